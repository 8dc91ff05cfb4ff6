"""Rivals placed exactly before and after the steps between admission and the end of a job."""

import asyncio
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from aiscale import redis as redis_clients
from aiscale.db import make_public_id
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from aiscale.wire.codec import decode_event
from aiscale.wire.events import Finished
from aiscale.wire.scripts import FROM_QUEUE, finish_arguments, read_script
from apps.inference import completions, queue, reaper
from apps.inference.completions import CompletionRequest, Run
from apps.inference.prompts import ChatMessage
from tests.apps.conftest import Cast, cast
from tests.apps.inference.claims import CHAT, claim, list_lanes
from tests.apps.spend.cast import make_finished

__all__ = ["cast"]


@pytest.fixture
def redis_client(cast: Cast, redis_url: str) -> Iterator[Redis]:
    client = Redis.from_url(redis_url)
    yield client
    client.client_unpause()
    client.close()


async def start(cast: Cast) -> Run:
    request = CompletionRequest(
        request_id=make_public_id("req"),
        source="api",
        model=CHAT,
        messages=[ChatMessage(role="user", content="Hello")],
        max_tokens=5,
    )
    return await completions.start(request, cast.caller)


def list_ends(client: Redis) -> list[Finished]:
    events = [decode_event(fields[b"0"]) for _, fields in client.xrange(keys.FINISHED)]  # type: ignore[union-attr]
    return [event for event in events if isinstance(event, Finished)]


def end(client: Redis, cast: Cast, job_id: str, by: str) -> int:
    event = make_finished(cast.organization.public_id, job_id, model=CHAT)
    names, values = finish_arguments(event, reply_to="p", keep_log=False, by=by)
    return int(client.eval(read_script("finish"), len(names), *names, *values))  # type: ignore[arg-type]


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


async def test_who_leaves_while_the_job_is_queued_leaves_nothing_behind(
    cast: Cast,
    redis_client: Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client is gone when Redis has the order to queue and has not answered yet."""
    queueing = asyncio.Event()
    original = queue.enqueue

    async def enqueue(*values: Any, **options: Any) -> None:
        redis_client.client_pause(1500)
        queueing.set()
        await original(*values, **options)

    monkeypatch.setattr(queue, "enqueue", enqueue)
    task = asyncio.create_task(start(cast))
    await queueing.wait()
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    sweeper = reaper.Reaper()

    def is_over() -> bool:
        sweeper.sweep()
        return redis_client.zcard(keys.LEASES) == 0

    await asyncio.sleep(2)
    await until(is_over)
    assert claim(redis_client) == {} and list_lanes(redis_client) == []
    assert all(event.finish_reason == "cancelled" for event in list_ends(redis_client))


async def test_a_burst_that_was_admitted_together_does_not_pass_the_queues_limit(
    cast: Cast, redis_client: Redis, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    """All pass the gate before the first of them waits; then only as many find a place as may wait, and the others hold nothing."""
    settings.ENV = dataclasses.replace(settings.ENV, queue_limit=3)
    original, admitted = queue.enqueue, asyncio.Barrier(8)

    async def enqueue(*values: Any, **options: Any) -> None:
        await admitted.wait()
        await original(*values, **options)

    monkeypatch.setattr(queue, "enqueue", enqueue)
    outcomes = await asyncio.gather(*(start(cast) for _ in range(8)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, AiscaleError)]
    assert len(refused) == 5 and redis_client.zcard(keys.queue_depth("smollm2-135m-instruct")) == 3
    assert {error.code for error in refused} == {Code.QUEUE_FULL} and all(error.retry_after_s for error in refused)
    scope = f"organization:{cast.organization.public_id}"
    await until(lambda: redis_client.zcard(keys.holds(scope)) == 3 == redis_client.zcard(keys.in_flight(scope)))


async def test_an_order_to_queue_that_nobody_answers_is_withdrawn(
    cast: Cast,
    redis_client: Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The caller was told that it was not queued: so it must not be computed, and costs nothing."""
    monkeypatch.setattr(queue, "REDIS_TIMEOUT_S", 0.3)
    original = queue.enqueue

    async def enqueue(*values: Any, **options: Any) -> None:
        redis_client.client_pause(1200)
        await original(*values, **options)

    monkeypatch.setattr(queue, "enqueue", enqueue)
    with pytest.raises(AiscaleError) as refused:
        await start(cast)
    assert refused.value.code is Code.BACKEND_UNAVAILABLE
    await until(lambda: not queue._background)
    assert claim(redis_client) == {} and redis_client.zcard(keys.LEASES) == 0
    assert list(redis_client.scan_iter("aiscale:job:*")) == []
    scope = f"organization:{cast.organization.public_id}"
    await until(lambda: redis_client.zcard(keys.holds(scope)) == 0)
    assert redis_client.zcard(keys.in_flight(scope)) == 0


async def test_cancelling_before_and_after_the_claim(cast: Cast, redis_client: Redis) -> None:
    before, after = await start(cast), await start(cast)
    assert await queue.cancel(before.job_id, "left")
    assert list(claim(redis_client)) == [after.job_id], "what was cancelled is not given to a worker"
    assert await queue.cancel(after.job_id, "left")
    assert end(redis_client, cast, after.job_id, "w1") == 1
    assert await queue.cancel(after.job_id, "left") is False
    assert reaper.Reaper().sweep() == 1
    assert [event.job_id for event in list_ends(redis_client)] == [after.job_id, before.job_id]


async def test_a_worker_that_slept_cannot_end_what_another_one_has(cast: Cast, redis_client: Redis) -> None:
    run = await start(cast)
    assert claim(redis_client, worker="slept", dead=True) == {run.job_id: 1}
    sweeper = reaper.Reaper()
    sweeper.sweep()
    assert end(redis_client, cast, run.job_id, "slept") == 0, "it rests"
    redis_client.zadd(keys.LEASES, {run.job_id: 1})
    sweeper.sweep()
    assert end(redis_client, cast, run.job_id, "slept") == 0, "it waits"
    assert claim(redis_client, worker="other") == {run.job_id: 2}
    assert end(redis_client, cast, run.job_id, "slept") == 0 == end(redis_client, cast, run.job_id, FROM_QUEUE)
    assert end(redis_client, cast, run.job_id, "other") == 1
    assert end(redis_client, cast, run.job_id, "other") == 0
    assert len(list_ends(redis_client)) == 1


async def test_the_worker_ends_a_job_a_moment_before_or_after_the_reaper_looks(
    cast: Cast,
    redis_client: Redis,
) -> None:
    first, second = await start(cast), await start(cast)
    assert list(claim(redis_client, dead=True, most_jobs=2, most_tokens=10**6)) == [first.job_id, second.job_id]
    assert end(redis_client, cast, first.job_id, "w1") == 1
    redis_client.hset(keys.job_record(second.job_id), "streamed", 1)
    assert reaper.Reaper().sweep() == 1
    assert end(redis_client, cast, second.job_id, "w1") == 0
    ends = {event.job_id: event.error_code for event in list_ends(redis_client)}
    assert ends == {first.job_id: None, second.job_id: "worker_lost"}


async def test_two_reapers_give_a_job_back_once(cast: Cast, redis_client: Redis) -> None:
    run = await start(cast)
    claim(redis_client, dead=True)
    now_ms = time.time_ns() // 1_000_000
    job = reaper.read_job({"kind": b"generate", "payload": redis_client.hget(keys.job_record(run.job_id), "payload")})  # type: ignore[dict-item]
    client = redis_clients.get_sync()
    answers = [reaper.requeue(client, job, now_ms)[0] for _ in range(2)]
    assert answers == [b"resting", b"no"]
    redis_client.zadd(keys.LEASES, {run.job_id: 1})
    answers = [reaper.requeue(client, job, now_ms)[0] for _ in range(2)]
    assert answers == [b"queued", b"no"]
    assert claim(redis_client) == {run.job_id: 2} and claim(redis_client) == {}
