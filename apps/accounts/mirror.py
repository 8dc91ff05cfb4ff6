"""Keep in Redis what the gate must know of keys, organizations and plans. Nobody else writes these hashes.

Postgres is the truth. A mirror that could not be written is brought over by `publish_all`, which a periodic task calls.
"""

import asyncio
import logging
from typing import Any

from django.db import connection, transaction

from aiscale import redis as redis_clients
from aiscale.wire import keys
from aiscale.wire.codec import encode_control
from aiscale.wire.events import Control
from apps.accounts import callers
from apps.accounts.callers import Caller
from apps.accounts.models import ApiKey, Organization, Plan, User

log = logging.getLogger(__name__)

REVOKED_REASON = "its API key was revoked"
"""What somebody reads whose answer ends with the key that asked for it."""


def publish_key(key: ApiKey) -> None:
    """Mirror one key once the surrounding transaction commits. I/O: one Redis trip."""
    expires_at_ms = int(key.expires_at.timestamp() * 1000) if key.expires_at else ""
    fields = {
        "key_id": key.public_id,
        "organization_id": key.organization.public_id,
        "user_id": key.created_by.public_id,
        "state": key.state,
        "expires_at_ms": expires_at_ms,
        "requests_per_window": _number(key.requests_per_window),
        "window_s": _number(key.window_s),
        "tokens_per_minute": _number(key.tokens_per_minute),
        "max_in_flight": _number(key.max_in_flight),
        "models": _names(key.allowed_models),
    }
    _publish(keys.api_key(key.digest), fields, f"key:{key.digest}")


def publish_person(user: User) -> None:
    """Mirror the keys of a user, and end what they started if the user is shut out. I/O: one SQL statement, a Redis trip for each key."""
    for key in user.api_keys.filter(revoked_at=None).select_related("organization"):
        key.created_by = user
        publish_key(key)
        if not user.is_active:
            announce_revoked(key)


def announce_revoked(key: ApiKey) -> None:
    """Have workers end what the key started, once the surrounding transaction commits. I/O: one Redis trip.

    Who misses it reads the same in `keys.KILLED`, which spend.killswitch writes twice a second.
    """
    order = Control(order="kill", scope=f"key:{key.public_id}", reason=REVOKED_REASON)
    transaction.on_commit(lambda: _announce(order))


def publish_organization(organization: Organization) -> None:
    """Mirror one organization once the surrounding transaction commits. I/O: one Redis trip."""
    is_open = organization.is_active and organization.deleted_at is None
    fields = {
        "plan": organization.plan.slug,
        "state": "active" if is_open else "suspended",
        "semantic_max_error_percent": str(organization.semantic_max_error_percent)
        if organization.semantic_cache
        else "",
    }
    _publish(keys.organization(organization.public_id), fields, f"organization:{organization.public_id}")


def publish_plan(plan: Plan) -> None:
    """Mirror one plan once the surrounding transaction commits. I/O: one Redis trip."""
    fields = {
        "requests_per_window": plan.requests_per_window,
        "window_s": plan.window_s,
        "tokens_per_minute": _number(plan.tokens_per_minute),
        "max_in_flight": plan.max_in_flight,
        "monthly_limit_nanousd": plan.monthly_limit_nanousd,
        "models": _names(plan.allowed_models),
        "max_queued": _number(plan.max_queued),
        "max_wait_s": _number(plan.max_wait_s),
    }
    _publish(keys.plan(plan.slug), fields, f"plan:{plan.slug}")


def publish_all() -> None:
    """Mirror every plan, organization and key. I/O: three SQL statements, one Redis trip a row."""
    for plan in Plan.objects.iterator():
        publish_plan(plan)
    for organization in Organization.objects.select_related("plan").iterator():
        publish_organization(organization)
    for key in ApiKey.objects.select_related("organization", "created_by").iterator():
        publish_key(key)


async def load(caller: Caller) -> None:
    """Refill what the gate needs to know of one caller. I/O: SQL, up to three Redis trips. Raises: RedisError."""
    await asyncio.to_thread(_load, caller)


def load_key(digest: str) -> bool:
    """Refill one key and its organization and plan. False when there is no such key. I/O: SQL, Redis. Raises: RedisError."""
    key = ApiKey.objects.select_related("organization__plan", "created_by").filter(digest=digest).first()
    if key is None:
        return False
    publish_plan(key.organization.plan)
    publish_organization(key.organization)
    publish_key(key)
    return True


def _number(value: int | None) -> int | str:
    return "" if value is None else value


def _names(models: list[str]) -> str:
    return ",".join(models) or "*"


def _load(caller: Caller) -> None:
    try:
        found = Organization.objects.select_related("plan").filter(public_id=caller.organization_id).first()
        if found is not None:
            publish_plan(found.plan)
            publish_organization(found)
        if caller.key_digest:
            load_key(caller.key_digest)
    finally:
        connection.close()


def _publish(name: str, fields: dict[str, Any], scope: str) -> None:
    transaction.on_commit(lambda: _write(name, fields, scope))


def _announce(order: Control) -> None:
    try:
        redis_clients.get_sync().publish(keys.CONTROL_CHANNEL, encode_control(order))
    except redis_clients.UNAVAILABLE:
        log.exception("%s of %s is told once Redis answers", order.order, order.scope)


def _write(name: str, fields: dict[str, Any], scope: str) -> None:
    callers.forget()
    try:
        pipeline: Any = redis_clients.get_sync().pipeline(transaction=True)
        pipeline.hset(name, mapping=fields)
        pipeline.publish(keys.CONTROL_CHANNEL, encode_control(Control(order="refresh", scope=scope)))
        pipeline.execute()
    except redis_clients.UNAVAILABLE:
        log.exception("%s is saved, and reaches the gate once Redis answers", scope)
