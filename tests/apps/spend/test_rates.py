"""Requests and tokens have windows of their own, of the organization and of the key, right to the unit (L1, L2)."""

import asyncio
import subprocess
import sys

import pytest
from redis import Redis

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from apps.spend import holds, periods, settlement
from apps.spend.admission import Admitted, admit, run_gate
from tests.apps.spend.cast import (
    make_ask,
    make_caller,
    make_finished,
    make_plan,
    on_thread,
    publish_key,
    refused,
    scope_of,
    stage,
)

pytestmark = pytest.mark.django_db(transaction=True)
DIGEST = "cd" * 32
START_MS = 1_790_000_000_000


@pytest.fixture
def clock(monkeypatch):
    """Stand still until told otherwise. ``clock.at`` is the time in epoch ms."""

    class Clock:
        at = periods.now_ms()

    clock = Clock()
    monkeypatch.setattr(periods, "now_ms", lambda: clock.at)
    return clock


def keep(client: Redis) -> None:
    """Let no key end by Valkey's clock, which does not stand still: a window of a second ends while a busy machine looks away."""
    for key in client.scan_iter():
        client.persist(key)


def state(headers: dict[str, str], what: str) -> tuple[str, str]:
    return headers[f"x-ratelimit-limit-{what}"], headers[f"x-ratelimit-remaining-{what}"]


async def test_l1_requests_and_tokens_are_counted_apart(client: Redis):
    organization = await stage(requests_per_window=10, window_s=3600, tokens_per_minute=1000)
    caller = make_caller(organization)
    admitted = await admit(make_ask(caller, worst_tokens=300))
    assert state(admitted.headers, "requests") == ("10", "9")
    assert state(admitted.headers, "tokens") == ("1000", "700")
    assert admitted.headers["x-ratelimit-reset-requests"].startswith("1h")
    assert admitted.headers["x-ratelimit-reset-tokens"] in ("1m0s", "1m1s")
    # a request counts as its tokens, not as 1; and what is refused for tokens uses up no request
    refusal = await refused(make_ask(caller, worst_tokens=701))
    assert refusal.code is Code.RATE_LIMITED and "700 of the 1000 tokens a minute are left" in refusal.message
    assert state(refusal.headers, "requests") == ("10", "9")
    assert state((await admit(make_ask(caller, worst_tokens=700))).headers, "tokens") == ("1000", "0")


async def test_l1_neither_window_resets_the_other(client: Redis, clock):
    organization = await stage(requests_per_window=3, window_s=3600, tokens_per_minute=1000)
    caller = make_caller(organization)
    for _ in range(2):
        await admit(make_ask(caller, worst_tokens=500))
    assert (await refused(make_ask(caller, worst_tokens=1))).retry_after_s == pytest.approx(60, abs=1.1)
    clock.at += 62_000
    admitted = await admit(make_ask(caller, worst_tokens=500))
    assert (state(admitted.headers, "requests"), state(admitted.headers, "tokens")) == (("3", "0"), ("1000", "500"))
    refusal = await refused(make_ask(caller, worst_tokens=500))
    assert "all 3 requests of this hour" in refusal.message


@pytest.mark.parametrize(
    ("plan", "amounts"),
    [
        ({"requests_per_window": 5, "window_s": 60}, [1] * 5),
        ({"requests_per_window": 20, "window_s": 3600}, [1] * 20),
        ({"requests_per_window": 7, "window_s": 10}, [1] * 7),
        ({"requests_per_window": 3, "window_s": 1}, [1] * 3),
        ({"requests_per_window": 1000, "tokens_per_minute": 1000}, [400, 100, 300, 200]),
        ({"requests_per_window": 1000, "tokens_per_minute": 1000}, [999]),
    ],
)
async def test_the_time_to_wait_is_true_to_the_millisecond(client: Redis, clock, plan, amounts):
    organization = await stage(**plan)
    caller = make_caller(organization)
    for number, amount in enumerate(amounts):
        await admit(make_ask(caller, worst_tokens=amount))
        keep(client)
        clock.at += 137 + 61 * number
    ask = make_ask(caller, worst_tokens=450)
    gate = redis_clients.get_async()
    refusal = await refused(ask)
    wait_ms = round((refusal.retry_after_s or 0) * 1000)
    assert (await run_gate(gate, ask, plan="free", now_ms=clock.at + wait_ms - 1))[:2] == [
        "refused",
        "rate_limit_exceeded",
    ]
    assert (await run_gate(gate, ask, plan="free", now_ms=clock.at + wait_ms))[0] == "admitted"


async def test_the_reset_is_true_to_the_unit(client: Redis, clock):
    organization = await stage(requests_per_window=5, window_s=60, tokens_per_minute=1000)
    caller = make_caller(organization)
    for _ in range(3):
        await admit(make_ask(caller, worst_tokens=100))
        clock.at += 1000
    answer = await run_gate(
        redis_clients.get_async(), make_ask(caller, worst_tokens=1001), plan="free", now_ms=clock.at
    )
    assert (
        answer[:2] == ["refused", "rate_limit_exceeded"]
        and answer[2:4] == ["5", "2"]
        and answer[5:7] == ["1000", "700"]
    )
    for at, left in ((clock.at + int(answer[4]) - 1, "4"), (clock.at + int(answer[4]), "5")):
        again = await run_gate(redis_clients.get_async(), make_ask(caller, worst_tokens=1001), plan="free", now_ms=at)
        assert again[3] == left


async def test_no_minute_sees_more_than_the_limit_wherever_it_begins(client: Redis, clock):
    """No double burst at a window's edge."""
    organization = await stage(requests_per_window=6, window_s=60, max_in_flight=1000)
    caller = make_caller(organization)
    passed = []
    for step in range(400):
        clock.at += 400 + 7 * (step % 13)
        try:
            await admit(make_ask(caller, deadline_at_ms=clock.at + 60_000))
            passed.append(clock.at)
        except AiscaleError as refusal:
            assert refusal.code is Code.RATE_LIMITED
    assert all(sum(start <= at < start + 60_000 for at in passed) <= 6 for start in passed)
    # and nearly all of it can be used: one sixtieth is lost at the most
    assert len(passed) >= (clock.at - passed[0]) / 61_000 * 6 - 6


async def test_a_request_that_is_larger_than_the_limit_is_told_so_and_not_to_wait(client: Redis):
    organization = await stage(tokens_per_minute=1000)
    refusal = await refused(make_ask(make_caller(organization), worst_tokens=1001))
    assert (refusal.code, refusal.retry_after_s) == (Code.RATE_LIMITED, None)
    assert refusal.message == (
        "This request could take 1001 tokens; 1000 a minute are allowed on the Free plan. "
        "Shorten your message, begin a new chat or upgrade your plan."
    )


async def test_without_a_limit_of_tokens_nothing_is_said_about_them(client: Redis):
    organization = await stage()
    admitted = await admit(make_ask(make_caller(organization), worst_tokens=10**9))
    assert "x-ratelimit-limit-tokens" not in admitted.headers and "x-ratelimit-limit-requests" in admitted.headers
    assert not client.exists(keys.token_rate(scope_of(organization)))


# --- tokens that were not used come back --------------------------------------------------------------------------------------


async def use(organization, caller, admitted: Admitted, **changes) -> None:
    event = make_finished(
        organization.public_id,
        admitted.job_id,
        hold_tokens=admitted.worst_tokens,
        hold_nanousd=1000,
        admitted_at_ms=admitted.admitted_at_ms,
        key_id=caller.key_id,
        **changes,
    )
    await on_thread(lambda: settlement.settle(event))


async def left(caller) -> int:
    """Ask for something impossible, and read how many tokens are left."""
    return int((await refused(make_ask(caller, worst_tokens=10**6))).headers["x-ratelimit-remaining-tokens"])


@pytest.mark.parametrize(
    ("changes", "used"), [({}, 15), ({"finish_reason": "cancelled"}, 15), ({"finish_reason": "error"}, 0)]
)
async def test_l1_tokens_are_corrected_to_what_was_used(client: Redis, changes, used):
    organization = await stage(tokens_per_minute=1000)
    caller = make_caller(organization)
    admitted = await admit(make_ask(caller, worst_tokens=400))
    assert await left(caller) == 600
    for _ in range(3):  # settled again and again, it is corrected once
        await use(organization, caller, admitted, **changes)
    assert await left(caller) == 1000 - used


async def test_tokens_of_a_job_that_could_not_be_sent_come_back(client: Redis):
    organization = await stage(tokens_per_minute=1000)
    caller = make_caller(organization)
    admitted = await admit(make_ask(caller, worst_tokens=400))
    end = holds.End(admitted.job_id, 1000, (scope_of(organization), "site"), 400, admitted.admitted_at_ms)
    for _ in range(2):
        await holds.give_back(end)
    assert await left(caller) == 1000


async def test_tokens_that_were_counted_long_ago_are_not_given_back_twice(client: Redis, clock):
    organization = await stage(tokens_per_minute=1000)
    caller = make_caller(organization)
    old = await admit(make_ask(caller, worst_tokens=900, deadline_at_ms=clock.at + 600_000))
    clock.at += 62_000
    await admit(make_ask(caller, worst_tokens=500))
    await use(organization, caller, old)
    assert await left(caller) == 500


async def test_a_job_that_was_not_counted_gives_back_no_more_than_there_is(client: Redis, clock):
    """A plan gets its limit of tokens between two jobs of one second: the first one was counted nowhere."""
    organization = await stage()
    caller = make_caller(organization)
    uncounted = await admit(make_ask(caller, worst_tokens=900))
    await on_thread(lambda: make_plan(tokens_per_minute=1000))
    counted = await admit(make_ask(caller, worst_tokens=300))
    clock.at += 1000
    await admit(make_ask(caller, worst_tokens=200))
    await use(organization, caller, uncounted, finish_reason="error")
    assert await left(caller) == 800, "what other seconds counted stays"
    await use(organization, caller, counted, finish_reason="error")
    assert await left(caller) == 800, "and nothing is given back twice"


# --- a key's own limits --------------------------------------------------------------------------------------------------------


async def test_l2_the_tighter_of_key_and_organization_is_shown_and_named(client: Redis):
    organization = await stage(requests_per_window=10, tokens_per_minute=1000)
    publish_key(DIGEST, organization.public_id, requests_per_window="2", window_s="60", tokens_per_minute="5000")
    caller = make_caller(organization, key_digest=DIGEST)
    admitted = await admit(make_ask(caller, worst_tokens=100))
    assert (state(admitted.headers, "requests"), state(admitted.headers, "tokens")) == (("2", "1"), ("1000", "900"))
    await admit(make_ask(caller, worst_tokens=100))
    refusal = await refused(make_ask(caller, worst_tokens=100))
    assert refusal.message.startswith("You have used all 2 requests of this minute for this API key. Try again in ")
    assert "upgrade" not in refusal.message
    # another key of the same organization, and what the browser asks, go on
    assert state((await admit(make_ask(make_caller(organization)))).headers, "requests") == ("10", "7")


async def test_a_key_limits_tokens_models_and_what_runs(client: Redis):
    organization = await stage()
    publish_key(DIGEST, organization.public_id, tokens_per_minute="100", max_in_flight="1", models="tiny,small")
    caller = make_caller(organization, key_digest=DIGEST)
    refusal = await refused(make_ask(caller))
    assert (refusal.code, "This API key is not allowed" in refusal.message) == (Code.MODEL_NOT_ALLOWED, True)
    refusal = await refused(make_ask(caller, model="tiny", worst_tokens=101))
    assert "100 a minute are allowed for this API key" in refusal.message
    await admit(make_ask(caller, model="tiny", worst_tokens=10))
    refusal = await refused(make_ask(caller, model="small", worst_tokens=10))
    assert refusal.code is Code.TOO_MANY_IN_FLIGHT
    assert refusal.message.startswith("This API key has 1 request running and is allowed 1 at a time.")
    await admit(make_ask(make_caller(organization), worst_tokens=500))


async def test_what_a_plan_counted_goes_along_into_another_window(client: Redis, clock):
    """A change of plan gives nobody a fresh start, and takes nothing away for longer than the new window."""
    organization = await stage(requests_per_window=10, window_s=3600)
    caller = make_caller(organization)
    for _ in range(5):
        await admit(make_ask(caller))
    organization = await stage_again(requests_per_window=8, window_s=60)
    assert state((await admit(make_ask(caller))).headers, "requests") == ("8", "2")
    clock.at += 62_000
    assert state((await admit(make_ask(caller, deadline_at_ms=clock.at + 60_000))).headers, "requests") == ("8", "7")


async def stage_again(**changes):
    from tests.apps.spend.cast import make_plan

    return await on_thread(lambda: make_plan("free", **changes))


# --- processes -------------------------------------------------------------------------------------------------------------------

OTHER_PROCESS = """
import asyncio, sys
import django
django.setup()
from aiscale.errors import AiscaleError
from apps.accounts.callers import Caller
from apps.spend.admission import Ask, admit

async def main():
    caller = Caller(organization_id=sys.argv[1], user_id="usr_1", key_id=None, key_digest=None, plan="free")
    passed = 0
    for number in range(30):
        try:
            await admit(Ask(caller=caller, model="m", job_id=f"job_{sys.argv[2]}_{number}", worst_nanousd=1, worst_tokens=10,
                            deadline_at_ms=9_000_000_000_000))
            passed += 1
        except AiscaleError as error:
            assert error.code == "rate_limit_exceeded", error
    print(passed)

asyncio.run(main())
"""


@pytest.mark.parametrize("plan", [{"requests_per_window": 25}, {"tokens_per_minute": 250}])
async def test_l2_limits_hold_across_processes(client: Redis, plan, settings):
    organization = await stage(**plan)
    from django.db import connection

    name = connection.settings_dict["NAME"]
    command = [
        sys.executable,
        "-c",
        OTHER_PROCESS.replace(
            "django.setup()",
            f"django.setup(); from django.conf import settings; settings.DATABASES['default']['NAME'] = {name!r}",
        ),
    ]
    running = [
        await asyncio.create_subprocess_exec(*command, organization.public_id, str(number), stdout=subprocess.PIPE)
        for number in range(3)
    ]
    printed = [(await process.communicate())[0] for process in running]
    assert sum(map(int, printed)) == 25
