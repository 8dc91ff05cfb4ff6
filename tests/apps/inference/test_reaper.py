"""Jobs that nobody answers for come to an end: tried again before the first token, ended clearly after it, charged never."""

import asyncio
import time
from typing import Any

import pytest
from redis import Redis

from aiscale.db import make_public_id
from aiscale.wire import codec, keys
from aiscale.wire.broker import broker_list
from aiscale.wire.events import Delta, Event, Finished, Started
from apps.inference import completions, queue, reaper, replies
from apps.inference.cache import policy
from apps.inference.completions import CompletionRequest, Run
from apps.inference.prompts import ChatMessage
from tests.apps.conftest import Cast
from tests.apps.inference.claims import CHAT, claim, list_lanes, list_tickets


@pytest.fixture
def client(cast: Cast, redis_url: str) -> Redis:
    return Redis.from_url(redis_url)


async def start(cast: Cast, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "request_id": make_public_id("req"),
        "source": "api",
        "model": CHAT,
        "messages": [ChatMessage(role="user", content="Hello")],
        "max_tokens": 5,
        "temperature": 0.0,
        "cache": policy.NOTHING,
    } | changes
    return await completions.start(CompletionRequest(**values), cast.caller)


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


def pass_time(client: Redis, job_id: str) -> None:
    """Let a job's lease, or its rest, be over."""
    client.zadd(keys.LEASES, {job_id: 1}, xx=True)


async def test_a_job_is_tried_three_times_and_then_ended(cast: Cast, client: Redis) -> None:
    run = await start(cast)
    sweeper = reaper.Reaper()
    for attempt in (1, 2, 3):
        assert claim(client, dead=True) == {run.job_id: attempt}
        swept_from_ms = time.time_ns() // 1_000_000
        assert sweeper.sweep() == 1
        if attempt < 3:
            # it rests one second, then two
            rests_until_ms: Any = client.zscore(keys.LEASES, run.job_id)
            assert swept_from_ms <= rests_until_ms - 1000 * attempt <= time.time_ns() // 1_000_000
            assert claim(client) == {} and client.zcard(keys.queue_depth(CHAT)) == 0
            pass_time(client, run.job_id)
            assert sweeper.sweep() == 1
    *_, last = await read(run)
    assert isinstance(last, Finished)
    assert (last.finish_reason, last.error_code, last.completion_tokens) == ("error", "worker_lost", 0)
    assert sweeper.sweep() == 0 and list_lanes(client) == []


async def test_a_job_comes_back_to_its_place_with_a_ticket(cast: Cast, client: Redis) -> None:
    first, second = await start(cast), await start(cast)
    client.delete(broker_list(CHAT))
    assert claim(client, dead=True) == {first.job_id: 1}
    client.delete(broker_list(CHAT))
    sweeper = reaper.Reaper()
    sweeper.sweep()
    pass_time(client, first.job_id)
    client.hdel(keys.queue_state(CHAT), "call_after_ms")
    # another reaper than the one that took it back: nothing of it is in memory
    reaper.Reaper().sweep()
    assert list_tickets(client) == [[CHAT]]
    assert claim(client) == {first.job_id: 2}
    assert claim(client) == {second.job_id: 1}


async def test_a_job_that_rests_can_be_cancelled(cast: Cast, client: Redis) -> None:
    run = await start(cast)
    claim(client, dead=True)
    reaper.Reaper().sweep()
    assert await queue.cancel(run.job_id, "left")
    reaper.Reaper().sweep()
    *_, last = await read(run)
    assert isinstance(last, Finished) and last.finish_reason == "cancelled"
    assert client.zcard(keys.LEASES) == 0


async def test_text_that_was_seen_is_kept_and_not_made_twice(cast: Cast, client: Redis) -> None:
    run = await start(cast, keep_log=True, source="chat")
    claim(client, dead=True)
    say(client, run, "Once ", "upon")
    reaper.Reaper().sweep()
    events = await read(run)
    assert [event.text for event in events if isinstance(event, Delta)] == ["Once ", "upon"]
    last = events[-1]
    assert isinstance(last, Finished)
    assert (last.error_code, last.text) == ("worker_lost", "Once upon")
    assert claim(client) == {}
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


async def test_a_lost_ticket_is_sent_again(cast: Cast, client: Redis) -> None:
    run = await start(cast)
    client.delete(broker_list(CHAT))
    sweeper = reaper.Reaper()
    sweeper._looked_at -= 100
    sweeper.sweep()
    assert list_tickets(client) == [], "it may still be on its way"
    client.hincrby(keys.queue_state(CHAT), "call_after_ms", -2000)
    for _ in range(3):
        sweeper._looked_at -= 100
        sweeper.sweep()
        assert list_tickets(client) == [[CHAT]]
    await run.cancel("test")


async def test_a_lease_that_lives_is_left_alone(cast: Cast, client: Redis) -> None:
    run = await start(cast)
    claim(client)
    assert reaper.Reaper().sweep() == 0
    assert client.hget(keys.job_record(run.job_id), "state") == b"running"
    await run.cancel("test")


async def test_cancelling_what_waits_frees_its_place_and_ends_it(cast: Cast, client: Redis) -> None:
    run = await start(cast)
    assert await queue.cancel(run.job_id, "left") is True
    assert client.hget(keys.job_record(run.job_id), "cancelled") == b"left"
    assert client.zcard(keys.queue_depth(CHAT)) == 0 and claim(client) == {}
    assert reaper.Reaper().sweep() == 1
    [last] = await read(run)
    assert isinstance(last, Finished) and last.finish_reason == "cancelled" and last.prompt_tokens == 0
    assert await queue.cancel(run.job_id, "left") is False
    assert await queue.cancel("job_unknown", "left") is False
    assert client.exists(keys.job_record("job_unknown")) == 0


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
