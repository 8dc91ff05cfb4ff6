"""Charge past requests at other prices: mend a wrong price (M9).

Each request keeps its record; what changes is written as a `Correction` of it, and each organization gets one adjusting transaction
with the sum. A request that was refunded stays refunded: its cost never falls below what is left of it. A request's correction is the
difference between what it should cost and what it costs by now, so doing it again changes nothing, and rating twice ends at the last
prices.

An order (`Rerating`) is carried out organization by organization, each in a transaction of its own: whoever dies in between, the next run
goes on. It stays open for a while, since a request that was running is settled later. Then it is closed. Of two orders that cover a
request, the later one counts.
"""

import logging
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from django.db import connection, transaction
from django.utils import timezone

from aiscale.db import format_usd
from aiscale.errors import AiscaleError, Code
from apps.accounts import audit
from apps.accounts.models import Organization
from apps.spend import budgets, corrections, holds, ledger, prices
from apps.spend.ledger import Posting
from apps.spend.models import LedgerTransaction, Rerating
from apps.spend.prices import Terms

log = logging.getLogger(__name__)

STAYS_OPEN = timedelta(minutes=20)
"""Longer than a request may run, and settlement may lag."""
LISTED = 20

# What each request should cost by the order, less what it costs by now. Failed ones cost nothing at any price. The bounds on occurred_at
# let the index of a model's usage answer: a request ends after it was admitted, and within a day. What a later order (`pk`) covers is its
# business alone: two that are open together would else correct each other for ever.
_DELTAS = """
    SELECT u.id, u.organization_id, u.plan, u.model, u.user_id, u.key_id, u.cost_nanousd + coalesce(c.all_of_them, 0) AS costs,
        greatest(
            CASE WHEN u.cache <> '' THEN
                u.prompt_tokens * ((t.prompt * u.price_percent + 99) / 100)
                    + u.completion_tokens * ((t.completion * u.price_percent + 99) / 100)
                    + CASE WHEN u.prompt_tokens + u.completion_tokens > 0 THEN (t.request * u.price_percent + 99) / 100 ELSE 0 END
            ELSE
                (u.prompt_tokens - u.cached_tokens) * t.prompt + u.completion_tokens * t.completion
                    + u.cached_tokens * CASE WHEN u.kind = 'encode' THEN (t.prompt * u.price_percent + 99) / 100 ELSE t.cached END
                    + CASE WHEN u.prompt_tokens + u.completion_tokens > 0 THEN t.request ELSE 0 END
            END + coalesce(c.refunds, 0),
            0) AS should_cost
    FROM spend_usagerecord u
    JOIN (VALUES (false, %(prompt)s::bigint, %(cached)s::bigint, %(completion)s::bigint, %(request)s::bigint),
                 (true, %(bulk_prompt)s, %(bulk_cached)s, %(bulk_completion)s, %(bulk_request)s))
        AS t (is_bulk, prompt, cached, completion, request) ON t.is_bulk = (u.source = 'batch')
    LEFT JOIN LATERAL (
        SELECT sum(amount_nanousd) AS all_of_them, sum(amount_nanousd) FILTER (WHERE l.kind = 'refund') AS refunds
        FROM spend_correction k JOIN spend_ledgertransaction l ON l.id = k.transaction_id WHERE k.usage_id = u.id
    ) c ON true
    WHERE u.model = %(model)s AND u.occurred_at >= %(since)s AND u.occurred_at < %(until)s::timestamptz + interval '1 day'
        AND u.admitted_at >= %(since)s AND u.admitted_at < %(until)s AND u.finish_reason <> 'error'
        AND NOT EXISTS (
            SELECT 1 FROM spend_rerating r
            WHERE r.model = u.model AND r.id > %(pk)s AND u.admitted_at >= r.since AND u.admitted_at < r.until
        )
"""
_NOT_YET = (1 << 63) - 1
"""Stands for the id of an order that is not written down: no other is later."""


class Order(NamedTuple):
    """Say which requests are to be charged at which prices: those admitted from ``since`` until before ``until``."""

    model: str
    since: datetime
    until: datetime
    terms: Terms


class Change(NamedTuple):
    """Say what an order changes for one organization. ``requests`` are those whose cost changes."""

    organization_id: str
    name: str
    requests: int
    before_nanousd: int
    after_nanousd: int


def preview(order: Order, pk: int = _NOT_YET) -> list[Change]:
    """Say what an order (of the row ``pk``) would change, the biggest change first.

    I/O: two SQL statements. Raises: AiscaleError (INVALID_REQUEST).
    """
    check(order)
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT organization_id, count(*), sum(costs), sum(should_cost) FROM ({_DELTAS}) AS d
            WHERE should_cost <> costs GROUP BY organization_id ORDER BY abs(sum(should_cost) - sum(costs)) DESC, 1
            """,  # noqa: S608 - all values are parameters
            _parameters(order, pk),
        )
        rows = cursor.fetchall()
    found = Organization.objects.filter(public_id__in=[row[0] for row in rows])
    names = {organization.public_id: str(organization) for organization in found}
    return [Change(row[0], names.get(row[0], row[0]), *map(int, row[1:])) for row in rows]


def describe(order: Order, changes: list[Change]) -> list[str]:
    """Say in sentences what an order changes."""
    if not changes:
        return ["No request of these days costs anything else at these prices: nothing would be posted."]
    before, after = sum(change.before_nanousd for change in changes), sum(change.after_nanousd for change in changes)
    requests = _count(sum(change.requests for change in changes), "request")
    verb = "is given back" if after < before else "is charged in addition"
    sentences = [
        f"{requests} of {_count(len(changes), 'organization')} to {order.model} cost "
        f"{format_usd(after)} instead of {format_usd(before)}: {format_usd(abs(after - before))} {verb}.",
        "Each organization gets one adjustment; it counts in this month, wherever the requests were.",
    ]
    for change in changes[:LISTED]:
        difference = change.after_nanousd - change.before_nanousd
        sentences.append(
            f"{change.name} ({change.organization_id}): {_count(change.requests, 'request')}, "
            f"{format_usd(change.before_nanousd)} becomes {format_usd(change.after_nanousd)} ({format_usd(difference)})."
        )
    if len(changes) > LISTED:
        sentences.append(f"And {_count(len(changes) - LISTED, 'organization')} with smaller changes.")
    return sentences


def order(wanted: Order, *, reason: str, by: audit.Actor) -> Rerating:
    """Write an order down; `apply_open` carries it out. I/O: one SQL transaction. Raises: AiscaleError (INVALID_REQUEST)."""
    check(wanted)
    reason = corrections.check_reason(reason)
    with transaction.atomic():
        rerating = Rerating.objects.create(
            model=wanted.model,
            since=wanted.since,
            until=wanted.until,
            reason=reason,
            **{name: getattr(wanted.terms, name) for name in Terms.__struct_fields__},
        )
        audit.record(
            "price.rerate",
            target=f"rerating:{rerating.public_id}",
            by=by,
            reason=reason,
            details={"model": wanted.model, "since": wanted.since, "until": wanted.until}
            | {"to": prices.describe(wanted.model, wanted.terms)[1]},
        )
    return rerating


def apply_open() -> int:
    """Carry out every open order. Returns how many adjusting transactions were posted.

    I/O: SQL; one transaction an organization. Idempotent, also at the same time as another one. Raises: django.db.Error.
    """
    return sum(apply(rerating) for rerating in Rerating.objects.filter(finished_at=None).order_by("pk"))


def apply(rerating: Rerating) -> int:
    """Carry out one order as far as it is not yet. Returns how many adjusting transactions were posted. I/O, Raises: as `apply_open`."""
    wanted = Order(rerating.model, rerating.since, rerating.until, prices.terms_of(rerating))
    posted = sum(_adjust(rerating, wanted, change.organization_id) for change in preview(wanted, rerating.pk))
    now = timezone.now()
    if now > max(rerating.created_at, rerating.until) + STAYS_OPEN:
        rerating.finished_at = now
        rerating.save(update_fields=["finished_at", "updated_at"])
    if posted:
        log.warning("usage of %s was rated again: %d adjustments", rerating.model, posted, extra={"event": "rerate"})
    return posted


def check(wanted: Order) -> None:
    """Raises: AiscaleError (INVALID_REQUEST) for prices or times that cannot be."""
    prices.check(wanted.terms)
    if wanted.until <= wanted.since:
        raise _invalid("until", "The end must come after the beginning.")
    if wanted.since > timezone.now():
        raise _invalid("since", "Only past requests can be rated again. Change the price for those to come.")


def _adjust(rerating: Rerating, wanted: Order, organization_id: str) -> bool:
    """Correct one organization's requests, in one transaction with its adjustment. False when there was nothing left to correct."""
    with transaction.atomic(), connection.cursor() as cursor:
        ledger.lock(organization_id)
        # what is settled meanwhile comes with the next run: the sum and the corrections are of the same rows
        cursor.execute("DROP TABLE IF EXISTS rerated")
        cursor.execute(
            f"""
            CREATE TEMPORARY TABLE rerated ON COMMIT DROP AS
            SELECT id, plan, model, user_id, key_id, should_cost - costs AS amount FROM ({_DELTAS}) AS d
            WHERE organization_id = %(organization_id)s AND should_cost <> costs
            """,  # noqa: S608 - all values are parameters
            _parameters(wanted, rerating.pk) | {"organization_id": organization_id},
        )
        cursor.execute("SELECT plan, model, user_id, key_id, sum(amount), count(*) FROM rerated GROUP BY 1, 2, 3, 4")
        groups = cursor.fetchall()
        if not groups:
            return False
        posting = _make_posting(rerating, organization_id, groups)
        if posting is None:
            # up here, down there, nothing in sum: the ledger does not move, and neither do these requests
            return False
        [posted] = ledger.insert([posting])
        cursor.execute(
            """
            INSERT INTO spend_correction (usage_id, transaction_id, amount_nanousd)
            SELECT id, %s, amount FROM rerated ORDER BY id
            """,
            [posted.pk],
        )
        moved = ledger.move_totals([posting])
        holds.push_on_commit([item.total for item in moved])
    return True


def _make_posting(rerating: Rerating, organization_id: str, groups: Iterable[Any]) -> Posting | None:
    total, shares = 0, dict[str, int]()
    own = budgets.organization_scope(organization_id)
    for plan, model, user_id, key_id, amount, _ in groups:
        total += int(amount)
        scopes = budgets.list_scopes(
            organization_id=organization_id, plan=plan, model=model, user_id=user_id or None, key_id=key_id or None
        )
        for scope in scopes:
            if scope != own:
                shares[scope] = shares.get(scope, 0) + int(amount)
    if total == 0:
        return None
    kind = LedgerTransaction.Kind.ADJUSTMENT.value
    prefix = f"{rerating.public_id}:{organization_id}"
    number = LedgerTransaction.objects.filter(kind=kind, reference__startswith=prefix).count()
    return Posting(
        kind=kind,
        reference=f"{prefix}:{number}",
        occurred_at=timezone.now(),
        entries=((ledger.organization_account(organization_id), total), (ledger.REVENUE_ACCOUNT, -total)),
        memo=rerating.reason,
        shares=tuple(shares.items()),
    )


def _parameters(wanted: Order, pk: int) -> dict[str, Any]:
    values: dict[str, Any] = {"model": wanted.model, "since": wanted.since, "until": wanted.until, "pk": pk}
    for prefix, terms in (("", wanted.terms), ("bulk_", wanted.terms.in_bulk())):
        values |= {
            f"{prefix}prompt": terms.prompt_nanousd_per_token,
            f"{prefix}cached": terms.cached_prompt_nanousd_per_token,
            f"{prefix}completion": terms.completion_nanousd_per_token,
            f"{prefix}request": terms.request_nanousd,
        }
    return values


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _invalid(param: str, message: str) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, message, param=param)
