"""Keep an organization's fast copy in Redis (`keys.spend`) true to the ledger.

The ledger in Postgres is the truth; the copy is what the gate counts with. Two things write ``spent``: settlement adds what a job
cost (`charge`), and `publish` replaces it with the ledger's sum. Neither takes a lock. Each reads the copy's ``version`` before it
touches the ledger and writes only if the version is still the same, and each write raises it. So:

- a job that was committed and not yet added when the ledger was summed up is in the sum, and its `charge` finds another version;
- a job that was added after the ledger was summed up has raised the version, and the sum is not written but made again.

Either way it is counted once. After FLUSHALL the copy is rebuilt with what is settled; the holds of jobs that were running then are
gone, so as much as these may be spent above the limit. They are charged all the same when they end.
"""

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple, cast

from django.db import DatabaseError, connection, transaction
from django.utils import timezone
from redis import Redis
from redis.exceptions import RedisError

from aiscale import redis as redis_clients
from aiscale.wire import keys
from apps.spend import carryover, ledger, periods
from apps.spend.models import Budget, LedgerEntry, LedgerTransaction
from apps.spend.scripts import get_script

log = logging.getLogger(__name__)

PUBLISH_ATTEMPTS = 20


class Charge(NamedTuple):
    """Say what one finished job cost, and which stream entry said so ('' = none)."""

    entry_id: str
    job_id: str
    cost_nanousd: int
    month: str


def settle_keys(organization_id: str) -> list[str]:
    """Return the keys of settle.lua."""
    return [
        keys.spend(organization_id),
        keys.holds(organization_id),
        keys.hold_amounts(organization_id),
        keys.FINISHED,
    ]


def read_versions(client: Redis, organization_ids: Sequence[str]) -> dict[str, str]:
    """Return each copy's version, '' where there is none. I/O: one Redis trip."""
    pipeline = client.pipeline(transaction=False)
    for organization_id in organization_ids:
        pipeline.hget(keys.spend(organization_id), "version")
    return {
        organization_id: (version or b"").decode()
        for organization_id, version in zip(organization_ids, pipeline.execute(), strict=True)
    }


def charge(client: Redis, organization_id: str, version: str, charges: Sequence[Charge]) -> bool:
    """End the jobs' holds, add their costs, acknowledge them. False, with nothing done, if ``version`` is outdated.

    I/O: one Redis trip. Atomic.
    """
    return bool(_settle(client, organization_id, "charge", version, charges))


def drop(client: Redis, organization_id: str, charges: Sequence[Charge]) -> None:
    """End the jobs' holds and acknowledge them without adding a cost. I/O: one Redis trip. Atomic, idempotent."""
    _settle(client, organization_id, "drop", "", charges)


def publish(organization_id: str, *, only_if_missing: bool = False) -> None:
    """Replace the copy with the ledger's sum of this month and the organization's own limit.

    I/O: per try three SQL statements and two Redis trips. Raises: redis.exceptions.RedisError, OSError, django.db.Error.
    """
    client = redis_clients.get_sync()
    for _ in range(PUBLISH_ATTEMPTS):
        version, period = cast("list[bytes | None]", client.hmget(keys.spend(organization_id), ["version", "period"]))
        if only_if_missing and period is not None:
            return
        carryover.carry_if_due(organization_id)
        month = periods.month_of(periods.now_ms())
        spent = ledger.sum_charges(organization_id, month)
        own_limit = (
            Budget.objects.filter(scope=f"organization:{organization_id}", period=Budget.Period.MONTHLY)
            .values_list("limit_nanousd", flat=True)
            .first()
        )
        written = get_script("rebuild").run(
            client,
            [keys.spend(organization_id), keys.hold_amounts(organization_id)],
            [(version or b"").decode(), month, spent, "" if own_limit is None else own_limit],
        )
        if written:
            return
    raise RedisError(f"the balance of {organization_id} changed under each of {PUBLISH_ATTEMPTS} tries to rebuild it")


def publish_on_commit(organization_id: str) -> None:
    """Do `publish` once the surrounding transaction commits. Should that fail, `publish_corrected` does it seconds later."""
    transaction.on_commit(lambda: _try_publish(organization_id))


def publish_corrected(within_s: int = 120) -> int:
    """Do `publish` for every organization to which something other than usage was posted in the last seconds. Returns how many.

    I/O: as `publish`, for each. Raises: redis.exceptions.RedisError, OSError, django.db.Error.
    """
    since = timezone.now() - timedelta(seconds=within_s)
    accounts = LedgerEntry.objects.filter(
        account__startswith="organization:", transaction__in=LedgerTransaction.objects.list_corrections(since)
    )
    organization_ids = {account.partition(":")[2] for account in accounts.values_list("account", flat=True)}
    for organization_id in sorted(organization_ids):
        publish(organization_id)
    return len(organization_ids)


async def load(organization_id: str) -> None:
    """Rebuild a missing copy, off the event loop. I/O, Raises: as `publish`."""
    await asyncio.to_thread(_load, organization_id)


def _load(organization_id: str) -> None:
    try:
        publish(organization_id, only_if_missing=True)
    finally:
        # this thread belongs to nobody's request: give its connection back
        connection.close()


def _try_publish(organization_id: str) -> None:
    try:
        publish(organization_id)
    except (*redis_clients.UNAVAILABLE, DatabaseError):
        # what was decided is committed
        log.exception("a correction is posted, and reaches the gate soon", extra={"organization_id": organization_id})


def _settle(client: Redis, organization_id: str, mode: str, version: str, charges: Sequence[Charge]) -> int:
    args: list[str | int] = [keys.GROUP_SETTLEMENT, mode, version]
    for item in charges:
        args += [item.entry_id, item.job_id, item.cost_nanousd, item.month]
    return int(get_script("settle").run(client, settle_keys(organization_id), args))
