"""Make the web side's Redis clients, and load Lua.

One asynchronous client per event loop, one synchronous client per process. Both speak bytes. Workers make their own.
"""

import asyncio
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from itertools import islice
from typing import Any, Generic, TypeVar

import redis.asyncio as aioredis
from django.conf import settings
from redis import Redis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.connection import HiredisRespSerializer
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from aiscale.errors import AiscaleError, Code
from aiscale.wire.scripts import digest_script, read_script

UNAVAILABLE = (RedisError, OSError)
"""What a Redis that is down or starting raises."""

MAX_CONNECTIONS = 64
"""Of one event loop, for commands that answer at once; whoever comes when all are taken waits for `POOL_TIMEOUT_S`."""
POOL_TIMEOUT_S = 3
MAX_READERS = 10_000
"""Of one event loop, for reads that block: they hold their connection, and must not keep the gate waiting for one."""

BATCH_TIMEOUT_S = 3.0
BATCHES_AT_ONCE = 2
MAX_BATCH_COMMANDS = 256

Commands = Sequence[tuple[Any, ...]]
T = TypeVar("T")


class PerLoop(Generic[T]):
    """Keep one thing for each event loop, for as long as that lives."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._all: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, T] = weakref.WeakKeyDictionary()
        self._last: tuple[weakref.ref[asyncio.AbstractEventLoop], T] | None = None

    def get(self) -> T:
        """Return the running loop's; make it the first time."""
        loop, last = asyncio.get_running_loop(), self._last
        if last is not None and last[0]() is loop:
            return last[1]
        found = self._all.get(loop)
        if found is None:
            found = self._all[loop] = self._make()
        self._last = (weakref.ref(loop), found)
        return found

    def forget(self) -> T | None:
        """Let go of the running loop's, and return it: the next one is made anew."""
        self._last = None
        return self._all.pop(asyncio.get_running_loop(), None)


def get_async() -> aioredis.Redis:
    """Return the running loop's client for commands that answer at once. I/O: none until it is used."""
    return _clients.get()


def get_async_reader() -> aioredis.Redis:
    """Return the running loop's client for reads that block. I/O: none until it is used."""
    return _readers.get()


def _make_client() -> aioredis.Redis:
    pool = aioredis.BlockingConnectionPool.from_url(
        settings.REDIS_URL, max_connections=MAX_CONNECTIONS, timeout=POOL_TIMEOUT_S, **_async_options()
    )
    pool.connection_class = _pack_faster(pool.connection_class)  # type: ignore[arg-type]
    return aioredis.Redis.from_pool(pool)


def _make_reader() -> aioredis.Redis:
    pool = aioredis.ConnectionPool.from_url(settings.REDIS_URL, max_connections=MAX_READERS, **_async_options())
    return aioredis.Redis.from_pool(pool)


_clients, _readers = PerLoop(_make_client), PerLoop(_make_reader)


@cache
def _pack_faster(kind: type[Any]) -> Any:
    """Return a kind of connection that writes commands with hiredis, as redis-py's synchronous connections do: a tenth of the time."""
    pack = HiredisRespSerializer().pack
    return type(f"Fast{kind.__name__}", (kind,), {"pack_command": lambda _, *command: pack(*command)})


class Batcher:
    """Send the commands that many requests of one event loop give at the same time in one trip.

    A command alone goes out at once. While `BATCHES_AT_ONCE` trips are under way, what comes meanwhile waits for the next one: so the more
    there is to do, the less each command costs (a command alone costs Python about as much as ten in a batch).
    """

    def __init__(self, pool: aioredis.ConnectionPool) -> None:
        """``pool`` makes the few connections, whose sockets have no time-out of their own: a batch has one."""
        self._pool = pool
        self._free: list[Any] = []
        self._waiting: deque[tuple[Commands, asyncio.Future[list[Any]]]] = deque()
        self._under_way = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._retry = AsyncRetry(ExponentialBackoff(cap=0.2, base=0.02), 2, supported_errors=(RedisConnectionError,))

    async def execute(self, *command: Any) -> Any:
        """Run one command; the answer is as Redis gives it, in bytes. I/O: one Redis trip, shared. Raises: RedisError, OSError.

        Who is cancelled leaves a command that may run.
        """
        [answer] = await self.execute_all([command])
        return answer

    async def execute_all(self, commands: Commands) -> list[Any]:
        """Run commands one after the other. I/O and Raises: as `execute`, for the first that fails."""
        if self._under_way:
            future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
            self._waiting.append((commands, future))
            if self._under_way < BATCHES_AT_ONCE:
                self._start()
            answers = await future
        else:
            answers = await self._execute_alone(commands)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    async def _execute_alone(self, commands: Commands) -> list[Any]:
        self._under_way += 1
        try:
            answers: list[Any] = await heed_cancel(self._ask(commands))
        finally:
            self._under_way -= 1
            if self._waiting and not self._under_way:
                self._start()
        return answers

    def _start(self) -> None:
        self._under_way += 1
        task = asyncio.get_running_loop().create_task(self._run(), name="redis-batch")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, count = [], 0
                while self._waiting and count < MAX_BATCH_COMMANDS:
                    item = self._waiting.popleft()
                    if not item[1].done():
                        batch.append(item)
                        count += len(item[0])
                if batch:
                    await self._send(batch)
        finally:
            self._under_way -= 1

    async def _send(self, batch: list[tuple[Commands, asyncio.Future[list[Any]]]]) -> None:
        try:
            answers = iter(await self._ask([command for commands, _ in batch for command in commands]))
        except UNAVAILABLE as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for commands, future in batch:
            own = list(islice(answers, len(commands)))
            if not future.done():
                future.set_result(own)

    async def _ask(self, commands: Commands) -> list[Any]:
        """Return each command's answer, or the error that Redis gave for it. Raises: RedisError, OSError when there is no answer at all."""
        connection = self._free.pop() if self._free else self._pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(BATCH_TIMEOUT_S):
                # lost while it was idle, as a rule: Redis was restarted
                answers = await self._retry.call_with_retry(
                    lambda: _talk(connection, commands), lambda _: connection.disconnect(nowait=True)
                )
        except TimeoutError as error:
            await connection.disconnect(nowait=True)
            raise RedisTimeoutError("Redis does not answer") from error
        except BaseException:
            # what was not read must not be taken for the next command's answer
            await connection.disconnect(nowait=True)
            raise
        self._free.append(connection)
        return answers


async def _talk(connection: Any, commands: Commands) -> list[Any]:
    await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
    answers: list[Any] = []
    for _ in commands:
        try:
            answers.append(await connection.read_response())
        except ResponseError as error:
            answers.append(error)
    return answers


async def execute(*command: Any) -> Any:
    """Run a command in the running loop's next batch. I/O and Raises: as `Batcher.execute`."""
    return await _batchers.get().execute(*command)


async def execute_all(commands: "Commands") -> list[Any]:
    """Run commands, one after the other, in the running loop's next batch. I/O and Raises: as `Batcher.execute_all`."""
    return await _batchers.get().execute_all(commands)


def _make_batcher() -> Batcher:
    pool = aioredis.ConnectionPool.from_url(settings.REDIS_URL, **_async_options(), socket_timeout=None, protocol=2)
    pool.connection_class = _pack_faster(pool.connection_class)  # type: ignore[arg-type]
    return Batcher(pool)


_batchers = PerLoop(_make_batcher)


def _async_options() -> dict[str, Any]:
    return {
        "retry": AsyncRetry(ExponentialBackoff(cap=0.2, base=0.02), 2),
        "retry_on_error": [RedisConnectionError],
        "socket_connect_timeout": 2,
        "health_check_interval": 15,
    }


@cache
def get_sync() -> Redis:
    """Return this process's client. I/O: none until it is used."""
    return Redis.from_url(
        settings.REDIS_URL,
        retry=Retry(ExponentialBackoff(cap=0.2, base=0.02), 2),
        retry_on_error=[RedisConnectionError, RedisTimeoutError],
        socket_connect_timeout=2,
        health_check_interval=15,
    )


def run_script(client: Redis, name: str, keys: Sequence[str], values: Sequence[str | int | bytes]) -> Any:
    """Run a script of the wire. I/O: one Redis trip, two when the server has just started. Raises: RedisError, OSError."""
    try:
        return client.evalsha(digest_script(name), len(keys), *keys, *values)
    except NoScriptError:
        return client.eval(read_script(name), len(keys), *keys, *values)


async def run_script_async(name: str, keys: Sequence[str], values: Sequence[str | int | bytes]) -> Any:
    """Run a script of the wire in the running loop's next batch. I/O, Raises: as `run_script`."""
    try:
        return await execute("EVALSHA", digest_script(name), len(keys), *keys, *values)
    except NoScriptError:
        return await execute("EVAL", read_script(name), len(keys), *keys, *values)


async def heed_cancel(command: Awaitable[Any]) -> Any:
    """Await a command, and be cancelled when somebody asked for that meanwhile.

    Before Python 3.12 `asyncio.wait_for`, with which redis-py sends, forgets a cancellation that comes as it ends: who left would be
    served on (S2).
    """
    task = asyncio.current_task()
    asked_before = task.cancelling() if task is not None else 0
    answer = await command
    if task is not None and task.cancelling() > asked_before:
        raise asyncio.CancelledError
    return answer


def unavailable() -> AiscaleError:
    """Say that Redis does not answer: the gate fails closed (DESIGN rule 5)."""
    return AiscaleError(
        Code.BACKEND_UNAVAILABLE,
        "The service cannot check limits right now. Try again in a few seconds.",
        retry_after_s=2,
    )


__all__ = [
    "UNAVAILABLE",
    "Batcher",
    "PerLoop",
    "execute",
    "execute_all",
    "get_async",
    "get_async_reader",
    "get_sync",
    "heed_cancel",
    "read_script",
    "run_script",
    "run_script_async",
    "unavailable",
]
