"""What waits in the queue of a stopped scope ends at once, free of charge, and is never computed."""

import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone
from redis import Redis

from aiscale.db import make_public_id
from aiscale.wire import keys
from aiscale.wire.codec import decode_event
from aiscale.wire.events import Finished
from apps.inference import completions, stopping
from apps.inference.completions import CompletionRequest
from apps.inference.prompts import ChatMessage
from apps.inference.stopping import Stopper
from apps.spend import killswitch, settlement
from tests.apps.conftest import Cast
from tests.apps.inference.claims import claim, list_lanes
from tests.apps.spend.cast import ADA, MODEL, on_thread, scope_of

SCOPES = ["site", f"model:{MODEL}", "plan:enterprise", "organization:{organization}", "key:{key}", "provider:local"]


@pytest.fixture
def client(redis_url: str) -> Iterator[Redis]:
    client = Redis.from_url(redis_url)
    yield client
    client.close()


async def queue_one(cast: Cast) -> completions.Run:
    """Queue a request for which no worker is there."""
    request = CompletionRequest(
        request_id=make_public_id("req"),
        source="api",
        model=MODEL,
        messages=[ChatMessage(role="user", content="Hi")],
        max_tokens=5,
    )
    return await completions.start(request, cast.caller)


def list_ends(client: Redis) -> list[Finished]:
    events = [decode_event(fields[b"0"]) for _, fields in client.xrange(keys.FINISHED)]
    return [event for event in events if isinstance(event, Finished)]


def trip(cast: Cast, scope: str, **changes: Any) -> None:
    scope = scope.format(organization=cast.organization.public_id, key=cast.key.public_id)
    killswitch.trip(scope, reason="An incident", by=ADA, **changes)


@pytest.mark.parametrize("scope", SCOPES)
async def test_a_queued_job_ends_with_the_reason_and_gives_its_hold_back(cast: Cast, client: Redis, scope: str) -> None:
    run = await queue_one(cast)
    assert client.zcard(keys.holds(scope_of(cast.organization))) == 1
    stopper = Stopper(client)
    assert stopper.sweep() == 0
    await on_thread(lambda: trip(cast, scope))
    assert stopper.sweep() == 1 and stopper.sweep() == 0
    [*_, last] = [event async for event in run.events()]
    assert isinstance(last, Finished)
    assert (last.finish_reason, last.error_code, last.error_message) == ("killed", "killed", "An incident")
    await on_thread(lambda: settlement.Settler(client).turn(1))
    assert client.zcard(keys.holds(scope_of(cast.organization))) == 0
    assert client.hget(keys.spend(scope_of(cast.organization)), "held_nanousd") == b"0"
    assert client.hget(keys.spend(scope_of(cast.organization)), "monthly_spent_nanousd") == b"0"
    # a worker that gets its ticket now finds that nothing is to be done
    assert claim(client) == {} and list_lanes(client) == []


async def test_what_lies_in_no_stopped_scope_goes_on_waiting(cast: Cast, client: Redis) -> None:
    await queue_one(cast)
    stopper = Stopper(client)
    await on_thread(lambda: trip(cast, "model:other"))
    assert stopper.sweep() == 0
    # what was looked at once is free only as long as no other order is given
    await on_thread(lambda: trip(cast, f"model:{MODEL}"))
    assert stopper.sweep() == 1


async def test_an_order_that_is_over_ends_nothing(cast: Cast, client: Redis) -> None:
    await queue_one(cast)
    await on_thread(lambda: trip(cast, "site", until_at=timezone.now() + timedelta(seconds=0.2)))
    time.sleep(0.25)
    assert client.hexists(keys.KILLED, "site"), "nobody has tidied up"
    assert Stopper(client).sweep() == 0


async def test_a_job_that_a_worker_has_claimed_is_the_workers(cast: Cast, client: Redis) -> None:
    run = await queue_one(cast)
    assert claim(client) == {run.job_id: 1}
    await on_thread(lambda: trip(cast, "site"))
    assert Stopper(client).sweep() == 0 and list_ends(client) == []


async def test_the_loop_heals_redis_ends_what_waits_and_writes_down_what_is_over(cast: Cast, client: Redis) -> None:
    await queue_one(cast)
    stop = threading.Event()
    thread = threading.Thread(target=stopping.run, args=(stop,))
    thread.start()
    try:
        await on_thread(lambda: trip(cast, "site"))
        wait_for(lambda: len(list_ends(client)) == 1)
        client.delete(keys.KILLED)
        wait_for(lambda: client.hexists(keys.KILLED, "site"))
        await on_thread(lambda: trip(cast, "model:other", until_at=timezone.now() + timedelta(seconds=0.5)))
        wait_for(lambda: client.hgetall(keys.KILLED) == {b"loaded": b"1", b"site": b"|An incident"})
        switch = await on_thread(lambda: killswitch.KillSwitch.objects.get(scope="model:other"))
        assert switch.released_at == switch.until_at
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()


def wait_for(condition: Any, timeout_s: float = 20.0) -> None:
    ends_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_at, "it did not happen"
        time.sleep(0.02)
