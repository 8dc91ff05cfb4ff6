"""A model's queue that is too deep or too slow refuses at once, and says when to come back; whoever fills it keeps nobody else out."""

import dataclasses
import re
import time
from typing import Any

import pytest
from redis import Redis

from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from apps.spend.admission import admit, run_gate
from tests.apps.inference.claims import claim, put
from tests.apps.spend.cast import MODEL, make_ask, make_caller, make_finished, stage

pytestmark = pytest.mark.django_db(transaction=True)
LIMIT = 6


@pytest.fixture(autouse=True)
def small(settings: Any) -> None:
    """Let the service's queues be short."""
    settings.ENV = dataclasses.replace(settings.ENV, queue_limit=LIMIT)


def fill(client: Redis, count: int, organization: str = "org_other", **place: Any) -> None:
    for n in range(count):
        assert put(client, f"job_{organization}_{n}_{time.monotonic_ns()}", organization=organization, **place) == 1


async def refused(ask: Any) -> AiscaleError:
    before = dump_queue()
    with pytest.raises(AiscaleError) as refusal:
        await admit(ask)
    assert dump_queue() == before
    return refusal.value


def read_wait_s(refusal: AiscaleError) -> int:
    """Return the expected wait that a refusal names."""
    found = re.search(r"your request would wait about (\d+) seconds,", refusal.message)
    assert refusal.code is Code.QUEUE_FULL and found, refusal.message
    return int(found[1])


def dump_queue() -> Any:
    from aiscale import redis as redis_clients

    client: Any = redis_clients.get_sync()
    return {name: client.dump(name) for name in client.scan_iter(f"{keys.queue_state(MODEL)}*")}


def set_pace(client: Redis, tokens_per_s: int) -> None:
    """Have the model known to work so fast."""
    now_ms = time.time_ns() // 1_000_000
    state = {"rate_tokens": tokens_per_s * 30, "rate_ms": 30_000, "rate_ends": 1, "rate_at_ms": now_ms}
    client.hset(keys.queue_state(MODEL), mapping=state)


async def test_a_full_queue_is_refused_at_once_with_the_time_until_there_is_room(client: Redis) -> None:
    organization = await stage()
    fill(client, LIMIT, organization.public_id, tokens=100)
    refusal = await refused(make_ask(make_caller(organization)))
    assert refusal.code is Code.QUEUE_FULL and refusal.retry_after_s == 5.0, "nobody knows yet"
    set_pace(client, 25)
    refusal = await refused(make_ask(make_caller(organization)))
    # one job of a hundred tokens has to begin
    assert refusal.retry_after_s == pytest.approx(4, rel=0.2)
    assert f"{LIMIT} requests are waiting for the model {MODEL!r} already. Try again in about " in refusal.message
    claim(client)
    await admit(make_ask(make_caller(organization)))


async def test_who_fills_the_queue_keeps_nobody_else_out(client: Redis) -> None:
    heavy, light = await stage(name="Heavy"), await stage(name="Light")
    fill(client, LIMIT, heavy.public_id)
    assert (await refused(make_ask(make_caller(heavy)))).code is Code.QUEUE_FULL
    # of two organizations each has half of it
    for n in range(LIMIT // 2):
        await admit(make_ask(make_caller(light)))
        fill(client, 1, light.public_id, now_ms=time.time_ns() // 1_000_000 + n)
    assert (await refused(make_ask(make_caller(light)))).code is Code.QUEUE_FULL


async def test_nobody_passes_twice_the_limit(client: Redis) -> None:
    organization = await stage()
    for n in range(2 * LIMIT):
        await admit(make_ask(make_caller(organization)))
        fill(client, 1, f"org_{n}")
    assert (await refused(make_ask(make_caller(organization)))).code is Code.QUEUE_FULL


async def test_the_plans_own_depth_counts_if_it_is_smaller(client: Redis) -> None:
    organization = await stage(max_queued=2)
    fill(client, 2, organization.public_id)
    refusal = await refused(make_ask(make_caller(organization)))
    assert refusal.code is Code.QUEUE_FULL and refusal.message.startswith("2 requests are waiting")


async def test_lower_tiers_do_not_keep_higher_ones_out(client: Redis) -> None:
    organization = await stage(max_wait_s=5)
    fill(client, 4 * LIMIT, tier=9, tokens=1000)
    set_pace(client, 1000)
    await admit(make_ask(make_caller(organization), priority=0))
    assert (await refused(make_ask(make_caller(organization), priority=9))).code is Code.QUEUE_FULL
    fill(client, LIMIT, tier=0, tokens=1000)
    refusal = await refused(make_ask(make_caller(organization), priority=3))
    assert read_wait_s(refusal) == pytest.approx(7, rel=0.2)


async def test_too_long_a_wait_is_refused_and_names_both(client: Redis) -> None:
    organization = await stage(max_wait_s=10)
    fill(client, 3, organization.public_id, tokens=500)
    set_pace(client, 100)
    refusal = await refused(make_ask(make_caller(organization)))
    assert refusal.code is Code.QUEUE_FULL
    # three jobs before it, and one that has to end first
    assert read_wait_s(refusal) == pytest.approx(20, rel=0.2)
    assert "and the Free plan's requests wait 10 seconds at the most" in refusal.message
    assert refusal.retry_after_s == pytest.approx(10, rel=0.2)


async def test_the_wait_is_that_of_the_organization_not_of_its_tier(client: Redis) -> None:
    """Fair queueing: who has nothing waiting is next, however much somebody else has."""
    organization = await stage(max_wait_s=12)
    fill(client, 5, tokens=500)
    set_pace(client, 100)
    await admit(make_ask(make_caller(organization)))
    fill(client, 1, organization.public_id, tokens=500)
    refusal = await refused(make_ask(make_caller(organization)))
    assert read_wait_s(refusal) == pytest.approx(20, rel=0.2)


async def test_a_larger_share_waits_for_less(client: Redis) -> None:
    organization = await stage(max_wait_s=1)
    fill(client, 2, organization.public_id, tokens=500)
    fill(client, 3, "org_other", tokens=500)
    set_pace(client, 100)
    usual, large = (make_ask(make_caller(organization), weight=weight) for weight in (1, 10))
    assert read_wait_s(await refused(usual)) == pytest.approx(30, rel=0.2)
    # while its two jobs are served, a tenth of theirs is due to the others, and the one that is under way
    assert read_wait_s(await refused(large)) == pytest.approx(21, rel=0.2)


async def test_a_model_that_stands_still_gets_slower(client: Redis) -> None:
    organization = await stage(max_wait_s=20)
    fill(client, 3, organization.public_id, tokens=400)
    set_pace(client, 100)
    await admit(make_ask(make_caller(organization)))
    now_ms = time.time_ns() // 1_000_000
    client.hset(keys.queue_state(MODEL), mapping={"rate_at_ms": now_ms - 60_000, "backlog_at_ms": now_ms - 60_000})
    assert read_wait_s(await refused(make_ask(make_caller(organization)))) == pytest.approx(32, rel=0.2)


async def test_a_model_without_a_worker_is_refused_after_a_while(client: Redis, settings: Any) -> None:
    organization = await stage()
    ask = make_ask(make_caller(organization))
    await admit(ask)
    now_ms = time.time_ns() // 1_000_000
    client.set(keys.model_served(MODEL), now_ms - 29_000)
    await admit(make_ask(make_caller(organization)))
    client.set(keys.model_served(MODEL), now_ms - 31_000)
    refusal = await refused(make_ask(make_caller(organization)))
    assert (refusal.code, refusal.retry_after_s) == (Code.BACKEND_UNAVAILABLE, 5.0)
    assert (
        refusal.message.startswith(f"The model {MODEL!r} is not there right now.")
        and refusal.facts["unserved_ms"][0] == "3"
    )
    settings.ENV = dataclasses.replace(settings.ENV, unserved_s=0)
    await admit(make_ask(make_caller(organization)))


async def test_the_queues_numbers_are_explained(client: Redis) -> None:
    organization = await stage(max_wait_s=60)
    fill(client, 2, tokens=500)
    set_pace(client, 100)
    ask = make_ask(make_caller(organization))
    from aiscale import redis as redis_clients

    report = await run_gate(
        redis_clients.get_async(), ask, plan="free", now_ms=time.time_ns() // 1_000_000, mode="explain"
    )
    checks = {check[0]: check[1:] for check in report[1:]}
    verdict, *facts = checks["queue_full"]
    numbers = dict(zip(facts[::2], facts[1::2], strict=True))
    assert verdict == "pass" and numbers["waiting"] == "2" and numbers["limit"] == str(LIMIT)
    assert 9_000 < int(numbers["wait_ms"]) < 12_000 and numbers["longest_ms"] == "60000"
    assert checks["backend_unavailable"][0] == "pass"


async def test_a_request_is_in_flight_until_it_ends_not_until_it_is_settled(client: Redis) -> None:
    """The next request of a client that waits for its answers must not meet the hold of the last one."""
    from aiscale.wire.scripts import finish_arguments, read_script

    organization = await stage(max_in_flight=1)
    ask = make_ask(make_caller(organization))
    await admit(ask)
    name = keys.in_flight(f"organization:{organization.public_id}")
    assert (await refused(make_ask(make_caller(organization)))).code is Code.TOO_MANY_IN_FLIGHT
    put(client, ask.job_id, organization=organization.public_id, in_flight=name)
    assert list(claim(client)) == [ask.job_id]
    event = make_finished(organization.public_id, ask.job_id)
    names, values = finish_arguments(event, reply_to="p", keep_log=False, by="w1")
    assert client.eval(read_script("finish"), len(names), *names, *values) == 1
    assert client.zcard(name) == 0
    assert client.zcard(keys.holds(f"organization:{organization.public_id}")) == 1, "its money is held still"
    await admit(make_ask(make_caller(organization)))
