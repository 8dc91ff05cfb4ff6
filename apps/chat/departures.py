"""End the answers of people who are no longer in the organization that pays for them: who was removed stops spending within a second."""

import asyncio
import logging
import threading

from django.db import Error as DatabaseError
from django.db import InterfaceError, connection
from django.db.models import Exists, OuterRef

from aiscale import redis as redis_clients
from apps.accounts.models import Membership
from apps.chat.models import Message
from apps.inference import queue

log = logging.getLogger(__name__)

EVERY_S = 0.5
BATCH = 500


def run(stop: threading.Event) -> None:
    """Do so until ``stop`` is set. Outlives restarts of Redis and Postgres. Several at once do no harm."""
    while not stop.wait(EVERY_S):
        try:
            sweep()
        except (*redis_clients.UNAVAILABLE, DatabaseError, InterfaceError) as error:
            log.error("departures wait for their servers: %s", error)
            connection.close()
    connection.close()


def sweep() -> int:
    """Cancel the answers that are being made for somebody who is no member any more, or shut out. Returns how many there were.

    I/O: one SQL statement over what is being made, one Redis trip for each that is found. Raises: RedisError, OSError, django.db.Error.
    """
    place = Membership.objects.filter(
        user=OuterRef("conversation__user"),
        organization=OuterRef("conversation__organization"),
        user__is_active=True,
    )
    pending = Message.objects.filter(status=Message.Status.PENDING, job_id__isnull=False)
    gone = [str(job_id) for job_id in pending.exclude(Exists(place)).values_list("job_id", flat=True)[:BATCH]]
    if gone:
        asyncio.run(_cancel(gone))
    return len(gone)


def cancel_all(job_ids: list[str]) -> None:
    """Cancel the answers of who is gone for good. Without Redis their deadline ends them. I/O: one Redis trip each."""
    try:
        # a loop of its own: the web process's must keep its client
        asyncio.run(_cancel(job_ids))
    except redis_clients.UNAVAILABLE as error:
        log.warning("%d answers go on until their deadline: %s", len(job_ids), error)


async def _cancel(job_ids: list[str]) -> None:
    for job_id in job_ids:
        await queue.cancel(job_id, "not a member any more")
    await redis_clients.get_async().aclose()
