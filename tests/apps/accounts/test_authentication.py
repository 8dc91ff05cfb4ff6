"""Django's own API knows the keys of /v1, and its errors have OpenAI's shape."""

from datetime import timedelta
from typing import Any

import pytest
from django.core.exceptions import PermissionDenied
from django.db import OperationalError
from django.http import Http404
from django.test import RequestFactory
from django.utils import timezone
from rest_framework import exceptions
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from aiscale.errors import AiscaleError, Code
from aiscale.redis import RedisConnectionError
from apps.accounts.keys import create_key, revoke_key
from tests.apps.conftest import Cast


class WhoAmI(APIView):
    def get(self, request: Request) -> Response:
        return Response({"user": request.user.public_id, "key": getattr(request.auth, "public_id", None)})


def ask(raw: str | None = None, *, scheme: str = "Bearer", method: str = "get") -> Response:
    headers = {} if raw is None else {"Authorization": f"{scheme} {raw}"}
    response = WhoAmI.as_view()(getattr(RequestFactory(), method)("/", headers=headers))
    assert isinstance(response, Response)
    return response


def test_a_key_names_its_maker_and_itself(cast: Cast, django_assert_num_queries: Any) -> None:
    with django_assert_num_queries(1):
        response = ask(cast.raw)
    assert response.data == {"user": cast.user.public_id, "key": cast.key.public_id}


def test_what_is_no_good_key_is_refused_by_name(cast: Cast) -> None:
    revoked, raw_revoked = create_key(cast.organization, cast.user)
    revoke_key(revoked)
    expired, raw_expired = create_key(cast.organization, cast.user)
    expired.expires_at = timezone.now() - timedelta(seconds=1)
    expired.save()
    for raw, code in (
        (None, "missing_api_key"),
        ("", "invalid_api_key"),
        ("sk-aiscale-wrong", "invalid_api_key"),
        ("\udcff\0 ", "invalid_api_key"),
        (raw_revoked, "key_revoked"),
        (raw_expired, "key_expired"),
    ):
        response = ask(raw)
        assert (response.status_code, response.data["error"]["code"]) == (401, code), raw
        assert response.headers["www-authenticate"] == "Bearer"
        assert set(response.data["error"]) == {"message", "type", "param", "code"}
    assert ask(cast.raw, scheme="Basic").data["error"]["code"] == "missing_api_key"
    cast.organization.is_active = False
    cast.organization.save()
    response = ask(cast.raw)
    assert (response.status_code, response.data["error"]["code"]) == (403, "account_inactive")


def test_a_method_that_is_not_there(cast: Cast) -> None:
    response = ask(cast.raw, method="post")
    assert (response.status_code, response.data["error"]["type"]) == (405, "invalid_request_error")


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (AiscaleError(Code.BUDGET_EXHAUSTED, "No money."), 429, "insufficient_quota", None),
        (Http404("secret"), 404, "not_found", None),
        (PermissionDenied("secret"), 403, "permission_denied", None),
        (exceptions.ParseError(), 400, "invalid_json", None),
        (exceptions.ValidationError({"month": ["Not a month."]}), 400, "invalid_request", "month"),
        (exceptions.ValidationError({"non_field_errors": ["Both."]}), 400, "invalid_request", None),
        (exceptions.Throttled(wait=3), 429, "rate_limit_exceeded", None),
        (RedisConnectionError("secret"), 503, "backend_unavailable", None),
        (OperationalError("secret"), 503, "backend_unavailable", None),
        (RuntimeError("secret"), 500, "internal_error", None),
    ],
)
@pytest.mark.django_db
def test_every_error_has_openais_shape(error: Exception, status: int, code: str, param: str | None) -> None:
    class Failing(APIView):
        authentication_classes = ()
        permission_classes = ()

        def get(self, request: Request) -> Response:
            raise error

    response = Failing.as_view()(RequestFactory().get("/"))
    assert isinstance(response, Response)
    assert (response.status_code, response.data["error"]["code"]) == (status, code)
    assert response.data["error"]["param"] == param
    assert "secret" not in str(response.data)
    assert ("Retry-After" in response.headers) == (code in ("rate_limit_exceeded", "backend_unavailable"))
