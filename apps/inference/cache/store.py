"""Find and keep values in all three levels: this process, Redis, Postgres. What is found lower down is brought up.

Values are bytes; keys are those of `entries.derive_key`. A level that does not answer counts as empty.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from django.conf import settings
from django.db import Error as DatabaseError

from aiscale import redis as redis_clients
from aiscale.observability import CACHE_BYTES, CACHE_LOOKUPS
from aiscale.redis import Commands
from aiscale.wire import keys
from apps.accounts.callers import on_thread
from apps.inference.cache.entries import Level
from apps.inference.cache.local import LocalCache
from apps.inference.models import CachedAnswer

log = logging.getLogger(__name__)

LOCAL_TTL_S = 300.0
SHARED_TTL_S = 1_800
LASTING_TTL_S = 86_400
MAX_VALUE_BYTES = 1 << 20
WRITE_EVERY_S = 0.2
MAX_UNWRITTEN = 5_000
"""Values that wait for Postgres; what comes beyond is dropped."""
REDIS_TIMEOUT_S = 0.5
"""A cache that takes longer than this is of no use."""


@dataclass
class Found:
    """Say where a value was."""

    value: bytes
    level: Level


class Store:
    """Be one event loop's view of the cache."""

    def __init__(self) -> None:
        self.local = LocalCache(settings.ENV.cache_bytes, LOCAL_TTL_S)
        self._unwritten: dict[bytes, tuple[bytes, bytes, str, str]] = {}
        """(key, value, model, scope) of what is on its way to Postgres."""
        self._writer: asyncio.Task[None] | None = None
        self._keepers: set[asyncio.Task[None]] = set()
        self._lasting = LastingReader()

    async def find_many(self, wanted: Iterable[bytes]) -> dict[bytes, Found]:
        """Look in level 1, then 2, then 3. I/O: none, one Redis trip, one SQL statement shared with others who ask at once."""
        found = self.find_here(wanted)
        missing = [key for key in dict.fromkeys(wanted) if key not in found]
        if missing:
            found |= await self._find_shared(missing)
            missing = [key for key in missing if key not in found]
        if missing:
            found |= await self.find_lasting(missing)
        for key, item in found.items():
            if item.level != "l1":
                self.local.keep(key, item.value)
        CACHE_BYTES.set(self.local.size_bytes)
        return found

    def find_here(self, wanted: Iterable[bytes]) -> dict[bytes, Found]:
        """Look in level 1 alone. I/O: none."""
        return {key: Found(value, "l1") for key in wanted if (value := self.local.find(key)) is not None}

    async def find_near(self, wanted: list[bytes]) -> dict[bytes, Found]:
        """Look once more in levels 1 and 2 for what was not there a moment ago. I/O: one Redis trip for what level 1 does not know."""
        found = self.find_here(wanted)
        missing = [key for key in wanted if key not in found]
        if missing:
            found |= await self._find_shared(missing)
        return found

    async def keep_many(self, values: Mapping[bytes, bytes], *, model: str, scope: str) -> None:
        """Put values into all levels. I/O: one Redis trip; Postgres later, in batches."""
        await self._keep_shared(self._keep_here(values, model, scope))

    def keep_soon(self, values: Mapping[bytes, bytes], *, model: str, scope: str, then: Commands = ()) -> None:
        """Put values into level 1 now, and into the others after that; ``then`` are Redis commands to run once level 2 has them.

        I/O: one Redis trip, for which nobody waits; Postgres later, in batches.
        """
        fitting = self._keep_here(values, model, scope)
        task = asyncio.create_task(self._keep_shared(fitting, then), name="cache-keeper")
        self._keepers.add(task)
        task.add_done_callback(self._keepers.discard)

    def _keep_here(self, values: Mapping[bytes, bytes], model: str, scope: str) -> dict[bytes, bytes]:
        """Put values into level 1, and among those that wait for Postgres. Returns those that are not too large."""
        fitting = {key: value for key, value in values.items() if len(value) <= MAX_VALUE_BYTES}
        for key, value in fitting.items():
            self.local.keep(key, value)
            if len(self._unwritten) < MAX_UNWRITTEN:
                self._unwritten[key] = (key, value, model, scope)
        CACHE_BYTES.set(self.local.size_bytes)
        if self._unwritten and (self._writer is None or self._writer.done()):
            self._writer = asyncio.create_task(self._write_soon(), name="cache-writer")
        return fitting

    async def flush(self) -> None:
        """Write what waits for Postgres. I/O: SQL. For the end of a process and for tests."""
        batch, self._unwritten = list(self._unwritten.values()), {}
        if not batch:
            return
        try:
            await on_thread(lambda: CachedAnswer.objects.keep(batch, LASTING_TTL_S))
        except DatabaseError as error:
            log.warning("%d answers could not be kept in Postgres: %s", len(batch), error)

    async def _write_soon(self) -> None:
        while self._unwritten:
            await asyncio.sleep(WRITE_EVERY_S)
            await self.flush()

    async def _find_shared(self, wanted: list[bytes]) -> dict[bytes, Found]:
        try:
            async with asyncio.timeout(REDIS_TIMEOUT_S):
                values = await redis_clients.execute("MGET", *(keys.cached(key) for key in wanted))
        except (*redis_clients.UNAVAILABLE, TimeoutError) as error:
            log.warning("level 2 of the cache does not answer: %s", error)
            return {}
        return {key: Found(bytes(value), "l2") for key, value in zip(wanted, values, strict=True) if value is not None}

    async def _keep_shared(self, values: Mapping[bytes, bytes], then: Commands = ()) -> None:
        commands = [("SET", keys.cached(key), value, "EX", SHARED_TTL_S) for key, value in values.items()]
        try:
            if commands or then:
                async with asyncio.timeout(REDIS_TIMEOUT_S):
                    await redis_clients.execute_all([*commands, *then])
        except (*redis_clients.UNAVAILABLE, TimeoutError) as error:
            log.warning("answers could not be kept in level 2 of the cache: %s", error)

    async def find_lasting(self, wanted: list[bytes]) -> dict[bytes, Found]:
        """Look in level 3 alone, and bring what is there up to level 2.

        I/O: one SQL statement, shared; one Redis trip for what is found.
        """
        values = await self._lasting.find(wanted)
        if values:
            await self._keep_shared(values)
        return {key: Found(value, "l3") for key, value in values.items()}


class LastingReader:
    """Ask Postgres once for all that is asked for at the same time, and not at all for a while after it failed."""

    PAUSE_S = 5.0
    MAX_TOGETHER = 500
    EACH_S = 0.015
    """A statement costs as much for one key as for ten: who comes sooner after the last one waits for others."""

    def __init__(self) -> None:
        self._waiting: list[tuple[list[bytes], asyncio.Future[dict[bytes, bytes]]]] = []
        self._task: asyncio.Task[None] | None = None
        self._closed_until = self._next_at = 0.0

    async def find(self, wanted: list[bytes]) -> dict[bytes, bytes]:
        """Return what is there. I/O: SQL, shared. Never raises for a database that is away."""
        if self._closed_until > time.monotonic():
            return {}
        future: asyncio.Future[dict[bytes, bytes]] = asyncio.get_running_loop().create_future()
        self._waiting.append((wanted, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="cache-reader")
        return await future

    async def _run(self) -> None:
        while self._waiting:
            if (pause_s := self._next_at - time.monotonic()) > 0:
                await asyncio.sleep(pause_s)
            self._next_at = time.monotonic() + self.EACH_S
            batch, self._waiting = self._waiting[: self.MAX_TOGETHER], self._waiting[self.MAX_TOGETHER :]
            everything = [key for wanted, _ in batch for key in wanted]
            try:
                values = await on_thread(partial(CachedAnswer.objects.find, everything))
            except DatabaseError as error:
                log.warning("level 3 of the cache does not answer: %s", error)
                self._closed_until = time.monotonic() + self.PAUSE_S
                values = {}
            for wanted, future in batch:
                if not future.done():
                    future.set_result({key: values[key] for key in wanted if key in values})


_stores = redis_clients.PerLoop(Store)


def get_store() -> Store:
    """Return the running loop's store."""
    return _stores.get()


def count_lookup(model: str, level: Level, number: int = 1) -> None:
    """Count hits and misses, by level."""
    CACHE_LOOKUPS.labels(model, level).inc(number)


__all__: list[Any] = ["Found", "Store", "count_lookup", "get_store"]
