"""Show an invitation to whoever holds its link, and let them join or decline."""

from urllib.parse import urlencode

from django.contrib import messages
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods

from aiscale.errors import AiscaleError
from apps.accounts import audit, invitations
from apps.accounts.addresses import client_address
from apps.accounts.models import Invitation, User
from apps.accounts.organizations import find_membership

SESSION_KEY = "invitation"
"""The token of the link that this browser opened last: who signs up next with its address joins."""


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def show_invitation(request: HttpRequest, token: str) -> HttpResponse:
    """Ask whether to join; nothing happens before a button is pressed (mail programs open links by themselves)."""
    invitation = invitations.find_by_token(token)
    if invitation is None:
        raise Http404
    user = request.user if isinstance(request.user, User) else None
    if user is not None and _is_in_already(user, invitation):
        messages.success(request, f"You are a member of {invitation.organization.name}.")
        return redirect("accounts:organizations")
    if request.method == "POST":
        return _answer(request, user, invitation)
    is_open = invitation.state == Invitation.State.PENDING and not invitation.is_expired
    if is_open:
        request.session[SESSION_KEY] = token
    here = {"next": request.path}
    context = {
        "invitation": invitation,
        "is_open": is_open,
        "is_mine": user is not None and invitations.is_for(user, invitation),
        "signup_url": f"{reverse('account_signup')}?{urlencode(here | {'email': invitation.email})}",
        "login_url": f"{reverse('account_login')}?{urlencode(here)}",
    }
    return render(request, "accounts/invitation.html", context, status=200 if is_open else 410)


def find_in_session(request: HttpRequest, email: str) -> Invitation | None:
    """Return the open invitation whose link this browser holds, if it is for ``email``. I/O: one SQL statement."""
    token = request.session.get(SESSION_KEY)
    invitation = invitations.find_by_token(token) if token else None
    if invitation is None or invitation.email != email.strip().lower():
        return None
    is_open = invitation.state == Invitation.State.PENDING and not invitation.is_expired
    return invitation if is_open else None


def _answer(request: HttpRequest, user: User | None, invitation: Invitation) -> HttpResponse:
    actor = audit.by_request(request) if user else audit.by_link(invitation.email, address=client_address(request))
    name = invitation.organization.name
    try:
        if request.POST.get("answer") == "decline":
            invitations.decline(user, invitation, holds_link=True, actor=actor)
            messages.success(request, f"You declined to join {name}.")
            return redirect("chat:home")
        if user is None:
            return redirect(f"{reverse('account_login')}?{urlencode({'next': request.path})}")
        invitations.accept(user, invitation, holds_link=True, actor=actor)
    except AiscaleError as refusal:
        messages.error(request, refusal.message)
        return redirect(request.path)
    messages.success(request, f"You are a member of {name} now.")
    return redirect("accounts:organizations")


def _is_in_already(user: User, invitation: Invitation) -> bool:
    accepted = invitation.state == Invitation.State.ACCEPTED and invitations.is_for(user, invitation)
    return accepted and find_membership(user, invitation.organization.public_id) is not None
