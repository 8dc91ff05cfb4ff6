"""Make and revoke API keys."""

import secrets

from django.db import transaction
from django.db.models import QuerySet
from django.utils import timezone

from aiscale.errors import AiscaleError, Code
from apps.accounts import audit, mirror, roles
from apps.accounts.callers import hash_key
from apps.accounts.models import ApiKey, Membership, Organization, User
from apps.accounts.roles import Right

PREFIX = "sk-aiscale-"
MAX_ACTIVE = 50
"""Keys of one member in one organization that are not revoked."""


def create_key(
    organization: Organization, user: User, name: str = "", *, by: audit.Actor | None = None
) -> tuple[ApiKey, str]:
    """Make a key and return it with its raw text, which is nowhere else: show it once. I/O: SQL, one Redis trip.

    Asks nobody: for what a member may do, see `create_member_key`.
    """
    raw = PREFIX + secrets.token_urlsafe(32)
    with transaction.atomic():
        key = ApiKey.objects.create(
            organization=organization, created_by=user, name=name, digest=hash_key(raw), hint=raw[-4:]
        )
        _record(audit.KEY_CREATE, key, by or audit.by_user(user), name=name)
    return key, raw


def create_member_key(
    organization: Organization, user: User, name: str = "", *, address: str = ""
) -> tuple[ApiKey, str]:
    """Make a key for a member who may.

    I/O: SQL, one Redis trip. Raises: AiscaleError (NOT_FOUND, PERMISSION_DENIED, TOO_MANY_OBJECTS).
    """
    with transaction.atomic():
        # locked: whoever removes this member meanwhile waits, and then finds the key and revokes it
        membership = Membership.objects.select_for_update().filter(user=user, organization=organization).first()
        if membership is None:
            raise AiscaleError(Code.NOT_FOUND, "This organization does not exist.", param="organization_id")
        roles.check(membership.role, Right.MAKE_OWN_KEYS)
        if ApiKey.objects.filter(organization=organization, created_by=user, revoked_at=None).count() >= MAX_ACTIVE:
            raise AiscaleError(
                Code.TOO_MANY_OBJECTS,
                f"You have {MAX_ACTIVE} active keys here. Revoke one that you no longer use first.",
            )
        return create_key(organization, user, name, by=audit.by_user(user, address=address))


def revoke_key(key: ApiKey, by: audit.Actor | None = None, *, reason: str = "") -> None:
    """Refuse the key from now on, everywhere, and end what it started within a second. I/O: SQL, two Redis trips. Idempotent."""
    if key.revoked_at is not None:
        return
    with transaction.atomic():
        key.revoked_at = timezone.now()
        key.save(update_fields=["revoked_at", "updated_at"])
        mirror.announce_revoked(key)
        _record(audit.KEY_REVOKE, key, by or audit.by_system("accounts"), reason, name=key.name)


def revoke_keys(keys: QuerySet[ApiKey], by: audit.Actor, *, reason: str) -> int:
    """Revoke each, and return how many were not revoked before. I/O: SQL, one Redis trip a key."""
    active = list(keys.filter(revoked_at=None).select_related("organization", "created_by"))
    for key in active:
        revoke_key(key, by, reason=reason)
    return len(active)


def find_visible(membership: Membership) -> QuerySet[ApiKey]:
    """Return the keys of the organization that a member may see and revoke: their own, or all. I/O: none yet."""
    keys = ApiKey.objects.filter(organization=membership.organization)
    return keys if roles.may(membership.role, Right.MANAGE_ALL_KEYS) else keys.filter(created_by_id=membership.user_id)


def _record(action: str, key: ApiKey, by: audit.Actor, reason: str = "", **details: object) -> None:
    details = {"ending": key.hint, "maker": key.created_by.email, **details}
    target, organization_id = f"key:{key.public_id}", key.organization.public_id
    audit.record(action, target=target, by=by, reason=reason, organization_id=organization_id, details=details)
