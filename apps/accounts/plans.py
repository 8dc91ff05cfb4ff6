"""Know the plans that every installation starts with."""

from aiscale.db import NANOUSD_PER_USD
from apps.accounts.models import Plan

DEFAULT_PLAN = "free"

_SEEDS = (
    # slug, requests, window s, in flight, USD a month, output tokens, priority
    ("free", 20, 3600, 2, 1, 1024, 9),
    ("pro", 60, 60, 8, 50, 2048, 3),
    ("enterprise", 500, 60, 64, 5000, 4096, 0),
)


def seed_plans() -> int:
    """Make the plans that are missing; those that are there stay as their owner left them. Returns how many were made. I/O: SQL."""
    made = 0
    for slug, requests, window_s, in_flight, usd, output_tokens, priority in _SEEDS:
        _, created = Plan.objects.get_or_create(
            slug=slug,
            defaults={
                "name": slug.capitalize(),
                "requests_per_window": requests,
                "window_s": window_s,
                "max_in_flight": in_flight,
                "monthly_limit_nanousd": usd * NANOUSD_PER_USD,
                "max_output_tokens": output_tokens,
                "priority": priority,
            },
        )
        made += created
    return made
