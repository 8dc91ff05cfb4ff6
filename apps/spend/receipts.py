"""Tell whether an answer reached the web process that must deliver it: what reached nobody, by our own fault, costs nothing.

finish.lua writes an answer's end to the replies of its web process and, with that entry's id, to the finished stream. The process says
how far it has read before it hands anything on (`keys.web_progress`), and that it lives (`keys.reader_presence`). So an end that it has
read is delivered; one that it has not is undecided while it lives, and lost once it is gone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import msgspec
from redis import Redis

from aiscale.wire import keys
from aiscale.wire.events import Finished
from apps.spend import stream

WEB_LOST = "web_lost"
PATIENCE_S = 2.0
"""An end so young is not called lost: a process that has just begun to listen may not have said so."""


class Judged(NamedTuple):
    """Sort entries of the finished stream."""

    delivered: list[stream.Entry]
    lost: list[stream.Entry]
    undecided: list[stream.Entry]


def judge(client: Redis, entries: Sequence[stream.Entry], *, has_waited: bool = False) -> Judged:
    """Say of each entry what became of its answer.

    In a Redis that was emptied, processes that live have not said so yet: nothing is lost there before settlement ``has_waited``.
    I/O: one Redis trip, none when nothing must be delivered. Raises: RedisError, OSError.
    """
    judged = Judged([entry for entry in entries if not entry.process], [], [])
    awaited = [entry for entry in entries if entry.process]
    if not awaited:
        return judged
    processes = sorted({entry.process for entry in awaited})
    names = [name(process) for process in processes for name in (keys.web_progress, keys.reader_presence)]
    epoch, *values = cast("list[Any]", client.mget(keys.EPOCH, *names))
    known = {process: (values[2 * index], values[2 * index + 1]) for index, process in enumerate(processes)}
    for entry in awaited:
        progress, presence = known[entry.process]
        if progress is not None and stream.parse_id(progress) >= stream.parse_id(entry.reply):
            judged.delivered.append(entry)
        else:
            is_old = stream.age_s(entry) >= PATIENCE_S
            is_lost = presence is None and is_old and (epoch is not None or has_waited)
            (judged.lost if is_lost else judged.undecided).append(entry)
    return judged


def make_lost(event: Finished) -> Finished:
    """Turn the end of an answer that reached nobody into one that costs nothing; one that failed anyway stays what it is."""
    if event.finish_reason == "error":
        return event
    return msgspec.structs.replace(
        event,
        finish_reason="error",
        error_code=WEB_LOST,
        error_message="the process that was to deliver the answer died",
    )
