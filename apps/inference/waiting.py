"""Wait for one job's events, in order and without a gap, until its end."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator

from aiscale import overload
from aiscale import redis as redis_clients
from aiscale.wire.events import Delta, Encoded, Event, Started
from apps.inference import queue, replies

log = logging.getLogger(__name__)

AFTER_DEADLINE_S = 15.0
"""The reaper ends a job soon after its deadline; who has heard nothing by then hears nothing more."""


class Wait:
    """Hold one job's place among those who wait. Use it with ``async with``: who leaves before the end cancels the job."""

    def __init__(self, job_id: str, deadline_at_ms: int) -> None:
        self.job_id = job_id
        self._deadline_at_ms = deadline_at_ms
        self._reader = replies.get_reader()
        self._inbox = self._reader.subscribe(job_id)
        self._next_seq = 0
        self.gone = asyncio.Event()
        """Set when who waited has left before the end."""
        self.sent = False
        """Whether the job was queued, so that leaving must cancel it."""
        self.ended = False

    @property
    def process_id(self) -> str:
        return self._reader.process_id

    @property
    def left(self) -> bool:
        return self.gone.is_set()

    def take(self, event: Event) -> None:
        """Hand in an event that was made in this process."""
        self._inbox.put_nowait(event)

    async def events(self) -> AsyncIterator[Event]:
        """Yield events; the last is `Finished`. Raises: AiscaleError (WORKER_LOST)."""
        overload.wait_elsewhere()
        while not self.ended:
            event = await self._next()
            if isinstance(event, Started):
                self._next_seq = 1
            elif isinstance(event, Delta | Encoded):
                if event.seq < self._next_seq:
                    continue
                if event.seq > self._next_seq:
                    # pieces of the answer are gone (the reply stream was cut): better an error than a hole
                    raise replies.lost(self.job_id)
                self._next_seq += 1
            else:
                if event.finish_reason in ("stop", "length") and event.seq > self._next_seq:
                    raise replies.lost(self.job_id)
                self.ended = True
            yield event

    async def close(self, reason: str = "disconnected") -> None:
        """Leave. A job that has not ended is cancelled. I/O: one Redis trip then. Idempotent."""
        self._reader.unsubscribe(self.job_id)
        if self.ended or not self.sent:
            return
        self.ended = True
        self.gone.set()
        try:
            await queue.cancel(self.job_id, reason)
        except redis_clients.UNAVAILABLE:
            log.warning("a job could not be cancelled; its deadline ends it", extra={"job_id": self.job_id})

    def detach(self) -> None:
        """Leave, and let the job go on: its log and `Finished` still tell what becomes of it."""
        self._reader.unsubscribe(self.job_id)
        self.ended = True

    async def _next(self) -> Event:
        while True:
            event = await self._inbox.get(replies.CHECK_EVERY_S)
            if event is not None:
                return event
            await self._check()

    async def _check(self) -> None:
        """Look whether waiting still makes sense. Raises: AiscaleError (WORKER_LOST)."""
        if time.time() > self._deadline_at_ms / 1000 + AFTER_DEADLINE_S:
            raise replies.lost(self.job_id)
        try:
            state = await replies.find_state(self.job_id)
        except redis_clients.UNAVAILABLE:
            return
        if state in (None, "done"):
            # its end may be on the way: one more second
            await asyncio.sleep(1.0)
            if self._inbox.empty():
                raise replies.lost(self.job_id)
