"""Keep what each scope spent in the periods of its budgets: a row (`SpendTotal`) for each, moved in the transaction that moves the ledger.

So the gate's copies in Redis need no arithmetic of their own: each is a row with its ``revision``, and the newer one wins, in whatever
order they arrive, and however often. A copy that was lost is read from one row; nothing is summed up on the way.

A row must neither miss a charge that was committed while it was made, nor count it twice. Whoever moves totals holds an advisory lock
of Postgres, shared, until they commit; whoever makes a row (once a period and scope) holds it alone, sums up what is committed, and
writes the sum. Rows are locked in the order of their ids, so that two movers cannot deadlock (M8). Two settlements wait for each
other's rows for as long as a commit takes, once for up to 500 jobs; no request ever waits for one (D4).
"""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

from django.db import connection, transaction
from django.db.models import Sum
from django.utils import timezone

from apps.spend import periods
from apps.spend.models import Correction, LedgerEntry, SpendTotal, UsageRecord
from apps.spend.periods import Span

_ADVISORY_LOCK = 7_146_003
"""Any number nobody else uses."""


class Delta(NamedTuple):
    """Say by how much a scope's spending changes, and when that counts."""

    scope: str
    occurred_at: datetime
    amount_nanousd: int


class Total(NamedTuple):
    """State what a scope spent in one period, as of a revision of its row."""

    scope: str
    period: str
    span: Span
    spent_nanousd: int
    revision: int


class Moved(NamedTuple):
    """Say that a total changed, and what it was before."""

    before_nanousd: int
    total: Total


def add(deltas: Iterable[Delta]) -> list[Moved]:
    """Move the totals of all scopes and periods in which ``deltas`` lie. Call it in the transaction that posts them to the ledger.

    I/O: three SQL statements, whatever the number. Raises: TransactionManagementError outside of a transaction.
    """
    by_scope: dict[str, list[Delta]] = {}
    for delta in deltas:
        by_scope.setdefault(delta.scope, []).append(delta)
    if not by_scope:
        return []
    if not connection.in_atomic_block:
        raise transaction.TransactionManagementError("totals move in the transaction that moves the ledger: begin one")
    times = [delta.occurred_at for group in by_scope.values() for delta in group]
    _lock(shared=True)
    rows = SpendTotal.objects.select_for_update().filter(
        scope__in=by_scope, start_at__lte=max(times), end_at__gt=min(times)
    )
    amounts: dict[int, int] = {}
    moved = []
    for row in rows.order_by("pk"):
        inside = [d.amount_nanousd for d in by_scope[row.scope] if row.start_at <= d.occurred_at < row.end_at]
        if inside:
            amounts[row.pk] = sum(inside)
            total = _make_total(row)
            moved.append(
                Moved(
                    row.spent_nanousd,
                    total._replace(spent_nanousd=row.spent_nanousd + amounts[row.pk], revision=row.revision + 1),
                )
            )
    if amounts:
        _update(amounts)
    return moved


def read(scopes: Iterable[str], at_ms: int) -> list[Total]:
    """Return the totals of the periods in which the moment ``at_ms`` lies. I/O: one SQL statement."""
    at = periods.to_datetime(at_ms)
    rows = SpendTotal.objects.filter(scope__in=list(scopes), start_at__lte=at, end_at__gt=at)
    return [_make_total(row) for row in rows]


def list_changed(within_s: int, at_ms: int) -> list[Total]:
    """Return the current totals that moved in the last seconds. I/O: one SQL statement."""
    at = periods.to_datetime(at_ms)
    rows = SpendTotal.objects.filter(updated_at__gt=at - timedelta(seconds=within_s), start_at__lte=at, end_at__gt=at)
    return [_make_total(row) for row in rows]


def open_totals(scope: str, spans: Mapping[str, Span]) -> dict[str, Total]:
    """Return a scope's totals of the given periods, making those that are not there yet from what is recorded.

    Not inside of a transaction: the lock lasts until it ends. I/O: one SQL statement; three more and a sum for each that is made.
    """
    found = _find(scope, spans)
    missing = [period for period in spans if period not in found]
    if missing:
        with transaction.atomic():
            _lock(shared=False)
            SpendTotal.objects.bulk_create(
                [_make_row(scope, period, spans[period]) for period in missing], ignore_conflicts=True
            )
        found = _find(scope, spans)
    return found


def open_following(at_ms: int, spans: Mapping[tuple[str, str], Span]) -> int:
    """Make the rows of periods that lie wholly ahead: nothing can have been spent in them, so nobody has to wait. Returns how many.

    ``spans`` names the period that follows, for each scope and period. I/O: one SQL statement.
    """
    rows = [
        SpendTotal(scope=scope, period=period, start_at=start, end_at=end)
        for (scope, period), span in spans.items()
        for start, end in [(periods.to_datetime(span.start_ms), periods.to_datetime(span.end_ms))]
        if span.start_ms > at_ms
    ]
    return len(SpendTotal.objects.bulk_create(rows, ignore_conflicts=True))


def restate(pk: int) -> None:
    """Write one total anew from what is recorded, whatever it said. Nobody settles meanwhile. Not inside of a transaction.

    I/O: a sum and three SQL statements.
    """
    with transaction.atomic():
        _lock(shared=False)
        row = SpendTotal.objects.select_for_update().filter(pk=pk).first()
        if row is not None:
            row.spent_nanousd = sum_recorded(row.scope, row.start_at, row.end_at)
            row.revision += 1
            row.updated_at = timezone.now()
            row.save(update_fields=["spent_nanousd", "revision", "updated_at"])


def sum_recorded(scope: str, start: datetime, end: datetime) -> int:
    """Sum up what a scope spent from ``start`` until before ``end``: an organization by its account in the ledger, which has credits too;
    all others by the usage records, and the corrections of such records that were made in that time. I/O: one or two SQL statements."""
    kind, _, name = scope.partition(":")
    if kind == "organization":
        entries = LedgerEntry.objects.filter(account=scope, occurred_at__gte=start, occurred_at__lt=end)
        total = entries.aggregate(total=Sum("amount_nanousd"))["total"]
    else:
        column = {"plan": "plan", "model": "model", "user": "user_id", "key": "key_id"}
        records = UsageRecord.objects.filter(occurred_at__gte=start, occurred_at__lt=end)
        made = Correction.objects.filter(transaction__occurred_at__gte=start, transaction__occurred_at__lt=end)
        # written when it occurred: this condition lets the small index answer
        made = made.filter(transaction__created_at__gte=start - timedelta(days=1)).exclude(transaction__kind="usage")
        if kind in column:
            records = records.filter(**{column[kind]: name})
            made = made.filter(**{f"usage__{column[kind]}": name})
        total = records.aggregate(total=Sum("cost_nanousd"))["total"] or 0
        total += made.aggregate(total=Sum("amount_nanousd"))["total"] or 0
    return int(total or 0)


def _find(scope: str, spans: Mapping[str, Span]) -> dict[str, Total]:
    totals = [_make_total(row) for row in SpendTotal.objects.filter(scope=scope, end_at__gt=_earliest(spans.values()))]
    return {total.period: total for total in totals if spans.get(total.period) == total.span}


def _earliest(spans: Iterable[Span]) -> datetime:
    return periods.to_datetime(min(span.start_ms for span in spans))


def _make_row(scope: str, period: str, span: Span) -> SpendTotal:
    start, end = periods.to_datetime(span.start_ms), periods.to_datetime(span.end_ms)
    return SpendTotal(
        scope=scope, period=period, start_at=start, end_at=end, spent_nanousd=sum_recorded(scope, start, end)
    )


def _make_total(row: SpendTotal) -> Total:
    span = Span(int(row.start_at.timestamp() * 1000), int(row.end_at.timestamp() * 1000))
    return Total(row.scope, row.period, span, row.spent_nanousd, row.revision)


def _lock(*, shared: bool) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT pg_advisory_xact_lock{'_shared' if shared else ''}(%s)", [_ADVISORY_LOCK])


def _update(amounts: Mapping[int, int]) -> None:
    ids = list(amounts)
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            UPDATE {SpendTotal._meta.db_table} AS total
            SET spent_nanousd = total.spent_nanousd + moved.amount, revision = total.revision + 1, updated_at = %s
            FROM unnest(%s::bigint[], %s::bigint[]) AS moved (id, amount) WHERE total.id = moved.id
            """,  # noqa: S608 - the table's name is Django's
            [timezone.now(), ids, [amounts[pk] for pk in ids]],
        )
