"""Find out what became of an earlier try of a request, whose process died, so that it can be tried again and charged once.

A request's job is named after it. What is run again under the same job id is not charged again; so an earlier try that was charged is
repeated under its own name, and one that ended without an answer under a new one.
"""

import asyncio
import time
from typing import Any, Literal

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from aiscale.wire.scripts import read_script
from apps.accounts.callers import on_thread
from apps.inference import replies
from apps.spend.models import UsageRecord

POLL_S = 0.2
SETTLED_WITHIN_S = 10.0
"""Settlement writes the end of a job in milliseconds; after so long it is taken not to run."""

Outcome = Literal["unknown", "charged", "free"]


async def await_outcome(job_id: str, patience_s: float) -> Outcome:
    """Wait until no try of this job runs any more, and say how it ended: ``charged`` for a whole answer, ``free`` for none.

    ``unknown``: it never ran, or every trace of it is gone. Afterwards the job's id can be used again.
    I/O: polls Redis, then SQL. Raises: AiscaleError (BACKEND_UNAVAILABLE) when it still runs, or is not settled, after ``patience_s``;
    redis.exceptions.RedisError, OSError, django.db.Error.
    """
    ends_at = time.monotonic() + patience_s
    while (state := await replies.find_state(job_id)) in ("queued", "running"):
        if time.monotonic() > ends_at:
            raise _still_busy()
        await asyncio.sleep(POLL_S)
    outcome = await on_thread(lambda: _find_outcome(job_id))
    settled_by = time.monotonic() + SETTLED_WITHIN_S
    while state == "done" and outcome == "unknown":
        if time.monotonic() > settled_by:
            raise _still_busy()
        await asyncio.sleep(POLL_S)
        outcome = await on_thread(lambda: _find_outcome(job_id))
    client: Any = redis_clients.get_async()
    await client.eval(read_script("forget"), 1, keys.job_record(job_id))
    return outcome


def _find_outcome(job_id: str) -> Outcome:
    for reason in UsageRecord.objects.filter(job_id=job_id).values_list("finish_reason", flat=True):
        return "charged" if reason in ("stop", "length") else "free"
    return "unknown"


def _still_busy() -> AiscaleError:
    return AiscaleError(
        Code.BACKEND_UNAVAILABLE, "An earlier try of this request still runs. Try again in a moment.", retry_after_s=2
    )
