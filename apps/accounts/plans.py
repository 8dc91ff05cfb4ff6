"""Know the plans that every installation starts with."""

from typing import Any

from aiscale.db import NANOUSD_PER_USD
from apps.accounts.models import Plan

DEFAULT_PLAN = "free"

_SEEDS: tuple[dict[str, Any], ...] = (
    {
        "slug": "free",
        "requests_per_window": 20,
        "window_s": 3600,
        "tokens_per_minute": 20_000,
        "max_in_flight": 2,
        "monthly_limit_nanousd": 1 * NANOUSD_PER_USD,
        "monthly_included_nanousd": 1 * NANOUSD_PER_USD,
        "context_tokens": 4096,
        "max_output_tokens": 1024,
        "priority": 9,
        "max_queued": 64,
        "max_wait_s": 120,
    },
    {
        "slug": "pro",
        "requests_per_window": 60,
        "window_s": 60,
        "tokens_per_minute": 200_000,
        "max_in_flight": 8,
        "monthly_limit_nanousd": 50 * NANOUSD_PER_USD,
        "monthly_included_nanousd": 20 * NANOUSD_PER_USD,
        "monthly_price_nanousd": 20 * NANOUSD_PER_USD,
        "context_tokens": 16_384,
        "max_output_tokens": 2048,
        "priority": 3,
        "max_queued": 128,
        "max_wait_s": 60,
    },
    {
        "slug": "enterprise",
        "requests_per_window": 500,
        "window_s": 60,
        "tokens_per_minute": 2_000_000,
        "max_in_flight": 64,
        "monthly_limit_nanousd": 5000 * NANOUSD_PER_USD,
        "monthly_included_nanousd": 500 * NANOUSD_PER_USD,
        "monthly_price_nanousd": 500 * NANOUSD_PER_USD,
        "max_output_tokens": 4096,
        "priority": 0,
    },
)


def seed_plans() -> int:
    """Make the plans that are missing; those that are there stay as their owner left them. Returns how many were made. I/O: SQL."""
    made = 0
    for seed in _SEEDS:
        _, created = Plan.objects.get_or_create(slug=seed["slug"], defaults={"name": seed["slug"].capitalize(), **seed})
        made += created
    return made


def say_rate(requests: int, window_s: int) -> str:
    """Write so many requests in so many seconds: ``20 requests an hour``."""
    unit = {1: "a second", 60: "a minute", 3_600: "an hour", 86_400: "a day"}.get(window_s, f"in {window_s:,} s")
    return f"{requests:,} request{'' if requests == 1 else 's'} {unit}"
