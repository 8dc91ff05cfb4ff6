"""Notice that a budget's threshold is passed, once a period: in the transaction of the charge that passed it.

The limit is a threshold of every budget that has one (``limit $100.00``): its row is written when the limit is reached, or when a request
was refused that would not have fitted even if nothing else had been running. For the site's budget that trips the kill switch, once a
period; it is released when the next period begins, when the budget is changed so that there is room again, or by hand (decision 0008).
"""

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from django.db import transaction
from django.db.models import Q

from aiscale.db import format_usd
from apps.accounts import audit
from apps.spend import budgets, killswitch, periods
from apps.spend.models import Budget, KillSwitch, SpendAlert
from apps.spend.periods import Span
from apps.spend.refusals import Exhausted
from apps.spend.totals import Moved, Total

log = logging.getLogger(__name__)


_ACTOR_PREFIX = "budget "


class Passing(NamedTuple):
    """Say that a threshold (its text) lies at ``amount_nanousd``."""

    text: str
    amount_nanousd: int


def note(moved: Iterable[Moved]) -> list[SpendAlert]:
    """Write an alert for each threshold that lies between what a total was and what it is. In the transaction that moved them.

    I/O: one SQL statement; a few more for each threshold that is passed.
    """
    by_key = {(item.total.scope, item.total.period): item for item in moved}
    if not by_key:
        return []
    now_ms = periods.now_ms()
    found = Budget.objects.filter(scope__in={scope for scope, _ in by_key})
    alerts = []
    for budget in found.filter(~Q(thresholds=[]) | Q(limit_nanousd__isnull=False)):
        item = by_key.get((budget.scope, budget.period))
        if item is not None:
            alerts += _note(budget, item.total, now_ms, above=item.before_nanousd)
    return alerts


def note_current(scope: str, spent: Iterable[Total]) -> list[SpendAlert]:
    """Write an alert for each threshold that was passed already, when a budget is new or was changed; let the site go on that one had
    stopped which has room again, or is gone. I/O: as `note`."""
    by_period = {total.period: total for total in spent}
    now_ms = periods.now_ms()
    alerts = []
    with transaction.atomic():
        rows = {budget.period: budget for budget in Budget.objects.filter(scope=scope)}
        if scope == budgets.SITE:
            _release_if_room(rows, by_period, now_ms)
        for period, budget in rows.items():
            if period in by_period:
                alerts += _note(budget, by_period[period], now_ms, above=-1)
    return alerts


def limit_text(limit_nanousd: int) -> str:
    """Name the limit as a threshold. With its amount: a limit that was raised is reached anew."""
    return f"limit {format_usd(limit_nanousd)}"


def is_exhausted(refused: Exhausted) -> bool:
    """Tell whether a refusal means that the budget is used up: the request would not have fitted even if nothing else had been running.

    The site's budget stops everybody, so one huge request does not count for it: only one of at most a hundredth of the limit.
    """
    if refused.spent_nanousd + refused.worst_nanousd <= refused.limit_nanousd:
        return False
    is_small = refused.worst_nanousd * 100 <= refused.limit_nanousd
    return refused.scope != budgets.SITE or is_small or refused.spent_nanousd >= refused.limit_nanousd


def note_refusal(refused: Exhausted) -> SpendAlert | None:
    """Write down that a budget refuses requests, once a period; the site's stops all of them. I/O: a few SQL statements."""
    budget = Budget.objects.filter(scope=refused.scope, period=refused.period).first()
    if budget is None:
        # the plan's limit of an organization: nobody asked to be told
        return None
    limit = budgets.limit_of(budget, periods.now_ms())
    if limit is None or refused.spent_nanousd + refused.worst_nanousd <= limit:
        # changed since
        return None
    span = periods.span_of(budget.period, budgets.zone_of(budget.time_zone), refused.ends_at_ms - 1)
    with transaction.atomic():
        return _write(budget, limit_text(limit), span, refused.spent_nanousd, limit)


def list_passings(budget: Budget, limit_nanousd: int | None) -> list[Passing]:
    """Return at which amounts a budget alerts."""
    passings = []
    for text in budget.thresholds:
        amount = budgets.threshold_nanousd(text, limit_nanousd)
        if amount is not None:
            passings.append(Passing(text, amount))
    if limit_nanousd is not None:
        passings.append(Passing(limit_text(limit_nanousd), limit_nanousd))
    return passings


def _note(budget: Budget, total: Total, now_ms: int, *, above: int) -> list[SpendAlert]:
    limit = budgets.limit_of(budget, now_ms)
    alerts = []
    for passing in list_passings(budget, limit):
        if above < passing.amount_nanousd <= total.spent_nanousd:
            alert = _write(budget, passing.text, total.span, total.spent_nanousd, limit)
            if alert is not None:
                alerts.append(alert)
    return alerts


def _write(budget: Budget, text: str, span: Span, spent_nanousd: int, limit_nanousd: int | None) -> SpendAlert | None:
    """Write one alert, and trip the site's kill switch when its limit is what was reached. None when it was written before."""
    alert, created = SpendAlert.objects.get_or_create(
        scope=budget.scope,
        period=budget.period,
        period_start=periods.to_datetime(span.start_ms),
        threshold=text,
        defaults={"budget_id": budget.public_id, "spent_nanousd": spent_nanousd, "limit_nanousd": limit_nanousd},
    )
    if not created:
        return None
    log.warning("a threshold is passed: %s", alert, extra={"event": "budget.threshold"})
    if budget.scope == budgets.SITE and limit_nanousd is not None and text == limit_text(limit_nanousd):
        _trip(budget, span.end_ms)
    return alert


def _trip(budget: Budget, end_ms: int) -> None:
    """Stop the site until its budget's next period. The reason names no money: everybody who is stopped reads it."""
    word = "daily" if budget.period == Budget.Period.DAILY else "monthly"
    killswitch.trip(
        budgets.SITE,
        reason=f"This service's {word} budget is used up",
        by=_actor(budget),
        until_at=periods.to_datetime(end_ms),
    )


def _release_if_room(rows: Mapping[str, Budget], spent: Mapping[str, Total], now_ms: int) -> None:
    switch = KillSwitch.objects.filter(scope=budgets.SITE, released_at__isnull=True).first()
    if switch is None or not switch.tripped_by.startswith(_ACTOR_PREFIX):
        return
    for period, budget in rows.items():
        limit = budgets.limit_of(budget, now_ms)
        total = spent.get(period)
        if switch.tripped_by == _actor(budget).name and limit is not None and total and total.spent_nanousd >= limit:
            return
    killswitch.release(budgets.SITE, by=audit.by_system("budgets"), reason="The budget has room again, or is gone")


def _actor(budget: Budget) -> audit.Actor:
    return audit.by_budget(budget.public_id, f"{_ACTOR_PREFIX}{budget.public_id} ({budget.period})")
