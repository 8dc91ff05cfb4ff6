"""Know what models cost, now and at any time, and change it for the time to come.

A change is a new row (`Price`); none is ever changed or begins in the past, so the price in force at a moment that is over stays the
same. A price that looks like a mistake, such as one meant for a million tokens, needs a confirmation (M9); negative and missing ones cannot
be (M10).
"""

from collections.abc import Mapping
from datetime import datetime, timedelta

import msgspec
from django.db import transaction
from django.utils import timezone

from aiscale.db import format_usd
from aiscale.errors import AiscaleError, Code
from apps.accounts import audit
from apps.spend import pricing
from apps.spend.models import PRICE_CEILING_NANOUSD_PER_TOKEN, REQUEST_CEILING_NANOUSD, Price, Rerating

FAR = 100
"""A price so many times above or below the others is taken for a mistake."""
HIGH_NANOUSD_PER_TOKEN = 1_000_000
"""1,000 USD for a million tokens: more than anybody asks for."""
HIGH_REQUEST_NANOUSD = 1_000_000_000
BULK_SHARE = 2
"""A request of a batch costs one part in so many of the model's price, rounded up to a whole nano-dollar a token."""
NEW_S = 5
"""A moment that has just passed while the form travelled counts as now."""
_KINDS = {
    "prompt_nanousd_per_token": "prompt",
    "cached_prompt_nanousd_per_token": "cached prompt",
    "completion_nanousd_per_token": "completion",
    "request_nanousd": "request",
}


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """State what a model costs, in nano-USD a token; ``request_nanousd`` is for each request."""

    prompt_nanousd_per_token: int
    completion_nanousd_per_token: int
    cached_prompt_nanousd_per_token: int
    request_nanousd: int = 0

    def cost_nanousd(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> int:
        """Return what a request costs. Raises: AiscaleError (BACKEND_UNAVAILABLE) for what cannot be."""
        return pricing.cost_nanousd(prompt_tokens, completion_tokens, cached_tokens, **msgspec.structs.asdict(self))

    def at_percent(self, percent: int) -> "Terms":
        """Return the terms of an answer that was known: ``percent`` of the price, rounded up to whole nano-USD."""
        return Terms(**{name: -(-price * percent // 100) for name, price in msgspec.structs.asdict(self).items()})

    def in_bulk(self) -> "Terms":
        """Return the terms of a request in a batch."""
        return Terms(**{name: -(-price // BULK_SHARE) for name, price in msgspec.structs.asdict(self).items()})


def terms_of(price: Price | Rerating) -> Terms:
    return Terms(**{name: getattr(price, name) for name in _KINDS})


def map_current(at: datetime | None = None) -> dict[str, Price]:
    """Return each model's price, now or at a moment. I/O: one SQL statement."""
    return {price.model: price for price in Price.objects.list_in_force(at or timezone.now())}


def change(
    model: str,
    terms: Terms,
    *,
    valid_from: datetime | None = None,
    reason: str,
    by: audit.Actor,
    confirmed: bool = False,
) -> Price:
    """Let ``terms`` hold for requests of ``model`` that are admitted from a moment on (now, when none is given).

    I/O: one SQL transaction; every process follows within a second. Raises: AiscaleError (INVALID_REQUEST) for prices that cannot be, a
    moment in the past, or doubts (`list_doubts`) that nobody has confirmed.
    """
    check(terms)
    now = timezone.now()
    if valid_from is not None and valid_from < now - timedelta(seconds=NEW_S):
        raise _invalid("valid_from", "A price cannot begin in the past. To mend past charges, rate the usage again.")
    valid_from = max(valid_from or now, now)
    current = map_current(valid_from)
    doubts = list_doubts(model, terms, current)
    if doubts and not confirmed:
        raise _invalid("sure", f"{' '.join(doubts)} Confirm that this price is right.")
    before = current.get(model)
    with transaction.atomic():
        price = Price.objects.create(
            model=model, valid_from=valid_from, reason=reason.strip()[:300], **msgspec.structs.asdict(terms)
        )
        audit.record(
            "price.change",
            target=f"price:{price.public_id}",
            by=by,
            reason=reason,
            details={
                "model": model,
                "valid_from": valid_from,
                "from": _in_words(terms_of(before)) if before else None,
                "to": _in_words(terms),
                "doubts": doubts,
            },
        )
    return price


def check(terms: Terms) -> None:
    """Raises: AiscaleError (INVALID_REQUEST) for a price below zero or beyond counting (M10)."""
    for name, label in _KINDS.items():
        price = getattr(terms, name)
        ceiling = REQUEST_CEILING_NANOUSD if name == "request_nanousd" else PRICE_CEILING_NANOUSD_PER_TOKEN
        if not 0 <= price <= ceiling:
            raise _invalid(name, f"The {label} price must be between $0.00 and {format_usd(ceiling)}.")
    if terms.cached_prompt_nanousd_per_token > terms.prompt_nanousd_per_token:
        raise _invalid(
            "cached_prompt_nanousd_per_token",
            "A cached prompt token cannot cost more than another one: the hold of a request would not pay for it.",
        )


def list_doubts(model: str, terms: Terms, current: Mapping[str, Price]) -> list[str]:
    """Say in sentences what makes ``terms`` look like a mistake (M9). ``current`` are all models' prices."""
    doubts = []
    before = current.get(model)
    others = [price for slug, price in current.items() if slug != model]
    for name, label in _KINDS.items():
        price = getattr(terms, name)
        high = HIGH_REQUEST_NANOUSD if name == "request_nanousd" else HIGH_NANOUSD_PER_TOKEN
        if price > high:
            doubts.append(f"The {label} price, {_word(name, price)}, is above {_word(name, high)}.")
        was = getattr(before, name) if before else 0
        if was and not price:
            doubts.append(f"The {label} price was {_word(name, was)} and becomes nothing.")
        elif was and _is_far(price, [was]):
            doubts.append(f"The {label} price is {_times(price, was)} the one before, {_word(name, was)}.")
        theirs = [getattr(other, name) for other in others if getattr(other, name)]
        if price and theirs and _is_far(price, theirs):
            nearest = min(theirs, key=lambda other, price=price: max(other, price) / min(other, price))  # type: ignore[misc]
            doubts.append(f"The {label} price is {_times(price, nearest)} the nearest one of another model.")
    return doubts


def describe(model: str, terms: Terms, valid_from: datetime | None = None) -> list[str]:
    """Say on examples what ``terms`` mean."""
    example, million = terms.cost_nanousd(1_000, 500), 1_000_000
    sentences = [
        f"With {model}, 1,000 prompt and 500 completion tokens cost {format_usd(example)}.",
        f"A million such requests cost {format_usd(example * million)}; a million prompt tokens cost "
        f"{format_usd(terms.prompt_nanousd_per_token * million)}, a million cached ones "
        f"{format_usd(terms.cached_prompt_nanousd_per_token * million)}, a million completion tokens "
        f"{format_usd(terms.completion_nanousd_per_token * million)}.",
    ]
    if terms.request_nanousd:
        sentences.append(f"Of each request's cost {format_usd(terms.request_nanousd)} is for the request itself.")
    since = f"from {valid_from:%-d %B %Y %H:%M} (UTC) on" if valid_from else "from now on"
    sentences.append(f"It holds for requests that are admitted {since}. What was charged before stays as it is.")
    return sentences


def _in_words(terms: Terms) -> dict[str, str]:
    return {label: _word(name, getattr(terms, name)) for name, label in _KINDS.items()}


def _is_far(price: int, others: list[int]) -> bool:
    return bool(price) and (price > FAR * max(others) or price * FAR < min(others))


def _times(price: int, other: int) -> str:
    return f"{price // other:,} times" if price > other else f"one {other // price:,}th of"


def _word(name: str, price: int) -> str:
    if name == "request_nanousd":
        return f"{format_usd(price)} a request"
    return f"{format_usd(price * 1_000_000)} a million tokens"


def _invalid(param: str, message: str) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, message, param=param)
