"""Show single requests: those that were charged, those that were refused, and why."""

from typing import Any

import msgspec
from django.contrib.auth.decorators import login_required
from django.db.models import Q, QuerySet, Sum
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from aiscale.errors import AiscaleError
from apps.accounts.models import User
from apps.spend import explanations, statements, visibility
from apps.spend.models import RefusalCount, RefusedRequest, UsageRecord
from apps.spend.statements import Days
from apps.spend.usage_views import for_viewers, make_query, read_days
from apps.spend.visibility import Scope

PAGE_ROWS = 50


@for_viewers
def list_requests(request: HttpRequest, scope: Scope) -> HttpResponse:
    """List what was charged in the days of the query, newest first, or with ``refused`` what was refused."""
    if request.GET.get("id", "").strip():
        return redirect("spend:request", request.GET["id"].strip()[:128])
    days = read_days(request, scope)
    refused = "refused" in request.GET
    rows, following = _read_page(request, _list_refused(scope, days) if refused else _list_charged(scope, days))
    context = {
        "scope": scope,
        "organization": scope.organization,
        "days": days,
        "refused": refused,
        "rows": rows,
        "keys": statements.name_keys(row.key_id for row in rows),
        "query": make_query(request, days),
        "following": following,
        "counts": _count_refusals(scope, days) if refused else [],
    }
    return render(request, "spend/requests.html", context)


@login_required
@never_cache
@require_safe
def show_request(request: HttpRequest, request_id: str) -> HttpResponse:
    """Explain one request. To who may not see it, it does not exist."""
    assert isinstance(request.user, User)
    try:
        parts = explanations.explain(request_id, request.user)
    except AiscaleError as refusal:
        raise Http404 from refusal
    keys = statements.name_keys(key_id for part in parts if (key_id := getattr(part, "key_id", "")))
    people = statements.name_users(part.user_id for part in parts)
    context = {
        "request_id": parts[0].request_id,
        "parts": [_name_part(part, keys, people) for part in parts],
        "is_support": visibility.may_see_all(request.user),
    }
    return render(request, "spend/request.html", context)


def _list_charged(scope: Scope, days: Days) -> "QuerySet[UsageRecord]":
    return statements.filter_records(scope.organization.public_id, days.start, days.end, user_id=scope.user_id)


def _list_refused(scope: Scope, days: Days) -> "QuerySet[RefusedRequest]":
    found = RefusedRequest.objects.filter(
        organization_id=scope.organization.public_id, occurred_at__gte=days.start, occurred_at__lt=days.end
    )
    return found.filter(user_id=scope.user_id) if scope.user_id else found


def _read_page(request: HttpRequest, found: Any) -> tuple[list[Any], str]:
    """Return a page of rows and the id with which the next one begins, '' on the last. I/O: two SQL statements."""
    before = request.GET.get("before", "")
    if before.isdecimal() and len(before) < 19:
        at = found.model.objects.filter(pk=int(before)).values_list("occurred_at", flat=True).first()
        if at is not None:
            found = found.filter(Q(occurred_at__lt=at) | Q(occurred_at=at, pk__lt=int(before)), occurred_at__lte=at)
    rows = list(found.order_by("-occurred_at", "-pk")[: PAGE_ROWS + 1])
    return rows[:PAGE_ROWS], str(rows[PAGE_ROWS - 1].pk) if len(rows) > PAGE_ROWS else ""


def _count_refusals(scope: Scope, days: Days) -> list[dict[str, Any]]:
    """Count all refusals by code, those too that were not kept one by one; nothing for who sees only their own."""
    if scope.user_id:
        return []
    found = RefusalCount.objects.filter(
        organization_id=scope.organization.public_id, hour__gte=days.start, hour__lt=days.end
    )
    rows: Any = found.values("code").annotate(total=Sum("count")).order_by("-total")
    return list(rows)


def _name_part(part: explanations.Explanation, keys: dict[str, str], people: dict[str, str]) -> dict[str, Any]:
    values = msgspec.structs.asdict(part)
    key_id = values.get("key_id")
    values["key"] = keys.get(key_id, key_id) if key_id is not None else ""
    values["person"] = people.get(part.user_id, part.user_id)
    return values
