"""Prove that usage records, ledger, totals and the gate's copies agree; say where they do not; mend the copies, never the ledger.

What is in Postgres is compared in one snapshot, so nothing that is on its way can look like a difference. The copies in Redis follow a
little later: a difference counts when it is still there after `PATIENCE_S` (`apps.spend.copies`).
"""

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

import msgspec
from django.db import connection
from django.utils import timezone

from aiscale.db import format_usd, snapshot
from apps.spend import carryover, periods, totals
from apps.spend.models import SpendTotal

LISTED = 50
"""Differences of one kind that are named one by one."""


class Kind(StrEnum):
    """Name what can differ. Those of the ledger are for a person: an adjusting entry mends them."""

    UNBALANCED = "transaction does not sum to zero"
    NOT_CHARGED = "usage record without its transaction"
    CHARGED_WRONGLY = "transaction that is not what its usage record cost"
    WITHOUT_RECORD = "transaction without its usage record"
    WRONG_SUM = "sum of usage is not the sum of the ledger"
    CORRECTIONS = "corrections are not what their transaction moved"
    GIVEN_BACK_TOO_MUCH = "request was given back more than it cost"
    NOT_CARRIED = "credit was not carried over"
    BURIED = "finished job could not be settled"
    TOTAL = "total of a budget is not what is recorded"
    COPY = "copy is not what its total says"
    HELD = "held amount is not the sum of its holds"
    HOLD = "hold without a living job"


MENDED = frozenset({Kind.TOTAL, Kind.COPY, Kind.HELD, Kind.HOLD})
"""Kinds that are copies of something else, and are made anew from it."""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """State one thing that does not agree. ``subject`` is its id or scope; ``pk`` the row of a total, ``nanousd`` what a hold holds."""

    kind: Kind
    subject: str
    detail: str
    pk: int = 0
    nanousd: int = 0
    scopes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.subject}: {self.detail}"


class Report(msgspec.Struct, kw_only=True):
    """Collect what was compared and what differed."""

    counts: dict[str, int] = {}
    differences: list[Difference] = []


_SPAN = "occurred_at >= %(since)s AND occurred_at < %(until)s"

_UNBALANCED = f"""
    SELECT t.public_id, coalesce(sum(e.amount_nanousd), 0), count(e.id)
    FROM (SELECT id, public_id FROM spend_ledgertransaction WHERE {_SPAN}) t
    LEFT JOIN spend_ledgerentry e ON e.transaction_id = t.id
    GROUP BY t.id, t.public_id HAVING coalesce(sum(e.amount_nanousd), 0) <> 0 OR count(e.id) < 2
"""  # noqa: S608 - this module's own text

_CHARGES = f"""
    SELECT u.job_id, u.organization_id, u.cost_nanousd, c.reference, c.account, c.amount, c.transactions
    FROM (SELECT job_id, organization_id, cost_nanousd FROM spend_usagerecord WHERE {_SPAN}) u
    FULL JOIN (
        SELECT t.reference, min(e.account) AS account, sum(e.amount_nanousd) AS amount, count(DISTINCT t.id) AS transactions
        FROM (SELECT id, reference FROM spend_ledgertransaction WHERE kind = 'usage' AND {_SPAN}) t
        JOIN spend_ledgerentry e ON e.transaction_id = t.id AND e.account LIKE 'organization:%%'
        GROUP BY t.reference
    ) c ON c.reference = u.job_id
    WHERE u.job_id IS NULL OR (c.reference IS NULL AND u.cost_nanousd <> 0)
        OR (c.reference IS NOT NULL AND (c.amount <> u.cost_nanousd OR c.account <> 'organization:' || u.organization_id
            OR c.transactions <> 1))
"""  # noqa: S608 - this module's own text

_SUMS = f"""
    SELECT coalesce(u.organization_id, substr(l.account, 14)), coalesce(u.cost, 0), coalesce(l.amount, 0)
    FROM (SELECT organization_id, sum(cost_nanousd) AS cost FROM spend_usagerecord WHERE {_SPAN} GROUP BY 1) u
    FULL JOIN (
        SELECT e.account, sum(e.amount_nanousd) AS amount
        FROM (SELECT account, amount_nanousd, transaction_id FROM spend_ledgerentry WHERE {_SPAN}) e
        JOIN spend_ledgertransaction t ON t.id = e.transaction_id AND t.kind = 'usage'
        WHERE e.account LIKE 'organization:%%' GROUP BY 1
    ) l ON l.account = 'organization:' || u.organization_id
    WHERE coalesce(u.cost, 0) <> coalesce(l.amount, 0)
"""  # noqa: S608 - this module's own text

_CORRECTIONS = f"""
    SELECT t.public_id, c.amount, e.amount
    FROM (SELECT id, public_id, kind FROM spend_ledgertransaction WHERE kind <> 'usage' AND {_SPAN}) t
    JOIN LATERAL (SELECT sum(amount_nanousd) AS amount, count(*) AS number FROM spend_correction WHERE transaction_id = t.id) c
        ON c.number > 0 OR t.kind = 'refund'
    JOIN LATERAL (
        SELECT sum(amount_nanousd) AS amount FROM spend_ledgerentry
        WHERE transaction_id = t.id AND account LIKE 'organization:%%'
    ) e ON true
    WHERE c.amount IS DISTINCT FROM e.amount
"""  # noqa: S608 - this module's own text

_GIVEN_BACK = f"""
    SELECT u.job_id, u.cost_nanousd, sum(c.amount_nanousd) FROM spend_correction c
    JOIN spend_usagerecord u ON u.id = c.usage_id WHERE u.{_SPAN}
    GROUP BY u.id HAVING u.cost_nanousd + sum(c.amount_nanousd) < 0
"""  # noqa: S608 - this module's own text


def check_ledger(since: datetime | None = None) -> Report:
    """Compare what Postgres holds: since a moment, or all of it. I/O: SQL in one snapshot; not inside of a transaction."""
    report = Report()
    parameters = {"since": since or datetime(1970, 1, 1, tzinfo=timezone.get_default_timezone())}
    parameters["until"] = timezone.now() + timedelta(days=1)
    with snapshot(), connection.cursor() as cursor:
        for name in ("spend_usagerecord", "spend_ledgertransaction"):
            cursor.execute(f"SELECT count(*) FROM {name} WHERE {_SPAN}", parameters)  # noqa: S608 - names of ours
            report.counts["usage records" if name == "spend_usagerecord" else "transactions"] = cursor.fetchone()[0]
        for statement, read in (
            (_UNBALANCED, _read_unbalanced),
            (_CHARGES, _read_charge),
            (_SUMS, _read_sum),
            (_CORRECTIONS, _read_corrections),
            (_GIVEN_BACK, _read_given_back),
        ):
            cursor.execute(statement, parameters)
            report.differences += [read(*row) for row in cursor.fetchmany(LISTED)]
        found = list(_check_totals(report))
        report.differences += found
        report.differences += list(_check_carried())
    return report


def mend_totals(differences: Iterable[Difference]) -> None:
    """Write the totals that differ anew from what is recorded. I/O: SQL; settlement waits meanwhile."""
    for difference in differences:
        if difference.kind is Kind.TOTAL:
            totals.restate(difference.pk)


def _check_totals(report: Report) -> Iterator[Difference]:
    """Compare the totals of periods that are not over. Moved in the transactions that move the ledger, they are exact in any snapshot."""
    rows = list(SpendTotal.objects.filter(end_at__gt=timezone.now(), start_at__lte=timezone.now()).order_by("pk"))
    report.counts["totals"] = len(rows)
    for row in rows:
        recorded = totals.sum_recorded(row.scope, row.start_at, row.end_at)
        if recorded != row.spent_nanousd:
            yield Difference(
                kind=Kind.TOTAL,
                subject=f"{row.scope} {row.period}",
                detail=f"{format_usd(row.spent_nanousd)} is kept, {format_usd(recorded)} is recorded",
                pk=row.pk,
                scopes=(row.scope,),
            )


def _check_carried() -> Iterator[Difference]:
    """Look for credit that stayed behind in a month that has been over for a day."""
    now = timezone.now()
    for month in carryover.list_months():
        _, end = periods.bounds(month)
        if now < end + carryover.ZONES_APART + timedelta(days=1):
            return
        for organization_id in carryover.list_due(month):
            left = carryover.count_left(organization_id, month)
            if left:
                detail = f"{format_usd(left)} is left in {month}"
                yield Difference(kind=Kind.NOT_CARRIED, subject=organization_id, detail=detail)


def _read_unbalanced(public_id: str, total: Any, entries: int) -> Difference:
    return Difference(
        kind=Kind.UNBALANCED, subject=public_id, detail=f"{entries} entries sum to {format_usd(int(total))}"
    )


def _read_charge(
    job_id: str | None,
    organization_id: str | None,
    cost: int | None,
    reference: str | None,
    account: str | None,
    amount: Any,
    transactions: int | None,
) -> Difference:
    if job_id is None:
        return Difference(
            kind=Kind.WITHOUT_RECORD, subject=str(reference), detail=f"{account} was charged {format_usd(int(amount))}"
        )
    if reference is None:
        return Difference(
            kind=Kind.NOT_CHARGED, subject=job_id, detail=f"{format_usd(int(cost or 0))} of {organization_id}"
        )
    return Difference(
        kind=Kind.CHARGED_WRONGLY,
        subject=job_id,
        detail=f"it cost {organization_id} {format_usd(int(cost or 0))}; {transactions} transactions charge {account} "
        f"{format_usd(int(amount))}",
    )


def _read_sum(organization_id: str, cost: Any, amount: Any) -> Difference:
    return Difference(
        kind=Kind.WRONG_SUM,
        subject=organization_id,
        detail=f"records sum to {format_usd(int(cost))}, the ledger's usage to {format_usd(int(amount))}",
    )


def _read_corrections(public_id: str, corrected: Any, moved: Any) -> Difference:
    return Difference(
        kind=Kind.CORRECTIONS,
        subject=public_id,
        detail=f"corrections sum to {format_usd(int(corrected or 0))}, the account moved by {format_usd(int(moved or 0))}",
    )


def _read_given_back(job_id: str, cost: int, corrected: Any) -> Difference:
    return Difference(
        kind=Kind.GIVEN_BACK_TOO_MUCH,
        subject=job_id,
        detail=f"it cost {format_usd(int(cost))}, and corrections sum to {format_usd(int(corrected))}",
    )
