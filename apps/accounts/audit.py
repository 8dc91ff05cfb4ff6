"""Write down who changed what and why, in the same transaction as the change, so that neither is there without the other.

with transaction.atomic():
    key.save()
    audit.record(audit.KEY_REVOKE, target=f"key:{key.public_id}", by=audit.by_request(request), organization_id=org.public_id)
"""

import getpass
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.core.serializers.json import DjangoJSONEncoder
from django.db import connection
from django.db.transaction import TransactionManagementError
from django.http import HttpRequest

from apps.accounts.addresses import client_address
from apps.accounts.models import ApiKey, AuditEvent, User

KEY_CREATE, KEY_CHANGE, KEY_REVOKE = "key.create", "key.change", "key.revoke"
KILLSWITCH_TRIP, KILLSWITCH_EXTEND = "killswitch.trip", "killswitch.extend"
KILLSWITCH_RELEASE, KILLSWITCH_EXPIRE = "killswitch.release", "killswitch.expire"
"""Other actions are named by who records them: ``<thing>.<verb>``, in lower case."""

_ACTION = re.compile(r"[a-z_]+(\.[a-z_]+)+")
_SECRET_NAME = re.compile(
    r"secret|passw|digest|credential|authori[sz]ation|cookie|(^|_)(raw|token|api_key)$", re.IGNORECASE
)
_SECRET_TEXT = re.compile(r"\b(sk|whsec)[-_][A-Za-z0-9_+/=-]{16,}")
REMOVED = "[removed]"


@dataclass(frozen=True, kw_only=True)
class Actor:
    """Name who did it. ``actor_id`` is a public id where there is one."""

    kind: AuditEvent.ActorKind
    name: str
    actor_id: str = ""
    address: str = ""


def by_request(request: HttpRequest) -> Actor:
    """Name the signed-in user of a request, with the address that they came from."""
    assert isinstance(request.user, User), "only who is signed in can change what is audited"
    return by_user(request.user, address=client_address(request))


def by_user(user: User, *, address: str = "") -> Actor:
    return Actor(kind=AuditEvent.ActorKind.USER, name=user.email, actor_id=user.public_id, address=address)


def by_key(key: ApiKey, *, address: str = "") -> Actor:
    """Name a program by its key, and the key's maker, in whose name it acts."""
    name = f"{key.created_by.email} (key …{key.hint})"
    return Actor(kind=AuditEvent.ActorKind.USER, name=name, actor_id=key.public_id, address=address)


def by_link(email: str, *, address: str = "") -> Actor:
    """Name somebody without an account who holds a link that was mailed to them."""
    return Actor(kind=AuditEvent.ActorKind.LINK, name=email, address=address)


def by_command() -> Actor:
    """Name the operating system's user who runs a management command."""
    return Actor(kind=AuditEvent.ActorKind.COMMAND, name=f"{_login_name()} (command line)")


def by_system(part: str) -> Actor:
    """Name a part of aiscale that acts by itself, such as ``settlement``."""
    return Actor(kind=AuditEvent.ActorKind.SYSTEM, name=part)


def by_budget(budget_id: str, name: str) -> Actor:
    """Name a budget whose limit was reached."""
    return Actor(kind=AuditEvent.ActorKind.BUDGET, name=name, actor_id=budget_id)


def record(
    action: str,
    *,
    target: str,
    by: Actor,
    reason: str = "",
    organization_id: str = "",
    details: Mapping[str, Any] | None = None,
) -> AuditEvent:
    """Write one event. Call it inside the ``transaction.atomic()`` that makes the change.

    ``target`` is ``<kind>:<public id>``. ``details`` holds numbers, texts, lists and mappings of them (dates are written as text); what
    looks like a secret is removed from it.
    I/O: one SQL statement. Raises: TransactionManagementError outside of a transaction; ValueError for a name that is no action.
    """
    if not connection.in_atomic_block:
        raise TransactionManagementError("audit.record belongs into the transaction of the change that it records")
    if not _ACTION.fullmatch(action):
        raise ValueError(f"{action!r} is no action: write <thing>.<verb>")
    return AuditEvent.objects.create(
        actor_kind=by.kind,
        actor=_clean(by.name)[:254],
        actor_id=by.actor_id,
        address=by.address or None,
        action=action,
        target=_clean(target)[:200],
        organization_id=organization_id,
        reason=_clean(reason)[:500],
        details=_clean_all(details or {}),
    )


def _clean_all(value: Any) -> Any:
    """Make a value fit for a JSON column, without what looks like a secret."""
    if isinstance(value, Mapping):
        return {
            _clean(str(name)): REMOVED if _SECRET_NAME.search(str(name)) else _clean_all(part)
            for name, part in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean_all(part) for part in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    try:
        text = value if isinstance(value, str) else DjangoJSONEncoder().default(value)
    except TypeError:
        text = str(value)
    return _clean(str(text))


def _clean(text: str) -> str:
    return _SECRET_TEXT.sub(REMOVED, text.replace("\0", ""))


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # a container's user may have a number and no name
        return "somebody"
