"""Take jobs from Celery.

Idempotency key: the job id (claim.lua lets one delivery run). Retries: at most three in all, by the reaper, and only before the
first token; Celery itself retries nothing. Deadline: ``deadline_at_ms`` of the job; 30 s for encoders, which the web sets.
"""

import logging
import time
from collections.abc import Callable

import msgspec
from celery import shared_task
from celery.exceptions import Reject
from redis.exceptions import RedisError

from aiscale.wire import codec, keys
from aiscale.wire.jobs import ENCODE_TASK, GENERATE_TASK, EncodeJob, GenerateJob
from aiscale.wire.scripts import read_script
from workers.config import WORKER_ID, get_redis
from workers.publish import JobInHand
from workers.serving import Serving, get_serving

log = logging.getLogger(__name__)

PATIENCE_S = 30.0
"""How long past its deadline a task waits for its engine before it gives its thread back."""


@shared_task(name=GENERATE_TASK, acks_late=True, ignore_result=True)
def generate(payload: str) -> None:
    """Compute a `GenerateJob`."""
    _run(payload, codec.decode_generate_job)


@shared_task(name=ENCODE_TASK, acks_late=True, ignore_result=True)
def encode(payload: str) -> None:
    """Compute an `EncodeJob`."""
    _run(payload, codec.decode_encode_job)


def _run(payload: str, decode: Callable[[str], GenerateJob | EncodeJob]) -> None:
    try:
        job = decode(payload)
    except (msgspec.DecodeError, codec.UnknownVersion) as error:
        # its record stays: the reaper ends it at its deadline, with a clear error
        log.error("a job cannot be read: %s", error)
        return
    serving = get_serving()
    attempt, cancelled = _claim(job)
    if attempt:
        in_hand = JobInHand(job=job, attempt=attempt)
        _serve(serving, in_hand, cancelled)
        in_hand.published.wait(max(job.deadline_at_ms / 1000 - time.time(), 0) + PATIENCE_S)
        serving.forget(job.job_id)


def _serve(serving: Serving, in_hand: JobInHand, cancelled: bool) -> None:
    if cancelled:
        serving.take(in_hand)
        serving.publisher.finish(in_hand, "cancelled")
    elif (order := serving.find_order(in_hand.job)) is not None:
        # it was admitted just before the order, or waited since before it
        serving.take(in_hand)
        serving.publisher.finish(in_hand, "killed", error=order.reason)
    elif in_hand.job.deadline_at_ms <= time.time() * 1000:
        serving.take(in_hand)
        serving.publisher.finish(in_hand, "deadline", error="the request's deadline passed while it waited")
    else:
        serving.submit(in_hand)


def _claim(job: GenerateJob | EncodeJob) -> tuple[int, bool]:
    """Return (attempt, cancelled); attempt 0 when the job is not ours to run. Raises: Reject, so that the message comes back."""
    for pause_s in (0.1, 0.3, 1.0, 3.0, None):
        try:
            answer = get_redis().eval(
                read_script("claim"),
                3,
                keys.job_record(job.job_id),
                keys.LEASES,
                keys.queue_depth(job.model),
                job.job_id,
                WORKER_ID,
                now_ms := time.time_ns() // 1_000_000,
                now_ms + keys.LEASE_MS,
            )
            break
        except (RedisError, OSError) as error:
            if pause_s is None:
                raise Reject("Redis does not answer", requeue=True) from error
            time.sleep(pause_s)
    word, detail = (part.decode() for part in answer)
    if word == "claimed":
        return int(detail), False
    if word == "cancelled":
        return 1, True
    log.info("a job is not ours to run: %s %s", word, detail, extra={"job_id": job.job_id})
    return 0, False
