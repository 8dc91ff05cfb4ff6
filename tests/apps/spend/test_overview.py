"""The admin's first page says what is spent, waits and was refused; each to those who may see it."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import Permission
from django.test import Client
from django.utils import timezone
from redis import Redis

from aiscale import redis as redis_clients
from aiscale.wire import keys
from apps.accounts.models import User
from apps.inference import overview as load_overview
from apps.spend import budgets, overview, periods, settlement, totals
from apps.spend.models import Budget, RefusalCount, UsageRecord
from tests.apps.conftest import Cast
from tests.apps.spend.cast import make_finished


def open_page(user: User) -> str:
    browser = Client()
    browser.force_login(user)
    return browser.get("/admin/").content.decode()


def make_staff(*permissions: str) -> User:
    user = User.objects.create_user("staff@example.com", "x", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    return user


def test_it_says_what_everybody_spends(cast: Cast, django_assert_max_num_queries) -> None:
    Budget.objects.create(scope="site", limit_nanousd=10**9, thresholds=["50%"], period="daily")
    overview.sum_up_money()
    # the gate opens an organization's month with its first request
    month = periods.span_of("monthly", budgets.zone_of(""), periods.now_ms())
    totals.open_totals(budgets.organization_scope(cast.organization.public_id), {"monthly": month})
    for _ in range(3):
        settlement.settle(make_finished(cast.organization.public_id))
    cost = sum(UsageRecord.objects.values_list("cost_nanousd", flat=True))
    with django_assert_max_num_queries(8):
        money = overview.sum_up_money()
    assert money.today_nanousd == money.month_nanousd == money.budgets[0].spent_nanousd == cost > 0
    assert money.budgets[0].percent == cost * 100 // 10**9
    assert [(each.name, each.spent_nanousd) for each in money.spenders] == [(cast.organization.name, cost)]


def test_it_counts_the_refusals_of_a_day(cast: Cast) -> None:
    now = timezone.now()
    for hours, organization, count in ((0, "org_a", 3), (5, "org_b", 4), (30, "org_a", 100)):
        RefusalCount.objects.create(
            organization_id=organization, code="rate_limited", hour=now - timedelta(hours=hours), count=count
        )
    RefusalCount.objects.create(organization_id="", code="killed", hour=now, count=9)
    assert overview.list_refusals() == [("killed", 9), ("rate_limited", 7)]


def test_it_says_what_waits(cast: Cast, client: Redis) -> None:
    client.zadd(keys.queue_depth("smollm2-135m-instruct"), {"job_a": 1, "job_b": 2})
    load = load_overview.look()
    assert load is not None
    waiting = {model.name: model.waiting for model in load.models}
    assert waiting["SmolLM2 135M Instruct"] == 2 and sum(waiting.values()) == 2
    text = 'aiscale_cache_lookups_total{level="l1",model="a",process="web"} 3.0\n'
    text += (
        'aiscale_cache_lookups_total{level="miss",model="a",process="web"} 1.0\naiscale_refusals_total{code="x"} 7.0\n'
    )
    lookups = load_overview._count_lookups(text)
    known = load_overview.Load(models=[], workers=[], lookups=lookups)
    assert (known.hit_percent, dict(lookups)["l1"]) == (75, 3)
    assert load_overview.Load(models=[], workers=[], lookups=[]).hit_percent is None


@pytest.mark.parametrize(
    ("permission", "there", "not_there"),
    [
        ("view_usagerecord", "overview-money", "overview-load"),
        ("view_model", "overview-load", "overview-money"),
        ("view_refusedrequest", "overview-refusals", "overview-money"),
    ],
)
def test_staff_see_what_they_may(cast: Cast, permission: str, there: str, not_there: str) -> None:
    page = open_page(make_staff(permission))
    assert there in page and not_there not in page
    assert "Set the most that all of it may cost" not in page


def test_it_opens_without_redis(cast: Cast, settings: Any, tmp_path: Path) -> None:
    url, settings.REDIS_URL = settings.REDIS_URL, f"unix://{tmp_path}/nobody.sock"
    redis_clients.get_sync.cache_clear()
    try:
        assert load_overview.look() is None
    finally:
        settings.REDIS_URL = url
        redis_clients.get_sync.cache_clear()
