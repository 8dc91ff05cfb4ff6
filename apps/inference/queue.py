"""Put jobs into their model's queue, take them back, and cancel them."""

import asyncio
import logging
from typing import Any

from django.conf import settings
from kombu.exceptions import OperationalError

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import codec, keys
from aiscale.wire.events import Control
from aiscale.wire.jobs import ENCODE_TASK, GENERATE_TASK, EncodeJob, GenerateJob
from aiscale.wire.scripts import read_script

log = logging.getLogger(__name__)

TASKS = {"generate": GENERATE_TASK, "encode": ENCODE_TASK}
REDIS_TIMEOUT_S = 3.0


async def enqueue(job: GenerateJob | EncodeJob, priority: int) -> None:
    """Write the job's record and send its message. If the message cannot be sent, the record goes too.

    I/O: one Redis trip for the record, one for the message (on a thread). Raises: AiscaleError (BACKEND_UNAVAILABLE).
    """
    kind = "generate" if isinstance(job, GenerateJob) else "encode"
    payload, queue = codec.encode_job(job), keys.celery_queue(job.model)
    names = [keys.job_record(job.job_id), keys.LEASES, keys.queue_depth(job.model)]
    # the record outlives the deadline by the reaper's patience, so that nothing that may still run is forgotten
    record_ttl_s = settings.ENV.request_deadline_s + keys.JOB_RECORD_AFTER_S
    try:
        async with asyncio.timeout(REDIS_TIMEOUT_S):
            await _eval("enqueue", names, [job.job_id, kind, payload, queue, job.deadline_at_ms, record_ttl_s])
        await asyncio.to_thread(send, kind, payload, queue, priority)
    except (*redis_clients.UNAVAILABLE, OperationalError, TimeoutError) as error:
        log.error("a job could not be queued: %s", error, extra={"job_id": job.job_id})
        await _withdraw(job.job_id, names)
        raise AiscaleError(
            Code.BACKEND_UNAVAILABLE, "The request could not be queued. Try again in a few seconds.", retry_after_s=2
        ) from error


def send(kind: str, payload: str, queue: str, priority: int) -> None:
    """Send a job's message. Sending it twice does no harm: claim.lua answers it once.

    I/O: one Redis trip. Raises: kombu.exceptions.OperationalError.
    """
    from aiscale.celery import app

    app.send_task(TASKS[kind], args=[payload], queue=queue, priority=priority, ignore_result=True)


async def cancel(job_id: str, reason: str) -> bool:
    """Stop a job at its engine's next step, or before it begins. What was made is charged. False when it has ended.

    I/O: one Redis trip. Raises: redis.exceptions.RedisError, OSError.
    """
    order = codec.encode_control(Control(order="cancel", job_id=job_id, reason=reason))
    return bool(await _eval("cancel", [keys.job_record(job_id)], [reason, keys.CONTROL_CHANNEL, order]))


async def _withdraw(job_id: str, names: list[str]) -> None:
    """Forget a job whose message could not be sent; should the message have gone out after all, its claim finds nothing."""
    record, *sets = names
    try:
        pipeline: Any = redis_clients.get_async().pipeline(transaction=True)
        pipeline.delete(record)
        for name in sets:
            pipeline.zrem(name, job_id)
        async with asyncio.timeout(REDIS_TIMEOUT_S):
            await pipeline.execute()
    except (*redis_clients.UNAVAILABLE, TimeoutError):
        log.warning("a job could not be withdrawn; it ends at its deadline", extra={"job_id": job_id})


async def _eval(script: str, names: list[str], values: list[str | int | bytes]) -> Any:
    client: Any = redis_clients.get_async()
    return await client.eval(read_script(script), len(names), *names, *values)
