"""Take money from forms: US dollars in, whole nano-US-dollars out."""

import re
from decimal import Decimal
from typing import Any

from django import forms
from django.core.exceptions import ValidationError
from unfold.widgets import UnfoldAdminDecimalFieldWidget

from aiscale.db import NANOUSD_PER_USD

CEILING_USD = Decimal(9_000_000)
"""What Lua counts exactly in nano-USD."""


_PLAIN = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_ASK_PLAIN = "Write the amount as a plain number with a decimal point, such as 1234.56."

MILLION = 1_000_000
NANOUSD_PER_TOKEN_OF_USD_PER_MILLION = 1_000
"""1 USD for a million tokens is 1,000 nano-USD for each."""


def format_per_million(nanousd_per_token: int) -> str:
    """Write a token's price as US dollars for a million: 50 -> ``0.05``."""
    return f"{(Decimal(nanousd_per_token) / NANOUSD_PER_TOKEN_OF_USD_PER_MILLION).normalize():f}"


class PlainDecimalField(forms.DecimalField):
    """Take a number as it is read on a bill. Python knows other spellings, such as 1_0 and 1E1, and nobody means them with money."""

    def to_python(self, value: Any) -> Any:
        text = str(value or "").strip()
        if text and not _PLAIN.fullmatch(text):
            raise ValidationError(_ASK_PLAIN, code="invalid")
        return super().to_python(text)

    def has_changed(self, initial: Any, data: Any) -> bool:
        try:
            return bool(self.clean(data) != initial)
        except ValidationError:
            return True


class PerMillionField(PlainDecimalField):
    """Take US dollars for a million tokens, exactly, and give whole nano-USD a token; never negative (M10)."""

    def __init__(self, **kwargs: Any) -> None:
        defaults: dict[str, Any] = {
            "min_value": Decimal(0),
            "max_value": Decimal(MILLION),
            "decimal_places": 3,
            "widget": UnfoldAdminDecimalFieldWidget,
        }
        super().__init__(**defaults | kwargs)

    def clean(self, value: Any) -> int | None:
        usd = super().clean(value)
        return None if usd is None else int(usd * NANOUSD_PER_TOKEN_OF_USD_PER_MILLION)

    def prepare_value(self, value: Any) -> Any:
        return format_per_million(value) if isinstance(value, int) else value


class UsdField(PlainDecimalField):
    """Take US dollars exactly, as a decimal, and give whole nano-US-dollars; never negative (M10)."""

    def __init__(self, **kwargs: Any) -> None:
        defaults: dict[str, Any] = {
            "min_value": Decimal(0),
            "max_value": CEILING_USD,
            "max_digits": 16,
            "decimal_places": 9,
            "widget": UnfoldAdminDecimalFieldWidget,
        }
        super().__init__(**defaults | kwargs)

    def clean(self, value: Any) -> int | None:
        usd = super().clean(value)
        return None if usd is None else int(usd * NANOUSD_PER_USD)

    def prepare_value(self, value: Any) -> Any:
        if not isinstance(value, int):
            return value
        return f"{(Decimal(value) / NANOUSD_PER_USD).normalize():f}"
