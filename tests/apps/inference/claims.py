"""Do to the queue what a worker does, step by step."""

import json
import time
from base64 import b64decode
from typing import Any

from redis import Redis

from aiscale.wire import keys
from aiscale.wire.broker import broker_list, make_ticket
from aiscale.wire.scripts import claim_arguments, read_script

CHAT, EMBED = "smollm2-135m-instruct", "all-minilm-l6-v2"


def put(
    client: Redis,
    job_id: str,
    *,
    model: str = CHAT,
    organization: str = "org_other",
    tier: int = 9,
    tokens: int = 100,
    weight: int = 1,
    now_ms: int | None = None,
    in_flight: str = "",
) -> int:
    """Queue a job that says nothing of itself; see enqueue.lua."""
    now_ms = now_ms or time.time_ns() // 1_000_000
    names = [
        keys.job_record(job_id),
        keys.LEASES,
        keys.queue_state(model),
        keys.queue_depth(model),
        broker_list(model),
        keys.QUEUES,
    ]
    place = [now_ms, tier, organization, tokens, weight, make_ticket("generate", model), in_flight]
    values: list[Any] = [job_id, "generate", "{}", model, now_ms + 10**9, 600, *place]
    return int(client.eval(read_script("enqueue"), len(names), *names, *values))  # type: ignore[arg-type]


def claim(client: Redis, model: str = CHAT, worker: str = "w1", *, dead: bool = False, **most: Any) -> dict[str, int]:
    """Take the next jobs of a model: id -> attempt. ``dead``: and die at once, so that the lease has passed already."""
    most |= {"lease_ms": -1} if dead else {}
    now_ms = time.time_ns() // 1_000_000
    kind = "encode" if model == EMBED else "generate"
    names, values = claim_arguments(kind, model, worker, now_ms=now_ms, **most)
    _, *jobs = client.eval(read_script("claim"), len(names), *names, *values)  # type: ignore[misc]
    return {job_id.decode(): int(attempt) for job_id, attempt, _ in jobs}


def list_tickets(client: Redis, model: str = CHAT) -> list[Any]:
    """Return the arguments of each ticket that waits in Celery's queue."""
    messages: Any = client.lrange(broker_list(model), 0, -1)
    return [json.loads(b64decode(json.loads(message)["body"]))[0] for message in messages]


def read_state(client: Redis, model: str = CHAT) -> dict[str, str]:
    fields: Any = client.hgetall(keys.queue_state(model))
    return {name.decode(): value.decode() for name, value in fields.items()}


def list_lanes(client: Redis, model: str = CHAT) -> list[str]:
    """List every key of a model's lanes: none when nothing waits."""
    return sorted(key.decode() for key in client.scan_iter(f"{keys.queue_state(model)}:*:*"))
