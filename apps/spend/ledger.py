"""Post to the ledger: double entry, append only.

Accounts: ``organization:<id>`` is debited with what the organization used, ``revenue:usage`` credited with the same. The database
refuses to change or delete what was posted, and refuses a transaction whose entries do not sum to zero (migration 0002). Rows are
only ever inserted: two posters cannot wait for each other's rows (M8).
"""

from collections.abc import Sequence
from datetime import datetime

import msgspec
from django.db import transaction
from django.db.models import Sum

from aiscale.db import make_public_id
from apps.spend import periods
from apps.spend.models import LedgerEntry, LedgerTransaction

REVENUE_ACCOUNT = "revenue:usage"


class Posting(msgspec.Struct, frozen=True, kw_only=True):
    """Describe one transaction. ``entries`` are (account, nano-USD) and sum to zero."""

    kind: str
    reference: str
    occurred_at: datetime
    entries: tuple[tuple[str, int], ...]
    memo: str = ""


def organization_account(organization_id: str) -> str:
    return f"organization:{organization_id}"


def usage_posting(organization_id: str, job_id: str, cost_nanousd: int, occurred_at: datetime) -> Posting:
    """Describe what one job costs: the organization owes it, revenue earns it."""
    return Posting(
        kind=LedgerTransaction.Kind.USAGE.value,
        reference=job_id,
        occurred_at=occurred_at,
        entries=((organization_account(organization_id), cost_nanousd), (REVENUE_ACCOUNT, -cost_nanousd)),
    )


def post(postings: Sequence[Posting]) -> list[LedgerTransaction]:
    """Write transactions with their entries, all or none.

    I/O: two inserts, whatever the number. Raises: ValueError for entries that do not sum to zero; django.db.IntegrityError for a
    reference that was posted already.
    """
    for posting in postings:
        if len(posting.entries) < 2 or sum(amount for _, amount in posting.entries) != 0:
            raise ValueError(f"the entries of {posting.kind} {posting.reference} do not balance: {posting.entries}")
    with transaction.atomic(savepoint=False):
        rows = LedgerTransaction.objects.bulk_create(
            LedgerTransaction(
                public_id=make_public_id(LedgerTransaction.PUBLIC_ID_PREFIX),
                kind=posting.kind,
                reference=posting.reference,
                memo=posting.memo,
                occurred_at=posting.occurred_at,
            )
            for posting in postings
        )
        LedgerEntry.objects.bulk_create(
            LedgerEntry(transaction=row, account=account, amount_nanousd=amount, occurred_at=posting.occurred_at)
            for row, posting in zip(rows, postings, strict=True)
            for account, amount in posting.entries
        )
    return rows


def sum_charges(organization_id: str, month: str) -> int:
    """Return what the organization was charged in a month (``YYYY-MM``), in nano-USD. I/O: one index-only SQL statement."""
    start, end = periods.bounds(month)
    total = LedgerEntry.objects.filter(
        account=organization_account(organization_id), occurred_at__gte=start, occurred_at__lt=end
    ).aggregate(total=Sum("amount_nanousd"))["total"]
    return int(total or 0)
