"""Jobs that nobody answers for come to an end: tried again before the first token, ended clearly after it, charged never."""

import asyncio
import time
from typing import Any

import pytest
from redis import Redis

from aiscale.wire import codec, keys
from aiscale.wire.events import Delta, Event, Finished, Started
from aiscale.wire.scripts import read_script
from apps.inference import completions, queue, reaper, replies
from apps.inference.completions import CompletionRequest, Run
from apps.inference.prompts import ChatMessage
from tests.apps.conftest import Cast

CHAT = "smollm2-135m-instruct"
QUEUE = "aiscale:celery:" + keys.celery_queue(CHAT)


@pytest.fixture
def client(cast: Cast, redis_url: str) -> Redis:
    return Redis.from_url(redis_url)


async def start(cast: Cast, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "request_id": "req_1",
        "source": "api",
        "model": CHAT,
        "messages": [ChatMessage(role="user", content="Hello")],
        "max_tokens": 5,
        "temperature": 0.0,
    } | changes
    return await completions.start(CompletionRequest(**values), cast.caller)


def claim(client: Redis, job_id: str, worker: str = "w1") -> list[bytes]:
    """Take a job as a worker does, and be dead at once: the lease has passed already."""
    now_ms = time.time_ns() // 1_000_000
    names = [keys.job_record(job_id), keys.LEASES, keys.queue_depth(CHAT)]
    return client.eval(read_script("claim"), 3, *names, job_id, worker, now_ms, now_ms - 1)  # type: ignore[return-value]


def say(client: Redis, run: Run, *texts: str) -> None:
    """Say something as a worker does."""
    events: list[Event] = [Started(job_id=run.job_id, seq=0, worker_id="w1", attempt=1)]
    events += [Delta(job_id=run.job_id, seq=n, text=text, completion_tokens=n) for n, text in enumerate(texts, 1)]
    fields: Any = {str(n): codec.encode_event(event) for n, event in enumerate(events)}
    client.xadd(keys.replies(replies.get_reader().process_id), fields)
    client.xadd(keys.job_log(run.job_id), fields)
    client.hset(keys.job_record(run.job_id), "streamed", 1)


async def read(run: Run) -> list[Event]:
    async def collect() -> list[Event]:
        return [event async for event in run.events()]

    return await asyncio.wait_for(collect(), 10)


def list_queued(client: Redis) -> int:
    return sum(client.llen(QUEUE + ("" if step == 0 else f"\x06\x16{step}")) for step in (0, 3, 6, 9))  # type: ignore[misc]


async def test_a_job_is_tried_three_times_and_then_ended(cast: Cast, client: Redis) -> None:
    run = await start(cast)
    sweeper = reaper.Reaper()
    for attempt in (1, 2, 3):
        assert claim(client, run.job_id) == [b"claimed", str(attempt).encode()]
        assert sweeper.sweep() == 1
        # it comes back after one second, then two, unless there is no try left
        assert len(sweeper._again) == (attempt < 3)
        sweeper._again.clear()
    *_, last = await read(run)
    assert isinstance(last, Finished)
    assert (last.finish_reason, last.error_code, last.completion_tokens) == ("error", "worker_lost", 0)
    assert sweeper.sweep() == 0


async def test_a_job_is_sent_again_after_its_back_off(cast: Cast, client: Redis) -> None:
    run = await start(cast)
    client.delete(QUEUE)
    claim(client, run.job_id)
    sweeper = reaper.Reaper()
    sweeper.sweep()
    assert list_queued(client) == 0
    assert 0.5 < sweeper._again[0][0] - time.monotonic() <= 1
    sweeper._again[0] = (time.monotonic(), *sweeper._again[0][1:])
    sweeper.sweep()
    assert list_queued(client) == 1
    await run.cancel("test")


async def test_text_that_was_seen_is_kept_and_not_made_twice(cast: Cast, client: Redis) -> None:
    run = await start(cast, keep_log=True, source="chat")
    claim(client, run.job_id)
    say(client, run, "Once ", "upon")
    reaper.Reaper().sweep()
    events = await read(run)
    assert [event.text for event in events if isinstance(event, Delta)] == ["Once ", "upon"]
    last = events[-1]
    assert isinstance(last, Finished)
    assert (last.error_code, last.text) == ("worker_lost", "Once upon")
    assert claim(client, run.job_id) == [b"done", b""]
    followed = [event async for event in replies.follow(run.job_id)]
    assert followed == events


async def test_a_queued_job_ends_at_its_deadline(cast: Cast, client: Redis) -> None:
    run = await start(cast)
    client.zadd(keys.LEASES, {run.job_id: 1})
    record = client.hgetall(keys.job_record(run.job_id))
    job = codec.decode_generate_job(record[b"payload"])  # type: ignore[index]
    import msgspec

    late = msgspec.structs.replace(job, deadline_at_ms=1)
    client.hset(keys.job_record(run.job_id), mapping={"payload": codec.encode_job(late), "deadline_ms": 1})
    reaper.Reaper().sweep()
    [last] = await read(run)
    assert isinstance(last, Finished) and (last.finish_reason, last.error_code) == ("deadline", "deadline_exceeded")


async def test_a_lost_message_is_sent_again(cast: Cast, client: Redis) -> None:
    run = await start(cast)
    for step in (0, 3, 6, 9):
        client.delete(QUEUE + ("" if step == 0 else f"\x06\x16{step}"))
    sweeper = reaper.Reaper()
    for _ in range(2):
        sweeper._looked_at -= 100
        sweeper.sweep()
    assert list_queued(client) == 1
    await run.cancel("test")


async def test_a_lease_that_lives_is_left_alone(cast: Cast, client: Redis) -> None:
    run = await start(cast)
    claim(client, run.job_id)
    client.zadd(keys.LEASES, {run.job_id: time.time_ns() // 1_000_000 + 60_000})
    assert reaper.Reaper().sweep() == 0
    assert client.hget(keys.job_record(run.job_id), "state") == b"running"
    await run.cancel("test")


async def test_cancelling_is_written_down_once(cast: Cast, client: Redis) -> None:
    run = await start(cast)
    assert await queue.cancel(run.job_id, "left") is True
    assert client.hget(keys.job_record(run.job_id), "cancelled") == b"left"
    assert claim(client, run.job_id) == [b"cancelled", b"left"]
    assert await queue.cancel("job_unknown", "left") is False
    assert client.exists(keys.job_record("job_unknown")) == 0
    await run.cancel("test")


async def test_a_hole_in_the_answer_is_an_error(cast: Cast, client: Redis) -> None:
    from aiscale.errors import AiscaleError, Code

    run = await start(cast)
    events = [Started(job_id=run.job_id, seq=0, worker_id="w1", attempt=1)]
    holes = [Delta(job_id=run.job_id, seq=2, text="b", completion_tokens=2)]
    fields: Any = {str(n): codec.encode_event(event) for n, event in enumerate([*events, *holes])}
    client.xadd(keys.replies(replies.get_reader().process_id), fields)
    with pytest.raises(AiscaleError) as lost:
        await read(run)
    assert lost.value.code is Code.WORKER_LOST
    await run.cancel("test")


async def test_a_forgotten_job_ends_the_waiting(cast: Cast, client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    from aiscale.errors import AiscaleError, Code

    monkeypatch.setattr(replies, "CHECK_EVERY_S", 0.1)
    run = await start(cast)
    client.flushall()
    with pytest.raises(AiscaleError) as lost:
        await read(run)
    assert lost.value.code is Code.WORKER_LOST
