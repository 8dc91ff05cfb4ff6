"""Show what the gate lets pass, what it refuses, and that a refusal changes nothing."""

import time

import pytest
from redis import Redis

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from apps.accounts import mirror
from apps.accounts.callers import Caller
from apps.spend import holds, killswitch, periods, settlement
from apps.spend.admission import HOLD_GRACE_MS, Admitted, admit, release, run_gate
from apps.spend.models import Budget
from tests.apps.spend.cast import (
    ADA,
    MODEL,
    USD,
    make_ask,
    make_caller,
    make_finished,
    make_organization,
    make_plan,
    on_thread,
    publish_key,
    read_spend,
    refused,
    scope_of,
    set_budget,
    stage,
    warm,
)

pytestmark = pytest.mark.django_db(transaction=True)

DIGEST = "ab" * 32


async def give_back(caller: Caller, admitted: Admitted) -> None:
    tag = make_finished(
        caller.organization_id,
        plan=admitted.plan,
        hold_tokens=admitted.worst_tokens,
        admitted_at_ms=admitted.admitted_at_ms,
        hold_nanousd=1000,
        key_id=caller.key_id,
    ).billing
    await release(tag, MODEL, admitted.job_id)


@pytest.fixture
def organization(client):
    return warm(make_organization())


async def test_an_admitted_request_is_counted_and_held(client: Redis, organization):
    ask = make_ask(make_caller(organization), worst_nanousd=12_345)
    admitted = await admit(ask)
    assert admitted.headers["x-ratelimit-limit-requests"] == "1000"
    assert admitted.headers["x-ratelimit-remaining-requests"] == "999"
    assert admitted.headers["x-ratelimit-reset-requests"].startswith("1h")
    assert read_spend(scope_of(organization))["held_nanousd"] == "12345"
    hold = keys.hold(ask.job_id, 12_345)
    assert client.zscore(keys.holds(scope_of(organization)), hold) == ask.deadline_at_ms + HOLD_GRACE_MS


async def test_the_same_job_asked_twice_is_counted_once(organization):
    """A client that lost Redis's answer asks again."""
    ask = make_ask(make_caller(organization))
    first, second = await admit(ask), await admit(ask)
    assert first.headers["x-ratelimit-remaining-requests"] == second.headers["x-ratelimit-remaining-requests"] == "999"
    assert read_spend(scope_of(organization))["held_nanousd"] == "1000"


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ({"state": "revoked"}, Code.KEY_REVOKED),
        ({"state": "expired"}, Code.KEY_EXPIRED),
        ({"expires_at_ms": "1000"}, Code.KEY_EXPIRED),
        ({"organization_id": "org_other"}, Code.INVALID_API_KEY),
    ],
)
async def test_a_key_that_works_no_more_is_refused_by_name(organization, state, code):
    publish_key(DIGEST, organization.public_id, **state)
    refusal = await refused(make_ask(make_caller(organization, key_digest=DIGEST)))
    assert refusal.code is code
    assert "API keys page" in refusal.message


async def test_a_living_key_passes(organization):
    publish_key(DIGEST, organization.public_id, expires_at_ms=str(time.time_ns() // 1_000_000 + 5000))
    await admit(make_ask(make_caller(organization, key_digest=DIGEST)))


async def test_a_suspended_account_is_refused(client, organization):
    client.hset(keys.organization(organization.public_id), "state", "suspended")
    refusal = await refused(make_ask(make_caller(organization)))
    assert (refusal.code, "suspended" in refusal.message) == (Code.ACCOUNT_INACTIVE, True)


SCOPES = ["site", "model:{model}", "plan:free", "organization:{organization}", "key:key_1", "provider:local"]


@pytest.mark.parametrize("scope", SCOPES)
async def test_what_is_killed_is_refused_with_the_reason(client, organization, scope):
    publish_key(DIGEST, organization.public_id)
    ask = make_ask(make_caller(organization, key_digest=DIGEST))
    client.hset(keys.KILLED, scope.format(organization=organization.public_id, model=MODEL), "|The bill is too high.")
    refusal = await refused(ask)
    assert refusal.code is Code.KILLED and refusal.retry_after_s is None
    assert "The bill is too high. " in refusal.message
    assert refusal.headers["x-ratelimit-remaining-requests"] == "1000"


@pytest.mark.parametrize("scope", SCOPES)
async def test_a_kill_ends_at_its_time_whoever_sleeps(client, organization, scope):
    """Nothing tidies up here: what is in Redis is enough for the gate."""
    publish_key(DIGEST, organization.public_id)
    ask = make_ask(make_caller(organization, key_digest=DIGEST))
    until_ms = time.time_ns() // 1_000_000 + 60_000
    client.hset(keys.KILLED, scope.format(organization=organization.public_id, model=MODEL), f"{until_ms}|A fire drill")
    refusal = await refused(ask)
    assert refusal.code is Code.KILLED and 55 < (refusal.retry_after_s or 0) <= 60
    answer = await run_gate(redis_clients.get_async(), ask, plan="free", now_ms=until_ms - 1)
    assert answer[:2] == ["refused", "killed"]
    answer = await run_gate(redis_clients.get_async(), ask, plan="free", now_ms=until_ms)
    assert answer[0] == "admitted"


async def test_what_else_is_killed_stops_nobody_here(client, organization):
    publish_key(DIGEST, organization.public_id)
    others = ["model:other", "plan:pro", "organization:org_other", "key:key_2", "provider:elsewhere"]
    client.hset(keys.KILLED, mapping=dict.fromkeys(others, "|x"))
    await admit(make_ask(make_caller(organization, key_digest=DIGEST)))
    with pytest.raises(AiscaleError, match="'elsewhere', is stopped"):
        await admit(make_ask(make_caller(organization), provider="elsewhere"))


async def test_a_model_outside_the_plan_is_refused(client):
    organization = await stage(allowed_models=["tiny", f"{MODEL}-large"])
    refusal = await refused(make_ask(make_caller(organization)))
    assert (refusal.code, MODEL in refusal.message) == (Code.MODEL_NOT_ALLOWED, True)
    await admit(make_ask(make_caller(organization), model="tiny"))


async def test_the_rate_is_refused_with_the_time_to_wait(client):
    organization = await stage(requests_per_window=3)
    caller = make_caller(organization)
    remaining = [(await admit(make_ask(caller))).headers["x-ratelimit-remaining-requests"] for _ in range(3)]
    assert remaining == ["2", "1", "0"]
    refusal = await refused(make_ask(caller))
    assert refusal.code is Code.RATE_LIMITED
    assert refusal.message.startswith("You have used all 3 requests of this hour on the Free plan. Try again in 6")
    assert refusal.message.endswith("or upgrade your plan.")
    assert 3600 <= refusal.retry_after_s <= 3660
    assert refusal.headers["x-ratelimit-remaining-requests"] == "0"


async def test_too_many_in_flight_are_refused_until_one_ends(client):
    organization = await stage(max_in_flight=2)
    caller = make_caller(organization)
    running = await admit(make_ask(caller))
    await admit(make_ask(caller))
    refusal = await refused(make_ask(caller))
    assert (refusal.code, refusal.retry_after_s) == (Code.TOO_MANY_IN_FLIGHT, 1.0)
    assert "You have 2 requests running; the Free plan allows 2" in refusal.message
    await give_back(caller, running)
    await admit(make_ask(caller))


async def test_m12_the_whole_worst_case_fits_or_is_refused(client):
    organization = await stage(monthly_limit_nanousd=1000)
    caller = make_caller(organization)
    await admit(make_ask(caller, worst_nanousd=400))
    refusal = await refused(make_ask(caller, worst_nanousd=601))
    assert refusal.code is Code.BUDGET_EXHAUSTED
    assert "$0.000000601" in refusal.message
    assert "$0.000001" in refusal.message
    assert "Try again when they have finished" in refusal.message
    assert refusal.retry_after_s == 5.0
    await admit(make_ask(caller, worst_nanousd=600))
    refusal = await refused(make_ask(caller, worst_nanousd=1))
    assert refusal.code is Code.BUDGET_EXHAUSTED


async def test_a_spent_budget_says_when_it_starts_anew(client):
    organization = await stage(monthly_limit_nanousd=1000)
    client.hset(keys.spend(scope_of(organization)), "monthly_spent_nanousd", "999")
    refusal = await refused(make_ask(make_caller(organization), worst_nanousd=2))
    assert "$0.000000999 is spent" in refusal.message
    assert "The limit starts anew on 1 " in refusal.message
    assert "Upgrade your plan" in refusal.message
    assert refusal.retry_after_s is None


async def test_a_budget_of_its_own_replaces_the_plans_limit_at_once(organization):
    caller = make_caller(organization)
    await _change_budget(organization, 500)
    refusal = await refused(make_ask(caller, worst_nanousd=501))
    assert refusal.code is Code.BUDGET_EXHAUSTED
    await _change_budget(organization, 5 * USD)
    await admit(make_ask(caller, worst_nanousd=4 * USD))
    await _change_budget(organization, None)
    assert (await refused(make_ask(caller, worst_nanousd=USD))).code is Code.BUDGET_EXHAUSTED


async def _change_budget(organization, limit: int | None) -> None:
    def change():
        if limit is None:
            Budget.objects.get(scope=f"organization:{organization.public_id}").delete()
        else:
            scope = f"organization:{organization.public_id}"
            Budget.objects.update_or_create(scope=scope, defaults={"limit_nanousd": limit})

    await on_thread(change)


async def test_m10_a_negative_worst_case_is_refused(organization):
    refusal = await refused(make_ask(make_caller(organization), worst_nanousd=-1))
    assert refusal.code is Code.BACKEND_UNAVAILABLE


async def test_m2_a_hold_expires_by_itself(client):
    organization = await stage(monthly_limit_nanousd=1000, max_in_flight=1)
    caller = make_caller(organization)
    dead = make_ask(caller, worst_nanousd=1000)
    await admit(dead)
    asked_later = make_ask(caller, worst_nanousd=1000)
    expiry_ms = dead.deadline_at_ms + HOLD_GRACE_MS
    gate = redis_clients.get_async()
    assert (await run_gate(gate, asked_later, plan="free", now_ms=expiry_ms - 1))[:2] == [
        "refused",
        "too_many_in_flight",
    ]
    assert (await run_gate(gate, asked_later, plan="free", now_ms=expiry_ms))[0] == "admitted"
    for scope in ("site", scope_of(organization), "user:usr_1"):
        assert client.zrange(keys.holds(scope), 0, -1) == [keys.hold(asked_later.job_id, 1000).encode()]
    assert read_spend(scope_of(organization))["held_nanousd"] == "1000"


async def test_m2_an_expired_hold_of_a_key_that_asks_no_more_is_swept_out(client, monkeypatch):
    organization = await stage()
    publish_key(DIGEST, organization.public_id)
    caller = make_caller(organization, key_digest=DIGEST)
    await set_budget("key:key_1", 5000)
    await admit(make_ask(caller, worst_nanousd=10, deadline_at_ms=periods.now_ms() + 600_000))
    dead = make_ask(caller, worst_nanousd=1000)
    await admit(dead)
    assert read_spend("key:key_1")["held_nanousd"] == "1010"
    expiry_ms = dead.deadline_at_ms + HOLD_GRACE_MS
    for now_ms, swept in ((expiry_ms - 1, 0), (expiry_ms, 6), (expiry_ms, 0)):
        monkeypatch.setattr(periods, "now_ms", lambda now_ms=now_ms: now_ms)
        assert holds.sweep(client) == swept
    for scope in ("site", scope_of(organization), "user:usr_1", "key:key_1"):
        assert client.zcard(keys.holds(scope)) == 1
    assert client.zcard(keys.in_flight("key:key_1")) == client.zcard(keys.in_flight(scope_of(organization))) == 1
    assert read_spend("key:key_1")["held_nanousd"] == "10"


async def test_release_gives_the_hold_back_once_and_keeps_the_request_counted(organization):
    caller = make_caller(organization)
    admitted = await admit(make_ask(caller))
    for _ in range(2):
        await give_back(caller, admitted)
    assert read_spend(scope_of(organization))["held_nanousd"] == "0"
    assert (await admit(make_ask(caller))).headers["x-ratelimit-remaining-requests"] == "998"


async def test_a_new_month_starts_with_nothing_spent(client, organization, monkeypatch):
    await on_thread(lambda: settlement.settle(make_finished(organization.public_id)))
    now_ms = periods.now_ms()
    end_ms = periods.span_of("monthly", "UTC", now_ms).end_ms
    caller = make_caller(organization)
    await admit(make_ask(caller))
    monkeypatch.setattr(periods, "now_ms", lambda: end_ms - 1)
    await admit(make_ask(caller, deadline_at_ms=end_ms + 60_000))
    assert read_spend(scope_of(organization))["monthly_spent_nanousd"] == "65"
    monkeypatch.setattr(periods, "now_ms", lambda: end_ms)
    await admit(make_ask(caller, deadline_at_ms=end_ms + 60_000))
    after = read_spend(scope_of(organization))
    assert (after["monthly_start_ms"], after["monthly_spent_nanousd"]) == (str(end_ms), "0")
    # what still runs is held in the new month too
    assert after["held_nanousd"] == ("3000" if end_ms < now_ms + 60_000 + HOLD_GRACE_MS else "2000")


async def test_a_clock_that_is_behind_does_not_bring_the_last_month_back(client, organization, monkeypatch):
    await on_thread(lambda: settlement.settle(make_finished(organization.public_id)))
    start_ms = periods.span_of("monthly", "UTC", periods.now_ms()).start_ms
    monkeypatch.setattr(periods, "now_ms", lambda: start_ms - 1)
    await admit(make_ask(make_caller(organization), deadline_at_ms=start_ms + 60_000))
    after = read_spend(scope_of(organization))
    assert (after["monthly_start_ms"], after["monthly_spent_nanousd"]) == (str(start_ms), "65")


async def test_after_flushall_the_copies_come_back(client, organization):
    client.flushall()
    client.set(keys.EPOCH, "another")
    await admit(make_ask(make_caller(organization)))
    assert client.hget(keys.KILLED, keys.KILLED_LOADED) == b"1"
    assert read_spend(scope_of(organization))["held_nanousd"] == "1000"


async def test_m3_what_was_killed_stays_killed_after_flushall(client, organization):
    await on_thread(lambda: killswitch.trip("site", reason="An incident", by=ADA))
    client.flushall()
    client.set(keys.EPOCH, "another")
    with pytest.raises(AiscaleError) as refusal:
        await admit(make_ask(make_caller(organization)))
    assert refusal.value.code is Code.KILLED


async def test_a_plan_that_changed_a_moment_ago_is_the_one_that_counts(client, organization):
    caller = make_caller(organization)

    def change_plan():
        organization.plan = make_plan("pro", requests_per_window=7, window_s=60)
        organization.save()
        mirror.publish_organization(organization)

    await on_thread(change_plan)
    admitted = await admit(make_ask(caller))
    assert admitted.headers["x-ratelimit-limit-requests"] == "7"


async def test_m3_no_redis_refuses(organization, settings, tmp_path):
    settings.REDIS_URL = f"unix://{tmp_path}/nobody.sock"
    await _forget_client()
    try:
        with pytest.raises(AiscaleError) as refusal:
            await admit(make_ask(make_caller(organization)))
        assert refusal.value.code is Code.BACKEND_UNAVAILABLE
        assert refusal.value.retry_after_s
    finally:
        await _forget_client()


async def test_m3_a_redis_that_fails_refuses(client, organization):
    client.delete(keys.holds(scope_of(organization)))
    client.set(keys.holds(scope_of(organization)), "not a sorted set")
    assert (await refused(make_ask(make_caller(organization)))).code is Code.BACKEND_UNAVAILABLE


async def _forget_client() -> None:
    """Make the running loop's next client anew, from the settings as they are now."""
    redis_clients._batchers.forget()
    kept = redis_clients._clients.forget()
    if kept is not None:
        await kept.aclose()
