"""Let people make, change and revoke API keys of the organization that they work for."""

from django.conf import settings
from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.core.exceptions import PermissionDenied
from django.core.paginator import Paginator
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST

from aiscale.errors import AiscaleError
from apps.accounts import active_organization, audit, key_limits, roles
from apps.accounts.forms import KeyChangeForm, KeyForm
from apps.accounts.keys import change_key, create_member_key, find_visible, list_visible, read_terms, revoke_key
from apps.accounts.models import ApiKey, Membership, User
from apps.accounts.rates import CREATE_KEY, check_rate
from apps.accounts.roles import Right

PAGE = 50


@login_required
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def show_keys(request: HttpRequest) -> HttpResponse:
    """List the keys that the caller may see; make one on POST and show it in the answer, the only time that it can be seen."""
    place = active_organization.get_active(request)
    form, raw = KeyForm(request.POST or None), None
    if request.method == "POST" and form.is_valid():
        raw = _make_key(request, place, form)
        form = KeyForm() if raw else form
    page = Paginator(list_visible(place), PAGE).get_page(request.GET.get("page"))
    key_limits.attach(page.object_list)
    context = {
        "form": form,
        "raw": raw,
        "organization": place.organization,
        "may_make": roles.may(place.role, Right.MAKE_OWN_KEYS),
        "may_change": roles.may(place.role, Right.CHANGE_KEYS),
        "sees_all": roles.may(place.role, Right.MANAGE_ALL_KEYS) and not place.organization.is_personal,
        "page": page,
        "base_url": f"{settings.PUBLIC_URL}/v1",
    }
    return render(request, "accounts/keys.html", context)


@login_required
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def change(request: HttpRequest, key_id: str) -> HttpResponse:
    """Show what a key may do, and change it on POST: for who manages the organization. Another one's key does not exist."""
    place, key = _find(request, key_id)
    if not roles.may(place.role, Right.CHANGE_KEYS):
        raise PermissionDenied("What a key may do is changed by an owner or admin of its organization.")
    form = KeyChangeForm(key, read_terms(key), request.POST or None)
    if request.method == "POST" and form.is_valid():
        try:
            key = change_key(place, key, form.read_changes(), by=audit.by_request(request))
        except AiscaleError as refusal:
            form.add_error(None, refusal.message)
        else:
            messages.success(request, f"What the key ending in {key.hint} may do is saved, and counts from now on.")
            return redirect("accounts:keys")
    context = {"form": form, "key": key, "organization": place.organization}
    return render(request, "accounts/key.html", context)


@login_required
@require_POST
def revoke(request: HttpRequest, key_id: str) -> HttpResponse:
    """Revoke one of the caller's own keys, or, for who manages the organization, anybody's. Another one's key does not exist."""
    _, key = _find(request, key_id)
    revoke_key(key, audit.by_request(request))
    messages.success(request, f"The key ending in {key.hint} is revoked. Programs that use it are refused from now on.")
    return redirect("accounts:keys")


def _find(request: HttpRequest, key_id: str) -> tuple[Membership, ApiKey]:
    """Return a key that the caller may see, in any of their organizations, and their place there. Raises: Http404."""
    assert isinstance(request.user, User)
    for place in active_organization.list_own(request):
        key = find_visible(place, key_id)
        if key is not None:
            return place, key
    raise Http404


def _make_key(request: HttpRequest, place: Membership, form: KeyForm) -> str | None:
    """Return the new key's raw text; None, with the reason in the form, when there is none."""
    name, by = form.cleaned_data["name"], audit.by_request(request)
    try:
        check_rate(request, CREATE_KEY)
        _, raw = create_member_key(place.organization, place.user, name, form.make_terms(), by=by)
    except AiscaleError as refusal:
        form.add_error(None, refusal.message)
        return None
    return raw
