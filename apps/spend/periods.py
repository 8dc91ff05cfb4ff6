"""Say which month or day pays: calendar periods in a time zone, as moments that need no calendar to compare."""

import time
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError


class Span(NamedTuple):
    """Be one period: from ``start_ms`` on, until before ``end_ms`` (epoch ms)."""

    start_ms: int
    end_ms: int


def now_ms() -> int:
    """Return the time in epoch milliseconds."""
    return time.time_ns() // 1_000_000


def to_datetime(epoch_ms: int) -> datetime:
    return datetime.fromtimestamp(epoch_ms / 1000, UTC)


def month_of(epoch_ms: int, zone: str = "UTC") -> str:
    """Return the month of a time zone as ``YYYY-MM``; such names sort as the months do."""
    moment = datetime.fromtimestamp(span_of("monthly", zone, epoch_ms).start_ms / 1000, ZoneInfo(zone))
    return f"{moment.year:04d}-{moment.month:02d}"


def bounds(month: str, zone: str = "UTC") -> tuple[datetime, datetime]:
    """Return a month's first moment in a time zone, and the first one after it."""
    span = _span_of_date("monthly", zone, date(int(month[:4]), int(month[5:]), 1))
    return to_datetime(span.start_ms), to_datetime(span.end_ms)


def days_bounds(first: date, last: date, zone: str = "UTC") -> tuple[datetime, datetime]:
    """Return the first moment of a day in a time zone, and the first one after another day."""
    return to_datetime(_midnight_ms(first, zone)), to_datetime(_midnight_ms(last + timedelta(days=1), zone))


def month_before(month: str) -> str:
    year, number = int(month[:4]), int(month[5:])
    return f"{year - 1:04d}-12" if number == 1 else f"{year:04d}-{number - 1:02d}"


def month_after(month: str) -> str:
    year, number = int(month[:4]), int(month[5:])
    return f"{year + 1:04d}-01" if number == 12 else f"{year:04d}-{number + 1:02d}"


def is_time_zone(name: str) -> bool:
    """Tell whether ``name`` is an IANA time zone that this machine knows."""
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


@lru_cache(maxsize=4096)
def _span_of_date(period: str, zone: str, day: date) -> Span:
    if period == "daily":
        first, following = day, day + timedelta(days=1)
    else:
        first = day.replace(day=1)
        following = (first + timedelta(days=32)).replace(day=1)
    return Span(_midnight_ms(first, zone), _midnight_ms(following, zone))


def span_of(period: str, zone: str, at_ms: int) -> Span:
    """Return the day or month (``daily`` or ``monthly``) of a time zone in which the moment ``at_ms`` lies.

    A day lasts 23 or 25 hours when clocks are changed; it begins with its first midnight, or where that is skipped with the first
    moment after it. Raises: zoneinfo.ZoneInfoNotFoundError.
    """
    day = datetime.fromtimestamp(at_ms / 1000, ZoneInfo(zone)).date()
    span = _span_of_date(period, zone, day)
    if at_ms >= span.end_ms:
        # clocks were set back over midnight: the day that had begun goes on
        span = _span_of_date(period, zone, day + timedelta(days=1))
    return span


def _midnight_ms(day: date, zone: str) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone)).timestamp() * 1000)


def format_duration(duration_ms: int) -> str:
    """Write a duration as OpenAI's headers do: ``20ms``, ``7s``, ``6m0s``, ``1h1m0s``. Whole seconds from one second up, rounded up."""
    if duration_ms <= 0:
        return "0s"
    if duration_ms < 1000:
        return f"{duration_ms}ms"
    minutes, seconds = divmod(-(-duration_ms // 1000), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{seconds}s"
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
