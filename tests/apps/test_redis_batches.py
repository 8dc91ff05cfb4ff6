"""Commands of many requests share trips; each gets its own answer or its own error."""

import asyncio
import contextlib
import os
from typing import Any

import pytest
from redis.exceptions import RedisError, ResponseError

from aiscale import redis as redis_clients


async def test_each_command_gets_its_own_answer() -> None:
    await asyncio.gather(*(redis_clients.execute("SET", f"batch:{n}", n) for n in range(500)))
    values = await asyncio.gather(*(redis_clients.execute("GET", f"batch:{n}") for n in range(500)))
    assert values == [str(n).encode() for n in range(500)]


async def test_many_commands_make_few_trips() -> None:
    await redis_clients.execute("PING")
    batcher, trips = redis_clients._batchers.get(), 0
    ask = batcher._ask

    async def count(commands: Any) -> Any:
        nonlocal trips
        trips += 1
        return await ask(commands)

    batcher._ask = count  # type: ignore[method-assign]
    await asyncio.gather(*(batcher.execute("PING") for _ in range(200)))
    assert 1 <= trips <= 3


async def test_an_error_is_its_own_commands_alone() -> None:
    await redis_clients.execute("SET", "batch:text", "no number")
    answers = await asyncio.gather(
        redis_clients.execute("PING"),
        redis_clients.execute("INCR", "batch:text"),
        redis_clients.execute("PING"),
        return_exceptions=True,
    )
    assert answers[0] == answers[2] == b"PONG"
    assert isinstance(answers[1], ResponseError)


async def test_who_leaves_disturbs_nobody() -> None:
    tasks = [asyncio.create_task(redis_clients.execute("ECHO", str(n))) for n in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert list(answers[1::2]) == [str(n).encode() for n in range(1, 20, 2)]
    assert await redis_clients.execute("ECHO", "after") == b"after"


async def test_a_server_that_is_away_fails_all_that_wait(settings: Any) -> None:
    settings.REDIS_URL = f"unix://{os.devnull}/nothing.sock"
    answers = await asyncio.gather(*(redis_clients.execute("PING") for _ in range(10)), return_exceptions=True)
    assert all(isinstance(answer, RedisError | OSError) for answer in answers)


@pytest.fixture(autouse=True)
def _clean(redis_url: str) -> None:
    redis_clients.get_sync().flushall()


async def test_a_cancellation_that_comes_as_a_command_ends_is_heeded_s2() -> None:
    """S2: before Python 3.12 `asyncio.wait_for` forgets such a one; the task must end all the same."""

    async def command() -> bytes:
        # the task is asked to end, and the client's wait_for returns as if it had not been
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        return b"answer"

    task = asyncio.create_task(redis_clients.heed_cancel(command()))
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_connection_that_was_lost_is_made_anew() -> None:
    assert await redis_clients.execute("ECHO", "before") == b"before"
    redis_clients.get_sync().execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    answers = await asyncio.gather(*(redis_clients.execute("ECHO", str(n)) for n in range(30)))
    assert answers == [str(n).encode() for n in range(30)]


async def test_an_answer_that_nobody_read_is_not_taken_for_the_next_one() -> None:
    task = asyncio.create_task(redis_clients.execute("ECHO", "left behind"))
    for _ in range(20):
        await asyncio.sleep(0)
        if redis_clients._batchers.get()._under_way:
            break
    task.cancel()
    await asyncio.wait({task})
    assert await redis_clients.execute("ECHO", "mine") == b"mine"
