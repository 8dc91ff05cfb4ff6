"""Stop everything of a scope within a second, and let it go on again.

Scopes: ``site`` (everything), ``model:<slug>``, ``plan:<slug>``, ``organization:<id>``, ``key:<id>`` and ``provider:<name>`` (``local`` is
what our own workers compute). The table is the truth. `keys.KILLED` is what the gate and the workers read; it is always replaced as a
whole, by one process at a time, with what the table says, so it cannot keep an order that was withdrawn or miss one that was given. It
also holds an order for each key that was revoked a moment ago, so that what the key started ends.

An order with an end is over at that moment wherever it is read, in the gate and in the workers, whether or not anything tidies up;
`release_due` then writes that down.
"""

import asyncio
import logging
import re
from datetime import UTC, datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Q
from django.utils import timezone

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.moments import parse_moment
from aiscale.wire import keys
from aiscale.wire.codec import encode_control
from aiscale.wire.events import Control
from aiscale.wire.scopes import Order, write_order
from apps.accounts import audit, mirror
from apps.accounts.models import ApiKey, Organization, Plan
from apps.spend.models import KillSwitch

log = logging.getLogger(__name__)

KINDS = ("site", "model", "plan", "organization", "key", "provider")
_SCOPE = re.compile(
    r"site|(model|provider):[A-Za-z0-9][A-Za-z0-9._/-]{0,127}|plan:[A-Za-z0-9_-]{1,64}|organization:org_[0-9a-z]{1,36}|key:key_[0-9a-z]{1,36}"
)
LONGEST = timedelta(days=366)
_ADVISORY_LOCK = 7_146_001
"""Names the Postgres advisory lock under which `restore` writes; any number nobody else uses."""
REVOKED_GRACE_S = 60
"""A job of a revoked key may outlive its deadline by so long, at the most."""
BY_TIME = "time"
"""Who released a switch whose end had come."""


def trip(scope: str, *, reason: str, by: audit.Actor, until_at: datetime | None = None) -> KillSwitch:
    """Stop ``scope``: new requests are refused and running ones end within a second, with ``reason`` shown to their callers.

    It lasts until ``until_at``, or until somebody releases it. A scope that is stopped already keeps its reason, and the later end of both.
    In force once the surrounding transaction commits.
    I/O: SQL, three Redis trips. Raises: AiscaleError (INVALID_REQUEST) for a scope, reason or end that cannot be.
    """
    check_scope(scope)
    reason = check_reason(reason)
    check_end(until_at)
    with transaction.atomic():
        release_due()
        switch, created = KillSwitch.objects.select_for_update().get_or_create(
            scope=scope,
            released_at__isnull=True,
            defaults={"reason": reason, "tripped_by": by.name, "tripped_at": timezone.now(), "until_at": until_at},
        )
        if created:
            _record(audit.KILLSWITCH_TRIP, switch, by, reason)
        elif switch.until_at is not None and (until_at is None or until_at > switch.until_at):
            switch.until_at = until_at
            switch.save(update_fields=["until_at", "updated_at"])
            _record(audit.KILLSWITCH_EXTEND, switch, by, reason)
        transaction.on_commit(lambda: _announce(Control(order="kill", scope=scope, reason=switch.reason)))
    log.warning("kill switch tripped: %s by %s: %s", scope, by.name, reason, extra={"event": "killswitch.trip"})
    return switch


def release(scope: str, *, by: audit.Actor, reason: str = "") -> KillSwitch:
    """Let ``scope`` work again once the surrounding transaction commits. ``reason`` is for the audit log.

    I/O: SQL, three Redis trips. Raises: AiscaleError (NOT_FOUND) when it is not stopped, (INVALID_REQUEST) for a reason that cannot be.
    """
    reason = check_reason(reason) if reason.strip() else ""
    with transaction.atomic():
        release_due()
        switch = KillSwitch.objects.select_for_update().filter(scope=scope, released_at__isnull=True).first()
        if switch is None:
            raise AiscaleError(
                Code.NOT_FOUND, f"No kill switch is in force for {scope!r}. List those that are.", param="scope"
            )
        switch.released_at, switch.released_by, switch.release_reason = timezone.now(), by.name, reason
        switch.save(update_fields=["released_at", "released_by", "release_reason", "updated_at"])
        _record(audit.KILLSWITCH_RELEASE, switch, by, reason)
        transaction.on_commit(lambda: _announce(Control(order="release", scope=scope)))
    log.warning("kill switch released: %s by %s", scope, by.name, extra={"event": "killswitch.release"})
    return switch


def list_active() -> list[KillSwitch]:
    """Return the kill switches in force, newest first. I/O: one SQL statement."""
    in_force = Q(released_at__isnull=True) & (Q(until_at__isnull=True) | Q(until_at__gt=timezone.now()))
    return list(KillSwitch.objects.filter(in_force).order_by("-tripped_at"))


def release_due() -> int:
    """Write down that switches whose end has come are released, as of that moment. Returns how many. I/O: one SQL statement, and two
    for each. Atomic."""
    with transaction.atomic():
        due = KillSwitch.objects.select_for_update(skip_locked=True).filter(
            released_at__isnull=True, until_at__lte=timezone.now()
        )
        for switch in due:
            switch.released_at, switch.released_by = switch.until_at, BY_TIME
            switch.save(update_fields=["released_at", "released_by", "updated_at"])
            _record(audit.KILLSWITCH_EXPIRE, switch, audit.by_system(BY_TIME), "")
            log.warning("kill switch ended by itself: %s", switch.scope, extra={"event": "killswitch.expire"})
    return len(due)


def restore() -> None:
    """Make Redis say what the table says. Called after each change, and twice a second by inference.stopping.

    I/O: SQL under an advisory lock, so that an older reading never overwrites a newer one; one Redis trip.
    Raises: redis.exceptions.RedisError, OSError, django.db.Error.
    """
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_ADVISORY_LOCK])
        release_due()
        fields: dict[Any, Any] = {keys.KILLED_LOADED: "1", **_list_revoked()}
        for switch in KillSwitch.objects.filter(released_at__isnull=True):
            until_ms = int(switch.until_at.timestamp() * 1000) if switch.until_at else None
            fields[switch.scope] = write_order(Order(switch.reason, until_ms))
        pipeline = redis_clients.get_sync().pipeline(transaction=True)
        pipeline.delete(keys.KILLED)
        pipeline.hset(keys.KILLED, mapping=fields)
        pipeline.execute()


def _list_revoked() -> dict[str, str]:
    """Return orders for the keys that were revoked, or whose makers were shut out, while what they started may still run.

    I/O: two SQL statements over what happened in these minutes.
    """
    life = timedelta(seconds=settings.ENV.request_deadline_s + REVOKED_GRACE_S)
    since = timezone.now() - life
    revoked = ApiKey.objects.filter(revoked_at__gt=since).values_list("public_id", "revoked_at")
    shut_out = ApiKey.objects.filter(created_by__shut_out_at__gt=since)
    return {
        f"key:{key_id}": write_order(Order(mirror.REVOKED_REASON, int((at + life).timestamp() * 1000)))
        for key_id, at in [*shut_out.values_list("public_id", "created_by__shut_out_at"), *revoked]
        if at is not None
    }


async def restore_async() -> None:
    """Do `restore` off the event loop."""
    await asyncio.to_thread(_restore_and_close)


def check_scope(scope: str) -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for a scope of no known form, or a plan, organization or key that does not exist. I/O: up to
    one SQL statement."""
    if not _SCOPE.fullmatch(scope):
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"{scope!r} is no scope. Write site, model:<slug>, plan:<slug>, organization:<org_...>, key:<key_...> "
            "or provider:<name>.",
            param="scope",
        )
    kind, _, name = scope.partition(":")
    exists = {
        "plan": lambda: Plan.objects.filter(slug=name).exists(),
        "organization": lambda: Organization.objects.filter(public_id=name).exists(),
        "key": lambda: ApiKey.objects.filter(public_id=name).exists(),
    }
    if kind in exists and not exists[kind]():
        word = "name" if kind == "plan" else "id"
        raise AiscaleError(
            Code.INVALID_REQUEST, f"No {kind} has the {word} {name!r}. Copy it from the list.", param="scope"
        )


def check_reason(reason: str) -> str:
    """Return it without blanks around it. Raises: AiscaleError (INVALID_REQUEST)."""
    reason = reason.strip()
    if not reason or len(reason) > 300 or "\0" in reason:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            "Give a reason of 1 to 300 characters: the people who are stopped will read it.",
            param="reason",
        )
    return reason


def check_end(until_at: datetime | None) -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for an end that is over already, or beyond a year."""
    now = timezone.now()
    if until_at is not None and not now < until_at <= now + LONGEST:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"It cannot last until {until_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC: give a time within the next year.",
            param="until",
        )


def parse_end(text: str) -> datetime:
    """Read how long it lasts, or until when (see `aiscale.moments`). Raises: AiscaleError (INVALID_REQUEST)."""
    return parse_moment(text, "until")


def _record(action: str, switch: KillSwitch, by: audit.Actor, reason: str) -> None:
    kind, _, name = switch.scope.partition(":")
    organization_id = name if kind == "organization" else ""
    if kind == "key":
        found = ApiKey.objects.filter(public_id=name).values_list("organization__public_id", flat=True)
        organization_id = found.first() or ""
    audit.record(
        action,
        target=switch.scope,
        by=by,
        reason=reason,
        organization_id=organization_id,
        details={"killswitch": switch.public_id, "until_at": switch.until_at, "tripped_by": switch.tripped_by},
    )


def _announce(control: Control) -> None:
    """Write what is in force, then tell everybody who listens. Whoever misses it reads `keys.KILLED` within half a second.

    The order itself is committed by now, so a Redis that is down raises nothing: the gate refuses everything meanwhile, and
    inference.stopping writes the order when Redis is back.
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
