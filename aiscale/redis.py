"""Make the web side's Redis clients, and load Lua.

One asynchronous client per event loop, one synchronous client per process. Both speak bytes. Workers make their own.
"""

import asyncio
import weakref
from collections import deque
from collections.abc import Awaitable, Sequence
from functools import cache
from typing import Any

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

_Clients = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, aioredis.Redis]
_clients: _Clients = weakref.WeakKeyDictionary()
_readers: _Clients = weakref.WeakKeyDictionary()
_batchers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, "Batcher"] = weakref.WeakKeyDictionary()


def get_async() -> aioredis.Redis:
    """Return the running loop's client for commands that answer at once. I/O: none until it is used."""
    loop = asyncio.get_running_loop()
    client = _clients.get(loop)
    if client is None:
        pool = aioredis.BlockingConnectionPool.from_url(
            settings.REDIS_URL, max_connections=MAX_CONNECTIONS, timeout=POOL_TIMEOUT_S, **_async_options()
        )
        pool.connection_class = _pack_faster(pool.connection_class)  # type: ignore[arg-type]
        client = _clients[loop] = aioredis.Redis.from_pool(pool)
    return client


@cache
def _pack_faster(kind: type[Any]) -> Any:
    """Return a kind of connection that writes commands with hiredis, as redis-py's synchronous connections do: a tenth of the time."""
    pack = HiredisRespSerializer().pack
    return type(f"Fast{kind.__name__}", (kind,), {"pack_command": lambda _, *command: pack(*command)})


def get_async_reader() -> aioredis.Redis:
    """Return the running loop's client for reads that block. I/O: none until it is used."""
    loop = asyncio.get_running_loop()
    client = _readers.get(loop)
    if client is None:
        pool = aioredis.ConnectionPool.from_url(settings.REDIS_URL, max_connections=MAX_READERS, **_async_options())
        client = _readers[loop] = aioredis.Redis.from_pool(pool)
    return client


class Batcher:
    """Send the commands that many requests of one event loop give at the same time in one trip.

    A command alone goes out at once. While `BATCHES_AT_ONCE` trips are under way, what comes meanwhile waits for the next one: so the more
    there is to do, the less each command costs (a command alone costs Python about as much as ten in a batch).
    """

    def __init__(self, pool: aioredis.ConnectionPool) -> None:
        """``pool`` makes the few connections, whose sockets have no time-out of their own: a batch has one."""
        self._pool = pool
        self._free: list[Any] = []
        self._waiting: deque[tuple[tuple[Any, ...], asyncio.Future[Any]]] = deque()
        self._under_way = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._retry = AsyncRetry(ExponentialBackoff(cap=0.2, base=0.02), 2, supported_errors=(RedisConnectionError,))

    async def execute(self, *command: Any) -> Any:
        """Run one command; the answer is as Redis gives it, in bytes. I/O: one Redis trip, shared. Raises: RedisError, OSError.

        Who is cancelled leaves a command that may run.
        """
        if not self._under_way:
            return await self._execute_alone(command)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((command, future))
        if self._under_way < BATCHES_AT_ONCE:
            self._start()
        return await future

    async def _execute_alone(self, command: tuple[Any, ...]) -> Any:
        self._under_way += 1
        try:
            [answer] = await heed_cancel(self._ask([command]))
        finally:
            self._under_way -= 1
            if self._waiting and not self._under_way:
                self._start()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> None:
        self._under_way += 1
        task = asyncio.get_running_loop().create_task(self._run(), name="redis-batch")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH_COMMANDS))]
                await self._send([item for item in batch if not item[1].done()])
        finally:
            self._under_way -= 1

    async def _send(self, batch: list[tuple[tuple[Any, ...], asyncio.Future[Any]]]) -> None:
        answers: Sequence[Any]
        try:
            answers = await self._ask([command for command, _ in batch]) if batch else []
        except UNAVAILABLE as error:
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    async def _ask(self, commands: list[tuple[Any, ...]]) -> list[Any]:
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


async def _talk(connection: Any, commands: list[tuple[Any, ...]]) -> list[Any]:
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
    loop = asyncio.get_running_loop()
    batcher = _batchers.get(loop)
    if batcher is None:
        pool = aioredis.ConnectionPool.from_url(settings.REDIS_URL, **_async_options(), socket_timeout=None, protocol=2)
        pool.connection_class = _pack_faster(pool.connection_class)  # type: ignore[arg-type]
        batcher = _batchers[loop] = Batcher(pool)
    return await batcher.execute(*command)


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
    "execute",
    "get_async",
    "get_async_reader",
    "get_sync",
    "heed_cancel",
    "read_script",
    "run_script",
    "run_script_async",
    "unavailable",
]
