"""Tell allauth what happens when somebody signs up."""

import logging
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from allauth.account.adapter import DefaultAccountAdapter
from django.conf import settings
from django.db import transaction
from django.http import HttpRequest, HttpResponse

from aiscale.errors import AiscaleError
from apps.accounts import audit, invitations
from apps.accounts.addresses import client_address
from apps.accounts.invitation_views import find_in_session
from apps.accounts.models import User
from apps.accounts.organizations import ensure_personal_organization
from apps.accounts.rates import NO_ADDRESS

log = logging.getLogger(__name__)


class Site(NamedTuple):
    """Name this site to the templates of mails."""

    domain: str

    @property
    def name(self) -> str:
        return self.domain


class AccountAdapter(DefaultAccountAdapter):  # type: ignore[misc]
    """Give every new user an organization, in the same transaction, and let who was invited join."""

    def save_user(self, request: HttpRequest, user: User, form: Any, commit: bool = True) -> User:
        with transaction.atomic():
            saved: User = super().save_user(request, user, form, commit)
            if commit:
                ensure_personal_organization(saved)
        return saved

    def send_mail(self, template_prefix: str, email: str, context: dict[str, Any]) -> None:
        """Send a mail whose links, and name of this site, are of PUBLIC_URL: whoever asks chooses the Host of their own request, not
        where somebody else's link leads."""
        links = {name: _make_public(link) for name, link in context.items() if name.endswith("_url")}
        site = Site(urlsplit(settings.PUBLIC_URL).netloc)
        super().send_mail(template_prefix, email, {**context, **links, "current_site": site})

    def get_client_ip(self, request: HttpRequest) -> str:
        return client_address(request) or NO_ADDRESS

    def unstash_verified_email(self, request: HttpRequest) -> str | None:
        """Return the address that needs no confirmation: that of the invitation whose link this browser holds, if it signs up."""
        invitation = find_in_session(request, request.POST.get("email", ""))
        return invitation.email if invitation else None

    def post_login(self, request: HttpRequest, user: User, *, signup: bool, **options: Any) -> HttpResponse:
        """Let a new user join who came by an invitation's link."""
        invitation = find_in_session(request, user.email) if signup else None
        if invitation is not None:
            try:
                actor = audit.by_user(user, address=client_address(request))
                invitations.accept(user, invitation, holds_link=True, actor=actor)
            except AiscaleError as refusal:
                # it ended in this moment: its page says so
                log.info("an invitation was not accepted: %s", refusal)
        response: HttpResponse = super().post_login(request, user, signup=signup, **options)
        return response


def _make_public(link: str) -> str:
    parts = urlsplit(link)
    return settings.PUBLIC_URL + urlunsplit(("", "", parts.path, parts.query, parts.fragment))
