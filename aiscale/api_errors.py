"""Answer errors of Django's own API (``/api/v1``) in the shape that ``/v1`` uses: OpenAI's error object."""

import logging
from typing import Any

from django.core.exceptions import PermissionDenied
from django.db import Error as DatabaseError
from django.http import Http404
from rest_framework import exceptions
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView, set_rollback

from aiscale import request_ids
from aiscale.errors import AiscaleError, Code
from aiscale.redis import UNAVAILABLE, unavailable
from apps.gateway.errors import STATUSES, error_headers, error_object, internal_error

log = logging.getLogger(__name__)

_NO_KEY = (
    "You didn't provide an API key. Send it as the header 'Authorization: Bearer YOUR_KEY'; keys are made on the API "
    "keys page."
)


def answer(error: Exception, context: dict[str, Any]) -> Response:
    """Turn whatever a view raised into an error object (REST framework's EXCEPTION_HANDLER). No I/O."""
    set_rollback()
    if isinstance(error, exceptions.APIException):
        return _answer_framework(error)
    if isinstance(error, Http404):
        error = AiscaleError(Code.NOT_FOUND, "There is nothing here, or it is not yours.")
    elif isinstance(error, PermissionDenied):
        return _answer_framework(exceptions.PermissionDenied())
    elif isinstance(error, UNAVAILABLE):
        log.error("Redis failed: %s", error)
        error = unavailable()
    elif isinstance(error, DatabaseError):
        log.error("Postgres failed: %s", error)
        message = "The service cannot reach its database right now. Try again in a few seconds."
        error = AiscaleError(Code.BACKEND_UNAVAILABLE, message, retry_after_s=2)
    if isinstance(error, AiscaleError):
        return Response(error_object(error), STATUSES[error.code][0], headers=error_headers(error))
    request_id = request_ids.get(context["request"])
    log.error("a request failed", exc_info=error, extra={"request_id": request_id})
    return Response(internal_error(request_id), 500)


class NoSuchPath(APIView):
    """Answer every path below ``/api/`` that nobody else answers, so that programs get an error object and no page."""

    authentication_classes = ()
    permission_classes = ()

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        raise AiscaleError(Code.NOT_FOUND, f"Unknown request URL: {request.method} {request.path[:200]}.")


def _answer_framework(error: exceptions.APIException) -> Response:
    """Keep the framework's status, and word the error as ours."""
    param, message = _first_detail(error.detail)
    code = Code.INVALID_REQUEST
    if isinstance(error, exceptions.NotAuthenticated):
        code, message = Code.MISSING_API_KEY, _NO_KEY
    elif isinstance(error, exceptions.AuthenticationFailed):
        code = Code.INVALID_API_KEY
    elif isinstance(error, exceptions.NotFound):
        code = Code.NOT_FOUND
    elif isinstance(error, exceptions.PermissionDenied):
        code = Code.PERMISSION_DENIED
    elif isinstance(error, exceptions.ParseError):
        code = Code.INVALID_JSON
    elif isinstance(error, exceptions.Throttled):
        code = Code.RATE_LIMITED
    wait_s = getattr(error, "wait", None)
    ours = AiscaleError(code, message, param=param, retry_after_s=wait_s)
    return Response(error_object(ours), error.status_code, headers=error_headers(ours))


def _first_detail(detail: Any, param: str | None = None) -> tuple[str | None, str]:
    """Return the first message of the framework's nested details, and the field that it is about."""
    if isinstance(detail, dict) and detail:
        name, value = next(iter(detail.items()))
        return _first_detail(value, None if name == "non_field_errors" else str(name))
    if isinstance(detail, list) and detail:
        return _first_detail(detail[0], param)
    return param, str(detail)
