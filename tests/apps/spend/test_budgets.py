"""Budgets of every scope hold and refuse, in their own days and months, and say so without telling what is not the customer's."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from django.db.backends.utils import CursorWrapper

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from apps.accounts import audit
from apps.spend import balance, corrections, killswitch, periods, totals
from apps.spend.admission import admit, run_gate
from apps.spend.models import SpendTotal
from tests.apps.spend.cast import (
    MODEL,
    USD,
    finish,
    make_ask,
    make_caller,
    on_thread,
    read_spend,
    refused,
    set_budget,
    stage,
)

pytestmark = pytest.mark.django_db(transaction=True)
PRICE = 65
SCOPES = ["site", "plan:free", f"model:{MODEL}", "organization:{organization}", "user:usr_1", "key:key_1"]


def fill(scope: str, caller) -> str:
    return scope.format(organization=caller.organization_id)


# --- every scope -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", ["daily", "monthly"])
@pytest.mark.parametrize("scope", SCOPES)
async def test_m12_a_budget_of_any_scope_holds_the_whole_worst_case_or_refuses(caller, scope, period):
    scope = fill(scope, caller)
    await set_budget(scope, 1000, period=period)
    first = await admit(make_ask(caller, worst_nanousd=600))
    refusal = await refused(make_ask(caller, worst_nanousd=401))
    assert (refusal.code, refusal.retry_after_s) == (Code.BUDGET_EXHAUSTED, 5.0)
    second = await admit(make_ask(caller, worst_nanousd=400))
    assert read_spend(scope)["held_nanousd"] == "1000"
    # what was not used is there for others
    for admitted, hold in ((first, 600), (second, 400)):
        await finish(caller, admitted.job_id, hold_nanousd=hold)
    after = read_spend(scope)
    assert (after["held_nanousd"], after[f"{period}_spent_nanousd"]) == ("0", str(2 * PRICE))
    await admit(make_ask(caller, worst_nanousd=1000 - 2 * PRICE))
    refusal = await refused(make_ask(caller, worst_nanousd=1))
    assert refusal.code is Code.BUDGET_EXHAUSTED


@pytest.mark.parametrize("scope", SCOPES)
async def test_a_budget_that_is_made_in_mid_traffic_counts_what_runs_and_what_was_spent(caller, scope):
    scope = fill(scope, caller)
    await finish(caller)
    await admit(make_ask(caller, worst_nanousd=500))
    await set_budget(scope, 1000)
    await refused(make_ask(caller, worst_nanousd=1000 - PRICE - 500 + 1))
    await admit(make_ask(caller, worst_nanousd=1000 - PRICE - 500))


@pytest.mark.parametrize(
    "scope", ["site", "plan:pro", "model:other", "organization:org_other", "user:usr_2", "key:key_2"]
)
async def test_a_budget_of_somebody_else_stops_nobody_here(caller, scope):
    await set_budget(scope, 0)
    if scope == "site":
        await on_thread(lambda: killswitch.release("site", by=audit.by_system("test")))
        await refused(make_ask(caller))
    else:
        await admit(make_ask(caller))


async def test_m12_all_budgets_fit_or_nothing_is_held_in_any(caller):
    for scope in SCOPES:
        await set_budget(fill(scope, caller), 1000, period="daily")
    await set_budget("site", 500)
    await refused(make_ask(caller, worst_nanousd=501))
    assert [read_spend(fill(scope, caller))["held_nanousd"] for scope in SCOPES] == ["0"] * 6
    await admit(make_ask(caller, worst_nanousd=500))
    assert [read_spend(fill(scope, caller))["held_nanousd"] for scope in SCOPES] == ["500"] * 6


async def test_m2_expired_holds_of_others_free_the_sites_budget(caller, client):
    await set_budget("site", 1000)
    dead = make_ask(caller, worst_nanousd=1000)
    await admit(dead)
    other = await stage("pro")
    asked = make_ask(make_caller(other), worst_nanousd=1000)
    await refused(asked)
    expiry_ms = int(client.zscore(keys.holds("site"), keys.hold(dead.job_id, 1000)))  # type: ignore[arg-type]
    answer = await run_gate(redis_clients.get_async(), asked, plan="pro", now_ms=expiry_ms)
    assert answer[0] == "admitted"
    assert read_spend("site")["held_nanousd"] == "1000"


# --- what is said ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "words"),
    [
        ("key:key_1", "Of this API key's daily limit of $0.000001, $0.000000065 is spent."),
        ("user:usr_1", "Of your own daily limit of $0.000001, $0.000000065 is spent."),
        ("organization:{organization}", "Of your daily limit of $0.000001, $0.000000065 is spent."),
    ],
)
async def test_what_is_the_customers_own_is_told_in_numbers(caller, scope, words):
    await set_budget(fill(scope, caller), 1000, period="daily")
    await finish(caller)
    message = (await refused(make_ask(caller, worst_nanousd=1000))).message
    assert words in message and "The limit starts anew on " in message and "$0.000001" in message


@pytest.mark.parametrize(
    ("scope", "words"),
    [
        ("site", "This service's budget "),
        ("plan:free", "This service's budget for the Free plan "),
        (f"model:{MODEL}", f"This service's budget for the model '{MODEL}' "),
    ],
)
async def test_the_services_money_is_not_told_to_customers(caller, scope, words):
    await set_budget(scope, 1000)
    await finish(caller)
    await admit(make_ask(caller, worst_nanousd=500))
    held_back = await refused(make_ask(caller, worst_nanousd=900))
    assert held_back.message.startswith(words + "is held for running requests.") and held_back.retry_after_s == 5.0
    used_up = await refused(make_ask(caller, worst_nanousd=1000))
    end_ms = periods.span_of("monthly", "UTC", periods.now_ms()).end_ms
    assert used_up.message.startswith(
        words + f"is used up until 1 {datetime.fromtimestamp(end_ms / 1000, UTC):%B %Y}, 00:00 UTC."
    )
    assert used_up.retry_after_s == pytest.approx((end_ms - periods.now_ms()) / 1000, abs=60)
    for refusal in (held_back, used_up):
        assert "$" not in refusal.message and "65" not in refusal.message


async def test_the_narrowest_budget_that_refuses_is_named(caller):
    for scope in SCOPES:
        await set_budget(fill(scope, caller), 10, period="daily")
    assert "this API key's" in (await refused(make_ask(caller))).message


async def test_credit_that_is_left_is_no_negative_spending(caller):
    why = {"reason": "A present", "by": audit.by_system("test"), "reference": "corr_1"}
    await on_thread(lambda: corrections.give_credit(caller.organization_id, 2 * USD, source="goodwill", **why))
    await admit(make_ask(caller, worst_nanousd=3 * USD - 500))
    message = (await refused(make_ask(caller, worst_nanousd=4 * USD))).message
    assert message.startswith(
        "This request could cost up to $4.00. Of your monthly limit of $1.00, nothing is spent, $2.00 of credit comes on top and "
    )
    assert "-$" not in message and "$-" not in message


# --- periods -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York", "Pacific/Auckland"])
@pytest.mark.parametrize("scope", ["site", "organization:{organization}"])
async def test_a_day_ends_at_midnight_of_the_budgets_own_zone(caller, monkeypatch, zone, scope):
    scope = fill(scope, caller)
    await set_budget(scope, 100, period="daily", time_zone=zone)
    tomorrow = (datetime.now(ZoneInfo(zone)) + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    midnight_ms = int(tomorrow.timestamp() * 1000)
    await finish(caller)
    for at_ms, passes in ((midnight_ms - 1, False), (midnight_ms, True)):
        monkeypatch.setattr(periods, "now_ms", lambda at_ms=at_ms: at_ms)
        ask = make_ask(caller, worst_nanousd=50, deadline_at_ms=at_ms + 60_000)
        if passes:
            await admit(ask)
        else:
            assert (await refused(ask)).code is Code.BUDGET_EXHAUSTED
    assert read_spend(scope)["daily_spent_nanousd"] == "0"


async def test_what_ends_after_midnight_counts_in_the_new_day(caller, monkeypatch):
    await set_budget("site", 1000, period="daily")
    end_ms = periods.span_of("daily", "UTC", periods.now_ms()).end_ms
    monkeypatch.setattr(periods, "now_ms", lambda: end_ms + 5)
    # nobody has asked in the new day yet: its row is made when somebody does, with what was recorded
    await finish(caller, finished_at_ms=end_ms - 1, admitted_at_ms=end_ms - 10)
    await finish(caller, finished_at_ms=end_ms + 1, admitted_at_ms=end_ms - 10)
    await admit(make_ask(caller, worst_nanousd=10, deadline_at_ms=end_ms + 60_000))
    assert read_spend("site")["daily_spent_nanousd"] == str(PRICE)
    days = await on_thread(
        lambda: list(
            SpendTotal.objects.filter(scope="site").order_by("start_at").values_list("spent_nanousd", flat=True)
        )
    )
    assert days == [PRICE, PRICE]


async def test_the_service_has_a_time_zone_for_those_who_name_none(caller, settings, monkeypatch):
    monkeypatch.setattr(type(settings.ENV), "time_zone", "Pacific/Auckland", raising=False)
    object.__setattr__(settings.ENV, "time_zone", "Pacific/Auckland")
    try:
        await on_thread(lambda: balance.restore(only_if_changed=True))
        await admit(make_ask(caller))
        start_ms = int(read_spend(f"organization:{caller.organization_id}")["monthly_start_ms"])
        assert periods.span_of("monthly", "Pacific/Auckland", periods.now_ms()).start_ms == start_ms
    finally:
        object.__setattr__(settings.ENV, "time_zone", "UTC")


# --- changes -----------------------------------------------------------------------------------------------------------------------


async def test_a_raise_counts_until_it_ends(caller):
    until = datetime.now(UTC) + timedelta(seconds=30)
    await set_budget(f"organization:{caller.organization_id}", 100, raise_nanousd=900, raise_until=until)
    await admit(make_ask(caller, worst_nanousd=100))
    ask = make_ask(caller, worst_nanousd=900)
    gate, until_ms = redis_clients.get_async(), int(until.timestamp() * 1000)
    answer = await run_gate(gate, ask, plan="free", now_ms=until_ms)
    assert answer[:2] == ["refused", "insufficient_quota"]
    assert (await run_gate(gate, ask, plan="free", now_ms=until_ms - 1))[0] == "admitted"


async def test_a_raise_works_on_the_plans_limit_too(caller):
    until = datetime.now(UTC) + timedelta(hours=1)
    await set_budget(
        f"organization:{caller.organization_id}", None, thresholds=["80%"], raise_nanousd=USD, raise_until=until
    )
    await admit(make_ask(caller, worst_nanousd=2 * USD))


async def test_a_budget_without_a_limit_refuses_nothing_and_leaves_the_plans(caller):
    await set_budget(f"organization:{caller.organization_id}", None, thresholds=["$0.10"])
    await set_budget("site", None, thresholds=["$0.10"])
    assert (await refused(make_ask(caller, worst_nanousd=USD + 1))).code is Code.BUDGET_EXHAUSTED
    await admit(make_ask(caller, worst_nanousd=USD))


async def test_another_time_zone_means_another_period_at_once(caller):
    scope = f"organization:{caller.organization_id}"
    await finish(caller)
    for zone in ("Pacific/Auckland", "America/New_York", "UTC"):
        await set_budget(scope, 1000, time_zone=zone)
        span = periods.span_of("monthly", zone, periods.now_ms())
        copy = read_spend(scope)
        assert (int(copy["monthly_start_ms"]), int(copy["monthly_end_ms"])) == span
        assert copy["monthly_spent_nanousd"] == str(PRICE)
        await finish(caller, prompt_tokens=0, completion_tokens=0)


async def test_a_deleted_budget_is_gone_at_once_and_the_plans_is_back(caller):
    for scope in ("site", f"organization:{caller.organization_id}"):
        budget = await set_budget(scope, 10, period="daily")
        assert (await refused(make_ask(caller))).code is Code.BUDGET_EXHAUSTED
        await on_thread(budget.delete)
    await admit(make_ask(caller))
    assert read_spend("site") == {}


@pytest.mark.parametrize("lost", ["copy", "definition", "both"])
async def test_m3_a_change_that_reached_one_of_two_copies_is_found_by_the_next_request(caller, client, lost):
    """A process that dies in the middle of telling Redis, or a Redis that forgets: no budget is passed by."""
    await set_budget("site", 1000)
    copy, definitions = client.hgetall(keys.spend("site")), client.hgetall(keys.BUDGETS)
    await set_budget("site", 10)
    if lost in ("copy", "both"):
        client.delete(keys.spend("site"))
        client.hset(keys.spend("site"), mapping=copy)  # type: ignore[arg-type]
    if lost in ("definition", "both"):
        client.delete(keys.BUDGETS)
        client.hset(keys.BUDGETS, mapping=definitions)  # type: ignore[arg-type]
        await on_thread(lambda: balance.restore(only_if_changed=True))
    with pytest.raises(AiscaleError) as refusal:
        await admit(make_ask(caller))
    assert refusal.value.code is Code.BUDGET_EXHAUSTED


async def test_m3_a_lost_list_of_budgets_never_means_that_there_are_none(caller, client):
    await set_budget("site", 10)
    for lost in ([keys.BUDGETS], [keys.spend("site")], [keys.BUDGETS, keys.spend("site")]):
        client.delete(*lost)
        with pytest.raises(AiscaleError) as refusal:
            await admit(make_ask(caller))
        assert refusal.value.code is Code.BUDGET_EXHAUSTED


# --- totals ------------------------------------------------------------------------------------------------------------------------


async def test_m5_totals_equal_the_sum_of_what_is_recorded(caller):
    for scope in SCOPES:
        for period in ("daily", "monthly"):
            await set_budget(fill(scope, caller), USD, period=period)
    for number in range(12):
        await finish(caller, prompt_tokens=number, key_id=None if number % 3 else "key_1")

    def compare() -> int:
        rows = SpendTotal.objects.all()
        for row in rows:
            assert row.spent_nanousd == totals.sum_recorded(row.scope, row.start_at, row.end_at), row
            copy = read_spend(row.scope)
            assert int(copy[f"{row.period}_spent_nanousd"]) == row.spent_nanousd
        return len(rows)

    assert await on_thread(compare) == 12
    assert await on_thread(lambda: SpendTotal.objects.get(scope="key:key_1", period="daily").spent_nanousd) < spent_all(
        caller
    )


def spent_all(caller) -> int:
    return int(read_spend("site")["daily_spent_nanousd"])


async def test_d4_the_hot_path_reads_no_sql_with_budgets_everywhere(caller, monkeypatch):
    for scope in SCOPES:
        await set_budget(fill(scope, caller), USD)
    await admit(make_ask(caller))
    seen = []
    batcher = redis_clients._batchers.get()
    really = batcher._ask

    async def count(commands):
        seen.extend(command[0] for command in commands)
        return await really(commands)

    monkeypatch.setattr(batcher, "_ask", count)
    client = redis_clients.get_async()
    monkeypatch.setattr(client, "execute_command", lambda *_: pytest.fail("the gate asked Redis apart"))
    monkeypatch.setattr(CursorWrapper, "execute", lambda *_: pytest.fail("the gate asked Postgres"))
    await admit(make_ask(caller))
    assert seen == ["EVALSHA"]
