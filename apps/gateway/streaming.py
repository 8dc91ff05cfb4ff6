"""Help streams along: say that they live while nothing comes, and join several into one."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

from aiscale.wire.events import Delta, Finished
from apps.gateway.chat_choices import Calls
from apps.inference.completions import Run
from apps.inference.endings import make_failure

T = TypeVar("T")

KEEP_ALIVE_S = 15.0
"""How long a stream may be silent: proxies cut connections that say nothing."""
COMMENT = b": still here\n\n"


async def with_silences(items: AsyncIterator[T]) -> AsyncIterator[T | None]:
    """Yield items, and None whenever nothing came for `KEEP_ALIVE_S`."""
    pending: asyncio.Future[T] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(items))
            done, _ = await asyncio.wait({pending}, timeout=KEEP_ALIVE_S)
            if not done:
                yield None
                continue
            try:
                item = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield item
    finally:
        if pending is not None:
            pending.cancel()


async def merge(streams: Sequence[AsyncIterator[T]]) -> AsyncIterator[tuple[int, T]]:
    """Yield the items of all streams as they come, each with its stream's index. The first that fails ends them all."""
    waiting = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                index = waiting.pop(future)
                try:
                    item = future.result()
                except StopAsyncIteration:
                    continue
                yield index, item
                waiting[asyncio.ensure_future(anext(streams[index]))] = index
    finally:
        for future in waiting:
            future.cancel()


async def read_whole(run: Run) -> tuple[str, Calls, Finished]:
    """Listen to the end; return the text, the calls and how it ended. Raises: AiscaleError for any end but a good one."""
    text: list[str] = []
    calls = Calls()
    async for event in run.events():
        if isinstance(event, Delta):
            text.append(event.text)
            calls.take(event.tool_calls)
        elif isinstance(event, Finished):
            check_end(run, event)
            return "".join(text), calls, event
    raise AssertionError("a run ended without its last event")


def check_end(run: Run, event: Finished) -> None:
    """Raise: AiscaleError for any end but a good one."""
    if event.finish_reason not in ("stop", "length"):
        raise make_failure(event, run.headers)
