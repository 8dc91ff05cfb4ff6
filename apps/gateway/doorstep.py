"""Refuse what is one too many on the server's own thread, without a turn of the event loop.

Granian reads requests on its threads, and hands each one to the event loop. While a flood lasts, the loop's turns are the very thing of
which there are too few: a refusal that waits for one comes as late as an answer, and takes the turn from it. So the thread that hands
over looks at the crowd first (`aiscale/overload.py`), and sends the refusal itself. Granian (2.8) has no public place for that: the
function that makes its hand-over is wrapped. Where another version has none of that name, the loop refuses as it always can. See
``aiscale/decisions/0052-say-no-early.md``.
"""

import contextlib
import logging
import os
import sys
from asyncio import AbstractEventLoop
from collections.abc import Awaitable, Callable
from contextvars import Context
from functools import cache, partial
from typing import Any

from granian import _futures

from aiscale.overload import Crowd, get_crowd
from apps.gateway import shedding

log = logging.getLogger(__name__)

HAND_OVER = "_cbsched_aioschedule"
LOOP_NICENESS = 3
"""How far the event loop stands back where all want a core: for the server's own threads, which read, refuse and send."""

HandOver = Callable[[Any], None]
MakeHandOver = Callable[[AbstractEventLoop, Context, Callable[[Any], Awaitable[None]]], HandOver]


def install() -> bool:
    """Have Granian, once it serves, ask the crowd of this process. False, and a warning, where it cannot be told."""
    make: MakeHandOver | None = getattr(_futures, HAND_OVER, None)
    if make is None:
        log.warning(
            "this version of Granian hands requests over in another way: under overload refusals wait for the event loop"
        )
        return False
    setattr(_futures, HAND_OVER, partial(make_hand_over, make))
    return True


def make_hand_over(
    make: MakeHandOver, loop: AbstractEventLoop, context: Context, begin: Callable[[Any], Awaitable[None]]
) -> HandOver:
    """Return what Granian calls with each request and connection, on its one thread that holds the interpreter.

    ``make`` is Granian's own way to make that; ``begin`` answers a request, in a task of the ``loop``.
    """
    crowd = get_crowd()
    given = taken = 0  # each of them is written by one thread alone

    async def take(request: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == 1:
            _stand_back()
        await begin(request)

    give = make(loop, context, take)

    def hand_over(request: Any) -> None:
        nonlocal given
        if crowd.is_full(given - taken) and _refuse(request, crowd):
            return
        given += 1
        give(request)

    return hand_over


@cache
def _stand_back() -> None:
    """Lower the running thread's priority, once: Linux alone has one for each thread. The server's own exist by then, and keep theirs."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + LOOP_NICENESS)


def _refuse(request: Any, crowd: Crowd) -> bool:
    """Send the refusal. False when it is no request to the API, or one that asks whether a page may ask (`OPTIONS`): those are let in."""
    try:
        scope = request.scope
        if scope["type"] != "http" or not shedding.is_ours(scope["path"]) or scope["method"] == "OPTIONS":
            return False
        for message in shedding.write_refusal(scope):
            # Granian sends at once; what is returned is there to be awaited, and has nothing to wait for
            request.proto.send(message)
        request.done()
    except Exception:  # on this thread nobody would see it: the request goes on, and fails or not where it is logged
        log.exception("a request could not be refused at the door")
        return False
    crowd.refused_outside += 1
    return True
