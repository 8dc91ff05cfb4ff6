"""Sum up for the admin's first page what the whole service spends, who spends most, and whom it refuses."""

from datetime import timedelta

import msgspec
from django.conf import settings
from django.db.models import Sum
from django.utils import timezone

from apps.accounts.models import Organization
from apps.spend import budgets, periods, totals
from apps.spend.models import Budget, RefusalCount, SpendTotal

TOP = 5
REFUSED_HOURS = 24


class SiteBudget(msgspec.Struct, frozen=True, kw_only=True):
    """State one budget of the whole service. ``limit_nanousd`` is None when it only alerts."""

    period: str
    spent_nanousd: int
    limit_nanousd: int | None

    @property
    def percent(self) -> int:
        """Return how much of it is used, 100 when that is more."""
        return min(self.spent_nanousd * 100 // self.limit_nanousd, 100) if self.limit_nanousd else 0


class Spender(msgspec.Struct, frozen=True, kw_only=True):
    """Name one organization, and what it spent in its month."""

    pk: int
    name: str
    plan: str
    spent_nanousd: int


class Money(msgspec.Struct, frozen=True, kw_only=True):
    """State what is charged to all organizations together, in the service's time zone."""

    time_zone: str
    today_nanousd: int
    month_nanousd: int
    budgets: list[SiteBudget]
    spenders: list[Spender]


def sum_up_money() -> Money:
    """I/O: some ten SQL statements, each for a few rows. The first one of a month sums up its records once."""
    now_ms, zone = periods.now_ms(), budgets.zone_of("")
    spans = {period: periods.span_of(period, zone, now_ms) for period in ("daily", "monthly")}
    found = totals.open_totals(budgets.SITE, spans)
    return Money(
        time_zone=str(settings.ENV.time_zone),
        today_nanousd=found["daily"].spent_nanousd,
        month_nanousd=found["monthly"].spent_nanousd,
        budgets=[_describe(budget, now_ms) for budget in Budget.objects.filter(scope=budgets.SITE).order_by("period")],
        spenders=_list_spenders(),
    )


def list_refusals() -> list[tuple[str, int]]:
    """List the codes of refusals of the last day, the most frequent first, with how often. I/O: one SQL statement, by its index."""
    since = timezone.now() - timedelta(hours=REFUSED_HOURS)
    rows = RefusalCount.objects.filter(hour__gte=since).values("code").annotate(total=Sum("count"))
    return [(row["code"], row["total"]) for row in rows.order_by("-total", "code")[:12]]


def _describe(budget: Budget, now_ms: int) -> SiteBudget:
    span = periods.span_of(budget.period, budgets.zone_of(budget.time_zone), now_ms)
    total = totals.open_totals(budgets.SITE, {budget.period: span})[budget.period]
    limit = budgets.limit_of(budget, now_ms)
    return SiteBudget(period=budget.get_period_display(), spent_nanousd=total.spent_nanousd, limit_nanousd=limit)


def _list_spenders() -> list[Spender]:
    now = timezone.now()
    current = SpendTotal.objects.filter(end_at__gt=now, start_at__lte=now, period=Budget.Period.MONTHLY)
    prefix = budgets.organization_scope("")
    most = current.filter(scope__startswith=prefix, spent_nanousd__gt=0).order_by("-spent_nanousd")[:TOP]
    spent = {row.scope.removeprefix(prefix): row.spent_nanousd for row in most}
    known = {each.public_id: each for each in Organization.objects.filter(public_id__in=spent).select_related("plan")}
    return [
        Spender(
            pk=organization.pk,
            name=organization.name,
            plan=organization.plan.name,
            spent_nanousd=amount,
        )
        for public_id, amount in spent.items()
        if (organization := known.get(public_id)) is not None
    ]
