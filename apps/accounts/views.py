"""Let people make and revoke their API keys."""

from django.conf import settings
from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST
from django_ratelimit.core import is_ratelimited

from apps.accounts import audit
from apps.accounts.forms import KeyForm
from apps.accounts.keys import create_key, revoke_key
from apps.accounts.models import ApiKey, Organization, User
from apps.accounts.organizations import ensure_personal_organization

KEY_RATE = "20/h"
MAX_ACTIVE_KEYS = 50


@login_required
@never_cache
@require_http_methods(["GET", "POST"])
def show_keys(request: HttpRequest) -> HttpResponse:
    """List the caller's keys; make one on POST and show it in the answer, the only time that it can be seen."""
    assert isinstance(request.user, User)
    organization = ensure_personal_organization(request.user)
    form, raw = KeyForm(request.POST or None), None
    if request.method == "POST" and form.is_valid() and _may_make_key(request, form, organization):
        _, raw = create_key(organization, request.user, form.cleaned_data["name"])
        form = KeyForm()
    context = {
        "form": form,
        "raw": raw,
        "keys": organization.api_keys.order_by("revoked_at", "-created_at"),
        "base_url": f"{settings.PUBLIC_URL}/v1",
    }
    return render(request, "accounts/keys.html", context)


@login_required
@require_POST
def revoke(request: HttpRequest, key_id: str) -> HttpResponse:
    """Revoke one of the caller's own keys. Another one's key does not exist."""
    key = get_object_or_404(ApiKey, public_id=key_id, organization__memberships__user=request.user)
    revoke_key(key, audit.by_request(request))
    messages.success(request, f"The key ending in {key.hint} is revoked. Programs that use it are refused from now on.")
    return redirect("accounts:keys")


def _may_make_key(request: HttpRequest, form: KeyForm, organization: Organization) -> bool:
    if organization.api_keys.filter(revoked_at=None).count() >= MAX_ACTIVE_KEYS:
        form.add_error(None, f"You have {MAX_ACTIVE_KEYS} active keys. Revoke one that you no longer use first.")
        return False
    if is_ratelimited(request, group="accounts.create_key", key="user", rate=KEY_RATE, increment=True):
        form.add_error(None, "You have made many keys within the last hour. Try again later.")
        return False
    return True
