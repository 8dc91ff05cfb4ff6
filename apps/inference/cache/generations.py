"""Empty the cache at once: what was kept before a purge is not found after it, at no level, in no process.

Each scope (``site``, ``model:<slug>``, ``organization:<id>``) has a number that a purge raises, and the numbers are part of every key. The
table is the truth; `keys.CACHE_GENERATIONS` is what requests read.
"""

import asyncio
import logging
import weakref
from typing import Any

from django.db import Error as DatabaseError
from django.db import connection, transaction
from django.db.models import F

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from apps.accounts import audit
from apps.accounts.callers import on_thread
from apps.inference.models import CachedAnswer, CacheGeneration, SemanticEntry

log = logging.getLogger(__name__)

LOADED = "loaded"
_ADVISORY_LOCK = 7_146_002
"""Names the Postgres advisory lock under which `restore` writes; any number nobody else uses."""
_TIMEOUT_S = 0.5

_recalled: dict[tuple[str, str], str] = {}
"""What this process read last, by model and organization. It may be outdated: the gate compares it."""
MAX_RECALLED = 20_000

_restoring: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[None]] = weakref.WeakKeyDictionary()


def recall(model: str, organization_id: str) -> str | None:
    """Return the generation that this process saw last; None for none. Whoever finds something by it has the gate compare it
    (`telling.admit_known`). I/O: none."""
    return _recalled.get((model, organization_id))


async def find(model: str, organization_id: str) -> str | None:
    """Return the generation that a request's key carries; None when it is not known: then nothing is cached.

    I/O: one Redis trip; SQL when Redis has lost it.
    """
    fields = [LOADED, "site", f"model:{model}", f"organization:{organization_id}"]
    for _ in range(2):
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                loaded, *numbers = await redis_clients.execute("HMGET", keys.CACHE_GENERATIONS, *fields)
            if loaded is not None:
                generation = ".".join((number or b"0").decode() for number in numbers)
                if len(_recalled) >= MAX_RECALLED:
                    _recalled.clear()
                _recalled[(model, organization_id)] = generation
                return generation
            await _restore_once()
        except (*redis_clients.UNAVAILABLE, TimeoutError, DatabaseError) as error:
            log.warning("the cache is not used: %s", error)
            break
    return None


async def _restore_once() -> None:
    """Restore, together with all who find the copy missing at the same time."""
    loop = asyncio.get_running_loop()
    task = _restoring.get(loop)
    if task is None or task.done():
        task = _restoring[loop] = loop.create_task(on_thread(restore))
    # who leaves does not take it away from the others
    await asyncio.shield(task)


def purge(scope: str, *, by: audit.Actor, reason: str = "") -> int:
    """Forget every answer of ``scope``, from the end of the surrounding transaction on. Returns how many rows went.

    I/O: SQL, one Redis trip. Raises: AiscaleError (INVALID_REQUEST) for a scope of no known form.
    """
    kind, _, name = scope.partition(":")
    if kind not in ("site", "model", "organization") or (kind == "site") == bool(name):
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"{scope!r} is no scope. Write site, model:<slug> or organization:<id>.",
            param="scope",
        )
    with transaction.atomic():
        CacheGeneration.objects.get_or_create(scope=scope)
        CacheGeneration.objects.filter(scope=scope).update(number=F("number") + 1)
        rows = CachedAnswer.objects.all()
        if kind != "site":
            rows = rows.filter(model=name) if kind == "model" else rows.filter(scope__startswith=scope)
        alike = SemanticEntry.objects.all()
        if kind != "site":
            alike = alike.filter(model=name) if kind == "model" else alike.filter(organization_id=name)
        deleted = rows.delete()[0] + alike.delete()[0]
        audit.record("cache.purge", target=scope, by=by, reason=reason, details={"rows": deleted})
        transaction.on_commit(_announce)
    return deleted


def restore() -> None:
    """Make Redis say what the table says. Called after each purge and by a periodic task.

    I/O: SQL under an advisory lock, one Redis trip. Raises: redis.exceptions.RedisError, OSError, django.db.Error.
    """
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_ADVISORY_LOCK])
        fields: dict[Any, Any] = {LOADED: 1, **dict(CacheGeneration.objects.values_list("scope", "number"))}
        redis_clients.get_sync().hset(keys.CACHE_GENERATIONS, mapping=fields)


def _announce() -> None:
    try:
        restore()
    except redis_clients.UNAVAILABLE:
        log.exception("the purge is recorded, and works once Redis answers")
