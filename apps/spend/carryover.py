"""Carry credit that a month has not used into the next one.

A month counts charges less credits (`ledger.sum_charges`), in the time zone of the organization's monthly budget. When that is negative
at its end, the organization has credit left, and the next month begins with it: two transactions of the same amount, the last moment of
the old month and the first of the new one, over the account ``carried:<id>``. A charge that is settled after that makes less be left
over; the difference is posted the same way, so running this again and again ends at the same sums.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import Count, Sum

from apps.spend import budgets, ledger, periods
from apps.spend.models import LedgerEntry, LedgerTransaction

LAST_MOMENT = timedelta(microseconds=1)
ZONES_APART = timedelta(hours=26)
"""No two time zones begin a month further apart."""
_KIND = LedgerTransaction.Kind.CARRYOVER.value

_settled: set[tuple[str, str]] = set()
"""Organizations and months, the last one excepted, that this process has looked at: no late charge comes for them any more."""


def carry(organization_id: str, month: str) -> int:
    """Bring what is left over of ``month`` into the next one. Returns what was moved now, 0 when all had been.

    The month must be over. I/O: SQL. Idempotent. Raises: ValueError for a month that is not over; django.db.Error.
    """
    zone = budgets.month_zone(organization_id)
    start, end = periods.bounds(month, zone)
    if end > periods.to_datetime(periods.now_ms()):
        raise ValueError(f"{month} is not over")
    with transaction.atomic():
        ledger.lock(organization_id)
        moved_nanousd, count = _read_moved(organization_id, end)
        difference = _count_left(organization_id, start, end, moved_nanousd)
        if difference:
            ledger.post(_make_postings(organization_id, month, zone, count, difference))
    return difference


def count_left(organization_id: str, month: str) -> int:
    """Return the credit that is left in a month and was not carried over (or, negative, what was carried too much). I/O: SQL."""
    start, end = periods.bounds(month, budgets.month_zone(organization_id))
    moved_nanousd, _ = _read_moved(organization_id, end)
    return _count_left(organization_id, start, end, moved_nanousd)


def carry_if_due(organization_id: str) -> None:
    """Do `carry` for the month before this one, if the organization can have credit left of it.

    I/O: one SQL statement; more for organizations with credits, refunds or adjustments.
    """
    now_ms = periods.now_ms()
    month = periods.month_before(periods.month_of(now_ms, budgets.month_zone(organization_id)))
    if organization_id in list_due(month, [organization_id]):
        carry(organization_id, month)


def list_due(month: str, organization_ids: Iterable[str] | None = None) -> list[str]:
    """List the organizations (of those given, or all) that can have credit left of ``month``: to whom something other than usage was
    posted in it, wherever its month begins. I/O: one SQL statement."""
    start, end = periods.bounds(month)
    start, end = start - ZONES_APART, end + ZONES_APART
    found = LedgerEntry.objects.filter(account__startswith="organization:", occurred_at__gte=start, occurred_at__lt=end)
    if organization_ids is not None:
        found = LedgerEntry.objects.filter(
            account__in=[ledger.organization_account(name) for name in organization_ids],
            occurred_at__gte=start,
            occurred_at__lt=end,
        )
    # a transaction is written when it occurs or later: this condition lets the small index answer
    posted = found.filter(transaction__created_at__gte=start - timedelta(days=1)).exclude(transaction__kind="usage")
    accounts = posted.order_by("account").values_list("account", flat=True).distinct()
    return [account.partition(":")[2] for account in accounts]


def carry_all() -> int:
    """Do `carry` for every organization and month that may be due. Returns how many sums moved.

    I/O: a few SQL statements for each month since the first correction; months before the last are looked at once by each process, so
    that a time in which nothing ran is made up for.
    """
    moved = 0
    months = list_months()
    for month in months:
        for organization_id in list_due(month):
            if (organization_id, month) not in _settled and _is_over(organization_id, month):
                moved += bool(carry(organization_id, month))
                if month != months[-1]:
                    _settled.add((organization_id, month))
    return moved


def list_months() -> list[str]:
    """List the months before this one that can have credit to be carried over, oldest first. I/O: one SQL statement."""
    first = LedgerTransaction.objects.exclude(kind="usage").order_by("created_at").first()
    if first is None:
        return []
    this_month = periods.month_of(periods.now_ms())
    months = [f"{first.occurred_at:%Y-%m}"]
    while months[-1] < this_month:
        months.append(periods.month_after(months[-1]))
    return [month for month in months if month < this_month]


def _read_moved(organization_id: str, end: datetime) -> tuple[int, int]:
    """Return what was carried over at the end of a month so far, and in how many transactions."""
    moved = LedgerEntry.objects.filter(
        account=ledger.organization_account(organization_id), occurred_at=end - LAST_MOMENT, transaction__kind=_KIND
    ).aggregate(total=Sum("amount_nanousd"), count=Count("pk"))
    return int(moved["total"] or 0), moved["count"]


def _count_left(organization_id: str, start: datetime, end: datetime, moved_nanousd: int) -> int:
    left_nanousd = max(moved_nanousd - ledger.sum_between(organization_id, start, end), 0)
    return left_nanousd - moved_nanousd


def _is_over(organization_id: str, month: str) -> bool:
    _, end = periods.bounds(month, budgets.month_zone(organization_id))
    return end <= periods.to_datetime(periods.now_ms())


def _make_postings(
    organization_id: str, month: str, zone: str, number: int, amount_nanousd: int
) -> list[ledger.Posting]:
    _, end = periods.bounds(month, zone)
    account, bridge = ledger.organization_account(organization_id), f"carried:{organization_id}"
    following = periods.month_after(month)
    sides = (
        (
            f"{organization_id}:{month}:{zone}:{number}:out",
            end - LAST_MOMENT,
            amount_nanousd,
            f"Carried over to {following}",
        ),
        (f"{organization_id}:{month}:{zone}:{number}:in", end, -amount_nanousd, f"Carried over from {month}"),
    )
    return [
        ledger.Posting(
            kind=_KIND,
            reference=reference,
            occurred_at=moment,
            entries=((account, amount), (bridge, -amount)),
            memo=memo,
        )
        for reference, moment, amount, memo in sides
    ]
