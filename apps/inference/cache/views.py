"""Show an organization what its cache does, and let who may empty it."""

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST, require_safe

from apps.accounts import audit
from apps.accounts.models import Membership
from apps.accounts.organization_views import describe_place, for_members
from apps.accounts.roles import Right
from apps.inference.cache import generations, reports


@require_safe
@for_members(Right.SEE_USAGE, back="accounts:organization")
def show_cache(request: HttpRequest, place: Membership) -> HttpResponse:
    """Show hits, savings and errors of the last days, and the semantic cache's setting."""
    report = reports.build(place.organization)
    lines = [(reports.LEVELS[line.level], line) for line in report.levels]
    context = describe_place(place) | {"report": report, "lines": lines, "days": reports.DAYS}
    return render(request, "inference/cache.html", context)


@require_POST
@for_members(Right.SET_CACHE, back="inference:cache")
def purge(request: HttpRequest, place: Membership) -> HttpResponse:
    """Forget all of the organization's answers, at once."""
    generations.purge(f"organization:{place.organization.public_id}", by=audit.by_request(request))
    messages.success(request, "All known answers of this organization are forgotten. The next requests are computed.")
    return redirect("inference:cache", place.organization.public_id)
