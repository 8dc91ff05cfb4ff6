"""Let one request compute what several ask for at the same time: in this process, and in all of them.

Who comes first flies; the others wait for what it brings, or follow it as it comes (`Flight`). In this process they listen to the flight
itself. Elsewhere they say that they want it (`keys.flight_wanted`), and the process that flies writes down what it hears for them
(`keys.flight_log`). A flight that fails, or whose process dies, sets the next one of those who wait free to fly itself.
"""

import asyncio
import logging
import secrets
import time
import weakref
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import msgspec

from aiscale import redis as redis_clients
from aiscale.wire import keys
from aiscale.wire.codec import decode_event, encode_event
from aiscale.wire.events import Delta
from apps.inference.cache.store import Store, get_store

log = logging.getLogger(__name__)

LEASE_MS = 5_000
TOUCH_EVERY_S = 1.5
FIRST_PAUSE_S, LAST_PAUSE_S = 0.01, 0.25
LOG_EVERY_S = 0.05
"""How often what is told is written down for other processes, and read there."""
WANT_EVERY_S, WANTED_MS = 1.0, 5_000
LOG_TTL_MS = 30_000
_TIMEOUT_S = 0.5


class Flight:
    """Be what one computation said so far, and what came of it. Known to one event loop."""

    def __init__(self, name: str) -> None:
        self.name = name
        """No other flight of any process has it, not even the next one of the same answer."""
        self.deltas: list[Delta] = []
        self.value: bytes | None = None
        """The encoded answer of a flight that ended well."""
        self.is_over = False
        self.written = 0
        """How many of ``deltas`` other processes were told."""
        self.is_wanted = False
        self._bell = asyncio.Event()

    def tell(self, delta: Delta) -> None:
        self.deltas.append(delta)
        self._ring()

    def end(self, value: bytes | None) -> None:
        """Say what came of it: an answer, or (None) nothing."""
        if not self.is_over:
            self.is_over, self.value = True, value
            self._ring()

    async def follow(self) -> AsyncIterator[Delta]:
        """Yield what is told, from the first word to the end."""
        heard = 0
        while True:
            bell = self._bell
            while heard < len(self.deltas):
                heard += 1
                yield self.deltas[heard - 1]
            if self.is_over:
                return
            if bell is self._bell:
                await bell.wait()

    async def wait(self) -> bytes | None:
        """Return what comes of it."""
        while not self.is_over:
            await self._bell.wait()
        return self.value

    def _ring(self) -> None:
        bell, self._bell = self._bell, asyncio.Event()
        bell.set()


class Flights:
    """Be one event loop's flights."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._name = secrets.token_hex(8)
        self._count = 0
        self._mine: dict[bytes, Flight] = {}
        self._heard: weakref.WeakValueDictionary[bytes, Flight] = weakref.WeakValueDictionary()
        """Those of other processes that somebody here follows."""
        self._toucher: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._hearing: set[asyncio.Task[None]] = set()

    async def claim(self, wanted: list[bytes]) -> set[bytes]:
        """Return those keys that the caller must compute now; it must `land` each of them. I/O: one Redis trip.

        The others are being computed: `wait` for them. Without Redis this process alone is looked at.
        """
        return (await self.claim_and_look(wanted))[0]

    async def claim_and_look(self, wanted: list[bytes]) -> tuple[set[bytes], dict[bytes, bytes]]:
        """Do `claim`, and look into level 2 after that: what is not there then, nobody else can put there before us.

        Returns the keys to `land`, and the values of those of ``wanted`` that are there. I/O: one Redis trip.
        """
        free = [key for key in dict.fromkeys(wanted) if key not in self._mine]
        for key in free:
            self._count += 1
            self._mine[key] = Flight(f"{self._name}-{self._count}")
        foreign, values = await self._claim_shared(free, wanted)
        for key in foreign:
            # somebody in another process flies: those here wait for level 2 together
            self._mine.pop(key).end(None)
        if self._mine and (self._toucher is None or self._toucher.done()):
            self._toucher = asyncio.create_task(self._touch(), name="cache-flights")
        return set(free) - foreign, values

    def tell(self, key: bytes, delta: Delta) -> None:
        """Let those who follow hear a piece of what this process computes. I/O: none here."""
        flight = self._mine.get(key)
        if flight is None:
            return
        flight.tell(delta)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(), name="cache-flight-logs")

    def join(self, key: bytes) -> Flight:
        """Return the flight of what somebody else computes, to follow it. I/O: Redis in the background, when another process flies."""
        flight = self._mine.get(key) or self._heard.get(key)
        if flight is None or flight.is_over:
            flight = self._heard[key] = Flight("")
            task = asyncio.create_task(self._hear(key, flight), name="cache-flight-heard")
            self._hearing.add(task)
            task.add_done_callback(self._hearing.discard)
        return flight

    async def land(self, key: bytes, value: bytes | None) -> None:
        """Tell those who wait what came out, or (None) that nothing did. Call it after the store has it. I/O: one Redis trip."""
        [command] = self.release([key], {} if value is None else {key: value})
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await redis_clients.execute(*command)
        except (*redis_clients.UNAVAILABLE, TimeoutError):
            log.debug("a flight ends by itself")

    def release(self, mine: Iterable[bytes], values: Mapping[bytes, bytes]) -> list[tuple[Any, ...]]:
        """Tell those of this process who wait for the caller's keys what came out. Returns the Redis commands that tell the others, to be
        run once level 2 has the values. I/O: none."""
        commands = []
        for key in mine:
            flight = self._mine.pop(key, None)
            if flight is not None:
                flight.end(values.get(key))
            commands.append(("DEL", keys.flight(key)))
        return commands

    async def wait(self, key: bytes, timeout_s: float) -> bytes | None:
        """Return the answer that somebody else computes, or None: they failed, or it took too long. I/O: Redis, while another process
        computes it."""
        ends_at, pause_s = time.monotonic() + timeout_s, FIRST_PAUSE_S
        own = self._mine.get(key)
        if own is not None:
            try:
                async with asyncio.timeout(timeout_s):
                    return await own.wait()
            except TimeoutError:
                return None
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
            value = bytes(value)
            self._store.local.keep(key, value)
        return value, owner

    async def _claim_shared(self, free: list[bytes], wanted: list[bytes]) -> tuple[set[bytes], dict[bytes, bytes]]:
        """Return those of ``free`` that another process has, and what level 2 knows of ``wanted``."""
        claims = [("SET", keys.flight(key), self._mine[key].name, "NX", "PX", LEASE_MS) for key in free]
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                *answers, values = await redis_clients.execute_all([*claims, ("MGET", *map(keys.cached, wanted))])
        except (*redis_clients.UNAVAILABLE, TimeoutError):
            return set(), {}
        foreign = {key for key, answer in zip(free, answers, strict=True) if answer is None}
        return foreign, {key: bytes(value) for key, value in zip(wanted, values, strict=True) if value is not None}

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

    async def _write(self) -> None:
        """Write down for other processes what is told here, where they want it. I/O: a Redis trip or two each `LOG_EVERY_S`."""
        while told := [flight for flight in self._mine.values() if flight.deltas]:
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    await self._note_wanted([flight for flight in told if not flight.is_wanted])
                    await asyncio.gather(*(_write_log(flight) for flight in told if flight.is_wanted))
            except (*redis_clients.UNAVAILABLE, TimeoutError):
                log.debug("other processes hear of flights later")
            await asyncio.sleep(LOG_EVERY_S)

    async def _note_wanted(self, flights: list[Flight]) -> None:
        if flights:
            marks = await redis_clients.execute("MGET", *(keys.flight_wanted(flight.name) for flight in flights))
            for flight, mark in zip(flights, marks, strict=True):
                flight.is_wanted = mark is not None

    async def _hear(self, key: bytes, flight: Flight) -> None:
        """Hear what another process computes, as long as somebody follows it here. I/O: a Redis trip or two each `LOG_EVERY_S`."""
        last, asked_at, listener = "0-0", float("-inf"), weakref.ref(flight)
        del flight
        while (heard := listener()) is not None:
            value, owner = await self._look(key)
            name = heard.name = heard.name or (owner or b"").decode()
            if value is not None or owner is None or owner != name.encode():
                # what is still in its log is in the answer too
                heard.end(value)
                return
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    if time.monotonic() - asked_at > WANT_EVERY_S:
                        asked_at = time.monotonic()
                        await redis_clients.execute("SET", keys.flight_wanted(name), 1, "PX", WANTED_MS)
                    entries = await redis_clients.execute("XRANGE", keys.flight_log(name), f"({last}", "+")
                for entry_id, fields in entries:
                    last = entry_id.decode()
                    _hear_entry(heard, fields)
            except (*redis_clients.UNAVAILABLE, TimeoutError, msgspec.MsgspecError):
                log.warning("what another process computes is not heard for now")
            del heard
            await asyncio.sleep(LOG_EVERY_S)


async def _write_log(flight: Flight) -> None:
    fresh = flight.deltas[flight.written :]
    if not fresh:
        return
    name = keys.flight_log(flight.name)
    fields = [part for number, delta in enumerate(fresh) for part in (number, encode_event(delta))]
    flight.written += len(fresh)
    await asyncio.gather(
        redis_clients.execute("XADD", name, "*", *fields), redis_clients.execute("PEXPIRE", name, LOG_TTL_MS)
    )


def _hear_entry(flight: Flight, fields: list[bytes] | dict[bytes, bytes]) -> None:
    pairs = fields.items() if isinstance(fields, dict) else zip(fields[::2], fields[1::2], strict=True)
    for _, data in pairs:
        event = decode_event(data)
        if isinstance(event, Delta):
            flight.tell(event)


_flights = redis_clients.PerLoop(lambda: Flights(get_store()))


def get_flights() -> Flights:
    """Return the running loop's flights."""
    return _flights.get()
