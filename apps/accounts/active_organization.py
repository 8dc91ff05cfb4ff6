"""Know for which of their organizations a person works in this browser. Kept in the session; the personal one until they switch."""

from typing import Any

from django.http import HttpRequest
from django.utils.functional import SimpleLazyObject

from apps.accounts.models import Membership, User
from apps.accounts.organizations import ensure_personal_organization, list_memberships

SESSION_KEY = "organization"
_CACHE = "_aiscale_memberships"


def list_own(request: HttpRequest) -> list[Membership]:
    """List the places of who is logged in, the personal organization first. I/O: one SQL statement a request."""
    known: list[Membership] | None = getattr(request, _CACHE, None)
    if known is not None:
        return known
    assert isinstance(request.user, User)
    found = list_memberships(request.user)
    if not any(each.organization.is_personal for each in found):
        ensure_personal_organization(request.user)
        found = list_memberships(request.user)
    setattr(request, _CACHE, found)
    return found


def get_active(request: HttpRequest) -> Membership:
    """Return the place in the active organization. Who was removed from it is in their personal one again. I/O: as `list_own`."""
    own = list_own(request)
    chosen = request.session.get(SESSION_KEY)
    return next((each for each in own if each.organization.public_id == chosen), own[0])


def switch(request: HttpRequest, membership: Membership) -> None:
    """Work for another organization from now on, in this browser."""
    request.session[SESSION_KEY] = membership.organization.public_id


def switch_to(request: HttpRequest, organization_pk: int) -> None:
    """Work for the organization of what is being looked at. I/O: as `list_own`."""
    if get_active(request).organization_id != organization_pk:
        for each in list_own(request):
            if each.organization_id == organization_pk:
                switch(request, each)


def forget(request: HttpRequest) -> None:
    """Read the places again, after they were changed in this request."""
    if hasattr(request, _CACHE):
        delattr(request, _CACHE)


def context(request: HttpRequest) -> dict[str, Any]:
    """Give templates ``active_membership`` and ``own_memberships``. I/O: none before they are used."""
    user = getattr(request, "user", None)
    if user is None or not user.is_authenticated:
        return {}
    return {
        "active_membership": SimpleLazyObject(lambda: get_active(request)),
        "own_memberships": SimpleLazyObject(lambda: list_own(request)),
    }
