"""Look at the kill orders for all relays of this process: as workers do, more often than a relay beats, in one trip for all of them."""

import asyncio
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiscale import redis as redis_clients
from aiscale.wire import keys, scopes
from aiscale.wire.jobs import EncodeJob, GenerateJob

log = logging.getLogger(__name__)

LOOK_EACH_S = 0.4
"""What is stopped must have ended everywhere within a second."""

Stop = Callable[[str], None]


class Orders:
    """Know one event loop's relayed jobs, and how each is stopped."""

    def __init__(self) -> None:
        self._stops: dict[str, tuple[list[str], Stop]] = {}
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def watch(self, job: GenerateJob | EncodeJob, stop: Stop) -> Iterator[None]:
        """Call ``stop`` with the reason once a kill switch covers the job, as long as the block lasts. I/O: in the background."""
        self._stops[job.job_id] = scopes.list_scopes(job), stop
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look(), name="relay-orders")
        try:
            yield
        finally:
            self._stops.pop(job.job_id, None)

    async def _look(self) -> None:
        """Look until nothing is relayed any more. I/O: one Redis trip each `LOOK_EACH_S`, whatever the number of relays."""
        client: Any = redis_clients.get_async()
        while self._stops:
            try:
                fields = await client.hgetall(keys.KILLED)
                now_ms = time.time_ns() // 1_000_000
                orders = scopes.read_orders(fields, now_ms)
                for covered, stop in list(self._stops.values()) if orders else ():
                    order = scopes.find_order(orders, covered, now_ms)
                    if order is not None:
                        stop(order.reason)
            except redis_clients.UNAVAILABLE as error:
                log.warning("kill orders cannot be read for now: %s", error)
            await asyncio.sleep(LOOK_EACH_S)


_orders: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Orders] = weakref.WeakKeyDictionary()


def watch(job: GenerateJob | EncodeJob, stop: Stop) -> Any:
    """Do `Orders.watch` on the running loop."""
    return _orders.setdefault(asyncio.get_running_loop(), Orders()).watch(job, stop)
