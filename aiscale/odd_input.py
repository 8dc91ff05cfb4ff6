"""Answer addresses of the admin that no link of ours has with a 400, before they reach a query that cannot hold them."""

from collections.abc import Callable
from urllib.parse import unquote_to_bytes

from django.core.exceptions import BadRequest
from django.http import HttpRequest, HttpResponse


class OddInputMiddleware:
    """Refuse NUL characters, which Postgres cannot store, and numbers too large for any date, in the admin's addresses.

    Our own pages and APIs answer for their parameters themselves; the admin's lists are Django's.
    """

    sync_capable, async_capable = True, False

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if request.path.startswith("/admin/") and (
            "\0" in request.path or b"\0" in unquote_to_bytes(request.META.get("QUERY_STRING", ""))
        ):
            raise BadRequest("The address holds a NUL character.")
        return self._get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> None:
        # Django's date_hierarchy passes the year on to datetime, and catches its ValueError alone
        if isinstance(error, OverflowError) and request.method == "GET" and request.path.startswith("/admin/"):
            raise BadRequest("The address holds a number that is too large.") from error
