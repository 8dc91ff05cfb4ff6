"""Put jobs into their model's queue, and cancel them.

A job waits in Redis, in a fair order (``aiscale/wire/lua/queue.lua``), until a worker asks for it. Celery carries tickets, which
tell a worker that there is something to ask for; the script that queues a job pushes its ticket too.
"""

import asyncio
import logging
import time

from django.conf import settings

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.observability import REFUSALS
from aiscale.wire import codec, keys
from aiscale.wire.broker import broker_list, make_ticket
from aiscale.wire.events import Control
from aiscale.wire.jobs import EncodeJob, GenerateJob
from apps.spend import refusals

log = logging.getLogger(__name__)

REDIS_TIMEOUT_S = 3.0
WITHDRAW_EVERY_S = FORSAKE_AFTER_S = 1.0

NO_HOLD = -1

_background: set[asyncio.Task[None]] = set()


async def enqueue(
    job: GenerateJob | EncodeJob, priority: int, weight: int = 1, *, held: bool = True, most_queued: int | None = None
) -> None:
    """Write the job's record, give it its place, and call a worker: all or nothing. ``held`` is false for what we run at our own cost.

    ``most_queued``: how many may wait, looked at once more: of many that were admitted at the same moment only as many find a place.
    I/O: one Redis trip. Raises: AiscaleError (QUEUE_FULL, BACKEND_UNAVAILABLE); what may have been queued all the same is withdrawn.
    """
    kind = "generate" if isinstance(job, GenerateJob) else "encode"
    names = [
        keys.job_record(job.job_id),
        keys.LEASES,
        keys.queue_state(job.model),
        keys.queue_depth(job.model),
        broker_list(job.model),
        keys.QUEUES,
    ]
    if held:
        names.append(keys.holds(f"organization:{job.billing.organization_id}"))
    values: list[str | int | bytes] = [
        job.job_id,
        kind,
        codec.encode_job(job),
        job.model,
        job.deadline_at_ms,
        # the record outlives the deadline by the reaper's patience, so that nothing that may still run is forgotten
        settings.ENV.request_deadline_s + keys.JOB_RECORD_AFTER_S,
        time.time_ns() // 1_000_000,
        priority,
        job.billing.organization_id,
        count_tokens(job),
        weight,
        make_ticket(kind, job.model),
        " ".join(list_in_flight(job)),
        keys.hold(job.job_id, job.billing.hold_nanousd),
    ]
    if most_queued is not None:
        values.append(most_queued)
    try:
        async with asyncio.timeout(REDIS_TIMEOUT_S):
            queued = await redis_clients.run_script_async("enqueue", names, values)
    except (*redis_clients.UNAVAILABLE, TimeoutError) as error:
        log.error("a job could not be queued: %s", error, extra={"job_id": job.job_id})
        _keep(asyncio.create_task(_withdraw(job)))
        raise AiscaleError(
            Code.BACKEND_UNAVAILABLE, "The request could not be queued. Try again in a few seconds.", retry_after_s=2
        ) from error
    if isinstance(queued, list):
        waiting, again_in_ms = map(int, queued)
        REFUSALS.labels(Code.QUEUE_FULL.value).inc()
        raise refusals.make_queue_full(
            job.model, job.billing.plan, waiting, again_in_ms, in_browser=job.billing.source == "chat"
        )
    if queued == NO_HOLD:
        log.warning("a job is not queued: its hold is gone", extra={"job_id": job.job_id})
        raise redis_clients.unavailable()


def count_tokens(job: GenerateJob | EncodeJob) -> int:
    """Return how many tokens a job may have computed, at the most: its length in the fair order."""
    if isinstance(job, GenerateJob):
        return len(job.prompt_token_ids) + job.sampling.n * job.sampling.max_tokens
    return sum(map(len, job.inputs))


def list_in_flight(job: GenerateJob | EncodeJob) -> list[str]:
    """List the sets in which the gate counts a job as in flight."""
    tag = job.billing
    scopes = [f"organization:{tag.organization_id}", *([f"key:{tag.key_id}"] if tag.key_id else [])]
    return [keys.in_flight(scope) for scope in scopes]


async def cancel(job_id: str, reason: str) -> bool:
    """Stop a job at its engine's next step; one that waits loses its place at once, and the reaper ends it. What was made is charged.
    False when it has ended.

    I/O: one Redis trip. Raises: redis.exceptions.RedisError, OSError.
    """
    order = codec.encode_control(Control(order="cancel", job_id=job_id, reason=reason))
    values: list[str | int | bytes] = [
        job_id,
        reason,
        time.time_ns() // 1_000_000,
        keys.CONTROL_CHANNEL,
        order,
        keys.queue_state(""),
        keys.queue_depth(""),
    ]
    return bool(await redis_clients.run_script_async("cancel", [keys.job_record(job_id), keys.LEASES], values))


def forsake(job_id: str) -> None:
    """Cancel once more in a moment: the order to queue may have been on its way when its caller left. I/O: one Redis trip, later."""
    _keep(asyncio.create_task(_cancel_later(job_id)))


async def _cancel_later(job_id: str) -> None:
    await asyncio.sleep(FORSAKE_AFTER_S)
    try:
        await cancel(job_id, "disconnected")
    except redis_clients.UNAVAILABLE:
        log.warning("a job could not be cancelled; its deadline ends it", extra={"job_id": job_id})


def _keep(task: asyncio.Task[None]) -> None:
    _background.add(task)
    task.add_done_callback(_background.discard)


async def _withdraw(job: GenerateJob | EncodeJob) -> None:
    """Forget a job that may or may not have been queued, as soon as Redis answers."""
    names = [
        keys.job_record(job.job_id),
        keys.LEASES,
        keys.queue_state(job.model),
        keys.queue_depth(job.model),
    ]
    while time.time() * 1000 < job.deadline_at_ms:
        try:
            async with asyncio.timeout(REDIS_TIMEOUT_S):
                await redis_clients.run_script_async("withdraw", names, [job.job_id])
            return
        except (*redis_clients.UNAVAILABLE, TimeoutError):
            await asyncio.sleep(WITHDRAW_EVERY_S)
    log.warning("a job could not be withdrawn; its deadline ends it", extra={"job_id": job.job_id})
