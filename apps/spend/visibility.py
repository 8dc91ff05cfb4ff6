"""Say whose usage somebody may see: their organization's, their own, or as an administrator anybody's."""

import msgspec
from django.contrib.auth.models import AnonymousUser
from django.http import HttpRequest

from aiscale.errors import AiscaleError, Code
from apps.accounts import active_organization, organizations, roles
from apps.accounts.models import ApiKey, Membership, Organization, User
from apps.accounts.roles import Right
from apps.spend.models import UsageRecord


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """Be what somebody may see of one organization: all, or with ``user_id`` what that person used. ``as_admin``: they are no member."""

    organization: Organization
    user_id: str = ""
    as_admin: bool = False


def of_page(request: HttpRequest, organization_id: str = "") -> Scope:
    """Return what a browser's user may see of an organization, or of the one that they work for.

    I/O: up to two SQL statements. Raises: AiscaleError (NOT_FOUND), which for a stranger is all that there is.
    """
    assert isinstance(request.user, User)
    if not organization_id:
        return _of_membership(active_organization.get_active(request))
    membership = organizations.find_membership(request.user, organization_id)
    if membership is not None:
        return _of_membership(membership)
    if may_see_all(request.user):
        found = Organization.objects.select_related("plan").filter(public_id=organization_id.replace("\0", "")).first()
        if found is not None:
            return Scope(organization=found, as_admin=True)
    raise _not_found()


def of_key(user: User, key: ApiKey) -> Scope:
    """Return what a program may see with its key: what the key's maker may see of the key's organization.

    I/O: one SQL statement. Raises: AiscaleError (NOT_FOUND) when the maker has left it.
    """
    membership = organizations.find_membership(user, key.organization.public_id)
    if membership is None:
        raise _not_found()
    return _of_membership(membership)


def may_see_all(user: User | AnonymousUser) -> bool:
    """Tell whether this is an administrator who looks after others' requests. I/O: up to two SQL statements, once a request."""
    return bool(user.is_active and user.is_staff and user.has_perm("spend.view_usagerecord"))


def may_see(user: User, organization_id: str, user_id: str) -> bool:
    """Tell whether somebody may see what ``user_id`` did for an organization. I/O: up to three SQL statements."""
    membership = organizations.find_membership(user, organization_id)
    if membership is not None:
        scope = _of_membership(membership)
        if scope.user_id in ("", user_id):
            return True
    return may_see_all(user)


def may_see_record(user: User, record: UsageRecord) -> bool:
    return may_see(user, record.organization_id, record.user_id)


def _of_membership(membership: Membership) -> Scope:
    everybody = roles.may(membership.role, Right.SEE_USAGE)
    return Scope(organization=membership.organization, user_id="" if everybody else membership.user.public_id)


def _not_found() -> AiscaleError:
    return AiscaleError(Code.NOT_FOUND, "There is no such organization, or it is not yours.")
