"""Account for a span of days: what was used by day, model, key and person, and what else moved the balance.

A statement adds up to the ledger to the last nano-dollar: its usage lines and its entries sum to the organization's account over the same
days, read in one snapshot. Days are those of the time zone in which the organization's months are counted (`budgets.month_zone`), so
that a month's statement is what the month counts as spent.
"""

from collections.abc import Iterable, Iterator
from datetime import date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
from django.db.models import Count, Q, QuerySet, Sum
from django.db.models.functions import TruncDate

from aiscale.db import snapshot
from aiscale.errors import AiscaleError, Code
from apps.accounts.models import ApiKey, User
from apps.spend import budgets, ledger, periods
from apps.spend.models import LedgerEntry, UsageRecord

MAX_DAYS = 366


class Days(msgspec.Struct, frozen=True, kw_only=True):
    """Be a span of days in a time zone: from the first until the last, both included. ``month`` is set when it is exactly one."""

    first: date
    last: date
    zone: str
    month: str = ""

    @property
    def start(self) -> datetime:
        return periods.days_bounds(self.first, self.last, self.zone)[0]

    @property
    def end(self) -> datetime:
        """The first moment that no longer belongs to it."""
        return periods.days_bounds(self.first, self.last, self.zone)[1]

    def __iter__(self) -> Iterator[date]:
        return (self.first + timedelta(days=number) for number in range((self.last - self.first).days + 1))


class UsageLine(msgspec.Struct, frozen=True, kw_only=True):
    """Sum up what one key (or a person in the browser: '') used of one model on one day.

    ``cache_hits`` are requests whose whole answer was known; ``saved_nanousd`` is what these, and parts that were known, cost less.
    """

    date: date
    model: str
    key_id: str
    user_id: str
    requests: int
    failed_requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_nanousd: int
    cache_hits: int = 0
    saved_nanousd: int = 0


class EntryLine(msgspec.Struct, frozen=True, kw_only=True):
    """State one movement that is not usage: a credit, a refund, an adjustment, what was carried over."""

    transaction_id: str
    kind: str
    occurred_at: datetime
    memo: str
    amount_nanousd: int


class Statement(msgspec.Struct, frozen=True, kw_only=True):
    """Account for ``days``. ``ledger_nanousd`` is what the ledger says of the same days; None when only one person's usage is told."""

    organization_id: str
    days: Days
    usage: list[UsageLine]
    entries: list[EntryLine]
    ledger_nanousd: int | None

    @property
    def usage_nanousd(self) -> int:
        return sum(line.cost_nanousd for line in self.usage)

    @property
    def entries_nanousd(self) -> int:
        return sum(line.amount_nanousd for line in self.entries)

    @property
    def total_nanousd(self) -> int:
        return self.usage_nanousd + self.entries_nanousd

    @property
    def requests(self) -> int:
        return sum(line.requests for line in self.usage)

    @property
    def cache_hits(self) -> int:
        return sum(line.cache_hits for line in self.usage)

    @property
    def saved_nanousd(self) -> int:
        return sum(line.saved_nanousd for line in self.usage)

    @property
    def tokens(self) -> int:
        return sum(line.prompt_tokens + line.completion_tokens for line in self.usage)


def read_days(
    organization_id: str, month: str | None = None, first: str | None = None, last: str | None = None
) -> Days:
    """Read a month (``YYYY-MM``) or a first and a last day (``YYYY-MM-DD``) of an organization; without any, this month.

    I/O: one SQL statement. Raises: AiscaleError (INVALID_REQUEST).
    """
    zone = budgets.month_zone(organization_id)
    if month and (first or last):
        raise _invalid("month", "Give either a month, or from and to.")
    if first or last:
        days = Days(first=_read_date("from", first), last=_read_date("to", last), zone=zone)
        if days.last < days.first:
            raise _invalid("to", "The last day comes before the first.")
        if (days.last - days.first).days >= MAX_DAYS:
            raise _invalid("to", f"A statement covers at most {MAX_DAYS} days. Choose fewer.")
        return days
    month = month or this_month(zone)
    try:
        begin = datetime.strptime(month, "%Y-%m").date()  # noqa: DTZ007 - a month has no time zone
    except ValueError:
        raise _invalid("month", f"{month[:20]!r} is no month. Write it as 2026-11.") from None
    _check_year("month", begin)
    following = (begin + timedelta(days=32)).replace(day=1)
    return Days(first=begin, last=following - timedelta(days=1), zone=zone, month=f"{begin:%Y-%m}")


def this_month(zone: str) -> str:
    return periods.month_of(periods.now_ms(), zone)


def build(organization_id: str, days: Days, *, user_id: str = "") -> Statement:
    """Make the statement of an organization, or of what one of its people used.

    I/O: three SQL statements in one snapshot; not inside a transaction.
    """
    with snapshot():
        lines = list_usage(organization_id, days, user_id=user_id)
        entries = [] if user_id else list_entries(organization_id, days.start, days.end)
        total = None if user_id else ledger.sum_between(organization_id, days.start, days.end)
    return Statement(organization_id=organization_id, days=days, usage=lines, entries=entries, ledger_nanousd=total)


def list_usage(organization_id: str, days: Days, *, user_id: str = "") -> list[UsageLine]:
    """Sum up usage by day, model, key and person. I/O: one SQL statement."""
    rows = (
        filter_records(organization_id, days.start, days.end, user_id=user_id)
        .annotate(day=TruncDate("occurred_at", tzinfo=ZoneInfo(days.zone)))
        .values("day", "model", "key_id", "user_id")
        .annotate(
            requests=Count("pk"),
            failed_requests=Count("pk", filter=Q(finish_reason="error")),
            prompt_tokens_sum=Sum("prompt_tokens"),
            cached_tokens_sum=Sum("cached_tokens"),
            completion_tokens_sum=Sum("completion_tokens"),
            cost_nanousd_sum=Sum("cost_nanousd"),
            cache_hits=Count("pk", filter=~Q(cache="")),
            saved_nanousd_sum=Sum("saved_nanousd"),
        )
        .order_by("day", "model", "key_id", "user_id")
    )
    return [
        UsageLine(
            date=row["day"],
            model=row["model"],
            key_id=row["key_id"],
            user_id=row["user_id"],
            requests=row["requests"],
            failed_requests=row["failed_requests"],
            prompt_tokens=int(row["prompt_tokens_sum"]),
            cached_tokens=int(row["cached_tokens_sum"]),
            completion_tokens=int(row["completion_tokens_sum"]),
            cost_nanousd=int(row["cost_nanousd_sum"]),
            cache_hits=row["cache_hits"],
            saved_nanousd=int(row["saved_nanousd_sum"]),
        )
        for row in rows
    ]


def list_entries(organization_id: str, start: datetime, end: datetime) -> list[EntryLine]:
    """List what moved the organization's account besides usage. I/O: one SQL statement."""
    rows = (
        LedgerEntry.objects.filter(
            account=ledger.organization_account(organization_id),
            occurred_at__gte=start,
            occurred_at__lt=end,
            transaction__created_at__gte=start - timedelta(days=1),
        )
        .exclude(transaction__kind="usage")
        .order_by("occurred_at", "pk")
        .select_related("transaction")
    )
    return [
        EntryLine(
            transaction_id=row.transaction.public_id,
            kind=row.transaction.kind,
            occurred_at=row.occurred_at,
            memo=row.transaction.memo,
            amount_nanousd=row.amount_nanousd,
        )
        for row in rows
    ]


def filter_records(
    organization_id: str, start: datetime, end: datetime, *, user_id: str = ""
) -> "QuerySet[UsageRecord]":
    """Keep the usage records of an organization (and person) in a span of time. I/O: none yet."""
    found = UsageRecord.objects.filter(organization_id=organization_id, occurred_at__gte=start, occurred_at__lt=end)
    return found.filter(user_id=user_id) if user_id else found


def roll_up(lines: Iterable[UsageLine], field: str) -> dict[object, UsageLine]:
    """Sum usage lines up by one of their fields; the biggest cost first (days in their order). The other names are empty."""
    sums: dict[object, UsageLine] = {}
    for line in lines:
        value = getattr(line, field)
        known = sums.get(value)
        names: dict[str, Any] = {"date": line.date, "model": "", "key_id": "", "user_id": "", field: value}
        counts: dict[str, Any] = {
            name: getattr(line, name) + (getattr(known, name) if known else 0)
            for name in UsageLine.__struct_fields__
            if name not in names
        }
        sums[value] = UsageLine(**names, **counts)
    if field == "date":
        return sums
    return dict(sorted(sums.items(), key=lambda item: -item[1].cost_nanousd))


def name_keys(key_ids: Iterable[str]) -> dict[str, str]:
    """Return what keys are called, by their ids; '' is the browser. I/O: one SQL statement."""
    rows = ApiKey.objects.filter(public_id__in=set(key_ids) - {""}).values_list("public_id", "name", "hint")
    return {"": "Chat in the browser"} | {
        key_id: f"{name} (…{hint})" if name else f"…{hint}" for key_id, name, hint in rows
    }


def name_users(user_ids: Iterable[str]) -> dict[str, str]:
    """Return people's addresses by their ids. I/O: one SQL statement."""
    return dict(User.objects.filter(public_id__in=set(user_ids) - {""}).values_list("public_id", "email"))


def _read_date(param: str, text: str | None) -> date:
    try:
        day = date.fromisoformat((text or "").strip())
    except ValueError:
        raise _invalid(param, f"Give {param} as a day, such as 2026-11-24.") from None
    _check_year(param, day)
    return day


def _check_year(param: str, day: date) -> None:
    if not 2000 <= day.year <= 9000:
        raise _invalid(param, f"Nothing can be accounted for in the year {day.year}.")


def _invalid(param: str, message: str) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, message, param=param)
