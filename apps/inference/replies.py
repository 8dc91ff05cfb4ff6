"""Listen to what workers say: one reader for each process, which hands events to the requests that wait for them."""

import asyncio
import logging
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import AsyncIterator
from enum import Enum
from typing import Any

import msgspec

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import codec, keys
from aiscale.wire.events import Event, Finished

log = logging.getLogger(__name__)

BLOCK_MS = 1_000
READ_COUNT = 500
TRIM_EVERY_S = 1.0
CHECK_EVERY_S = 5.0
"""How long a request hears nothing before it looks whether its job is still there."""


class Unseen(Enum):
    """Say that no epoch was looked for yet."""

    UNSEEN = 0


UNSEEN = Unseen.UNSEEN


class Inbox:
    """Hold the events of one job until the one who waits for them takes them. A token costs half as much as with an `asyncio.Queue` and
    a timeout around it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put_nowait(self, event: Event) -> None:
        self._events.append(event)
        if self._waiter is not None:
            _wake(self._waiter)

    def empty(self) -> bool:
        return not self._events

    async def get(self, timeout_s: float) -> Event | None:
        """Return the next event; None when there was none for so long."""
        if not self._events:
            waiter = self._waiter = self._loop.create_future()
            timer = self._loop.call_later(timeout_s, _wake, waiter)
            try:
                await waiter
            finally:
                self._waiter = None
                timer.cancel()
        return self._events.popleft() if self._events else None


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Reader:
    """Read one process's reply stream on one event loop, as long as somebody waits."""

    def __init__(self) -> None:
        self.process_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._inboxes: dict[str, Inbox] = {}
        self._task: asyncio.Task[None] | None = None
        self._told_at = float("-inf")
        self._epoch: bytes | Unseen | None = UNSEEN
        self._ends: deque[tuple[float, bytes]] = deque(maxlen=keys.REMEMBER_ENDS)

    def subscribe(self, job_id: str) -> Inbox:
        """Return where a job's events come, from now on."""
        inbox = self._inboxes.get(job_id)
        if inbox is None:
            inbox = self._inboxes[job_id] = Inbox(asyncio.get_running_loop())
        self._start()
        return inbox

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._read(), name="replies")

    def remember(self, data: bytes) -> None:
        """Remember the encoded end of an answer that this process knew and told itself, for a Redis that forgets it."""
        self._forget_ends()
        self._ends.append((time.monotonic(), data))
        self._start()

    def unsubscribe(self, job_id: str) -> None:
        self._inboxes.pop(job_id, None)

    async def _read(self) -> None:
        name, last, trimmed_at, pause_s = keys.replies(self.process_id), "0-0", time.monotonic(), 0.05
        task = asyncio.current_task()
        # a cancellation that the client's own retries swallowed must end this all the same
        while task is not None and not task.cancelling():
            try:
                client: Any = redis_clients.get_async_reader()
                if time.monotonic() - self._told_at > keys.READER_BEAT_S:
                    await self._tell_progress(last)
                answer = await client.xread({name: last}, count=READ_COUNT, block=BLOCK_MS)
                pause_s = 0.05
                entries: Any = answer[0][1] if answer else ()
                if any(_tells_an_end(fields) for _, fields in entries):
                    await self._tell_progress(entries[-1][0].decode())
                for entry_id, fields in entries:
                    last = entry_id.decode()
                    self._hand_out(fields)
                if answer and time.monotonic() - trimmed_at > TRIM_EVERY_S:
                    trimmed_at = time.monotonic()
                    await client.xtrim(name, minid=last, approximate=True)
            except redis_clients.UNAVAILABLE as error:
                log.warning("the reply reader waits for Redis: %s", error)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, 1.0)

    async def _tell_progress(self, reached: str) -> None:
        """Say that this process is there and what it took, before it hands it on: an answer that nobody took is not charged.

        I/O: one Redis trip, every `keys.READER_BEAT_S` and whenever an answer ends.
        """
        pipeline: Any = redis_clients.get_async().pipeline(transaction=False)
        pipeline.set(keys.web_progress(self.process_id), reached, ex=keys.WEB_PROGRESS_TTL_S)
        pipeline.set(keys.reader_presence(self.process_id), 1, ex=keys.READER_PRESENCE_TTL_S)
        pipeline.get(keys.EPOCH)
        *_, epoch = await pipeline.execute()
        if epoch != self._epoch:
            if self._epoch is not UNSEEN:
                await self._tell_ends_again()
            self._epoch = epoch
        self._told_at = time.monotonic()

    async def _tell_ends_again(self) -> None:
        """Write down again what was delivered lately: Redis was emptied, perhaps before it was charged. I/O: one Redis trip, if at all."""
        self._forget_ends()
        if not self._ends:
            return
        log.warning("Redis was emptied: %d ends are told again", len(self._ends))
        pipeline: Any = redis_clients.get_async().pipeline(transaction=False)
        for _, data in self._ends:
            pipeline.xadd(keys.FINISHED, {"0": data})
        await pipeline.execute()

    def _forget_ends(self) -> None:
        while self._ends and self._ends[0][0] < time.monotonic() - keys.REMEMBER_ENDS_S:
            self._ends.popleft()

    def _hand_out(self, fields: dict[bytes, bytes]) -> None:
        for _, data in sorted((int(number), data) for number, data in fields.items()):
            try:
                event = codec.decode_event(data)
            except msgspec.MsgspecError as error:
                log.error("an event cannot be read: %s", error)
                continue
            inbox = self._inboxes.get(event.job_id)
            if inbox is not None:
                if isinstance(event, Finished):
                    self._forget_ends()
                    self._ends.append((time.monotonic(), data))
                inbox.put_nowait(event)


def _tells_an_end(fields: dict[bytes, bytes]) -> bool:
    """Look without decoding: the tag of `Finished` is in its bytes (a text that holds it costs a trip more)."""
    return any(b"finished" in data for data in fields.values())


_readers = redis_clients.PerLoop(Reader)


def get_reader() -> Reader:
    """Return the running loop's reader. I/O: none until somebody subscribes."""
    return _readers.get()


async def follow(job_id: str, keep_waiting_s: float = 900.0) -> AsyncIterator[Event]:
    """Yield the events of a job with ``keep_log`` from its first one, and go on until `Finished`.

    For browsers that come back, to any web process. I/O: blocks on the job's log. Raises: AiscaleError (NOT_FOUND when there is no such
    job any more, BACKEND_UNAVAILABLE); redis.exceptions.RedisError, OSError.
    """
    client: Any = redis_clients.get_async_reader()
    last, ends_at = "0-0", time.monotonic() + keep_waiting_s
    while time.monotonic() < ends_at:
        answer = await client.xread({keys.job_log(job_id): last}, count=READ_COUNT, block=BLOCK_MS)
        if not answer and await find_state(job_id) in (None, "done"):
            # it may have ended between the two questions
            answer = await client.xread({keys.job_log(job_id): last}, count=READ_COUNT)
            if not answer:
                raise lost(job_id)
        for entry_id, fields in answer[0][1] if answer else ():
            last = entry_id.decode()
            for _, data in sorted((int(number), data) for number, data in fields.items()):
                event = codec.decode_event(data)
                yield event
                if isinstance(event, Finished):
                    return
    raise lost(job_id)


async def find_ending(job_id: str) -> Finished | None:
    """Return the last event of a job with ``keep_log``; None while it goes on, or when its log is gone.

    I/O: one Redis trip. Raises: redis.exceptions.RedisError, OSError.
    """
    client: Any = redis_clients.get_async()
    for _, fields in await client.xrevrange(keys.job_log(job_id), count=1):
        for _, data in sorted(((int(number), data) for number, data in fields.items()), reverse=True):
            event = codec.decode_event(data)
            return event if isinstance(event, Finished) else None
    return None


async def find_state(job_id: str) -> str | None:
    """Return a job's state (queued, running, done), or None when there is no record of it. I/O: one Redis trip."""
    client: Any = redis_clients.get_async()
    state = await client.hget(keys.job_record(job_id), "state")
    return None if state is None else str(state.decode())


def lost(job_id: str) -> AiscaleError:
    """Say that nobody knows this job any more."""
    log.error("nobody knows the job any more", extra={"job_id": job_id})
    return AiscaleError(Code.WORKER_LOST, "The answer was lost while it was made, and is not charged. Try again.")
