"""Change who is in an organization and with which role. An organization is never without an owner.

Each change locks the organization first, and reads the role of whoever asks under that lock: somebody who was removed a moment ago
changes nothing any more. The database checks the owner once more at commit.
"""

from django.db import transaction

from aiscale.errors import AiscaleError, Code
from apps.accounts import audit, roles
from apps.accounts.keys import revoke_keys
from apps.accounts.models import Membership, Organization, User
from apps.accounts.organizations import lock_for, refuse_personal
from apps.accounts.roles import Right, Role


def change_role(
    by: User, organization: Organization, member_id: str, role: str, *, actor: audit.Actor | None = None
) -> Membership:
    """Give a member another role. Who may make no keys any more loses those that they made.

    I/O: SQL, a Redis trip for each key. Raises: AiscaleError (NOT_FOUND, PERMISSION_DENIED, LAST_OWNER, INVALID_REQUEST).
    """
    if role not in Role.values:
        raise AiscaleError(
            Code.INVALID_REQUEST, f"There is no role {role!r}; there are {', '.join(Role.values)}.", param="role"
        )
    with transaction.atomic():
        place = lock_for(by, organization, Right.CHANGE_ROLES)
        refuse_personal(place.organization, "You are its only member.")
        member = get_member(place.organization, member_id)
        if member.role == role:
            return member
        roles.check_grant(place.role, member.role, "change an owner's role")
        roles.check_grant(place.role, role, "make somebody an owner")
        if member.role == Role.OWNER:
            _check_other_owner(member, "Make somebody else an owner first.")
        _set_role(member, role, "member.role", actor or audit.by_user(by))
    return member


def transfer(by: User, organization: Organization, member_id: str, *, actor: audit.Actor | None = None) -> Membership:
    """Make another member an owner, and the one who asks an admin; both or neither. Returns the new owner.

    I/O: SQL. Raises: AiscaleError (NOT_FOUND, PERMISSION_DENIED, INVALID_REQUEST).
    """
    with transaction.atomic():
        place = lock_for(by, organization, Right.TRANSFER)
        refuse_personal(place.organization, "You are its only member.")
        member = get_member(place.organization, member_id)
        if member.pk == place.pk:
            raise AiscaleError(Code.INVALID_REQUEST, "You own it already. Choose another member.", param="member_id")
        who = actor or audit.by_user(by)
        _set_role(member, Role.OWNER, "organization.transfer", who)
        _set_role(place, Role.ADMIN, "member.role", who)
    return member


def remove(by: User, organization: Organization, member_id: str, *, actor: audit.Actor | None = None) -> Membership:
    """Put somebody out: their keys of this organization are refused from now on, and they see nothing of it any more.

    I/O: SQL, a Redis trip for each key. Raises: AiscaleError (NOT_FOUND, PERMISSION_DENIED, LAST_OWNER).
    """
    with transaction.atomic():
        place = lock_for(by, organization, Right.REMOVE_MEMBERS)
        member = get_member(place.organization, member_id)
        if member.pk == place.pk:
            raise AiscaleError(Code.INVALID_REQUEST, "To go yourself, leave the organization.", param="member_id")
        roles.check_grant(place.role, member.role, "remove an owner")
        _part(member, "member.remove", actor or audit.by_user(by))
    return member


def leave(user: User, organization: Organization, *, actor: audit.Actor | None = None) -> None:
    """Go. The last owner stays until somebody else is one.

    I/O: SQL, a Redis trip for each key. Raises: AiscaleError (NOT_FOUND, LAST_OWNER, INVALID_REQUEST).
    """
    with transaction.atomic():
        member = lock_for(user, organization, Right.SEE_ORGANIZATION)
        refuse_personal(member.organization, "It goes when you delete your account.")
        if member.role == Role.OWNER:
            _check_other_owner(member, "Hand it over to somebody, or delete it.")
        _part(member, "member.leave", actor or audit.by_user(user))


def get_member(organization: Organization, member_id: str) -> Membership:
    """Return a member by public id. I/O: one SQL statement. Raises: AiscaleError (NOT_FOUND)."""
    found = organization.memberships.select_related("user").filter(public_id=member_id.replace("\x00", "")).first()
    if found is None:
        raise AiscaleError(Code.NOT_FOUND, "This person is no member of this organization.", param="member_id")
    found.organization = organization
    return found


def _part(member: Membership, action: str, by: audit.Actor) -> None:
    # the row goes first: a key that is being made holds it locked, so this waits, and then finds that key
    keys = member.organization.api_keys.filter(created_by_id=member.user_id)
    _record(action, member, by, role=member.role)
    member.delete()
    revoke_keys(keys, by, reason="Its maker is no member any more.")


def _set_role(member: Membership, role: str, action: str, by: audit.Actor) -> None:
    _record(action, member, by, before=member.role, after=role)
    member.role = role
    member.save(update_fields=["role", "updated_at"])
    if not roles.may(role, Right.MAKE_OWN_KEYS):
        keys = member.organization.api_keys.filter(created_by_id=member.user_id)
        revoke_keys(keys, by, reason=f"Its maker's role is {role} now.")


def _record(action: str, member: Membership, by: audit.Actor, **details: object) -> None:
    audit.record(
        action,
        target=f"user:{member.user.public_id}",
        by=by,
        organization_id=member.organization.public_id,
        details={"email": member.user.email, **details},
    )


def is_last_owner(member: Membership) -> bool:
    """Tell whether the organization would be without an owner. I/O: one SQL statement for an owner."""
    if member.role != Role.OWNER:
        return False
    return not member.organization.memberships.filter(role=Role.OWNER).exclude(pk=member.pk).exists()


def _check_other_owner(member: Membership, advice: str) -> None:
    if is_last_owner(member):
        raise AiscaleError(Code.LAST_OWNER, f"An organization needs an owner, and this is the only one. {advice}")
