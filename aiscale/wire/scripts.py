"""Load the Lua scripts that both sides run. Each file opens with its KEYS, ARGV, return codes and a worked example."""

import hashlib
from functools import cache
from importlib.resources import files

from aiscale.wire import codec, keys
from aiscale.wire.broker import broker_list, make_ticket
from aiscale.wire.events import Finished

BY_REAPER, FROM_QUEUE = "", "queue"
"""Who may end a job besides its worker: the reaper, once its lease has passed; and whoever takes it out of the queue, while it waits."""

USES_QUEUE = "Uses queue.lua"

TEXTS = {
    entry.name.removesuffix(".lua"): entry.read_text(encoding="utf-8")
    for entry in (files("aiscale.wire") / "lua").iterdir()
    if entry.name.endswith(".lua")
}
"""Every script as it was when the process began: a deployment in place must not bring new ones into old code."""


@cache
def read_script(name: str) -> str:
    """Return the text of ``aiscale/wire/lua/<name>.lua``, ready to run. I/O: none."""
    return complete_script(TEXTS[name])


@cache
def digest_script(name: str) -> str:
    """Return the digest under which Redis keeps `read_script`. I/O: none."""
    return hashlib.sha1(read_script(name).encode(), usedforsecurity=False).hexdigest()


def complete_script(text: str) -> str:
    """Put queue.lua in front of a script that uses it. I/O: none."""
    return f"{_read_queue_functions()}\n{text}" if USES_QUEUE in text else text


@cache
def _read_queue_functions() -> str:
    # what runs needs no comments
    return "\n".join(line for line in TEXTS["queue"].splitlines() if not line.lstrip().startswith("--"))


def claim_arguments(
    kind: str,
    model: str,
    worker_id: str,
    *,
    now_ms: int,
    most_jobs: int = 1,
    most_tokens: int = 0,
    with_ticket: bool = True,
    back_in_ms: int = 0,
    lease_ms: int = keys.LEASE_MS,
) -> tuple[list[str], list[str | int | bytes]]:
    """Return KEYS and ARGV of claim.lua. ``with_ticket``: a ticket of Celery's brought the worker here.
    ``back_in_ms``: it asks again so soon, whatever it gets."""
    return [keys.queue_state(model), keys.queue_depth(model), keys.LEASES, broker_list(model)], [
        worker_id,
        now_ms,
        now_ms + lease_ms,
        most_jobs,
        most_tokens,
        keys.job_record(""),
        int(with_ticket),
        make_ticket(kind, model),
        back_in_ms,
    ]


def finish_arguments(
    event: Finished, *, reply_to: str, keep_log: bool, by: str
) -> tuple[list[str], list[str | int | bytes]]:
    """Return KEYS and ARGV of finish.lua. ``by`` is the worker's id, `BY_REAPER` or `FROM_QUEUE`."""
    job_id = event.job_id
    return [
        keys.job_record(job_id),
        keys.LEASES,
        keys.FINISHED,
        keys.replies(reply_to),
        keys.job_log(job_id),
        keys.queue_depth(event.model),
        keys.queue_state(event.model),
    ], [
        job_id,
        by,
        event.finished_at_ms,
        codec.encode_event(event),
        int(keep_log),
        keys.REPLIES_MAXLEN,
        keys.REPLIES_TTL_S,
        keys.JOB_LOG_TTL_S,
        keys.JOB_RECORD_AFTER_S,
        event.prompt_tokens + event.completion_tokens,
        # an answer with a log is kept, and so delivered, whatever becomes of the web process
        "" if keep_log else reply_to,
    ]
