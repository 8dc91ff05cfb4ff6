"""Let one request compute what several ask for at the same time: in this process, and in all of them.

Who comes first flies (`Flight.owns`); the others wait for what it brings, in this process through a future, elsewhere through
`keys.flight` and level 2. A flight that fails, or whose process dies, sets the next one of those who wait free to fly itself.
"""

import asyncio
import logging
import secrets
import time
import weakref

from aiscale import redis as redis_clients
from aiscale.wire import keys
from apps.inference.cache.store import Store

log = logging.getLogger(__name__)

LEASE_MS = 5_000
TOUCH_EVERY_S = 1.5
FIRST_PAUSE_S, LAST_PAUSE_S = 0.01, 0.25
_TIMEOUT_S = 0.5


class Flights:
    """Be one event loop's flights."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._name = secrets.token_hex(8)
        self._mine: dict[bytes, asyncio.Future[bytes | None]] = {}
        self._toucher: asyncio.Task[None] | None = None

    async def claim(self, wanted: list[bytes]) -> set[bytes]:
        """Return those keys that the caller must compute now; it must `land` each of them. I/O: one Redis trip.

        The others are being computed: `wait` for them. Without Redis this process alone is looked at.
        """
        free = [key for key in dict.fromkeys(wanted) if key not in self._mine]
        for key in free:
            self._mine[key] = asyncio.get_running_loop().create_future()
        foreign = await self._claim_shared(free)
        for key in foreign:
            # somebody in another process flies: those here wait for level 2 together
            self._mine.pop(key).cancel()
        if self._mine and (self._toucher is None or self._toucher.done()):
            self._toucher = asyncio.create_task(self._touch(), name="cache-flights")
        return set(free) - foreign

    async def land(self, key: bytes, value: bytes | None) -> None:
        """Tell those who wait what came out, or (None) that nothing did. Call it after the store has it. I/O: one Redis trip."""
        future = self._mine.pop(key, None)
        if future is not None and not future.done():
            future.set_result(value)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await redis_clients.execute("DEL", keys.flight(key))
        except (*redis_clients.UNAVAILABLE, TimeoutError):
            log.debug("a flight ends by itself")

    async def wait(self, key: bytes, timeout_s: float) -> bytes | None:
        """Return the answer that somebody else computes, or None: they failed, or it took too long. I/O: Redis, while another process
        computes it."""
        ends_at, pause_s = time.monotonic() + timeout_s, FIRST_PAUSE_S
        own = self._mine.get(key)
        if own is not None:
            done, _ = await asyncio.wait({own}, timeout=timeout_s)
            return own.result() if done and not own.cancelled() else None
        while time.monotonic() < ends_at:
            value, owner = await self._look(key)
            if value is not None or owner is None:
                return value
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, LAST_PAUSE_S)
        return None

    async def _look(self, key: bytes) -> tuple[bytes | None, bytes | None]:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                value, owner = await redis_clients.execute("MGET", keys.cached(key), keys.flight(key))
        except (*redis_clients.UNAVAILABLE, TimeoutError):
            return None, None
        if value is not None:
            self._store.local.keep(key, bytes(value))
        return value, owner

    async def _claim_shared(self, wanted: list[bytes]) -> set[bytes]:
        """Return those that another process has."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                answers = await asyncio.gather(
                    *(
                        redis_clients.execute("SET", keys.flight(key), self._name, "NX", "PX", LEASE_MS)
                        for key in wanted
                    )
                )
        except (*redis_clients.UNAVAILABLE, TimeoutError):
            return set()
        return {key for key, answer in zip(wanted, answers, strict=True) if answer is None}

    async def _touch(self) -> None:
        """Keep the leases of what flies here alive."""
        while self._mine:
            await asyncio.sleep(TOUCH_EVERY_S)
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    await asyncio.gather(
                        *(redis_clients.execute("PEXPIRE", keys.flight(key), LEASE_MS) for key in list(self._mine))
                    )
            except (*redis_clients.UNAVAILABLE, TimeoutError):
                continue


_flights: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Flights] = weakref.WeakKeyDictionary()


def get_flights(store: Store) -> Flights:
    """Return the running loop's flights."""
    loop = asyncio.get_running_loop()
    flights = _flights.get(loop)
    if flights is None:
        flights = _flights[loop] = Flights(store)
    return flights
