"""Know what a key may spend in a month. Budgets lie above accounts, so settings name the module that keeps them (KEY_LIMITS)."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from django.conf import settings

from apps.accounts.models import ApiKey

CEILING_NANOUSD = 9_000_000 * 1_000_000_000
"""What Lua counts exactly."""


def set_limit(key: ApiKey, limit_nanousd: int | None) -> None:
    """Limit what a key spends in a month of its organization, or (None) no more; in force when the transaction commits.

    I/O: SQL, Redis.
    """
    _get_keeper().set_limit(key.public_id, key.organization.public_id, limit_nanousd)


def attach(keys: Iterable[ApiKey]) -> list[ApiKey]:
    """Tell keys what they may spend, and have spent, this month. I/O: two SQL statements."""
    found = list(keys)
    months = _get_keeper().read_months([key.public_id for key in found]) if found else {}
    for key in found:
        key.month_limit_nanousd, key.month_spent_nanousd = months.get(key.public_id, (None, 0))
    return found


def _get_keeper() -> Any:
    return import_module(settings.KEY_LIMITS)
