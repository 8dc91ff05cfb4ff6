"""Write money, and the numbers behind refusals, in templates."""

from collections.abc import Mapping
from typing import Any

from django import template
from django.contrib.humanize.templatetags.humanize import intcomma

from aiscale.db import format_usd
from apps.spend import periods
from apps.spend.refusals import say_moment

register = template.Library()
register.filter("usd", format_usd)

CENT_NANOUSD = 10_000_000
_UNITS = ("_nanousd", "_at_ms", "_ms", "_s")
_LABELS = {"worst_nanousd": "Could cost", "ends_at_ms": "Until", "retry_ms": "Try again in", "scope": "Counted for"}


@register.filter
def usd_cents(nanousd: int) -> str:
    """Write money for the eye, in whole cents."""
    if 0 < nanousd < CENT_NANOUSD:
        return "under $0.01"
    return format_usd(nanousd // CENT_NANOUSD * CENT_NANOUSD)


@register.filter
def named(value: str, names: Mapping[str, str]) -> str:
    """Return what something is called, or its id."""
    return names.get(value, value)


@register.filter
def fact_name(name: str) -> str:
    """Name a number of a refusal: ``held_nanousd`` -> ``Held``."""
    if name in _LABELS:
        return _LABELS[name]
    unit = next((unit for unit in _UNITS if name.endswith(unit)), "")
    return name.removesuffix(unit).replace("_", " ").capitalize()


@register.filter
def fact(value: Any, name: str) -> str:
    """Write a number of a refusal in the unit that its name tells."""
    if not isinstance(value, int):
        return str(value)
    if name.endswith("_nanousd"):
        return format_usd(value)
    if name.endswith("_at_ms"):
        return say_moment(periods.to_datetime(value))
    if name.endswith("_ms"):
        return periods.format_duration(value)
    return f"{value} s" if name.endswith("_s") else intcomma(value)
