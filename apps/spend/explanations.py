"""Answer two questions about a request, by its id: why was I refused, and why does this cost what it costs.

A request that was let in has a usage record; one that was refused was noted (`apps.spend.refusal_log`); one that runs has a hold. Who may
not see it (`apps.spend.visibility`) learns nothing, not even that it exists.
"""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from django.db.models import Q

from aiscale import redis as redis_clients
from aiscale.db import format_usd
from aiscale.errors import AiscaleError, Code
from aiscale.wire import codec, keys
from aiscale.wire.jobs import EncodeJob, GenerateJob
from apps.accounts import mirror, organizations
from apps.accounts.models import User
from apps.spend import budgets, ledger, periods, visibility
from apps.spend.models import Correction, LedgerTransaction, Price, RefusedRequest, UsageRecord
from apps.spend.prices import BULK_SHARE
from apps.spend.refusal_log import describe_facts

MOST_JOBS = 200
"""Jobs of one request that are explained, and holds that are searched for one that runs."""

_ENDS = {
    "stop": "The model came to its end, or to a stop sequence.",
    "length": "It reached the most tokens that were asked for (max_tokens), or the end of the model's context.",
    "cancelled": "Its caller stopped it or left",
    "killed": "An administrator stopped it",
    "deadline": "It took longer than this service allows.",
    "error": "It failed by our own fault, so nothing is charged",
}


class CostLine(msgspec.Struct, frozen=True, kw_only=True):
    """Be one product: so many of something, at so much each."""

    what: str
    count: int
    unit_nanousd: int
    cost_nanousd: int


class CorrectionLine(msgspec.Struct, frozen=True, kw_only=True):
    kind: str
    reason: str
    occurred_at: datetime
    amount_nanousd: int


class PriceInForce(msgspec.Struct, frozen=True, kw_only=True):
    """Name the price that counted. ``share`` 2 means that the request, in a batch, paid one half of it."""

    price_id: str
    valid_from: datetime
    valid_until: datetime | None
    share: int


class MonthState(msgspec.Struct, frozen=True, kw_only=True):
    """State what the organization's month counted as spent just after the charge. ``zone`` says where months begin."""

    month: str
    zone: str
    spent_after_nanousd: int


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    """Explain what one job cost."""

    status: Literal["charged"] = "charged"
    request_id: str
    job_id: str
    organization_id: str
    user_id: str
    key_id: str
    plan: str
    source: str
    model: str
    model_version: str
    admitted_at: datetime
    ended_at: datetime
    ended: str
    ended_because: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    lines: list[CostLine]
    cost_nanousd: int
    hold_nanousd: int
    given_back_nanousd: int
    corrections: list[CorrectionLine]
    costs_now_nanousd: int
    price: PriceInForce | None
    transaction_id: str
    month: MonthState
    queued_ms: int
    first_token_ms: int | None
    duration_ms: int


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Explain why a request was refused. ``facts`` are the numbers of the check that refused it."""

    status: Literal["refused"] = "refused"
    request_id: str
    organization_id: str
    user_id: str
    key_id: str
    plan: str
    source: str
    model: str
    code: str
    message: str
    param: str
    facts: dict[str, Any]
    occurred_at: datetime


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """Tell of a job that has not ended: what is held for it, and where it is."""

    status: Literal["running"] = "running"
    request_id: str
    job_id: str
    organization_id: str
    user_id: str
    model: str
    state: str
    admitted_at: datetime
    hold_nanousd: int


Explanation = Charge | Refusal | Running


def explain(request_id: str, viewer: User | None) -> list[Explanation]:
    """Explain a request (or a job), one part for each of its jobs. ``viewer`` None is who has the command line, and sees all.

    I/O: two SQL statements to find it, three to see who may, six for each job; Redis for one that runs. Raises: AiscaleError (NOT_FOUND)
    for what does not exist or is not the viewer's.
    """
    name = request_id.replace("\0", "")[:128]
    may_see = _make_check(viewer)
    records = list(UsageRecord.objects.filter(Q(request_id=name) | Q(job_id=name)).order_by("pk")[:MOST_JOBS])
    seen: list[Explanation] = [_explain_charge(record) for record in records if may_see(record)]
    if not records:
        refused = RefusedRequest.objects.filter(request_id=name).first()
        if refused is not None and may_see(refused):
            seen = [_explain_refusal(refused)]
        elif refused is None:
            seen = [part for part in _find_running(name, viewer) if may_see(part)]
    if not seen:
        raise AiscaleError(
            Code.NOT_FOUND,
            "There is no request of this id, or it is not yours. Of many refusals at once only some are kept one by one.",
        )
    return seen


def _make_check(viewer: User | None) -> Callable[[UsageRecord | RefusedRequest | Running], bool]:
    """Return a function that tells whether the viewer may see something; it asks the database once for each person's."""
    known: dict[tuple[str, str], bool] = {}

    def may_see(subject: UsageRecord | RefusedRequest | Running) -> bool:
        if viewer is None:
            return True
        name = (subject.organization_id, subject.user_id)
        if name not in known:
            known[name] = visibility.may_see(viewer, *name) if name[0] else visibility.may_see_all(viewer)
        return known[name]

    return may_see


def _explain_refusal(refused: RefusedRequest) -> Refusal:
    names = [name for name in Refusal.__struct_fields__ if name not in ("status", "facts")]
    return Refusal(facts=describe_facts(refused.facts), **{name: getattr(refused, name) for name in names})


def _explain_charge(record: UsageRecord) -> Charge:
    corrected = Correction.objects.filter(usage=record).select_related("transaction").order_by("pk")
    corrections = [
        CorrectionLine(
            kind=row.transaction.kind,
            reason=row.transaction.memo,
            occurred_at=row.transaction.occurred_at,
            amount_nanousd=row.amount_nanousd,
        )
        for row in corrected
    ]
    posted = LedgerTransaction.objects.filter(kind=LedgerTransaction.Kind.USAGE, reference=record.job_id)
    same = (
        *("request_id", "job_id", "organization_id", "user_id", "key_id", "plan", "source", "model", "model_version"),
        *("admitted_at", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_nanousd", "hold_nanousd"),
        *("queued_ms", "first_token_ms", "duration_ms"),
    )
    return Charge(
        **{name: getattr(record, name) for name in same},
        ended_at=record.occurred_at,
        ended=record.finish_reason,
        ended_because=describe_end(record),
        lines=list_cost_lines(record),
        given_back_nanousd=max(record.hold_nanousd - record.cost_nanousd, 0),
        corrections=corrections,
        costs_now_nanousd=record.cost_nanousd + sum(line.amount_nanousd for line in corrections),
        price=_find_price(record),
        transaction_id=posted.values_list("public_id", flat=True).first() or "",
        month=_find_month(record),
    )


def list_cost_lines(record: UsageRecord) -> list[CostLine]:
    """Return the products that sum to what a request cost; none for one that failed."""
    if record.finish_reason == "error":
        return []
    cached_price = record.cached_prompt_nanousd_per_token
    if cached_price is None:
        cached_price = record.prompt_nanousd_per_token
    products = [
        ("prompt tokens", record.prompt_tokens - record.cached_tokens, record.prompt_nanousd_per_token),
        ("cached prompt tokens", record.cached_tokens, cached_price),
        ("completion tokens", record.completion_tokens, record.completion_nanousd_per_token),
        ("request", 1 if record.prompt_tokens or record.completion_tokens else 0, record.request_nanousd),
    ]
    optional = ("cached prompt tokens", "request")
    return [
        CostLine(what=what, count=count, unit_nanousd=price, cost_nanousd=count * price)
        for what, count, price in products
        if what not in optional or count * price or (what == optional[0] and count)
    ]


def describe_end(record: UsageRecord) -> str:
    """Say in a sentence how a request came to its end, and who ended it."""
    if record.finish_reason == "length" and record.source == "chat":
        return "It became as long as the plan lets an answer be, or reached the end of the model's context."
    sentence = _ENDS.get(record.finish_reason, record.finish_reason)
    detail = record.end_detail.strip().rstrip(".")
    if record.finish_reason == "killed" and detail.removeprefix("killed: ") == mirror.REVOKED_REASON:
        return "Its API key was revoked while it ran."
    if sentence.endswith("."):
        return sentence
    return f"{sentence}: {detail.removeprefix('killed: ')}." if detail else f"{sentence}."


def _find_price(record: UsageRecord) -> PriceInForce | None:
    price: Any = Price.objects.with_ends().filter(public_id=record.price_id).first() if record.price_id else None
    if price is None:
        return None
    return PriceInForce(
        price_id=price.public_id,
        valid_from=price.valid_from,
        valid_until=price.valid_until,
        share=BULK_SHARE if record.source == "batch" else 1,
    )


def _find_month(record: UsageRecord) -> MonthState:
    zone = budgets.month_zone(record.organization_id)
    at_ms = int(record.occurred_at.timestamp() * 1000)
    start_ms, _ = periods.span_of("monthly", zone, at_ms)
    # with this charge, and those of the same millisecond
    spent = ledger.sum_between(record.organization_id, periods.to_datetime(start_ms), periods.to_datetime(at_ms + 1))
    return MonthState(month=periods.month_of(at_ms, zone), zone=zone, spent_after_nanousd=spent)


def _find_running(name: str, viewer: User | None) -> Iterable[Running]:
    """Look for a request among the holds of the viewer's organizations (of everybody's, for who sees all). I/O: Redis."""
    client: Any = redis_clients.get_sync()
    if viewer is None or visibility.may_see_all(viewer):
        scopes = [budgets.SITE]
    else:
        memberships = organizations.list_memberships(viewer)
        scopes = [budgets.organization_scope(each.organization.public_id) for each in memberships]
    try:
        job_ids = {
            member.decode().rpartition(":")[0]
            for scope in scopes
            for member in client.zrange(keys.holds(scope), 0, MOST_JOBS * 5)
        }
        # a job is named after its request, where it has one alone
        first = [job_id for job_id in job_ids if job_id.partition("_")[2] == name.partition("_")[2]]
        pipeline = client.pipeline(transaction=False)
        chosen = (first or sorted(job_ids))[: MOST_JOBS * 5]
        for job_id in chosen:
            pipeline.hmget(keys.job_record(job_id), "kind", "payload", "state")
        answers = pipeline.execute()
    except redis_clients.UNAVAILABLE:
        return
    for job_id, (kind, payload, state) in zip(chosen, answers, strict=True):
        job = _read_job(kind, payload)
        if job is not None and name in (job_id, job.billing.request_id):
            yield Running(
                request_id=job.billing.request_id,
                job_id=job_id,
                organization_id=job.billing.organization_id,
                user_id=job.billing.user_id or "",
                model=job.model,
                state="waiting" if state == b"queued" else "running",
                admitted_at=periods.to_datetime(job.billing.admitted_at_ms),
                hold_nanousd=job.billing.hold_nanousd,
            )


def _read_job(kind: bytes | None, payload: bytes | None) -> GenerateJob | EncodeJob | None:
    if payload is None:
        return None
    try:
        if kind == b"generate":
            return codec.decode_generate_job(payload)
        return codec.decode_encode_job(payload)
    except (msgspec.MsgspecError, codec.UnknownVersion):
        return None


def write_text(part: Explanation) -> str:
    """Write an explanation as lines of text, for the command line."""
    if isinstance(part, Refusal):
        lines = [f"Refused with {part.code} at {_moment(part.occurred_at)}: {part.message}"]
        lines += [f"  {_write_fact(name, value)}" for name, value in part.facts.items()]
        return "\n".join(lines)
    if isinstance(part, Running):
        return (
            f"{part.job_id} is {part.state} on {part.model} since {_moment(part.admitted_at)}; "
            f"{format_usd(part.hold_nanousd)} is held for it."
        )
    lines = [
        f"{part.job_id} on {part.model}: {format_usd(part.cost_nanousd)}",
        *(
            f"  {line.count:,} {line.what} at {format_usd(line.unit_nanousd)}: {format_usd(line.cost_nanousd)}"
            for line in part.lines
        ),
        f"  {part.ended_because}",
        f"  Held {format_usd(part.hold_nanousd)}, gave back {format_usd(part.given_back_nanousd)}.",
    ]
    if part.price is not None:
        share = ", of which a batch pays half" if part.price.share > 1 else ""
        lines.append(f"  Price {part.price.price_id}, in force from {_moment(part.price.valid_from)}{share}.")
    for line in part.corrections:
        lines.append(f"  {line.kind}: {format_usd(line.amount_nanousd)}, {line.reason}")
    if part.corrections:
        lines.append(f"  It costs {format_usd(part.costs_now_nanousd)} after that.")
    first = f"{part.first_token_ms} ms" if part.first_token_ms is not None else "never"
    lines.append(f"  Waited {part.queued_ms} ms, first token after {first}, took {part.duration_ms} ms.")
    month = part.month
    lines.append(f"  With it, {month.month} ({month.zone}) counted {format_usd(month.spent_after_nanousd)} as spent.")
    return "\n".join(lines)


def _write_fact(name: str, value: object) -> str:
    """Write one number of a refusal: money and moments as people read them."""
    text = str(value)
    if text.removeprefix("-").isdecimal():
        if name.endswith("_nanousd"):
            name, text = name.removesuffix("_nanousd"), format_usd(int(text))
        elif name.endswith("_at_ms"):
            name, text = name.removesuffix("_at_ms"), _moment(datetime.fromtimestamp(int(text) / 1000, UTC))
    return f"{name.replace('_', ' ')}: {text}"


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
