"""Read and check what budgets say: scopes, limits, time zones and thresholds.

An organization always has a budget for the month: its own, or one without a row, which has the plan's limit. A threshold is a text:
``80%`` (of the limit) or ``$100.00``. It is kept as it is written here, so that an alert can name it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from functools import cache, lru_cache
from typing import Any, NamedTuple

from django.conf import settings
from django.db.models import BigIntegerField, Count, F, Func, Max, Sum

from aiscale.db import NANOUSD_PER_USD, format_usd
from aiscale.errors import AiscaleError, Code
from aiscale.wire.jobs import BillingTag
from apps.accounts.models import ApiKey, Organization, Plan, User
from apps.spend import periods
from apps.spend.models import LIMIT_CEILING_NANOUSD, Budget

SITE = "site"
KINDS = ("site", "plan", "model", "organization", "user", "key")
MAX_THRESHOLDS = 20
MAX_PERCENT = 1000

_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


PLANS_LIMIT = "plan"


class Part(NamedTuple):
    """Be one budget of a scope as the gate knows it. ``limit`` is nano-USD, '' for none, or `PLANS_LIMIT`."""

    period: str
    zone: str
    limit: str
    raise_nanousd: int
    raise_until_ms: int


def organization_scope(organization_id: str) -> str:
    return f"organization:{organization_id}"


@lru_cache(maxsize=4_096)
def list_scopes(
    *, organization_id: str, plan: str, model: str, user_id: str | None, key_id: str | None
) -> tuple[str, ...]:
    """List all scopes that a request counts in, the narrowest first."""
    names = (
        f"key:{key_id}" if key_id else "",
        f"user:{user_id}" if user_id else "",
        organization_scope(organization_id),
        f"model:{model}",
        f"plan:{plan}",
        SITE,
    )
    return tuple(name for name in names if name)


def list_scopes_of(tag: BillingTag, model: str) -> tuple[str, ...]:
    """List all scopes that a job counts in, the narrowest first."""
    return list_scopes(
        organization_id=tag.organization_id, plan=tag.plan, model=model, user_id=tag.user_id, key_id=tag.key_id
    )


def list_parts(scope: str) -> list[Part]:
    """Return the budgets of a scope, with the one that an organization always has. I/O: one SQL statement."""
    return _make_parts(scope, Budget.objects.filter(scope=scope))


def list_definitions() -> dict[str, str]:
    """Return what the budgets of each scope say, as `write_definition` does. I/O: one SQL statement."""
    by_scope: dict[str, list[Budget]] = defaultdict(list)
    for budget in Budget.objects.iterator():
        by_scope[budget.scope].append(budget)
    return {scope: write_definition(_make_parts(scope, rows)) for scope, rows in by_scope.items()}


def month_zone(organization_id: str) -> str:
    """Return the time zone of an organization's months. I/O: one SQL statement."""
    own = Budget.objects.filter(scope=organization_scope(organization_id), period=Budget.Period.MONTHLY)
    return zone_of(own.values_list("time_zone", flat=True).first() or "")


def write_definition(parts: Iterable[Part]) -> str:
    """Write budgets as one text; equal texts mean equal limits and periods."""
    return ";".join("|".join(map(str, part)) for part in parts)


def plans_definition() -> str:
    """Write the budget of an organization that has no row of its own."""
    return _write_plans(zone_of(""))


@cache
def _write_plans(zone: str) -> str:
    return write_definition([Part("monthly", zone, PLANS_LIMIT, 0, 0)])


def read_signature() -> str:
    """Return a short text that changes with every change of any budget. I/O: one SQL statement."""
    changed_us = Func(
        F("updated_at"),
        template="(extract(epoch FROM %(expressions)s) * 1000000)::bigint",
        output_field=BigIntegerField(),
    )
    state = Budget.objects.aggregate(count=Count("pk"), newest=Max("pk"), changes=Sum(changed_us))
    return f"{state['count']}:{state['newest']}:{state['changes']}:{zone_of('')}"


def limit_of(budget: Budget, at_ms: int) -> int | None:
    """Return what may be spent at a moment, raise included; None when the budget only alerts.

    I/O: one SQL statement for an organization's month without a limit of its own.
    """
    limit: int | None = budget.limit_nanousd
    kind, _, name = budget.scope.partition(":")
    if limit is None and kind == "organization" and budget.period == Budget.Period.MONTHLY:
        found = Organization.objects.filter(public_id=name).values_list("plan__monthly_limit_nanousd", flat=True)
        limit = found.first()
    if limit is None or budget.raise_until is None or budget.raise_until <= periods.to_datetime(at_ms):
        return limit
    return limit + int(budget.raise_nanousd)


def check_scope(scope: str) -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for a scope of no known form, or one that names nothing. I/O: one SQL statement."""
    kind, _, name = scope.partition(":")
    if scope == SITE:
        return
    if kind not in KINDS or kind == SITE or not _SLUG.fullmatch(name):
        raise _invalid(
            "scope",
            f"{scope!r} is no scope. Write site, or plan, model, organization, user or key, a colon and which one.",
        )
    tables: dict[str, Any] = {"plan": Plan, "organization": Organization, "user": User, "key": ApiKey}
    if kind == "model":
        # the catalog is above this layer; a model may have a budget before it has a row
        return
    field = "slug" if kind == "plan" else "public_id"
    if not tables[kind].objects.filter(**{field: name}).exists():
        raise _invalid("scope", f"There is no {kind} {name!r}. Copy it from the list.")


def check_time_zone(name: str) -> str:
    """Return the name of a time zone, '' for the service's. Raises: AiscaleError (INVALID_REQUEST)."""
    name = name.strip()
    if name and not periods.is_time_zone(name):
        raise _invalid("time_zone", f"{name!r} is no time zone. Write a name such as Europe/Berlin or UTC.")
    return name


def zone_of(name: str) -> str:
    """Return a budget's time zone, or the service's."""
    return name or str(settings.ENV.time_zone)


def parse_thresholds(texts: Iterable[str], *, has_limit: bool) -> list[str]:
    """Return thresholds as they are kept: percents first, each once, in order. Raises: AiscaleError (INVALID_REQUEST)."""
    percents: set[Decimal] = set()
    amounts: set[int] = set()
    for text in texts:
        percent = text.strip().endswith("%")
        value = _read_number(text, "%" if percent else "$")
        if percent and not has_limit:
            raise _invalid("thresholds", f"{text.strip()} is a part of the limit, and this budget has none.")
        if percent and not 0 < value <= MAX_PERCENT:
            raise _invalid("thresholds", f"{text.strip()} must be above 0% and at most {MAX_PERCENT}%.")
        if not percent and not 0 < value * NANOUSD_PER_USD <= LIMIT_CEILING_NANOUSD:
            raise _invalid("thresholds", f"{text.strip()} must be above $0 and at most 9 million US dollars.")
        if percent:
            percents.add(value.normalize())
        else:
            amounts.add(int(value * NANOUSD_PER_USD))
    if len(percents) + len(amounts) > MAX_THRESHOLDS:
        raise _invalid("thresholds", f"A budget has at most {MAX_THRESHOLDS} thresholds.")
    return [f"{value:f}%" for value in sorted(percents)] + [format_usd(amount) for amount in sorted(amounts)]


def threshold_nanousd(text: str, limit_nanousd: int | None) -> int | None:
    """Return the amount at which a kept threshold is passed; None when it is a part of no limit. Rounded up: never too early."""
    if text.endswith("%"):
        if limit_nanousd is None:
            return None
        exact = Decimal(text[:-1]) * limit_nanousd / 100
        return int(exact.to_integral_value(rounding="ROUND_CEILING"))
    return int(_read_number(text, "$") * NANOUSD_PER_USD)


def _make_parts(scope: str, rows: Iterable[Budget]) -> list[Part]:
    is_organization = scope.startswith("organization:")
    parts = {}
    for budget in rows:
        plans = is_organization and budget.period == Budget.Period.MONTHLY
        limit = str(budget.limit_nanousd) if budget.limit_nanousd is not None else PLANS_LIMIT if plans else ""
        until_ms = int(budget.raise_until.timestamp() * 1000) if budget.raise_until else 0
        parts[budget.period] = Part(budget.period, zone_of(budget.time_zone), limit, budget.raise_nanousd, until_ms)
    if is_organization:
        parts.setdefault("monthly", Part("monthly", zone_of(""), PLANS_LIMIT, 0, 0))
    return [parts[period] for period in sorted(parts)]


def _read_number(text: str, sign: str) -> Decimal:
    bare = text.strip().removeprefix("$") if sign == "$" else text.strip().removesuffix("%")
    bare = bare.replace(",", "").strip()
    try:
        if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", bare):
            raise InvalidOperation
        return Decimal(bare)
    except InvalidOperation:
        raise _invalid(
            "thresholds", f"{text.strip()!r} is no threshold. Write amounts and percents such as $100, $500, 80%."
        ) from None


def _invalid(param: str, message: str) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, message, param=param)
