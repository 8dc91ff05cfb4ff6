"""Say kindly, on any page, that Redis is away. What programs ask answers by itself (``aiscale.api_errors``, ``apps.gateway``)."""

import logging
from collections.abc import Callable

from django.http import HttpRequest, HttpResponse
from django.template.loader import render_to_string

from aiscale.redis import UNAVAILABLE, unavailable

log = logging.getLogger(__name__)


class OutageMiddleware:
    """Turn a page that failed for want of Redis into a 503 with a sentence and Retry-After."""

    sync_capable, async_capable = True, False

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        return self._get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        if not isinstance(error, UNAVAILABLE):
            return None
        log.error("a page could not be shown: %s", error, extra={"event": "page.outage"})
        refusal = unavailable()
        # without the request: what the other pages show of it may need Redis, too
        response = HttpResponse(render_to_string("503.html", {"message": refusal.message}), status=503)
        response.headers["Retry-After"] = str(round(refusal.retry_after_s or 1))
        response.headers["Cache-Control"] = "no-store"
        return response
