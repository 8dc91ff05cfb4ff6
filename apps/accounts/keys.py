"""Make, change and revoke API keys."""

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from typing import Any

from django.db import connection, transaction
from django.db.models import QuerySet
from django.utils import timezone

from aiscale.db import format_usd
from aiscale.errors import AiscaleError, Code
from apps.accounts import audit, key_limits, mirror, roles
from apps.accounts.callers import hash_key
from apps.accounts.models import ApiKey, Membership, Organization, User
from apps.accounts.roles import Right

PREFIX = "sk-aiscale-"
MAX_ACTIVE = 50
"""Keys of one member in one organization that are not revoked."""
NAME_CHARS, MAX_MODELS, MAX_NUMBER = 80, 50, 2_000_000_000
_NOTE_USES = """
    WITH use AS (SELECT unnest(%s::text[]) AS public_id, unnest(%s::timestamptz[]) AS at),
    stale AS (
        SELECT key.id, use.at FROM accounts_apikey key JOIN use USING (public_id)
        WHERE key.last_used_at IS NULL OR key.last_used_at < use.at - interval '1 minute'
        ORDER BY key.id FOR UPDATE OF key SKIP LOCKED
    )
    UPDATE accounts_apikey key SET last_used_at = stale.at FROM stale WHERE key.id = stale.id
"""


@dataclass(frozen=True, kw_only=True)
class KeyTerms:
    """Say what a key may do: less than its plan, never more. None and () leave it to the plan alone."""

    expires_at: datetime | None = None
    allowed_models: tuple[str, ...] = ()
    requests_per_window: int | None = None
    window_s: int | None = None
    tokens_per_minute: int | None = None
    max_in_flight: int | None = None
    monthly_limit_nanousd: int | None = None
    can_manage: bool = False

    def check(self) -> None:
        """Raise: AiscaleError (INVALID_REQUEST) for terms that cannot be."""
        if self.expires_at is not None and self.expires_at <= timezone.now():
            raise _refuse("expires_at", "A key that has expired already is of no use. Choose a time to come.")
        for name in ("requests_per_window", "window_s", "tokens_per_minute", "max_in_flight"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_NUMBER:
                raise _refuse(name, f"{name} is at least 1, or left out.")
        if (self.requests_per_window is None) != (self.window_s is None):
            raise _refuse("window_s", "A limit of requests needs both requests_per_window and window_s, in seconds.")
        limit = self.monthly_limit_nanousd
        if limit is not None and not 0 <= limit <= key_limits.CEILING_NANOUSD:
            raise _refuse("monthly_limit_nanousd", "A monthly limit is from 0 to 9 million US dollars, or left out.")
        if len(self.allowed_models) > MAX_MODELS or not all(
            0 < len(name) <= 128 and "," not in name and name.isprintable() for name in self.allowed_models
        ):
            raise _refuse("allowed_models", f"Name at most {MAX_MODELS} models as they stand in the list of models.")


def create_key(
    organization: Organization,
    user: User,
    name: str = "",
    terms: KeyTerms | None = None,
    *,
    by: audit.Actor | None = None,
) -> tuple[ApiKey, str]:
    """Make a key and return it with its raw text, which is nowhere else: show it once.

    Asks nobody: for what a member may do, see `create_member_key`.
    I/O: SQL, one Redis trip. Raises: AiscaleError (INVALID_REQUEST).
    """
    terms = terms or KeyTerms()
    terms.check()
    _check_name(name)
    raw = PREFIX + secrets.token_urlsafe(32)
    values = asdict(terms) | {"allowed_models": list(terms.allowed_models)}
    limit_nanousd = values.pop("monthly_limit_nanousd")
    with transaction.atomic():
        key = ApiKey.objects.create(
            organization=organization, created_by=user, name=name, digest=hash_key(raw), hint=raw[-4:], **values
        )
        if limit_nanousd is not None:
            key_limits.set_limit(key, limit_nanousd)
            values["monthly_limit_usd"] = format_usd(limit_nanousd)
        told = {field: value for field, value in values.items() if value}
        _record(audit.KEY_CREATE, key, by or audit.by_user(user), name=name, **told)
    return key, raw


def create_member_key(
    organization: Organization,
    user: User,
    name: str = "",
    terms: KeyTerms | None = None,
    *,
    by: audit.Actor | None = None,
) -> tuple[ApiKey, str]:
    """Make a key for a member who may.

    I/O: SQL, one Redis trip. Raises: AiscaleError (NOT_FOUND, PERMISSION_DENIED, TOO_MANY_OBJECTS, INVALID_REQUEST).
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
        return create_key(organization, user, name, terms, by=by)


def read_terms(key: ApiKey) -> KeyTerms:
    """Return what a key may do now. I/O: two SQL statements."""
    [key] = key_limits.attach([key])
    values = {field.name: getattr(key, field.name, None) for field in fields(KeyTerms)}
    return KeyTerms(
        **values | {"allowed_models": tuple(key.allowed_models), "monthly_limit_nanousd": key.month_limit_nanousd}
    )


def change_key(
    place: Membership, key: ApiKey, changes: Mapping[str, Any], *, by: audit.Actor, reason: str = ""
) -> ApiKey:
    """Change what a key may do, or its ``name``: what ``changes`` names of `KeyTerms`, and nothing else. In force within a second.

    All or nothing, recorded with what it was before. Whether it manages the organization is settled when it is made.
    I/O: SQL, two Redis trips. Raises: AiscaleError (NOT_FOUND, PERMISSION_DENIED, INVALID_REQUEST).
    """
    changes = dict(changes)
    with transaction.atomic():
        # locked: whoever removes this member, or changes their role, meanwhile waits
        membership = Membership.objects.select_for_update().filter(pk=place.pk).first()
        if membership is None:
            raise AiscaleError(Code.NOT_FOUND, "This key does not exist.", param="key_id")
        roles.check(membership.role, Right.CHANGE_KEYS)
        key = ApiKey.objects.select_for_update(of=("self",)).select_related("organization", "created_by").get(pk=key.pk)
        if key.revoked_at is not None:
            raise _refuse("key_id", "This key is revoked, and stays so. Make another one.")
        name = changes.pop("name", key.name)
        _check_name(name)
        before = read_terms(key)
        after = replace(before, **changes)
        # a time that has passed may stay: the key's other terms are changed all the same
        (replace(after, expires_at=None) if after.expires_at == before.expires_at else after).check()
        old, new = _tell_terms(key.name, before), _tell_terms(name, after)
        changed = [field for field in new if old[field] != new[field]]
        if not changed:
            return key
        key.name, key.allowed_models = name, list(after.allowed_models)
        for field in ("expires_at", "requests_per_window", "window_s", "tokens_per_minute", "max_in_flight"):
            setattr(key, field, getattr(after, field))
        key.save()
        if "monthly_limit_usd" in changed:
            key_limits.set_limit(key, after.monthly_limit_nanousd)
        told = {field: {"from": old[field], "to": new[field]} for field in changed}
        _record(audit.KEY_CHANGE, key, by, reason, changed=told)
    return key


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
    """Revoke each, and return how many were not revoked before. I/O: SQL, two Redis trips a key."""
    active = list(keys.filter(revoked_at=None).select_related("organization", "created_by"))
    for key in active:
        revoke_key(key, by, reason=reason)
    return len(active)


def note_uses(uses: Mapping[str, datetime]) -> None:
    """Write down when keys, named by their public ids, were last used; to the minute, so that a busy key is not written all the time.

    I/O: one SQL statement. Several at once do no harm: a row that another one holds is left to it.
    """
    with connection.cursor() as cursor:
        cursor.execute(_NOTE_USES, [list(uses), list(uses.values())])


def list_visible(membership: Membership) -> QuerySet[ApiKey]:
    """Return the keys of the organization that a member may see and revoke: their own, or all; those in use first. I/O: none yet."""
    keys = ApiKey.objects.filter(organization=membership.organization).select_related("created_by", "organization")
    if not roles.may(membership.role, Right.MANAGE_ALL_KEYS):
        keys = keys.filter(created_by_id=membership.user_id)
    # nulls are the last in Postgres: turned around, what is not revoked comes first
    return keys.order_by("-revoked_at", "-created_at", "-id")


def find_visible(membership: Membership, key_id: str) -> ApiKey | None:
    """Return one of `list_visible`. I/O: one SQL statement."""
    return list_visible(membership).filter(public_id=key_id.replace("\x00", "")).first()


def _check_name(name: str) -> None:
    if len(name) > NAME_CHARS or "\x00" in name:
        raise _refuse("name", f"A name has at most {NAME_CHARS} characters.")


def _tell_terms(name: str, terms: KeyTerms) -> dict[str, Any]:
    """Write terms as the audit log does."""
    values = asdict(terms) | {"name": name, "allowed_models": list(terms.allowed_models)}
    limit_nanousd = values.pop("monthly_limit_nanousd")
    return values | {"monthly_limit_usd": None if limit_nanousd is None else format_usd(limit_nanousd)}


def _record(action: str, key: ApiKey, by: audit.Actor, reason: str = "", **details: object) -> None:
    details = {"ending": key.hint, "maker": key.created_by.email, **details}
    target, organization_id = f"key:{key.public_id}", key.organization.public_id
    audit.record(action, target=target, by=by, reason=reason, organization_id=organization_id, details=details)


def _refuse(param: str, message: str) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, message, param=param)
