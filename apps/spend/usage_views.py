"""Show people what they and their organization used: the statement of a month or of some days, as page and as CSV."""

from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from aiscale.db import format_usd
from aiscale.errors import AiscaleError, Code
from apps.spend import charts, periods, statement_files, statements, usage, visibility
from apps.spend.statements import Days, Statement
from apps.spend.visibility import Scope

LINES_SHOWN = 200

View = Callable[..., HttpResponse]


def for_viewers(view: View) -> View:
    """Call the view with what its user may see. A stranger's organization does not exist: 404. What was asked wrongly is said on the
    page of this month."""

    @wraps(view)
    @login_required
    @never_cache
    @require_safe
    def check(request: HttpRequest, **values: str) -> HttpResponse:
        try:
            return view(request, visibility.of_page(request, request.GET.get("organization", "")), **values)
        except AiscaleError as refusal:
            if refusal.code is Code.NOT_FOUND:
                raise Http404 from refusal
            messages.error(request, refusal.message)
            return redirect("spend:usage")

    return check


@for_viewers
def show_usage(request: HttpRequest, scope: Scope) -> HttpResponse:
    """Show the statement of the days in the query, this month's without any."""
    days = read_days(request, scope)
    statement = statements.build(scope.organization.public_id, days, user_id=scope.user_id)
    keys = statements.name_keys(line.key_id for line in statement.usage)
    people = statements.name_users(line.user_id for line in statement.usage)
    by_day = {day: line.cost_nanousd for day, line in statements.roll_up(statement.usage, "date").items()}
    context = {
        "scope": scope,
        "organization": scope.organization,
        "statement": statement,
        "days": days,
        "nav": _navigate(days),
        "query": make_query(request, days),
        "organization_query": f"organization={scope.organization.public_id}&" if "organization" in request.GET else "",
        "chart": charts.draw_days(list(days), by_day),
        "tables": _make_tables(statement, keys, people),
        "lines": [_name_line(line, keys, people) for line in statement.usage[:LINES_SHOWN]],
        "lines_left": max(len(statement.usage) - LINES_SHOWN, 0),
        "month": _describe_month(scope, days),
    }
    return render(request, "spend/usage.html", context)


@for_viewers
def download_statement(request: HttpRequest, scope: Scope) -> HttpResponse:
    days = read_days(request, scope)
    return stream_csv("statement", scope, days, statement_files.iter_statement)


@for_viewers
def download_requests(request: HttpRequest, scope: Scope) -> HttpResponse:
    days = read_days(request, scope)
    return stream_csv("requests", scope, days, statement_files.iter_requests)


def stream_csv(name: str, scope: Scope, days: Days, iterate: Callable[..., Any]) -> HttpResponse:
    """Answer with a CSV file that is written while it is sent."""
    organization_id = scope.organization.public_id
    response = StreamingHttpResponse(
        iterate(organization_id, days, user_id=scope.user_id), content_type="text/csv; charset=utf-8"
    )
    file_name = f"{name}-{organization_id}-{days.month or f'{days.first}-to-{days.last}'}.csv"
    response.headers["Content-Disposition"] = f'attachment; filename="{file_name}"'
    return response  # type: ignore[return-value]  # a StreamingHttpResponse is answered as any other


def read_days(request: HttpRequest, scope: Scope) -> Days:
    """Read the days in the query. I/O: one SQL statement. Raises: AiscaleError (INVALID_REQUEST)."""
    values = request.GET
    return statements.read_days(scope.organization.public_id, values.get("month"), values.get("from"), values.get("to"))


def make_query(request: HttpRequest, days: Days) -> str:
    """Return the query that names the same organization and days again, for links."""
    values = request.GET.copy()
    for name in list(values):
        if name != "organization":
            del values[name]
    if days.month:
        values["month"] = days.month
    else:
        values["from"], values["to"] = f"{days.first}", f"{days.last}"
    return values.urlencode()


def _navigate(days: Days) -> dict[str, str]:
    month = f"{days.first:%Y-%m}"
    following = periods.month_after(month)
    this_month = statements.this_month(days.zone)
    return {"before": periods.month_before(month), "after": following if following <= this_month else ""}


def _describe_month(scope: Scope, days: Days) -> dict[str, Any] | None:
    """Say how the current month stands against its limit, for the page."""
    summary = usage.find_month(scope.organization.public_id, days, scope.user_id)
    if summary is None:
        return None
    spent, limit = summary.spent_nanousd, summary.limit_nanousd
    return {
        "spent": format_usd(max(spent, 0)),
        "credit": format_usd(-spent) if spent < 0 else "",
        "limit": format_usd(limit),
        "held": format_usd(summary.held_nanousd) if summary.held_nanousd else "",
        "left": format_usd(max(limit - spent - summary.held_nanousd, 0)),
        "percent": min(max(spent, 0) * 100 // limit, 100) if limit else 100,
        "included": summary.describe_included(),
        "renews_on": days.last + timedelta(days=1),
    }


def _make_tables(statement: Statement, keys: dict[str, str], people: dict[str, str]) -> list[dict[str, Any]]:
    """Sum up by model, key and person, for the small tables."""
    names: dict[str, tuple[str, dict[str, str]]] = {
        "model": ("Model", {}),
        "key_id": ("API key", keys),
        "user_id": ("Person", people),
    }
    tables = [
        {
            "title": title,
            "lines": [
                (known.get(str(value), str(value)) or "Nobody", line)
                for value, line in statements.roll_up(statement.usage, field).items()
            ],
        }
        for field, (title, known) in names.items()
    ]
    # where there is but one person, all is theirs
    return tables if len(tables[-1]["lines"]) > 1 else tables[:-1]


def _name_line(line: statements.UsageLine, keys: dict[str, str], people: dict[str, str]) -> dict[str, Any]:
    key = keys.get(line.key_id, line.key_id)
    return {"line": line, "key": key, "person": people.get(line.user_id, line.user_id)}
