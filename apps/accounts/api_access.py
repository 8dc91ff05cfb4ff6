"""Say who calls Django's own API, and what they may do with an organization: a person in a browser, or a program with a key.

A program acts in the name of its key's maker, in the key's organization alone, and manages it only when the key was made for that: a
key that leaks from a website gives nobody members' addresses and no further keys.
"""

from typing import NamedTuple

from rest_framework.request import Request

from aiscale.errors import AiscaleError, Code
from apps.accounts import audit, key_limits, organizations, roles
from apps.accounts.addresses import client_address
from apps.accounts.keys import KeyTerms
from apps.accounts.models import ApiKey, Membership, Organization, User
from apps.accounts.roles import Right


class Access(NamedTuple):
    """Be a caller's place in an organization. ``key`` is None for a person."""

    place: Membership
    key: ApiKey | None
    actor: audit.Actor

    @property
    def user(self) -> User:
        return self.place.user

    @property
    def organization(self) -> Organization:
        return self.place.organization


def read_actor(request: Request) -> audit.Actor:
    """Name who calls, for the audit log. No I/O."""
    if isinstance(request.auth, ApiKey):
        return audit.by_key(request.auth, address=client_address(request._request))
    return audit.by_request(request._request)


def read_access(request: Request, organization_id: str, right: Right) -> Access:
    """Return the caller's place in the organization.

    I/O: one SQL statement. Raises: AiscaleError (NOT_FOUND, PERMISSION_DENIED).
    """
    assert isinstance(request.user, User)
    key = request.auth if isinstance(request.auth, ApiKey) else None
    if key is not None and key.organization.public_id != organization_id:
        raise organizations.not_found()
    place = organizations.get_membership(request.user, organization_id)
    place.user = request.user
    if key is not None and right is not Right.SEE_ORGANIZATION:
        check_manages(key)
    roles.check(place.role, right)
    return Access(place, key, read_actor(request))


def refuse_program(request: Request) -> None:
    """Raise: AiscaleError (PERMISSION_DENIED) for what only a person does, logged in, on the page."""
    if isinstance(request.auth, ApiKey):
        raise _refuse("No key may do this. Log in, and do it on the organization's page.")


def check_manages(key: ApiKey | None) -> None:
    """Raise: AiscaleError (PERMISSION_DENIED) for a key that was not made to manage its organization."""
    if key is not None and not key.can_manage:
        raise _refuse("This key may not manage its organization. Make one on the API keys page that may.")


def check_no_wider(key: ApiKey, terms: KeyTerms) -> None:
    """Let a program make no key that may do more than its own. I/O: two SQL statements. Raises: AiscaleError (PERMISSION_DENIED)."""
    if terms.can_manage:
        raise _refuse("A key makes no keys that manage the organization. Log in, and make it on the API keys page.")
    [key] = key_limits.attach([key])
    has_budget = key.month_limit_nanousd is not None
    if key.requests_per_window or key.tokens_per_minute or key.max_in_flight or has_budget:
        raise _refuse("A key that has limits of its own makes no other keys. Log in, and make it on the API keys page.")
    if key.expires_at is not None and (terms.expires_at is None or terms.expires_at > key.expires_at):
        raise _refuse(
            f"This key expires on {key.expires_at:%Y-%m-%d %H:%M} UTC; a key that it makes may not live longer."
        )
    if key.allowed_models and not (terms.allowed_models and set(terms.allowed_models) <= set(key.allowed_models)):
        raise _refuse(f"This key may use {', '.join(key.allowed_models)} alone; so may a key that it makes.")


def _refuse(message: str) -> AiscaleError:
    return AiscaleError(Code.PERMISSION_DENIED, message)
