"""Answer ``/api/v1/usage`` and ``/api/v1/requests``: what the pages say, for programs. A bearer key or a session says who asks."""

from typing import Any

import msgspec
from django.http import Http404, HttpResponse
from rest_framework.negotiation import BaseContentNegotiation
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from apps.accounts.models import ApiKey, User
from apps.spend import explanations, statement_files, statements, usage, visibility
from apps.spend.statement_files import format_amount
from apps.spend.statements import Statement
from apps.spend.usage_views import read_days, stream_csv
from apps.spend.visibility import Scope


class AnyContent(BaseContentNegotiation):
    """Take no notice of Accept: a file is what it is."""

    def select_parser(self, request: Request, parsers: Any) -> Any:
        return parsers[0]

    def select_renderer(self, request: Request, renderers: Any, format_suffix: str | None = None) -> Any:
        return renderers[0], renderers[0].media_type


class StatementView(APIView):
    """``GET /api/v1/usage?month=2026-11`` or ``?from=2026-11-01&to=2026-11-15``."""

    def get(self, request: Request) -> Response:
        scope = read_scope(request)
        days = read_days(request._request, scope)
        statement = statements.build(scope.organization.public_id, days, user_id=scope.user_id)
        month = usage.find_month(scope.organization.public_id, days, scope.user_id)
        return Response(_describe(statement) | {"month": month and _describe_month(month)})


class StatementFile(APIView):
    """``GET /api/v1/usage.csv``, with the same query."""

    content_negotiation_class = AnyContent

    def get(self, request: Request) -> HttpResponse:
        scope = read_scope(request)
        return stream_csv("statement", scope, read_days(request._request, scope), statement_files.iter_statement)


class RequestsFile(APIView):
    """``GET /api/v1/usage/requests.csv``, with the same query: a row for each request."""

    content_negotiation_class = AnyContent

    def get(self, request: Request) -> HttpResponse:
        scope = read_scope(request)
        return stream_csv("requests", scope, read_days(request._request, scope), statement_files.iter_requests)


class RequestView(APIView):
    """``GET /api/v1/requests/<x-request-id>``: why it was refused, or why it cost what it cost."""

    def get(self, request: Request, request_id: str) -> Response:
        assert isinstance(request.user, User)
        parts = explanations.explain(request_id, request.user)
        if isinstance(request.auth, ApiKey):
            # a key speaks for one organization, whatever else its maker may see
            parts = [part for part in parts if part.organization_id == request.auth.organization.public_id]
        if not parts:
            raise Http404
        value = {"object": "request.explanation", "request_id": request_id, "jobs": []}
        return Response(value | {"jobs": [_describe_part(part) for part in parts]})


def read_scope(request: Request) -> Scope:
    """Return what the key or the session may see. I/O: up to two SQL statements. Raises: AiscaleError (NOT_FOUND)."""
    assert isinstance(request.user, User)
    if isinstance(request.auth, ApiKey):
        return visibility.of_key(request.user, request.auth)
    return visibility.of_page(request._request, request.query_params.get("organization", ""))


def _describe(statement: Statement) -> dict[str, Any]:
    totals = {
        "usage": statement.usage_nanousd,
        "entries": statement.entries_nanousd,
        "total": statement.total_nanousd,
        "saved": statement.saved_nanousd,
    }
    return {
        "object": "usage.statement",
        "organization": statement.organization_id,
        "from": f"{statement.days.first}",
        "to": f"{statement.days.last}",
        "time_zone": statement.days.zone,
        "usage": [_with_usd(_with_usd(msgspec.to_builtins(line), "cost"), "saved") for line in statement.usage],
        "entries": [_with_usd(msgspec.to_builtins(line), "amount") for line in statement.entries],
        "requests": statement.requests,
        "cache_hits": statement.cache_hits,
        "totals": {
            f"{name}_{unit}": nanousd if unit == "nanousd" else format_amount(nanousd)
            for name, nanousd in totals.items()
            for unit in ("nanousd", "usd")
        },
    }


def _describe_month(summary: usage.MonthSummary) -> dict[str, Any]:
    """Say how the current month stands: what a limit refuses, and what the plan's price pays for."""
    left = {
        "left": max(summary.limit_nanousd - summary.spent_nanousd - summary.held_nanousd, 0),
        "included_used": summary.included_used(summary.spent_nanousd),
        "beyond_included": summary.spent_nanousd - summary.included_used(summary.spent_nanousd),
        "included_left": max(summary.included_nanousd - max(summary.spent_nanousd, 0), 0),
    }
    amounts = {name.removesuffix("_nanousd"): value for name, value in msgspec.structs.asdict(summary).items()}
    month = amounts.pop("month")
    value: dict[str, Any] = {"month": month}
    for name, nanousd in (amounts | left).items():
        value |= {f"{name}_nanousd": nanousd, f"{name}_usd": format_amount(nanousd)}
    return value


def _describe_part(part: explanations.Explanation) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(part)
    if isinstance(part, explanations.Charge):
        for name in ("cost", "hold", "given_back", "costs_now"):
            values = _with_usd(values, name)
    return values


def _with_usd(line: dict[str, Any], name: str) -> dict[str, Any]:
    return line | {f"{name}_usd": format_amount(line[f"{name}_nanousd"])}
