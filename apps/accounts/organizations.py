"""Make organizations, find those of a user, rename and delete them.

Every user has one personal organization, which has no other members, and may be in any number of shared ones.
"""

import unicodedata
from decimal import Decimal

from django.db import IntegrityError, transaction
from django.utils import timezone

from aiscale.errors import AiscaleError, Code
from apps.accounts import audit, roles
from apps.accounts.keys import revoke_keys
from apps.accounts.models import Invitation, Membership, Organization, Plan, User
from apps.accounts.plans import DEFAULT_PLAN, seed_plans
from apps.accounts.roles import Right, Role

NAME_CHARS = 120
LEAST_ERROR_PERCENT, MOST_ERROR_PERCENT = Decimal("0.1"), Decimal(10)
"""What may be said of how often the semantic cache may be wrong."""
MAX_OWNED = 5
"""Shared organizations that one user may own. Each begins on the default plan with that plan's money, so they are no way to
get more of it without end. An administrator can make somebody the owner of more."""


def ensure_personal_organization(user: User, plan: str = DEFAULT_PLAN) -> Organization:
    """Return the user's own organization, making it on ``plan`` when there is none. I/O: SQL. Idempotent, also under races.

    Raises: Plan.DoesNotExist for an unknown plan.
    """
    found = Organization.objects.select_related("plan").filter(personal_of=user).first()
    if found is not None:
        return found
    if plan == DEFAULT_PLAN:
        seed_plans()
    chosen = Plan.objects.get(slug=plan)
    try:
        with transaction.atomic():
            made = Organization.objects.create(name=user.email[:NAME_CHARS], plan=chosen, personal_of=user)
            Membership.objects.create(user=user, organization=made, role=Role.OWNER)
    except IntegrityError:
        # another request of the same user was first
        return Organization.objects.select_related("plan").get(personal_of=user)
    return made


def create(user: User, name: str, *, actor: audit.Actor | None = None) -> Membership:
    """Make a shared organization on the default plan, owned by ``user``; return the ownership.

    I/O: SQL, one Redis trip. Raises: AiscaleError (INVALID_REQUEST for the name, TOO_MANY_OBJECTS).
    """
    name = check_name(name)
    seed_plans()
    with transaction.atomic():
        # one at a time for each user, so that the count below holds
        User.objects.select_for_update(no_key=True).get(pk=user.pk)
        owned = Membership.objects.filter(
            user=user, role=Role.OWNER, organization__personal_of=None, organization__deleted_at=None
        )
        if owned.count() >= MAX_OWNED:
            raise AiscaleError(
                Code.TOO_MANY_OBJECTS,
                f"You own {MAX_OWNED} organizations already, the most that one person may. Delete one or hand one over first.",
            )
        made = Organization.objects.create(name=name, plan=Plan.objects.get(slug=DEFAULT_PLAN))
        record("organization.create", made, actor or audit.by_user(user), name=name)
        return Membership.objects.create(user=user, organization=made, role=Role.OWNER)


def rename(by: User, organization: Organization, name: str, *, actor: audit.Actor | None = None) -> Organization:
    """Give a shared organization another name. I/O: SQL, one Redis trip. Raises: AiscaleError."""
    name = check_name(name)
    with transaction.atomic():
        membership = lock_for(by, organization, Right.RENAME)
        refuse_personal(membership.organization, "It is named after you.")
        renamed, before = membership.organization, membership.organization.name
        renamed.name = name
        renamed.save(update_fields=["name", "updated_at"])
        record("organization.rename", renamed, actor or audit.by_user(by), before=before, after=name)
    return renamed


def set_semantic_cache(
    by: User,
    organization: Organization,
    is_on: bool,
    max_error_percent: Decimal | None = None,
    *,
    actor: audit.Actor | None = None,
) -> Organization:
    """Say whether alike questions share answers, and how many of them may be wrong; None leaves that as it is.

    It holds for requests within half a second. I/O: SQL, one Redis trip. Raises: AiscaleError (INVALID_REQUEST, PERMISSION_DENIED).
    """
    with transaction.atomic():
        changed = lock_for(by, organization, Right.SET_CACHE).organization
        before = describe_semantic_cache(changed)
        changed.semantic_cache = is_on
        if max_error_percent is not None:
            changed.semantic_max_error_percent = check_error_percent(max_error_percent)
        changed.save(update_fields=["semantic_cache", "semantic_max_error_percent", "updated_at"])
        after = describe_semantic_cache(changed)
        if before != after:
            record("organization.semantic_cache", changed, actor or audit.by_user(by), before=before, after=after)
    return changed


def check_error_percent(percent: Decimal) -> Decimal:
    """Raise: AiscaleError (INVALID_REQUEST) for what is not 0.1 to 10 percent, in steps of 0.1."""
    if not (percent.is_finite() and LEAST_ERROR_PERCENT <= percent <= MOST_ERROR_PERCENT and percent * 10 % 1 == 0):
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"The rate of wrong answers is {LEAST_ERROR_PERCENT} to {MOST_ERROR_PERCENT} percent, in steps of 0.1.",
            param="semantic_max_error_percent",
        )
    return percent


def describe_semantic_cache(organization: Organization) -> str:
    return f"on, at most {organization.semantic_max_error_percent} % wrong" if organization.semantic_cache else "off"


def delete(by: User, organization: Organization, *, actor: audit.Actor | None = None) -> None:
    """Delete a shared organization: its members leave it, its keys and invitations end. Its ledger stays.

    I/O: SQL, a Redis trip for each key. Raises: AiscaleError.
    """
    with transaction.atomic():
        membership = lock_for(by, organization, Right.DELETE)
        refuse_personal(membership.organization, "It goes when you delete your account.")
        close(membership.organization, actor or audit.by_user(by))


def close(organization: Organization, by: audit.Actor) -> None:
    """End a locked organization: no members, keys or invitations any more, and nothing that it kept. I/O: SQL, a Redis trip for each
    key."""
    from apps.accounts import personal_data

    now = timezone.now()
    organization.deleted_at = now
    organization.save(update_fields=["deleted_at", "updated_at"])
    members, _ = organization.memberships.all().delete()
    organization.invitations.filter(state=Invitation.State.PENDING).update(
        state=Invitation.State.REVOKED, ended_at=now, updated_at=now, send_at=None
    )
    keys = revoke_keys(organization.api_keys.all(), by, reason="The organization was deleted.")
    personal_data.forget_organization(organization)
    record("organization.delete", organization, by, members=members, keys_revoked=keys)


def find_membership(user: User, organization_id: str) -> Membership | None:
    """Return the user's place in an organization, with the organization and its plan. None when they have none, or it does not
    exist: nobody can tell the two apart. I/O: one SQL statement."""
    return (
        Membership.objects.select_related("organization__plan")
        .filter(user=user, organization__public_id=organization_id.replace("\x00", ""), organization__deleted_at=None)
        .first()
    )


def get_membership(user: User, organization_id: str) -> Membership:
    """Do `find_membership`. Raises: AiscaleError (NOT_FOUND)."""
    found = find_membership(user, organization_id)
    if found is None:
        raise not_found()
    return found


def list_memberships(user: User) -> list[Membership]:
    """List the user's places, the personal organization first, then by name. I/O: one SQL statement."""
    found = Membership.objects.select_related("organization__plan").filter(user=user, organization__deleted_at=None)
    return sorted(found, key=lambda each: (not each.organization.is_personal, each.organization.name.casefold()))


def lock_for(user: User, organization: Organization, right: Right) -> Membership:
    """Lock the organization, so that its members change one after the other, and check that the user may do this now.

    Within a transaction. I/O: two SQL statements. Raises: AiscaleError (NOT_FOUND, PERMISSION_DENIED).
    """
    locked = Organization.objects.select_for_update(no_key=True).filter(pk=organization.pk, deleted_at=None).first()
    membership = Membership.objects.filter(user=user, organization=organization).first() if locked else None
    if locked is None or membership is None:
        raise not_found()
    roles.check(membership.role, right)
    membership.organization = locked
    return membership


def record(action: str, organization: Organization, by: audit.Actor, **details: object) -> None:
    """Write down what was done to an organization. Within the change's transaction. I/O: one SQL statement."""
    target = f"organization:{organization.public_id}"
    audit.record(action, target=target, by=by, organization_id=organization.public_id, details=details)


def check_name(name: str) -> str:
    """Return the name with single spaces. Raises: AiscaleError (INVALID_REQUEST)."""
    name = " ".join(name.split())
    if not 1 <= len(name) <= NAME_CHARS:
        raise AiscaleError(
            Code.INVALID_REQUEST, f"Give the organization a name of 1 to {NAME_CHARS} characters.", param="name"
        )
    if "://" in name or any(unicodedata.category(each).startswith("C") for each in name):
        # it stands in the mails that invite people
        raise AiscaleError(
            Code.INVALID_REQUEST,
            "A name holds no web address and no invisible characters. Choose another.",
            param="name",
        )
    return name


def refuse_personal(organization: Organization, why: str) -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for a personal organization."""
    if organization.is_personal:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"This is not possible with your personal organization. {why} Make a shared organization instead.",
        )


def not_found() -> AiscaleError:
    return AiscaleError(Code.NOT_FOUND, "This organization does not exist.", param="organization_id")
