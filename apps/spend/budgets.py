"""Read and check what a budget says: its scope, time zone and thresholds.

A threshold is a text: ``80%`` (of the limit) or ``$100.00``. It is kept as it is written here, so that an alert can name it.
"""

import re
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from typing import Any

from django.conf import settings

from aiscale.db import NANOUSD_PER_USD, format_usd
from aiscale.errors import AiscaleError, Code
from apps.accounts.models import ApiKey, Organization, Plan, User
from apps.spend import periods
from apps.spend.models import LIMIT_CEILING_NANOUSD

SITE = "site"
KINDS = ("site", "plan", "model", "organization", "user", "key")
MAX_THRESHOLDS = 20
MAX_PERCENT = 1000

_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


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


def _read_number(text: str, sign: str) -> Decimal:
    bare = text.strip().strip(sign).replace(",", "").strip()
    try:
        if not re.fullmatch(r"\d{1,12}(\.\d{1,9})?", bare):
            raise InvalidOperation
        return Decimal(bare)
    except InvalidOperation:
        raise _invalid(
            "thresholds", f"{text.strip()!r} is no threshold. Write amounts and percents such as $100, $500, 80%."
        ) from None


def _invalid(param: str, message: str) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, message, param=param)
