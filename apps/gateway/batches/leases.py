"""Let one process at a time work on a batch, and another take over when it dies."""

import asyncio
import logging
from datetime import timedelta

from django.db import Error as DatabaseError
from django.db.models import Q
from django.db.models.functions import Now

from apps.accounts.callers import on_thread
from apps.gateway.models import Batch

log = logging.getLogger(__name__)

LEASE = timedelta(seconds=12)
RENEW_EACH_S = 3.0


def take(batch_id: str, holder: str) -> bool:
    """Take the lease of a batch whose time has come, if nobody has it. I/O: one SQL statement. The database's clock counts."""
    free = Q(lease_until__isnull=True) | Q(lease_until__lt=Now())
    due = Q(due_at__isnull=True) | Q(due_at__lte=Now())
    rows = Batch.objects.filter(free & due, public_id=batch_id, status__in=Batch.OPEN)
    return bool(rows.update(lease_holder=holder, lease_until=Now() + LEASE))


def renew(batch_id: str, holder: str) -> str | None:
    """Push the lease ahead and return the batch's status; None when another one has it. I/O: two SQL statements."""
    mine = Batch.objects.filter(public_id=batch_id, lease_holder=holder)
    if not mine.update(lease_until=Now() + LEASE):
        return None
    status: str | None = mine.values_list("status", flat=True).first()
    return status


def release(batch_id: str, holder: str, wait_s: float = 0.0) -> None:
    """Give the lease back; nobody shall go on before ``wait_s`` are over. I/O: one SQL statement."""
    due_at = Now() + timedelta(seconds=wait_s) if wait_s > 0 else None
    Batch.objects.filter(public_id=batch_id, lease_holder=holder).update(
        lease_holder="", lease_until=None, due_at=due_at
    )


class Keeper:
    """Renew a lease in the background; ``status`` is the batch's, as it was last seen."""

    def __init__(self, batch_id: str, holder: str, status: str) -> None:
        self._batch_id = batch_id
        self._holder = holder
        self.status = status
        self.lost = asyncio.Event()

    async def run(self) -> None:
        """I/O: SQL every few seconds. Returns when the lease is another's."""
        failures = 0
        while True:
            await asyncio.sleep(RENEW_EACH_S)
            try:
                status = await on_thread(lambda: renew(self._batch_id, self._holder))
                failures = 0
            except DatabaseError:
                log.warning("a batch's lease could not be renewed", exc_info=True)
                failures += 1
                if failures * RENEW_EACH_S < LEASE.total_seconds():
                    continue
                status = None
            if status is None:
                self.lost.set()
                return
            self.status = status
