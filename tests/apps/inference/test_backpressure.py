"""What a refusal says of the time to wait is what really happens, with a worker at its limit."""

import asyncio
import time
from typing import Any

import pytest
from redis import Redis

from aiscale import redis as redis_clients
from aiscale.db import make_public_id
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from apps.accounts.callers import on_thread
from apps.inference import completions
from apps.inference.cache import policy
from apps.inference.completions import CompletionRequest, Run
from apps.inference.prompts import ChatMessage
from apps.spend.admission import Ask, run_gate
from tests.apps.conftest import Cast
from tests.apps.inference.claims import CHAT, read_state

pytestmark = pytest.mark.usefixtures("worker")
TOKENS = 50
"""A second of work for one of the sixteen slots."""


def limit(cast: Cast, **changes: int | None) -> None:
    plan = cast.organization.plan
    plan.requests_per_window = plan.max_in_flight = 100_000
    plan.tokens_per_minute = None
    for name, value in changes.items():
        setattr(plan, name, value)
    plan.save()


async def start(cast: Cast) -> Run:
    request = CompletionRequest(
        request_id=make_public_id("req"),
        source="api",
        model=CHAT,
        messages=[ChatMessage(role="user", content="Hello")],
        max_tokens=TOKENS,
        temperature=0.0,
        cache=policy.NOTHING,
    )
    return await completions.start(request, cast.caller)


async def finish(run: Run) -> None:
    async for _ in run.events():
        pass


async def is_full(cast: Cast, worst_tokens: int) -> bool:
    """Ask the gate whether it would refuse, and leave everything as it is."""
    ask = Ask(
        caller=cast.caller,
        model=CHAT,
        job_id=make_public_id("job"),
        worst_nanousd=1,
        worst_tokens=worst_tokens,
        deadline_at_ms=time.time_ns() // 1_000_000 + 60_000,
        priority=cast.organization.plan.priority,
    )
    now_ms = time.time_ns() // 1_000_000
    report: Any = await run_gate(redis_clients.get_async(), ask, plan=cast.caller.plan, now_ms=now_ms, mode="explain")
    [verdict] = [check[1] for check in report[1:] if check[0] == "queue_full"]
    return bool(verdict == "refuse")


@pytest.mark.parametrize("changes", [{"max_queued": 40, "max_wait_s": None}, {"max_queued": None, "max_wait_s": 3}])
async def test_retry_after_is_the_time_until_there_is_room(
    cast: Cast, redis_url: str, changes: dict[str, int | None]
) -> None:
    await on_thread(lambda: limit(cast, **changes))
    client = Redis.from_url(redis_url)
    running: list[asyncio.Task[None]] = []
    refusal = None
    try:
        # as many as find room, and then one too many, once the model's pace is known
        ends_at = time.monotonic() + 60
        while refusal is None or len(running) < 80:
            assert time.monotonic() < ends_at, f"{len(running)} were let in, {read_state(client)}"
            pace_is_known = "rate_tokens" in read_state(client)
            try:
                running.append(asyncio.create_task(finish(await start(cast))))
                await asyncio.sleep(0.01)
            except AiscaleError as error:
                assert error.code is Code.QUEUE_FULL
                refusal = error if pace_is_known else None
                await asyncio.sleep(0.05)
        refused_at = time.monotonic()
        assert refusal.retry_after_s is not None and refusal.retry_after_s >= 1
        while await is_full(cast, TOKENS + 30):
            await asyncio.sleep(0.02)
        waited_s = time.monotonic() - refused_at
        # Retry-After is whole seconds, one at the least
        assert waited_s <= 3 * refusal.retry_after_s + 1
        assert refusal.retry_after_s <= 3 * waited_s + 1.5
    finally:
        await asyncio.gather(*running)
        client.close()
    assert client.zcard(keys.queue_depth(CHAT)) == 0
