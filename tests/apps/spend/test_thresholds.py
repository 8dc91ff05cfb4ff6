"""Thresholds alert once a period, and a site budget that is used up stops the site, once."""

from datetime import UTC, datetime

import pytest

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from apps.accounts import audit
from apps.spend import budgets, killswitch, periods, settlement, thresholds
from apps.spend.admission import admit
from apps.spend.models import KillSwitch, SpendAlert, SpendTotal
from tests.apps.spend.cast import USD, finish, make_ask, make_finished, on_thread, refused, set_budget

pytestmark = pytest.mark.django_db(transaction=True)
PRICE = 65


async def alerts() -> list[tuple[str, str, int]]:
    rows = SpendAlert.objects.order_by("pk").values_list("scope", "threshold", "spent_nanousd")
    return await on_thread(lambda: list(rows))


async def test_each_threshold_alerts_once_a_period(caller, monkeypatch):
    scope = f"organization:{caller.organization_id}"
    await set_budget(scope, 10 * PRICE, thresholds=["20%", "80%", "$0.000000130", "$0.0000002"])
    for _ in range(5):
        await finish(caller)
    # 20% and $0.00000013 are the same amount: 130
    assert await alerts() == [(scope, "20%", 130), (scope, "$0.000000130", 130), (scope, "$0.0000002", 260)]
    end_ms = periods.span_of("monthly", "UTC", periods.now_ms()).end_ms
    monkeypatch.setattr(periods, "now_ms", lambda: end_ms + 10)
    await admit(make_ask(caller, worst_nanousd=1, deadline_at_ms=end_ms + 60_000))
    for _ in range(2):
        await finish(caller, finished_at_ms=end_ms + 5)
    assert (await alerts())[3:] == [(scope, "20%", 130), (scope, "$0.000000130", 130)]


async def test_a_threshold_that_is_new_and_passed_already_alerts_at_once_and_once(caller):
    for _ in range(3):
        await finish(caller)
    await set_budget("site", None, thresholds=["$0.0000001"])
    await set_budget("site", None, thresholds=["$0.0000001", "$0.0000002"], note="changed")
    assert await alerts() == [("site", "$0.0000001", 195)]
    await finish(caller)
    assert await alerts() == [("site", "$0.0000001", 195), ("site", "$0.0000002", 260)]


async def test_an_alert_is_written_with_the_charge_or_not_at_all(caller, monkeypatch):
    await set_budget("site", None, thresholds=["$0.00000005"])

    def die(*args):
        raise redis_clients.RedisConnectionError("the cable was pulled")

    with monkeypatch.context() as broken:
        broken.setattr(thresholds, "_write", die)
        with pytest.raises(redis_clients.RedisConnectionError):
            await finish(caller, "job_1")
    assert (await alerts(), await on_thread(SpendTotal.objects.filter(spent_nanousd__gt=0).count)) == ([], 0)
    for _ in range(2):
        await finish(caller, "job_1")
    assert await alerts() == [("site", "$0.00000005", PRICE)]


async def test_a_refusal_for_lack_of_money_is_written_down_once(caller):
    scope = f"organization:{caller.organization_id}"
    await set_budget(scope, 100)
    for _ in range(3):
        with pytest.raises(AiscaleError):
            await admit(make_ask(caller, worst_nanousd=101))
    await settle_background()
    assert await alerts() == [(scope, "limit $0.0000001", 0)]


async def settle_background() -> None:
    import asyncio

    from apps.spend import admission

    await asyncio.gather(*admission._background)


# --- the site's kill switch -----------------------------------------------------------------------------------------------------------


async def switches() -> list[tuple[str, bool]]:
    rows = await on_thread(lambda: list(KillSwitch.objects.order_by("pk")))
    return [(row.scope, row.is_in_force) for row in rows]


async def test_the_sites_budget_trips_the_kill_switch_once_until_its_end(caller):
    budget = await set_budget("site", 2 * PRICE)
    await finish(caller)
    assert await switches() == []
    await finish(caller)
    await finish(caller)
    assert await switches() == [("site", True)]
    switch = await on_thread(KillSwitch.objects.get)
    end_ms = periods.span_of("monthly", "UTC", periods.now_ms()).end_ms
    assert switch.until_at == datetime.fromtimestamp(end_ms / 1000, UTC)
    assert budget.public_id in switch.tripped_by and "$" not in switch.reason
    refusal = await refused(make_ask(caller, worst_nanousd=0))
    assert refusal.code is Code.KILLED and "This service's monthly budget is used up" in refusal.message
    # released by hand, it is not tripped again in this period; the budget itself goes on refusing
    await on_thread(lambda: killswitch.release("site", by=audit.by_system("ada")))
    await finish(caller)
    assert await switches() == [("site", False)]
    assert (await refused(make_ask(caller))).code is Code.BUDGET_EXHAUSTED


async def test_a_sites_budget_that_refuses_small_requests_is_used_up(caller):
    """What is spent comes close to a limit, and seldom meets it."""
    await set_budget("site", 1000)
    for _ in range(15):
        await finish(caller)
    await refused(make_ask(caller, worst_nanousd=900))
    await settle_background()
    assert await switches() == [], "one huge request does not stop everybody"
    with pytest.raises(AiscaleError):
        await admit(make_ask(caller, worst_nanousd=100))
    await settle_background()
    assert await switches() == []
    await on_thread(
        lambda: settlement.settle(make_finished(caller.organization_id, prompt_tokens=6, completion_tokens=0))
    )
    with pytest.raises(AiscaleError):
        await admit(make_ask(caller, worst_nanousd=10))
    await settle_background()
    assert await switches() == [("site", True)]


async def test_a_budget_that_is_deleted_lets_the_site_go_on(caller):
    budget = await set_budget("site", PRICE)
    await finish(caller)
    assert await switches() == [("site", True)]
    await on_thread(budget.delete)
    assert await switches() == [("site", False)]
    await admit(make_ask(caller))


async def test_more_budget_lets_the_site_go_on(caller):
    await set_budget("site", PRICE)
    await finish(caller)
    assert await switches() == [("site", True)]
    await set_budget("site", PRICE, note="no more than before")
    assert await switches() == [("site", True)]
    await set_budget("site", 2 * PRICE)
    assert await switches() == [("site", False)]
    await finish(caller, (await admit(make_ask(caller, worst_nanousd=PRICE))).job_id)
    assert await switches() == [("site", False), ("site", True)]


async def test_a_switch_that_a_person_tripped_is_not_released_by_a_budget(caller):
    await on_thread(lambda: killswitch.trip("site", reason="An incident", by=audit.by_system("ada")))
    await set_budget("site", USD)
    assert await switches() == [("site", True)]


# --- what a budget may say -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "kept"),
    [
        (["80%", "50 %", "100%", "80%"], ["50%", "80%", "100%"]),
        (["$1,000", "500", "$100.50"], ["$100.50", "$500.00", "$1,000.00"]),
        (["12.5%", "$0.000000001"], ["12.5%", "$0.000000001"]),
        ([], []),
    ],
)
def test_thresholds_are_kept_in_one_form(texts, kept):
    assert budgets.parse_thresholds(texts, has_limit=True) == kept
    assert budgets.parse_thresholds(kept, has_limit=True) == kept


@pytest.mark.parametrize("text", ["", "abc", "0%", "1001%", "-5", "$0", "$9000001", "1e3", "5%%", "$-1", "NaN", "٣%"])
def test_thresholds_that_cannot_be_are_refused(text):
    with pytest.raises(AiscaleError) as refusal:
        budgets.parse_thresholds([text], has_limit=True)
    assert refusal.value.param == "thresholds"


def test_a_percent_needs_a_limit():
    with pytest.raises(AiscaleError, match="this budget has none"):
        budgets.parse_thresholds(["50%"], has_limit=False)


@pytest.mark.parametrize(("text", "amount"), [("50%", 50), ("33.4%", 34), ("100%", 100), ("$0.000000005", 5)])
def test_a_percent_is_rounded_up(text, amount):
    assert budgets.threshold_nanousd(text, 100) == amount


async def test_scopes_that_name_nothing_are_refused(caller):
    def check() -> None:
        for scope in ("site", "plan:free", "model:any", f"organization:{caller.organization_id}"):
            budgets.check_scope(scope)
        for scope in (
            "",
            "site:x",
            "plan:none",
            "organization:org_x",
            "user:usr_x",
            "key:key_x",
            "cat:x",
            "model:",
            "model:a b",
        ):
            with pytest.raises(AiscaleError) as refusal:
                budgets.check_scope(scope)
            assert refusal.value.param == "scope"

    await on_thread(check)
