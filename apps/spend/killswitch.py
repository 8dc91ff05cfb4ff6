"""Stop everything of a scope within a second, and let it go on again.

Scopes: ``site`` (everything), ``model:<slug>``, ``organization:<id>``. The table is the truth. `keys.KILLED` is what the gate and the
workers read; it is always replaced as a whole, by one process at a time, with what the table says, so it cannot keep an order that was
withdrawn or miss one that was given.
"""

import asyncio
import logging
import re
from typing import Any

from django.db import connection, transaction
from django.utils import timezone

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from aiscale.wire.codec import encode_control
from aiscale.wire.events import Control
from apps.accounts.models import Organization
from apps.spend.models import KillSwitch, UsageRecord

log = logging.getLogger(__name__)

_SCOPE = re.compile(r"site|model:[A-Za-z0-9][A-Za-z0-9._/-]{0,127}|organization:org_[0-9a-z]{1,36}")
_ADVISORY_LOCK = 7_146_001
"""Names the Postgres advisory lock under which `restore` writes; any number nobody else uses."""


def trip(scope: str, *, reason: str, by: str) -> KillSwitch:
    """Stop ``scope``: new requests are refused and running ones end within a second, with ``reason`` shown to their callers.

    A scope that is stopped already stays as it is. In force once the surrounding transaction commits.
    I/O: SQL, three Redis trips. Raises: AiscaleError (INVALID_REQUEST) for a scope or reason that cannot be.
    """
    check_scope(scope)
    reason = reason.strip()
    if not reason or len(reason) > 300 or "\0" in reason:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            "Give a reason of 1 to 300 characters: the people who are stopped will read it.",
            param="reason",
        )
    with transaction.atomic():
        switch, created = KillSwitch.objects.get_or_create(
            scope=scope,
            released_at__isnull=True,
            defaults={"reason": reason, "tripped_by": by, "tripped_at": timezone.now()},
        )
        transaction.on_commit(lambda: _announce(Control(order="kill", scope=scope, reason=switch.reason)))
    if created:
        log.warning("kill switch tripped: %s by %s: %s", scope, by, reason, extra={"event": "killswitch.trip"})
    return switch


def release(scope: str, *, by: str) -> KillSwitch:
    """Let ``scope`` work again once the surrounding transaction commits.

    I/O: SQL, three Redis trips. Raises: AiscaleError (NOT_FOUND) when it is not stopped.
    """
    check_scope(scope)
    with transaction.atomic():
        switch = KillSwitch.objects.select_for_update().filter(scope=scope, released_at__isnull=True).first()
        if switch is None:
            raise AiscaleError(
                Code.NOT_FOUND, f"No kill switch is in force for {scope!r}. List those that are.", param="scope"
            )
        switch.released_at, switch.released_by = timezone.now(), by
        switch.save(update_fields=["released_at", "released_by", "updated_at"])
        transaction.on_commit(lambda: _announce(Control(order="release", scope=scope)))
    log.warning("kill switch released: %s by %s", scope, by, extra={"event": "killswitch.release"})
    return switch


def list_active() -> list[KillSwitch]:
    """Return the kill switches in force, newest first. I/O: one SQL statement."""
    return list(KillSwitch.objects.filter(released_at__isnull=True).order_by("-tripped_at"))


def restore() -> None:
    """Make Redis say what the table says. Called after each change, and every few seconds by settlement.

    I/O: SQL under an advisory lock, so that an older reading never overwrites a newer one; one Redis trip.
    Raises: redis.exceptions.RedisError, OSError, django.db.Error.
    """
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_ADVISORY_LOCK])
        active = KillSwitch.objects.filter(released_at__isnull=True)
        fields: dict[Any, Any] = {keys.KILLED_LOADED: "1", **dict(active.values_list("scope", "reason"))}
        pipeline = redis_clients.get_sync().pipeline(transaction=True)
        pipeline.delete(keys.KILLED)
        pipeline.hset(keys.KILLED, mapping=fields)
        pipeline.execute()


async def restore_async() -> None:
    """Do `restore` off the event loop."""
    await asyncio.to_thread(_restore_and_close)


def check_scope(scope: str) -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for a scope of no known form, or an organization that does not exist. I/O: one SQL
    statement for an organization."""
    if not _SCOPE.fullmatch(scope):
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"{scope!r} is no scope. Write site, model:<slug> or organization:<id, such as org_01jb...>.",
            param="scope",
        )
    kind, _, name = scope.partition(":")
    if kind == "organization" and not Organization.objects.filter(public_id=name).exists():
        raise AiscaleError(
            Code.INVALID_REQUEST, f"No organization has the id {name!r}. Copy it from the list.", param="scope"
        )


def describe(scope: str) -> str:
    """Say in a sentence what tripping ``scope`` does, for the person who is about to."""
    kind, _, name = scope.partition(":")
    if kind == "site":
        what = "every request of every user, in the chat and the API alike"
    elif kind == "model":
        what = f"every request of every user to the model {name!r}"
    else:
        found = Organization.objects.filter(public_id=name).first()
        what = f"every request of the organization {str(found) if found else name!r}"
    return (
        f"This stops {what}. New requests are refused and running answers end within a second; "
        "what was made until then is charged. It lasts until somebody releases it."
    )


def is_known_model(slug: str) -> bool:
    """Tell whether any request for this model was settled: a slug that nobody ever used may be misspelt. I/O: one SQL statement."""
    return UsageRecord.objects.filter(model=slug).exists()


def _announce(control: Control) -> None:
    """Write what is in force, then tell everybody who listens. Whoever misses it reads `keys.KILLED` within seconds.

    The order itself is committed by now, so a Redis that is down raises nothing: the gate refuses everything meanwhile, and
    settlement writes the order when Redis is back.
    """
    try:
        restore()
        redis_clients.get_sync().publish(keys.CONTROL_CHANNEL, encode_control(control))
    except redis_clients.UNAVAILABLE:
        log.exception("%s of %s is recorded, and works once Redis answers", control.order, control.scope)


def _restore_and_close() -> None:
    try:
        restore()
    finally:
        connection.close()
