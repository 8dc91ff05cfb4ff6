"""Look after stored responses: write the end of those whose web process is gone, and delete what has expired."""

import logging
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.utils import timezone

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError
from aiscale.wire.events import Delta, Finished
from apps.accounts.callers import on_thread
from apps.gateway import loops
from apps.gateway.models import StoredResponse
from apps.gateway.responses import objects, retelling, storage
from apps.gateway.responses.output import Output
from apps.inference import replies
from apps.inference.endings import make_failure

log = logging.getLogger(__name__)

BATCH = 200
YOUNG_S = 20
"""A response may be without a job in Redis for so long: it has just begun."""


async def find_end(row: StoredResponse) -> dict[str, Any] | None:
    """Return a response as its job's log says that it ended; None while it goes on. I/O: one or two Redis trips."""
    try:
        ending = await replies.find_ending(row.job_id)
    except redis_clients.UNAVAILABLE:
        return None
    if ending is not None:
        gathered = await _read_output(row, ending)
        output = gathered.describe(is_whole=ending.finish_reason == "stop")
        if objects.has_answer(ending):
            return objects.end(row.response, output, ending)
        return objects.fail(row.response, make_failure(ending), objects.make_rest(output, ending))
    age_s = (timezone.now() - row.created_at).total_seconds()
    patience_s = settings.ENV.request_deadline_s + YOUNG_S
    if age_s > patience_s or (age_s > YOUNG_S and await replies.find_state(row.job_id) is None):
        return objects.fail(row.response, replies.lost(row.job_id))
    return None


async def _read_output(row: StoredResponse, ending: Finished) -> Output:
    """Gather what was said. I/O: none; where there are tools, reads the job's log. Raises: AiscaleError (BACKEND_UNAVAILABLE)."""
    output = Output(row.public_id)
    if not row.response["tools"]:
        output.add(Delta(job_id=row.job_id, seq=0, text=ending.text or "", completion_tokens=0))
        return output
    async for event in retelling.retell(row.job_id, row.response):
        if isinstance(event, Delta):
            output.add(event)
    return output


def finish_lost() -> int:
    """Write the end of responses that nobody waits for any more. Returns how many. I/O: SQL, Redis. Idempotent."""
    return loops.run(_finish_lost())


async def _finish_lost() -> int:
    rows: list[StoredResponse] = await on_thread(_list_in_progress)
    count = 0
    for row in rows:
        try:
            ended = await find_end(row)
        except AiscaleError:
            log.exception("the end of a response cannot be found", extra={"job_id": row.job_id})
            continue
        if ended is not None:
            count += await on_thread(lambda ended=ended: storage.finish(ended))  # type: ignore[misc]
    return count


def _list_in_progress() -> list[StoredResponse]:
    # whoever waits writes it at once: what is older than that moment is looked at
    recent = timezone.now() - timedelta(seconds=2)
    rows = StoredResponse.objects.filter(status=StoredResponse.Status.IN_PROGRESS, created_at__lt=recent)
    return list(rows.order_by("created_at")[:BATCH])


def forget_expired() -> int:
    """Delete what has expired, a few at a time. Returns how many. I/O: SQL."""
    ids = StoredResponse.objects.filter(expires_at__lt=timezone.now()).values_list("pk", flat=True)[:BATCH]
    deleted, _ = StoredResponse.objects.filter(pk__in=list(ids)).delete()
    return deleted
