"""Give people a copy of what is theirs, and forget them when they go.

What accounts does not know lies in modules above it, which settings name (PERSONAL_DATA). Each of them has three functions:

    export(user)                      yields (name, what is written under it); a generator is written as a list, item by item
    forget_person(user, addresses)    within the transaction that deletes the account
    forget_organization(organization) within the transaction that closes an organization for good

What was charged stays: the ledger names ids alone, and the user's row stays under its id without a name. The audit log stays, too: it
is how an owner shows who did what (`aiscale/decisions/0032-what-a-deleted-account-leaves.md`).
"""

import json
from collections.abc import Iterator
from importlib import import_module
from types import GeneratorType
from typing import Any, NamedTuple

from allauth.account.models import EmailAddress
from django.conf import settings
from django.core.serializers.json import DjangoJSONEncoder
from django.db import transaction
from django.utils import timezone

from aiscale.errors import AiscaleError, Code
from apps.accounts import audit, key_limits
from apps.accounts.keys import revoke_keys
from apps.accounts.models import Invitation, Membership, Organization, User
from apps.accounts.serializers import describe_key, describe_organization

FORMAT = "aiscale.export.1"
DELETED_NAME = "Deleted account"


class Parting(NamedTuple):
    """Say what becomes of a user's organizations when they go: those that need another owner first, those that end, those that go on."""

    blocking: list[Organization]
    closing: list[Organization]
    leaving: list[Organization]


def iter_export(user: User) -> Iterator[str]:
    """Write a JSON document of what is the user's, piece by piece. I/O: SQL."""
    head = {"format": FORMAT, "made_at": timezone.now(), "profile": _describe_person(user)}
    yield _write(head)[:-1]
    for name, value in _iter_parts(user):
        yield f", {_write(name)}: "
        if isinstance(value, GeneratorType):
            yield "["
            for number, item in enumerate(value):
                yield f"{', ' if number else ''}{_write(item)}"
            yield "]"
        else:
            yield _write(value)
    yield "}\n"


def plan_parting(user: User) -> Parting:
    """Tell what would become of the user's organizations. I/O: three SQL statements for each shared one."""
    parting = Parting([], [], [])
    places = Membership.objects.filter(user=user, organization__deleted_at=None).select_related("organization")
    for place in places.order_by("organization__name", "pk"):
        others = place.organization.memberships.exclude(user=user)
        if not others.exists():
            parting.closing.append(place.organization)
        elif place.role == Membership.Role.OWNER and not others.filter(role=Membership.Role.OWNER).exists():
            parting.blocking.append(place.organization)
        else:
            parting.leaving.append(place.organization)
    return parting


def delete_account(user: User, *, address: str = "") -> None:
    """Forget a person: all that is theirs alone is deleted, what they have running ends, and their row keeps nothing but its id.

    I/O: one SQL transaction, Redis trips for each key. Raises: AiscaleError (LAST_OWNER, PERMISSION_DENIED, ACCOUNT_INACTIVE).
    """
    with transaction.atomic():
        # organizations first, then people, each in order: as everybody locks them who changes members
        places = Membership.objects.filter(user=user).values_list("organization_id", flat=True)
        list(Organization.objects.select_for_update(no_key=True).filter(pk__in=list(places)).order_by("pk"))
        person = User.objects.select_for_update().get(pk=user.pk)
        check_may_go(person)
        parting = plan_parting(person)
        if parting.blocking:
            names = ", ".join(organization.name for organization in parting.blocking)
            raise AiscaleError(
                Code.LAST_OWNER,
                f"You are the only owner of {names}. Hand it over or delete it, then your account can go.",
            )
        addresses = {person.email, *EmailAddress.objects.filter(user=person).values_list("email", flat=True)}
        _take_name(person)
        # named by the id alone: this event outlives the person
        actor = audit.Actor(
            kind=audit.by_user(person).kind, name=person.public_id, actor_id=person.public_id, address=address
        )
        audit.record("user.delete", target=f"user:{person.public_id}", by=actor)
        _part(person, parting, actor)
        Invitation.objects.filter(email__in=[each.lower() for each in addresses]).delete()
        for part in _list_modules():
            part.forget_person(person, addresses)


def check_may_go(user: User) -> None:
    """Raise: AiscaleError (PERMISSION_DENIED) for the last administrator; (ACCOUNT_INACTIVE) for who is gone already."""
    if not user.is_active:
        raise AiscaleError(Code.ACCOUNT_INACTIVE, "This account is closed already.")
    others = User.objects.filter(is_superuser=True, is_active=True).exclude(pk=user.pk)
    if user.is_superuser and not others.exists():
        raise AiscaleError(
            Code.PERMISSION_DENIED,
            "You are the only administrator of this service. Make somebody else one first, in the admin.",
        )


def forget_organization(organization: Organization) -> None:
    """Delete what an organization kept, once it is closed for good. Within a transaction. I/O: SQL."""
    for part in _list_modules():
        part.forget_organization(organization)


def _part(person: User, parting: Parting, actor: audit.Actor) -> None:
    """End keys and memberships, and close what nobody else is in."""
    from apps.accounts import organizations

    revoke_keys(person.api_keys.all(), actor, reason="The account of its maker was deleted.")
    person.api_keys.update(name="")
    for organization in parting.closing:
        if organization.is_personal:
            organization.name = DELETED_NAME
            organization.save(update_fields=["name", "updated_at"])
        organizations.close(organization, actor)
    for organization in parting.leaving:
        organizations.record("member.leave", organization, actor)
    Membership.objects.filter(user=person).delete()


def _take_name(person: User) -> None:
    EmailAddress.objects.filter(user=person).delete()
    # no such domain can be: nobody receives a mail there, and the address is free for another account
    person.email = f"deleted-{person.public_id}@deleted.invalid"
    person.first_name = person.last_name = ""
    person.is_active = person.is_staff = person.is_superuser = False
    person.set_unusable_password()
    person.user_permissions.clear()
    person.save()


def _iter_parts(user: User) -> Iterator[tuple[str, Any]]:
    places = Membership.objects.filter(user=user, organization__deleted_at=None).select_related("organization__plan")
    yield "organizations", [describe_organization(place) for place in places.order_by("pk")]
    keys = user.api_keys.select_related("created_by", "organization").order_by("pk")
    yield (
        "api_keys",
        [describe_key(key) | {"organization_id": key.organization.public_id} for key in key_limits.attach(keys)],
    )
    for part in _list_modules():
        yield from part.export(user)


def _describe_person(user: User) -> dict[str, Any]:
    addresses = EmailAddress.objects.filter(user=user).order_by("pk")
    return {
        "id": user.public_id,
        "email": user.email,
        "first_name": user.first_name,
        "last_name": user.last_name,
        "joined_at": user.date_joined,
        "last_login_at": user.last_login,
        "addresses": [{"email": each.email, "confirmed": each.verified, "main": each.primary} for each in addresses],
    }


def _list_modules() -> list[Any]:
    return [import_module(name) for name in settings.PERSONAL_DATA]


def _write(value: Any) -> str:
    return json.dumps(value, cls=DjangoJSONEncoder, ensure_ascii=False)
