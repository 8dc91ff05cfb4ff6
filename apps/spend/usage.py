"""Write usage records, and sum up what an organization used."""

import logging
from collections.abc import Iterable

import msgspec
from django.db import connection, transaction

from aiscale import redis as redis_clients
from aiscale.db import format_usd
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from aiscale.wire.events import Finished
from apps.accounts.models import Organization
from apps.spend import budgets, ledger, periods, pricing, statements
from apps.spend.models import Budget, UsageRecord
from apps.spend.periods import Span
from apps.spend.statements import Days

log = logging.getLogger(__name__)

_COLUMNS = {
    "job_id": "text",
    "request_id": "text",
    "organization_id": "text",
    "user_id": "text",
    "key_id": "text",
    "plan": "text",
    "source": "text",
    "kind": "text",
    "model": "text",
    "model_version": "text",
    "finish_reason": "text",
    "error_code": "text",
    "end_detail": "text",
    "prompt_tokens": "bigint",
    "completion_tokens": "bigint",
    "cached_tokens": "bigint",
    "price_id": "text",
    "prompt_nanousd_per_token": "bigint",
    "cached_prompt_nanousd_per_token": "bigint",
    "completion_nanousd_per_token": "bigint",
    "request_nanousd": "bigint",
    "hold_nanousd": "bigint",
    "cost_nanousd": "bigint",
    "cache": "text",
    "price_percent": "smallint",
    "saved_nanousd": "bigint",
    "worker_id": "text",
    "queued_ms": "bigint",
    "first_token_ms": "bigint",
    "duration_ms": "bigint",
    "admitted_at": "timestamptz",
    "occurred_at": "timestamptz",
}

# JSON makes one statement and one parameter for any number of rows. The order by job id is the same in every process: two that write the
# same jobs wait for each other in one direction only, and cannot deadlock (M8).
_INSERT = f"""
    INSERT INTO {UsageRecord._meta.db_table} ({", ".join(_COLUMNS)})
    SELECT {", ".join(_COLUMNS)}
    FROM json_to_recordset(%s::json) AS fresh ({", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())})
    ORDER BY job_id
    ON CONFLICT (job_id) DO NOTHING
    RETURNING job_id
"""  # noqa: S608 - names and types are this module's own, values are parameters


class MonthSummary(msgspec.Struct, frozen=True, kw_only=True):
    """State an organization's month: what is spent, what running requests hold, what may be spent at most, and what the plan's price
    pays of it."""

    month: str
    spent_nanousd: int
    held_nanousd: int
    limit_nanousd: int
    included_nanousd: int

    def included_used(self, spent_nanousd: int) -> int:
        """Return how much of an amount the plan's price pays for."""
        return min(self.included_nanousd, max(spent_nanousd, 0))

    def describe_included(self) -> str:
        """Say how much of what the plan includes is left; '' for a plan that includes nothing."""
        if not self.included_nanousd:
            return ""
        left = self.included_nanousd - max(self.spent_nanousd, 0)
        rest = (
            f"{format_usd(left)} of it is left"
            if left >= 0
            else f"it is used up, and {format_usd(-left)} goes beyond it"
        )
        return f"The plan includes {format_usd(self.included_nanousd)} a month: {rest}."


def cost_of(event: Finished) -> int:
    """Return what a finished job costs in nano-USD: nothing for an ``error``, else what was made, at the prices of admission.

    Raises: AiscaleError for negative counts or prices.
    """
    billing = event.billing
    cost = pricing.cost_nanousd(
        event.prompt_tokens,
        event.completion_tokens,
        event.cached_tokens,
        prompt_nanousd_per_token=billing.prompt_nanousd_per_token,
        completion_nanousd_per_token=billing.completion_nanousd_per_token,
        cached_prompt_nanousd_per_token=billing.cached_prompt_nanousd_per_token,
        request_nanousd=billing.request_nanousd,
    )
    return 0 if event.finish_reason == "error" else cost


def saved_of(event: Finished) -> int:
    """Return how much less a job costs than it would without what was known: the answer, vectors, keys and values."""
    billing = event.billing
    if event.finish_reason == "error":
        return 0
    if event.cache or billing.cached_prompt_nanousd_per_token is None:
        return max(event.saved_nanousd, 0)
    return max(event.cached_tokens * (billing.prompt_nanousd_per_token - billing.cached_prompt_nanousd_per_token), 0)


def record(events: Iterable[Finished]) -> set[str]:
    """Write what jobs used, and charge them in the ledger. Returns the job ids that were not known before.

    I/O: one transaction of six statements, and what a passed threshold takes. All or none; a job that was recorded already is
    left as it is, and an internal one leaves nothing and is never known. Raises: django.db.Error, AiscaleError.
    """
    jobs = {event.job_id: event for event in events}
    internal = {job_id for job_id, event in jobs.items() if event.billing.is_internal and not cost_of(event)}
    by_job = {job_id: event for job_id, event in jobs.items() if job_id not in internal}
    if not by_job:
        return internal
    rows = [_make_row(event) for event in by_job.values()]
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute(_INSERT, [msgspec.json.encode(rows).decode()])
            fresh = {str(job_id) for (job_id,) in cursor.fetchall()}
        charged = sorted(job_id for job_id in fresh if cost_of(by_job[job_id]))
        if charged:
            ledger.write([_make_posting(by_job[job_id]) for job_id in charged])
    return fresh | internal


def month_summary(organization_id: str) -> MonthSummary:
    """Sum up the current month, in the organization's time zone. Not for the hot path: the gate has its own numbers.

    I/O: up to five SQL statements and one Redis trip. Without Redis the ledger alone speaks, and nothing seems held.
    Raises: AiscaleError (NOT_FOUND); django.db.Error.
    """
    now_ms = periods.now_ms()
    limit_nanousd, zone = _get_limit(organization_id, now_ms)
    span = periods.span_of("monthly", zone, now_ms)
    spent, held = _read_copy(budgets.organization_scope(organization_id), span, now_ms)
    if spent is None:
        start, end = periods.to_datetime(span.start_ms), periods.to_datetime(span.end_ms)
        spent = ledger.sum_between(organization_id, start, end)
    plan = Organization.objects.filter(public_id=organization_id).values_list(
        "plan__monthly_included_nanousd", flat=True
    )
    return MonthSummary(
        month=periods.month_of(now_ms, zone),
        spent_nanousd=spent,
        held_nanousd=held,
        limit_nanousd=limit_nanousd,
        included_nanousd=plan.first() or 0,
    )


def find_month(organization_id: str, days: Days, user_id: str = "") -> MonthSummary | None:
    """Do `month_summary` where the days are the current month; None for others, and for what one person used.

    I/O: none, or as `month_summary`.
    """
    if user_id or not days.month or days.month != statements.this_month(days.zone):
        return None
    return month_summary(organization_id)


def _get_limit(organization_id: str, now_ms: int) -> tuple[int, str]:
    """Return what may be spent this month, and the time zone of the month."""
    scope = budgets.organization_scope(organization_id)
    own = Budget.objects.filter(scope=scope, period=Budget.Period.MONTHLY).first()
    if own is not None and (limit := budgets.limit_of(own, now_ms)) is not None:
        return limit, budgets.zone_of(own.time_zone)
    found = Organization.objects.filter(public_id=organization_id)
    for limit in found.values_list("plan__monthly_limit_nanousd", flat=True):
        return int(limit), budgets.zone_of("")
    raise AiscaleError(Code.NOT_FOUND, f"No organization has the id {organization_id!r}.")


def _read_copy(scope: str, span: Span, now_ms: int) -> tuple[int | None, int]:
    """Return (spent, held) of the fast copy; spent is None when the copy is missing or of another month."""
    try:
        pipeline = redis_clients.get_sync().pipeline(transaction=True)
        pipeline.hmget(keys.spend(scope), ["monthly_start_ms", "monthly_end_ms", "monthly_spent_nanousd"])
        pipeline.zrangebyscore(keys.holds(scope), f"({now_ms}", "+inf")
        (start_ms, end_ms, spent), living = pipeline.execute()
    except redis_clients.UNAVAILABLE:
        log.warning("Redis does not answer: held amounts are unknown", extra={"scope": scope})
        return None, 0
    held = sum(int(hold.rpartition(b":")[2]) for hold in living)
    is_current = spent is not None and Span(int(start_ms), int(end_ms)) == span
    return (int(spent) if is_current else None), held


def _make_row(event: Finished) -> dict[str, object]:
    billing = event.billing
    return {
        "job_id": event.job_id,
        "request_id": billing.request_id,
        "organization_id": billing.organization_id,
        "user_id": billing.user_id or "",
        "key_id": billing.key_id or "",
        "plan": billing.plan,
        "source": billing.source,
        "kind": event.kind,
        "model": event.model,
        "model_version": event.model_version,
        "finish_reason": event.finish_reason,
        "error_code": event.error_code or "",
        "end_detail": event.error_message or "",
        "prompt_tokens": event.prompt_tokens,
        "completion_tokens": event.completion_tokens,
        "cached_tokens": event.cached_tokens,
        "price_id": billing.price_id,
        "prompt_nanousd_per_token": billing.prompt_nanousd_per_token,
        "cached_prompt_nanousd_per_token": billing.cached_prompt_nanousd_per_token,
        "completion_nanousd_per_token": billing.completion_nanousd_per_token,
        "request_nanousd": billing.request_nanousd,
        "hold_nanousd": billing.hold_nanousd,
        "cost_nanousd": cost_of(event),
        "cache": event.cache,
        "price_percent": billing.price_percent,
        "saved_nanousd": saved_of(event),
        "worker_id": event.worker_id,
        "queued_ms": event.queued_ms,
        "first_token_ms": event.first_token_ms,
        "duration_ms": event.duration_ms,
        "admitted_at": periods.to_datetime(billing.admitted_at_ms),
        "occurred_at": periods.to_datetime(event.finished_at_ms),
    }


def _make_posting(event: Finished) -> ledger.Posting:
    return ledger.usage_posting(
        event.billing.organization_id,
        event.job_id,
        cost_of(event),
        periods.to_datetime(event.finished_at_ms),
        budgets.list_scopes_of(event.billing, event.model),
    )
