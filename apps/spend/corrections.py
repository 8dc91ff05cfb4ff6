"""Correct an organization's balance: credits, refunds and adjustments, by an administrator and with a reason.

Each is one transaction of the ledger, posted once for its ``reference`` however often it is asked for, with its event in the audit log,
and at the gate within a second. It counts in the month in which it is posted, whatever it corrects: a month that is over stays as it
was. It lowers (or raises) what this month counts as spent, so with a credit of 10 USD an organization may spend 10 USD more than its
limit; what it does not use goes along into the next month (`apps.spend.carryover`).
"""

from collections.abc import Callable
from typing import Literal

import msgspec
from django.db import IntegrityError, transaction
from django.db.models import Sum
from django.utils import timezone

from aiscale.db import format_usd, make_public_id
from aiscale.errors import AiscaleError, Code
from apps.accounts import audit
from apps.accounts.models import Organization
from apps.spend import budgets, ledger
from apps.spend.models import LIMIT_CEILING_NANOUSD, Correction, LedgerEntry, LedgerTransaction, UsageRecord

CreditSource = Literal["prepaid", "goodwill"]
MAX_REASON_CHARS = 300
_CREDIT_ACCOUNTS = {"prepaid": ledger.PREPAID_ACCOUNT, "goodwill": ledger.GOODWILL_ACCOUNT}


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """State what a correction changes. ``room`` is what may still be spent this month, running requests aside."""

    organization_id: str
    name: str
    spent_before_nanousd: int
    spent_after_nanousd: int
    limit_nanousd: int

    def describe(self) -> str:
        """Say it in a sentence."""
        month = f"{timezone.now():%B %Y}"
        before, after = (self.limit_nanousd - spent for spent in (self.spent_before_nanousd, self.spent_after_nanousd))
        return (
            f"{self.name} ({self.organization_id}) may still spend {format_usd(max(after, 0))} in {month} instead of "
            f"{format_usd(max(before, 0))}: its limit is {format_usd(self.limit_nanousd)}, and "
            f"{format_usd(self.spent_after_nanousd)} counts as spent instead of {format_usd(self.spent_before_nanousd)}."
        )


def make_reference() -> str:
    """Make a reference for one correction: keep it over retries, so that it is posted once."""
    return make_public_id("corr")


def give_credit(
    organization_id: str,
    amount_nanousd: int,
    *,
    source: CreditSource,
    reason: str,
    by: audit.Actor,
    reference: str,
) -> LedgerTransaction:
    """Let an organization spend ``amount_nanousd`` more: it has paid for it (``prepaid``), or it is a present (``goodwill``).

    I/O: one SQL transaction; the gate's copy once that commits. Idempotent by ``reference``. Raises: AiscaleError (INVALID_REQUEST,
    NOT_FOUND).
    """
    _check_amount(amount_nanousd)
    if source not in _CREDIT_ACCOUNTS:
        raise _invalid("source", "A credit is either prepaid or goodwill.")
    entries = (
        (ledger.organization_account(organization_id), -amount_nanousd),
        (_CREDIT_ACCOUNTS[source], amount_nanousd),
    )
    return _post(LedgerTransaction.Kind.CREDIT, organization_id, reference, entries, reason=reason, by=by)


def adjust(
    organization_id: str, amount_nanousd: int, *, reason: str, by: audit.Actor, reference: str
) -> LedgerTransaction:
    """Mend a wrong charge: a positive amount charges more, a negative one gives back.

    I/O: one SQL transaction; the gate's copy once that commits. Idempotent by ``reference``. Raises: AiscaleError (INVALID_REQUEST,
    NOT_FOUND).
    """
    _check_amount(abs(amount_nanousd))
    entries = (
        (ledger.organization_account(organization_id), amount_nanousd),
        (ledger.REVENUE_ACCOUNT, -amount_nanousd),
    )
    return _post(LedgerTransaction.Kind.ADJUSTMENT, organization_id, reference, entries, reason=reason, by=by)


def refund(
    record: UsageRecord, amount_nanousd: int, *, reason: str, by: audit.Actor, reference: str
) -> LedgerTransaction:
    """Give back what one request cost, or a part of it; never more than is left of its cost after earlier corrections.

    I/O: one SQL transaction; the gate's copy once that commits. Idempotent by ``reference``. Raises: AiscaleError (INVALID_REQUEST).
    """
    _check_amount(amount_nanousd)
    entries = (
        (ledger.organization_account(record.organization_id), -amount_nanousd),
        (ledger.REVENUE_ACCOUNT, amount_nanousd),
    )

    def correct(posted: LedgerTransaction) -> None:
        check_refund(record, amount_nanousd)
        Correction.objects.create(usage=record, transaction=posted, amount_nanousd=-amount_nanousd)

    return _post(
        LedgerTransaction.Kind.REFUND,
        record.organization_id,
        reference,
        entries,
        reason=reason,
        by=by,
        correct=correct,
        scopes=list_other_scopes(record),
        details={"job_id": record.job_id, "request_id": record.request_id},
    )


def check_refund(record: UsageRecord, amount_nanousd: int) -> None:
    """Raises: AiscaleError (INVALID_REQUEST) when less than the amount is left to be given back. I/O: one SQL statement."""
    _check_amount(amount_nanousd)
    left_nanousd = count_left(record)
    if amount_nanousd > left_nanousd:
        raise _invalid(
            "amount", f"Of this request's cost {format_usd(left_nanousd)} is left; more than that cannot be given back."
        )


def list_other_scopes(record: UsageRecord) -> tuple[str, ...]:
    """List the scopes besides its organization in which a request counts."""
    scopes = budgets.list_scopes(
        organization_id=record.organization_id,
        plan=record.plan,
        model=record.model,
        user_id=record.user_id or None,
        key_id=record.key_id or None,
    )
    return tuple(scope for scope in scopes if scope != budgets.organization_scope(record.organization_id))


def count_left(record: UsageRecord) -> int:
    """Return what a request costs after all corrections. I/O: one SQL statement."""
    corrected = Correction.objects.filter(usage=record).aggregate(total=Sum("amount_nanousd"))["total"]
    return int(record.cost_nanousd + (corrected or 0))


def preview(organization_id: str, change_nanousd: int) -> Effect:
    """Say what adding ``change_nanousd`` to this month's sum does. I/O: SQL. Raises: AiscaleError (NOT_FOUND, INVALID_REQUEST) where it
    would be refused."""
    from apps.spend import usage  # usage posts through the ledger too

    _check_amount(abs(change_nanousd))
    organization = get_organization(organization_id)
    spent = ledger.sum_this_month(organization_id)
    _check_sum(spent + change_nanousd)
    return Effect(
        organization_id=organization_id,
        name=str(organization),
        spent_before_nanousd=spent,
        spent_after_nanousd=spent + change_nanousd,
        limit_nanousd=usage.month_summary(organization_id).limit_nanousd,
    )


def get_organization(organization_id: str) -> Organization:
    """Raises: AiscaleError (NOT_FOUND). I/O: one SQL statement."""
    found = Organization.objects.filter(public_id=organization_id).first()
    if found is None:
        raise AiscaleError(
            Code.NOT_FOUND,
            f"No organization has the id {organization_id!r}. Copy it from the list.",
            param="organization",
        )
    return found


def check_reason(reason: str) -> str:
    """Return the reason as it is kept. Raises: AiscaleError (INVALID_REQUEST)."""
    reason = reason.strip()
    if not reason or len(reason) > MAX_REASON_CHARS or "\0" in reason:
        raise _invalid(
            "reason",
            f"Give a reason of 1 to {MAX_REASON_CHARS} characters: the organization reads it on its statement.",
        )
    return reason


def _post(
    kind: LedgerTransaction.Kind,
    organization_id: str,
    reference: str,
    entries: tuple[tuple[str, int], ...],
    *,
    reason: str,
    by: audit.Actor,
    correct: Callable[[LedgerTransaction], None] | None = None,
    scopes: tuple[str, ...] = (),
    details: dict[str, str] | None = None,
) -> LedgerTransaction:
    """Post one correction with its audit event, once for its reference. The organization's corrections wait for each other."""
    reason = check_reason(reason)
    get_organization(organization_id)
    posting = ledger.Posting(
        kind=kind.value,
        reference=reference,
        occurred_at=timezone.now(),
        entries=entries,
        memo=reason,
        scopes=scopes,
    )
    try:
        with transaction.atomic():
            ledger.lock(organization_id)
            known = _find_known(posting)
            if known is not None:
                return known
            [posted] = ledger.post([posting])
            if correct is not None:
                correct(posted)
            _check_sum(ledger.sum_this_month(organization_id))
            amount_nanousd = entries[0][1]
            audit.record(
                f"ledger.{kind.value}",
                target=f"transaction:{posted.public_id}",
                by=by,
                reason=reason,
                organization_id=organization_id,
                details={"amount_nanousd": amount_nanousd, "amount": format_usd(amount_nanousd), **(details or {})},
            )
            return posted
    except IntegrityError:
        # the same reference, at the same moment, for another organization
        known = _find_known(posting)
        if known is None:
            raise
        return known


def _find_known(posting: ledger.Posting) -> LedgerTransaction | None:
    """Return what was posted for this reference. Raises: AiscaleError when that was something else. I/O: two SQL statements."""
    known = LedgerTransaction.objects.filter(kind=posting.kind, reference=posting.reference).first()
    if known is None:
        return None
    entries = set(LedgerEntry.objects.filter(transaction=known).values_list("account", "amount_nanousd"))
    if entries != set(posting.entries):
        raise _invalid(
            "reference", f"{posting.reference} was posted with another amount or for another organization. Begin anew."
        )
    return known


def _check_sum(total_nanousd: int) -> None:
    if abs(total_nanousd) > LIMIT_CEILING_NANOUSD:
        raise _invalid("amount", "With this, more than 9 million US dollars would be counted in a month: too much.")


def _check_amount(amount_nanousd: int) -> None:
    if not 0 < amount_nanousd <= LIMIT_CEILING_NANOUSD:
        raise _invalid("amount", "The amount must be more than zero and at most 9 million US dollars.")


def _invalid(param: str, message: str) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, message, param=param)
