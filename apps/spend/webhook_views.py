"""Let owners and admins keep the webhooks of their organization."""

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_POST

from aiscale.errors import AiscaleError, Code
from apps.accounts import audit
from apps.accounts.models import Membership
from apps.accounts.organization_views import describe_place, for_members
from apps.accounts.rates import ADD_WEBHOOK, TEST_WEBHOOK, check_rate
from apps.accounts.roles import Right
from apps.spend import endpoints
from apps.spend.alert_models import WebhookEndpoint

for_managers = for_members(Right.MANAGE_WEBHOOKS, back="spend:webhooks")


@require_http_methods(["GET", "HEAD", "POST"])
@for_managers
def show_webhooks(request: HttpRequest, place: Membership) -> HttpResponse:
    """List the endpoints and what they were told last; add one on POST and show its secret in the answer, the only time."""
    if request.method != "POST":
        return _show(request, place)
    url = request.POST.get("url", "")
    try:
        check_rate(request, ADD_WEBHOOK)
        made = endpoints.add(place.user, place.organization, url, actor=audit.by_request(request))
    except AiscaleError as refusal:
        if refusal.code in (Code.NOT_FOUND, Code.PERMISSION_DENIED):
            raise
        return _show(request, place, url=url, error=refusal.message)
    return _show(request, place, made)


@require_POST
@for_managers
def rotate(request: HttpRequest, place: Membership, endpoint_id: str) -> HttpResponse:
    """Make another secret and show it in the answer, the only time."""
    check_rate(request, ADD_WEBHOOK)
    made = endpoints.rotate(place.user, place.organization, endpoint_id, actor=audit.by_request(request))
    return _show(request, place, made)


@require_POST
@for_managers
def send_test(request: HttpRequest, place: Membership, endpoint_id: str) -> HttpResponse:
    check_rate(request, TEST_WEBHOOK)
    endpoint, error = endpoints.send_test(place.organization, endpoint_id)
    if error:
        messages.error(request, f"{endpoint.url} was not told: {error}.")
    else:
        messages.success(request, f"{endpoint.url} took the test message.")
    return redirect("spend:webhooks", place.organization.public_id)


@require_POST
@for_managers
def set_active(request: HttpRequest, place: Membership, endpoint_id: str) -> HttpResponse:
    """Pause an endpoint, or with ``active=yes`` go on with it."""
    active, actor = request.POST.get("active") == "yes", audit.by_request(request)
    endpoint = endpoints.set_active(place.user, place.organization, endpoint_id, active, actor=actor)
    told = "is told again from now on" if active else "is told nothing until you resume it"
    messages.success(request, f"{endpoint.url} {told}.")
    return redirect("spend:webhooks", place.organization.public_id)


@require_POST
@for_managers
def resend(request: HttpRequest, place: Membership, delivery_id: str) -> HttpResponse:
    check_rate(request, TEST_WEBHOOK)
    endpoints.resend(place.user, place.organization, delivery_id, actor=audit.by_request(request))
    messages.success(request, "The message is sent again within seconds.")
    return redirect("spend:webhooks", place.organization.public_id)


@require_POST
@for_managers
def delete(request: HttpRequest, place: Membership, endpoint_id: str) -> HttpResponse:
    endpoint = endpoints.delete(place.user, place.organization, endpoint_id, actor=audit.by_request(request))
    messages.success(request, f"{endpoint.url} is told nothing any more.")
    return redirect("spend:webhooks", place.organization.public_id)


def _show(
    request: HttpRequest,
    place: Membership,
    made: tuple[WebhookEndpoint, str] | None = None,
    *,
    url: str = "",
    error: str = "",
) -> HttpResponse:
    context = {
        **describe_place(place),
        "endpoints": endpoints.list_endpoints(place.organization),
        "deliveries": endpoints.list_recent(place.organization),
        "made": made,
        "url": url,
        "error": error,
    }
    return render(request, "spend/webhooks.html", context)
