"""Load the Lua scripts that both sides run. Each file opens with its KEYS, ARGV, return codes and a worked example."""

from functools import cache
from importlib.resources import files

from aiscale.wire import codec, keys
from aiscale.wire.events import Finished

BY_REAPER, FROM_QUEUE = "", "queue"
"""Who may end a job besides its worker: the reaper, once its lease has passed; and whoever takes it out of the queue, while it waits."""


@cache
def read_script(name: str) -> str:
    """Return the text of ``aiscale/wire/lua/<name>.lua``. I/O: one small file, once a process."""
    return (files("aiscale.wire") / "lua" / f"{name}.lua").read_text(encoding="utf-8")


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
    ]
