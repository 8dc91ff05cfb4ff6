"""Guard the pages where somebody can guess: log-in, sign-up and lost passwords. allauth's own limits on these are off (settings).

A middleware, so that no such page is forgotten when allauth brings another path to it.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from aiscale.errors import AiscaleError
from apps.accounts import rates
from apps.accounts.rates import Limit

log = logging.getLogger(__name__)

LIMITS: dict[str, Limit] = {
    "account_login": rates.LOGIN,
    "account_signup": rates.SIGNUP,
    "account_reset_password": rates.RESET_PASSWORD,
    "account_reset_password_from_key": rates.SET_PASSWORD,
}
"""By the name of the page's URL."""
ACCOUNT_FIELDS = ("login", "email")


class LoginLimitMiddleware:
    """Count each attempt by address and account before the page sees it; answer 429 with a page that says when to come back.

    I/O: up to six Redis trips for a POST to one of these pages, none for anything else.
    """

    sync_capable, async_capable = True, False

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        return self._get_response(request)

    def process_view(self, request: HttpRequest, view: Any, args: Any, kwargs: Any) -> HttpResponse | None:
        match = request.resolver_match
        limit = LIMITS.get(match.url_name or "") if match else None
        if limit is None or request.method not in ("POST", "PUT"):
            return None
        account = next((request.POST[name] for name in ACCOUNT_FIELDS if request.POST.get(name)), "")
        try:
            rates.check_rate(request, limit, account)
        except AiscaleError as refusal:
            log.warning("%s: %s", limit.group, refusal, extra={"event": "login.limited", "code": refusal.code.value})
            return _refuse(request, refusal)
        return None


def _refuse(request: HttpRequest, refusal: AiscaleError) -> HttpResponse:
    response = render(request, "429.html", {"message": refusal.message}, status=429)
    response.headers["Retry-After"] = str(math.ceil(refusal.retry_after_s or 1))
    response.headers["Cache-Control"] = "no-store"
    return response
