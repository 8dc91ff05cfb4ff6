"""Run asynchronous work from Celery's threads, on one event loop of its own: its Redis clients live as long as the process."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


@cache
def _get_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="gateway-loop", daemon=True).start()
    return loop


def begin(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Start the work; the future tells its end."""
    return asyncio.run_coroutine_threadsafe(work, _get_loop())


def run(work: Coroutine[Any, Any, T]) -> T:
    """Do the work and return its result. Raises: what it raises."""
    return begin(work).result()
