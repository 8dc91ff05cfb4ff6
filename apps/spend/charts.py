"""Draw small bar charts: numbers for an SVG in a template, in percent of its size, so that it needs no style and no script."""

from collections.abc import Mapping, Sequence
from datetime import date

import msgspec

from aiscale.db import format_usd

TOP_PERCENT = 6.0
"""Left free above the highest bar."""


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """Place one bar; ``label`` is read aloud and shown under the pointer, ``tick`` stands below it ('' = nothing)."""

    x: str
    width: str
    y: str
    height: str
    middle: str
    label: str
    tick: str


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    bars: list[Bar]
    highest: str
    """The amount of the highest bar; '' when there is nothing to show."""


def draw_days(days: Sequence[date], cost_nanousd: Mapping[object, int]) -> Chart:
    """Draw one bar for each day."""
    highest = max((cost_nanousd.get(day, 0) for day in days), default=0)
    step = 100 / len(days)
    tick_each = max(-(-len(days) // 5), 1)
    bars = []
    for number, day in enumerate(days):
        cost = cost_nanousd.get(day, 0)
        height = (100 - TOP_PERCENT) * max(cost, 0) / highest if highest else 0.0
        if cost > 0:
            height = max(height, 0.7)
        bars.append(
            Bar(
                x=f"{number * step + step * 0.12:.3f}%",
                width=f"{step * 0.76:.3f}%",
                y=f"{100 - height:.3f}%",
                height=f"{height:.3f}%",
                middle=f"{(number + 0.5) * step:.3f}%",
                label=f"{day:%-d %B}: {format_usd(cost)}",
                tick=f"{day:%-d %b}" if number % tick_each == 0 else "",
            )
        )
    return Chart(bars=bars, highest=format_usd(highest) if highest else "")
