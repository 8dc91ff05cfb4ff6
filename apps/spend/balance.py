"""Keep each scope's fast copy in Redis (`keys.spend`) true to its budgets and totals in Postgres.

Two things are copied. `keys.BUDGETS` says which scopes have budgets and what these say, as one text for each scope; like `keys.KILLED`
it is replaced as a whole, by one process at a time. The copy of a scope holds what was spent in the current periods of its budgets, and
the text of the budgets that it was made for: the gate takes a copy of another text, or of a period that is over, for a missing one. So
a change that reached only one of the two is found by the next request.

What was spent is a row of Postgres with a revision (`apps.spend.totals`), and the newer revision wins: settlement writes it in the
script that ends the holds (`apps.spend.holds`), `publish` when a copy is missing. A row that changes while `publish` works is seen by
its second look.
"""

import asyncio
import logging
from typing import Any

from django.db import DatabaseError, connection, transaction

from aiscale import redis as redis_clients
from aiscale.wire import keys
from apps.spend import budgets, carryover, periods, thresholds, totals
from apps.spend.scripts import get_script
from apps.spend.totals import Total

log = logging.getLogger(__name__)

PUBLISH_ATTEMPTS = 20
_ADVISORY_LOCK = 7_146_004
"""Names the Postgres advisory lock under which `restore` writes; any number nobody else uses."""


def publish(scope: str) -> None:
    """Write the copy of a scope from its budgets and totals; remove it where no budget is left.

    I/O: SQL, two Redis trips. Raises: redis.exceptions.RedisError, OSError, django.db.Error.
    """
    client = redis_clients.get_sync()
    kind, _, name = scope.partition(":")
    if kind == "organization":
        carryover.carry_if_due(name)
    written: tuple[str, dict[str, Total]] | None = None
    for _ in range(PUBLISH_ATTEMPTS):
        parts = budgets.list_parts(scope)
        if not parts:
            client.delete(keys.spend(scope))
            thresholds.note_current(scope, [])
            return
        now_ms = periods.now_ms()
        spans = {part.period: periods.span_of(part.period, part.zone, now_ms) for part in parts}
        found = totals.open_totals(scope, spans)
        definition = budgets.write_definition(parts)
        if written == (definition, found):
            # nothing was spent since it was written: it is true, or settlement has written a newer one since
            thresholds.note_current(scope, found.values())
            return
        args: list[str | int] = [definition]
        for part in parts:
            span, total = spans[part.period], found[part.period]
            args += [part.period, *span, total.spent_nanousd, total.revision]
            args += [part.limit, part.raise_nanousd, part.raise_until_ms]
        get_script("rebuild").run(client, [keys.spend(scope), keys.holds(scope)], args)
        written = (definition, found)
    log.warning("the totals of %s changed under each of %d looks; settlement writes them", scope, PUBLISH_ATTEMPTS)


def publish_on_commit(scope: str) -> None:
    """Bring a changed budget into force once the surrounding transaction commits. Should that fail, settlement does it in seconds."""

    def try_publish() -> None:
        try:
            restore()
            publish(scope)
        except (*redis_clients.UNAVAILABLE, DatabaseError):
            log.exception("the budget of %s is saved, and reaches the gate soon", scope)

    transaction.on_commit(try_publish)


def restore(*, only_if_changed: bool = False) -> None:
    """Make `keys.BUDGETS` say what the table says. Called after each change, and every few seconds by settlement.

    I/O: SQL under an advisory lock, so that an older reading never overwrites a newer one; one or two Redis trips.
    Raises: redis.exceptions.RedisError, OSError, django.db.Error.
    """
    client = redis_clients.get_sync()
    if only_if_changed and client.hget(keys.BUDGETS, keys.BUDGETS_LOADED) == budgets.read_signature().encode():
        return
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_ADVISORY_LOCK])
        fields: dict[Any, Any] = {keys.BUDGETS_LOADED: budgets.read_signature(), **budgets.list_definitions()}
        pipeline = client.pipeline(transaction=True)
        pipeline.delete(keys.BUDGETS)
        pipeline.hset(keys.BUDGETS, mapping=fields)
        pipeline.execute()


async def load(what: str) -> None:
    """Refill `keys.BUDGETS` (``budgets``) or a scope's copy, off the event loop. I/O, Raises: as `restore` and `publish`."""
    await asyncio.to_thread(_load, what)


def _load(what: str) -> None:
    try:
        if what == "budgets":
            restore()
        else:
            publish(what)
    finally:
        # this thread belongs to nobody's request: give its connection back
        connection.close()
