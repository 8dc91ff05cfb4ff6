"""Limit how often somebody may do what sends mails or fills tables, on pages and over the API together."""

from typing import NamedTuple

from django.http import HttpRequest
from django_ratelimit.core import is_ratelimited

from aiscale.errors import AiscaleError, Code


class Limit(NamedTuple):
    """Allow a user so many of something: ``rate`` is ``<number>/<s, m, h or d>``."""

    group: str
    rate: str


CREATE_KEY = Limit("accounts.create_key", "20/h")
CREATE_ORGANIZATION = Limit("accounts.create_organization", "20/d")
INVITE = Limit("accounts.invite", "100/h")


def check_rate(request: HttpRequest, limit: Limit) -> None:
    """Count this once more. I/O: one Redis trip. Raises: AiscaleError (RATE_LIMITED); without Redis, too."""
    if is_ratelimited(request, group=limit.group, key="user", rate=limit.rate, increment=True):
        raise AiscaleError(
            Code.RATE_LIMITED,
            "You have done this very often within a short time. Try again later.",
            retry_after_s=60,
        )
