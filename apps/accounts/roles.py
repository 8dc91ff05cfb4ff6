"""Say what each role of an organization may do: the one place where that is written.

Who is no member has no rights at all: for them the organization does not exist (`Code.NOT_FOUND`, never "forbidden").
"""

from enum import StrEnum

from aiscale.errors import AiscaleError, Code
from apps.accounts.models import Membership

Role = Membership.Role


class Right(StrEnum):
    """Something that a member may or may not do. The value completes the sentence "You may not ..."."""

    SEE_ORGANIZATION = "see this organization"
    SEE_MEMBERS = "see who is in this organization"
    CHAT = "spend this organization's money"
    SEE_OWN_USAGE = "see what you used yourself"
    SEE_USAGE = "see what everybody used"
    MAKE_OWN_KEYS = "make keys"
    REVOKE_OWN_KEYS = "revoke your own keys"
    MANAGE_ALL_KEYS = "see and revoke other people's keys"
    CHANGE_KEYS = "change what a key may do"
    INVITE = "invite people"
    CHANGE_ROLES = "change roles"
    REMOVE_MEMBERS = "remove people"
    RENAME = "rename this organization"
    SET_CACHE = "change how this organization's answers are cached"
    MANAGE_WEBHOOKS = "manage this organization's webhooks"
    REQUEST_PLAN = "ask for another plan or budget"
    TRANSFER = "hand this organization over"
    DELETE = "delete this organization"


_WRITTEN = {
    Right.SEE_ORGANIZATION: "owner admin member billing",
    Right.SEE_MEMBERS: "owner admin member billing",
    Right.SEE_OWN_USAGE: "owner admin member billing",
    Right.REVOKE_OWN_KEYS: "owner admin member billing",
    Right.CHAT: "owner admin member",
    Right.MAKE_OWN_KEYS: "owner admin member",
    Right.SEE_USAGE: "owner admin billing",
    Right.MANAGE_ALL_KEYS: "owner admin",
    Right.CHANGE_KEYS: "owner admin",
    Right.INVITE: "owner admin",
    Right.CHANGE_ROLES: "owner admin",
    Right.REMOVE_MEMBERS: "owner admin",
    Right.RENAME: "owner admin",
    Right.SET_CACHE: "owner admin",
    Right.MANAGE_WEBHOOKS: "owner admin",
    Right.REQUEST_PLAN: "owner billing",
    Right.TRANSFER: "owner",
    Right.DELETE: "owner",
}
TABLE: dict[Right, frozenset[Role]] = {
    right: frozenset(Role(name) for name in names.split()) for right, names in _WRITTEN.items()
}

DESCRIPTIONS: dict[Role, str] = {
    Role.OWNER: "Does everything, also hand the organization over or delete it.",
    Role.ADMIN: "Manages people, all keys and webhooks; sees everybody's usage.",
    Role.MEMBER: "Chats and makes keys of their own; sees their own usage.",
    Role.BILLING: "Sees usage and costs, and asks for plans and budgets; does not chat and makes no keys.",
}


def may(role: str, right: Right) -> bool:
    """Tell whether a member with this role has the right."""
    return role in TABLE[right]


def check(role: str, right: Right) -> None:
    """Raise: AiscaleError (PERMISSION_DENIED), naming who could do it instead."""
    if may(role, right):
        return
    able = " or ".join(each.value for each in Role if each in TABLE[right])
    raise AiscaleError(
        Code.PERMISSION_DENIED,
        f"Your role in this organization is {role}: you may not {right}. Ask somebody whose role is {able}.",
    )


def list_grantable(role: str) -> list[Role]:
    """List the roles that a member with this role may give, and whose bearers they may change or remove: an owner all, an admin
    all but owner, others none."""
    if not may(role, Right.CHANGE_ROLES):
        return []
    return [each for each in Role if each != Role.OWNER or role == Role.OWNER]


def check_grant(role: str, granted: str, what: str) -> None:
    """Raise: AiscaleError (PERMISSION_DENIED) when a member with ``role`` may not touch the role ``granted``."""
    if granted not in list_grantable(role):
        raise AiscaleError(Code.PERMISSION_DENIED, f"Only an owner may {what}. Ask an owner of this organization.")
