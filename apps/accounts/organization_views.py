"""Show organizations and their people. Another one's organization does not exist: 404, whatever is asked of it."""

from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from functools import wraps
from typing import Any

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.core.exceptions import PermissionDenied
from django.core.paginator import Paginator
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST

from aiscale.errors import AiscaleError, Code
from apps.accounts import active_organization, audit, invitations, members, organizations, roles
from apps.accounts.models import ApiKey, Invitation, Membership, User
from apps.accounts.rates import CREATE_ORGANIZATION, INVITE, check_rate
from apps.accounts.roles import Right

MEMBERS_PAGE = 50

View = Callable[..., HttpResponse]


def for_members(right: Right, back: str = "accounts:members") -> Callable[[View], View]:
    """Call the view with the caller's place in the organization. 404 for who has none, 403 for whose role may not; other refusals are
    shown on the page ``back``."""

    def decorate(view: View) -> View:
        @wraps(view)
        @login_required
        @never_cache
        def check(request: HttpRequest, organization_id: str, **values: str) -> HttpResponse:
            own = active_organization.list_own(request)
            place = next((each for each in own if each.organization.public_id == organization_id), None)
            if place is None:
                raise Http404
            try:
                roles.check(place.role, right)
                return view(request, place, **values)
            except AiscaleError as refusal:
                if refusal.code is Code.NOT_FOUND:
                    raise Http404 from refusal
                if refusal.code is Code.PERMISSION_DENIED:
                    raise PermissionDenied(refusal.message) from refusal
                messages.error(request, refusal.message)
                return redirect(back, organization_id)

        return check

    return decorate


@login_required
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def show_organizations(request: HttpRequest) -> HttpResponse:
    """List the caller's organizations and the invitations that wait for them; make a shared one on POST."""
    user, name = _user(request), ""
    error = ""
    if request.method == "POST":
        name = request.POST.get("name", "")
        try:
            check_rate(request, CREATE_ORGANIZATION)
            place = organizations.create(user, name, actor=audit.by_request(request))
        except AiscaleError as refusal:
            error = refusal.message
        else:
            active_organization.switch(request, place)
            messages.success(
                request, f"{place.organization.name} is made, and you work for it now. Invite your people."
            )
            return redirect("accounts:members", place.organization.public_id)
    context = {
        "invited": [{"invitation": each, "token": invitations.make_token(each)} for each in invitations.list_for(user)],
        "is_confirmed": invitations.is_confirmed(user),
        "name": name,
        "error": error,
        "max_owned": organizations.MAX_OWNED,
    }
    return render(request, "accounts/organizations.html", context)


@require_POST
@for_members(Right.SEE_ORGANIZATION)
def switch(request: HttpRequest, place: Membership) -> HttpResponse:
    """Work for this organization from now on."""
    active_organization.switch(request, place)
    target = request.POST.get("next", "")
    if not url_has_allowed_host_and_scheme(target, allowed_hosts=None):
        target = "/"
    return redirect(target)


@require_http_methods(["GET", "HEAD", "POST"])
@for_members(Right.SEE_ORGANIZATION, back="accounts:organization")
def show_organization(request: HttpRequest, place: Membership) -> HttpResponse:
    """Show what the organization is called and may spend; rename it on POST."""
    if request.method == "POST":
        organizations.rename(
            _user(request), place.organization, request.POST.get("name", ""), actor=audit.by_request(request)
        )
        messages.success(request, "The organization has its new name.")
        return redirect("accounts:organization", place.organization.public_id)
    return render(request, "accounts/organization.html", describe_place(place))


@require_POST
@for_members(Right.SET_CACHE, back="inference:cache")
def set_semantic_cache(request: HttpRequest, place: Membership) -> HttpResponse:
    """Let alike questions share answers, or not."""
    is_on = request.POST.get("semantic_cache") == "on"
    changed = organizations.set_semantic_cache(
        _user(request),
        place.organization,
        is_on,
        _read_percent(request.POST.get("max_error_percent", "")),
        actor=audit.by_request(request),
    )
    words = f"share answers now, of which at most {changed.semantic_max_error_percent} % may be wrong"
    messages.success(request, f"Alike questions {words if is_on else 'are each answered by the model now'}.")
    return redirect("inference:cache", place.organization.public_id)


@require_http_methods(["GET", "HEAD"])
@for_members(Right.SEE_MEMBERS)
def show_members(request: HttpRequest, place: Membership) -> HttpResponse:
    """List the members, a page at a time, those whose address holds ``?q=``, and who is invited."""
    query = request.GET.get("q", "").replace("\x00", "").strip()[:254]
    found = place.organization.memberships.select_related("user").order_by("user__email")
    if query:
        found = found.filter(user__email__icontains=query)
    page = Paginator(found, MEMBERS_PAGE).get_page(request.GET.get("page"))
    return render(
        request, "accounts/members.html", {"page": page, "query": query, **describe_place(place), **_invited(place)}
    )


@require_POST
@for_members(Right.INVITE)
def invite(request: HttpRequest, place: Membership) -> HttpResponse:
    """Invite an address."""
    check_rate(request, INVITE)
    made = invitations.invite(
        _user(request),
        place.organization,
        request.POST.get("email", ""),
        request.POST.get("role", ""),
        actor=audit.by_request(request),
    )
    messages.success(request, f"{made.email} is invited, and has seven days to join.")
    return _to_members(place)


@require_POST
@for_members(Right.INVITE)
def resend_invitation(request: HttpRequest, place: Membership, invitation_id: str) -> HttpResponse:
    check_rate(request, INVITE)
    made = invitations.resend(_user(request), place.organization, invitation_id, actor=audit.by_request(request))
    messages.success(request, f"The mail to {made.email} is sent again.")
    return _to_members(place)


@require_POST
@for_members(Right.INVITE)
def revoke_invitation(request: HttpRequest, place: Membership, invitation_id: str) -> HttpResponse:
    made = invitations.revoke(_user(request), place.organization, invitation_id, actor=audit.by_request(request))
    messages.success(request, f"The invitation of {made.email} is taken back.")
    return _to_members(place)


@require_POST
@for_members(Right.CHANGE_ROLES)
def change_role(request: HttpRequest, place: Membership, member_id: str) -> HttpResponse:
    role = request.POST.get("role", "")
    changed = members.change_role(_user(request), place.organization, member_id, role, actor=audit.by_request(request))
    active_organization.forget(request)
    messages.success(request, f"{changed.user.email} has the role {changed.get_role_display().lower()} now.")
    return _to_members(place)


@require_http_methods(["GET", "HEAD", "POST"])
@for_members(Right.REMOVE_MEMBERS)
def remove_member(request: HttpRequest, place: Membership, member_id: str) -> HttpResponse:
    """Say what removing somebody brings about, and do it on POST."""
    member = members.get_member(place.organization, member_id)
    if request.method == "POST":
        members.remove(_user(request), place.organization, member_id, actor=audit.by_request(request))
        messages.success(
            request, f"{member.user.email} is no member any more. Their keys of this organization are refused."
        )
        return _to_members(place)
    roles.check_grant(place.role, member.role, "remove an owner")
    return render(request, "accounts/remove_member.html", describe_place(place) | _leaving(member))


@require_http_methods(["GET", "HEAD", "POST"])
@for_members(Right.TRANSFER)
def transfer(request: HttpRequest, place: Membership, member_id: str) -> HttpResponse:
    """Say what handing over means, and do it on POST."""
    member = members.get_member(place.organization, member_id)
    if request.method == "POST":
        members.transfer(_user(request), place.organization, member_id, actor=audit.by_request(request))
        messages.success(request, f"{member.user.email} owns {place.organization.name} now, and you are an admin.")
        return _to_members(place)
    return render(request, "accounts/transfer.html", describe_place(place) | {"member": member})


@require_http_methods(["GET", "HEAD", "POST"])
@for_members(Right.SEE_ORGANIZATION)
def leave(request: HttpRequest, place: Membership) -> HttpResponse:
    """Say what leaving brings about, and do it on POST."""
    if request.method == "POST":
        members.leave(_user(request), place.organization, actor=audit.by_request(request))
        messages.success(request, f"You left {place.organization.name}.")
        return redirect("accounts:organizations")
    context = describe_place(place) | _leaving(place) | {"is_last_owner": members.is_last_owner(place)}
    return render(request, "accounts/leave.html", context)


@require_http_methods(["GET", "HEAD", "POST"])
@for_members(Right.DELETE)
def delete(request: HttpRequest, place: Membership) -> HttpResponse:
    """Say what deleting brings about, and do it when the name was typed."""
    organization, error = place.organization, ""
    if request.method == "POST":
        if " ".join(request.POST.get("name", "").split()) == organization.name:
            organizations.delete(_user(request), organization, actor=audit.by_request(request))
            messages.success(request, f"{organization.name} is deleted.")
            return redirect("accounts:organizations")
        error = "This is not its name. Write it exactly as it stands above."
    counts = {
        "member_count": organization.memberships.count(),
        "key_count": organization.api_keys.filter(revoked_at=None).count(),
    }
    return render(request, "accounts/delete_organization.html", describe_place(place) | counts | {"error": error})


def _read_percent(text: str) -> Decimal | None:
    """Return what was written, also with a decimal comma; None when nothing was. Raises: AiscaleError (INVALID_REQUEST)."""
    if not text.strip():
        return None
    try:
        return organizations.check_error_percent(Decimal(text.strip()[:20].replace(",", ".")))
    except InvalidOperation as error:
        raise AiscaleError(Code.INVALID_REQUEST, "Write the rate of wrong answers as a number of percent.") from error


def _user(request: HttpRequest) -> User:
    assert isinstance(request.user, User)
    return request.user


def describe_place(place: Membership) -> dict[str, Any]:
    """Say what the templates ask of the caller's place: each right as ``can.<right>``."""
    return {
        "place": place,
        "organization": place.organization,
        "can": {right.name.lower(): roles.may(place.role, right) for right in Right},
        "grantable": [(role.value, role.label, roles.DESCRIPTIONS[role]) for role in roles.list_grantable(place.role)],
    }


def _invited(place: Membership) -> dict[str, Any]:
    if not roles.may(place.role, Right.INVITE):
        return {"invited": []}
    pending = place.organization.invitations.filter(state=Invitation.State.PENDING).order_by("email")
    return {"invited": list(pending)}


def _leaving(member: Membership) -> dict[str, Any]:
    keys = ApiKey.objects.filter(organization=member.organization_id, created_by=member.user_id, revoked_at=None)
    return {"member": member, "leaving_keys": list(keys.order_by("-created_at"))}


def _to_members(place: Membership) -> HttpResponse:
    return redirect("accounts:members", place.organization.public_id)
