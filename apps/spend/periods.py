"""Say which month pays: budgets run by calendar months in UTC."""

import time
from datetime import UTC, datetime


def now_ms() -> int:
    """Return the time in epoch milliseconds."""
    return time.time_ns() // 1_000_000


def to_datetime(epoch_ms: int) -> datetime:
    return datetime.fromtimestamp(epoch_ms / 1000, UTC)


def month_of(epoch_ms: int) -> str:
    """Return the UTC month as ``YYYY-MM``; such names sort as the months do."""
    moment = to_datetime(epoch_ms)
    return f"{moment.year:04d}-{moment.month:02d}"


def bounds(month: str) -> tuple[datetime, datetime]:
    """Return a month's first moment and the first one after it."""
    year, number = int(month[:4]), int(month[5:])
    following = (year + 1, 1) if number == 12 else (year, number + 1)
    return datetime(year, number, 1, tzinfo=UTC), datetime(*following, 1, tzinfo=UTC)


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
