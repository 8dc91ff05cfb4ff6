"""Post to the ledger: double entry, append only.

Accounts (positive is a debit):

- ``organization:<id>``: what the organization used, less what it was credited or given back. Its sum over a month is what the month
  counts as spent: for the gate, the pages and the statement alike (M5).
- ``revenue:usage``: the other side of usage, refunds and adjustments.
- ``cash:prepaid``, ``expense:goodwill``: the other side of credits.
- ``carried:<id>``: the bridge over which unused credit goes from one month into the next; its sum is zero.

The database refuses to change or delete what was posted, and refuses a transaction whose entries do not sum to zero (migration 0002).
Rows are only ever inserted: two posters cannot wait for each other's rows (M8). The totals of budgets, which move in the same transaction,
are locked in one order (`apps.spend.totals`).
"""

from collections.abc import Iterable, Sequence
from datetime import datetime

import msgspec
from django.db import connection, transaction
from django.db.models import Sum
from django.utils import timezone

from aiscale.db import make_public_id
from apps.spend import budgets, holds, periods, thresholds, totals
from apps.spend.models import LedgerEntry, LedgerTransaction
from apps.spend.totals import Delta, Moved

REVENUE_ACCOUNT = "revenue:usage"
PREPAID_ACCOUNT = "cash:prepaid"
GOODWILL_ACCOUNT = "expense:goodwill"
_ADVISORY_LOCK = 7_146_002
"""Seeds the Postgres advisory lock of an organization; the trigger of migration spend.0005 takes the same."""

# One statement and one parameter for any number of transactions: settlement writes thousands a second.
_INSERT = f"""
    WITH asked AS (
        SELECT * FROM json_to_recordset(%s::json)
        AS asked (public_id text, kind text, reference text, memo text, occurred_at timestamptz, entries json)
    ), posted AS (
        INSERT INTO {LedgerTransaction._meta.db_table} (public_id, kind, reference, memo, occurred_at, created_at, updated_at)
        SELECT public_id, kind, reference, memo, occurred_at, now.at, now.at FROM asked, (SELECT %s::timestamptz AS at) AS now
        ORDER BY kind, reference
        RETURNING id, public_id
    ), moved AS (
        INSERT INTO {LedgerEntry._meta.db_table} (transaction_id, account, amount_nanousd, occurred_at)
        SELECT posted.id, entry ->> 0, (entry ->> 1)::bigint, asked.occurred_at
        FROM posted JOIN asked USING (public_id), json_array_elements(asked.entries) AS entry
    )
    SELECT id, public_id FROM posted
"""  # noqa: S608 - names are this module's own, values are parameters


class Posting(msgspec.Struct, frozen=True, kw_only=True):
    """Describe one transaction. ``entries`` are (account, nano-USD) and sum to zero.

    An entry on an organization's account counts in that organization's budgets; ``scopes`` names others in which all of it counts,
    ``shares`` those in which an amount of its own does.
    """

    kind: str
    reference: str
    occurred_at: datetime
    entries: tuple[tuple[str, int], ...]
    memo: str = ""
    scopes: tuple[str, ...] = ()
    shares: tuple[tuple[str, int], ...] = ()


def organization_account(organization_id: str) -> str:
    return f"organization:{organization_id}"


def usage_posting(
    organization_id: str, job_id: str, cost_nanousd: int, occurred_at: datetime, scopes: Sequence[str] = ()
) -> Posting:
    """Describe what one job costs: the organization owes it, revenue earns it; it counts in ``scopes`` too."""
    return Posting(
        kind=LedgerTransaction.Kind.USAGE.value,
        reference=job_id,
        occurred_at=occurred_at,
        entries=((organization_account(organization_id), cost_nanousd), (REVENUE_ACCOUNT, -cost_nanousd)),
        scopes=tuple(scope for scope in scopes if scope != organization_account(organization_id)),
    )


def post(postings: Sequence[Posting]) -> list[LedgerTransaction]:
    """Write transactions with their entries, all or none, and move the totals of budgets: at the gate once it is committed.

    I/O: one insert and three statements for the totals, whatever the number; one Redis trip. Raises: ValueError for entries that do not
    sum to zero; django.db.IntegrityError for a reference that was posted already.
    """
    with transaction.atomic(savepoint=False):
        rows = insert(postings)
        holds.push_on_commit([item.total for item in move_totals(postings)])
    return rows


def write(postings: Sequence[Posting]) -> list[Moved]:
    """Do `post` without telling the gate: for who does that in the step that ends the holds. Inside of a transaction."""
    _insert(postings)
    return move_totals(postings)


def insert(postings: Sequence[Posting]) -> list[LedgerTransaction]:
    """Write transactions with their entries, and leave the totals to `move_totals`: for who has much to do in between, since nobody can
    settle while totals are locked. I/O: one insert. Raises: as `post`."""
    return [
        LedgerTransaction(
            pk=pk,
            public_id=public_id,
            kind=posting.kind,
            reference=posting.reference,
            memo=posting.memo,
            occurred_at=posting.occurred_at,
        )
        for posting, (pk, public_id) in zip(postings, _insert(postings), strict=True)
    ]


def _insert(postings: Sequence[Posting]) -> list[tuple[int, str]]:
    """Write rows and their entries. Returns the primary key and the public id of each, in order."""
    for posting in postings:
        if len(posting.entries) < 2 or sum(amount for _, amount in posting.entries) != 0:
            raise ValueError(f"the entries of {posting.kind} {posting.reference} do not balance: {posting.entries}")
    public_ids = [make_public_id(LedgerTransaction.PUBLIC_ID_PREFIX) for _ in postings]
    asked = [
        {
            "public_id": public_id,
            "kind": posting.kind,
            "reference": posting.reference,
            "memo": posting.memo,
            "occurred_at": posting.occurred_at,
            "entries": posting.entries,
        }
        for public_id, posting in zip(public_ids, postings, strict=True)
    ]
    with connection.cursor() as cursor:
        cursor.execute(_INSERT, [msgspec.json.encode(asked).decode(), timezone.now()])
        made = {public_id: pk for pk, public_id in cursor.fetchall()}
    return [(made[public_id], public_id) for public_id in public_ids]


def move_totals(postings: Iterable[Posting]) -> list[Moved]:
    """Move the totals of budgets by what was inserted, in the same transaction. I/O: three SQL statements."""
    moved = totals.add(delta for posting in postings for delta in _list_deltas(posting))
    thresholds.note(moved)
    return moved


def _list_deltas(posting: Posting) -> list[Delta]:
    own = [(account, amount) for account, amount in posting.entries if account.startswith("organization:")]
    cost = sum(amount for _, amount in own)
    others = [*((scope, cost) for scope in posting.scopes), *posting.shares]
    return [Delta(scope, posting.occurred_at, amount) for scope, amount in own + others]


def lock(organization_id: str) -> None:
    """Let one transaction at a time correct an organization's charges; released when it ends. Settlement does not wait for it.

    I/O: one SQL statement. Raises: TransactionManagementError outside of a transaction.
    """
    if not connection.in_atomic_block:
        raise transaction.TransactionManagementError("the lock lasts as long as a transaction: begin one")
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, %s))", [organization_id, _ADVISORY_LOCK])


def sum_charges(organization_id: str, month: str) -> int:
    """Return what a month (``YYYY-MM``, in the organization's time zone) counts as spent, in nano-USD: charges less credits, refunds and
    what was carried over.

    Negative when more was credited than used. I/O: two SQL statements, the sum by its index alone.
    """
    return sum_between(organization_id, *periods.bounds(month, budgets.month_zone(organization_id)))


def sum_this_month(organization_id: str) -> int:
    """Do `sum_charges` for the month that it is there now. I/O: as `sum_charges`."""
    zone = budgets.month_zone(organization_id)
    start, end = periods.span_of("monthly", zone, periods.now_ms())
    return sum_between(organization_id, periods.to_datetime(start), periods.to_datetime(end))


def sum_between(organization_id: str, start: datetime, end: datetime) -> int:
    """Return the sum of the organization's account from ``start`` until before ``end``. I/O: one index-only SQL statement."""
    total = LedgerEntry.objects.filter(
        account=organization_account(organization_id), occurred_at__gte=start, occurred_at__lt=end
    ).aggregate(total=Sum("amount_nanousd"))["total"]
    return int(total or 0)
