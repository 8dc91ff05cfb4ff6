"""Take a model's jobs only as fast as its thread can work, so that the fair order is kept until the last moment.

Each model has some lanes. A ticket takes one, asks for the next jobs, waits for their ends, and asks again until nothing waits. A ticket
that finds no lane free has nothing to do here: those in the lanes go on with what waits. Should another worker be idle, it is told.
"""

import logging
import threading
import time
from collections.abc import Callable

import msgspec
from celery.exceptions import Reject
from redis.exceptions import RedisError

from aiscale.wire import codec, keys
from aiscale.wire.events import Control
from aiscale.wire.jobs import EncodeJob, GenerateJob
from aiscale.wire.scripts import claim_arguments
from workers.config import WORKER_ID, get_redis, run_script
from workers.lanes import Lanes
from workers.publish import JobInHand
from workers.serving import Serving

log = logging.getLogger(__name__)

ENCODER_JOBS, ENCODER_TOKENS = 32, 2048
"""The most that an encoder's lane takes at a time; a single job may be larger."""
LINGER_S, LOOK_EVERY_S = 0.06, 0.006
"""How long, and how often, the last lane of an encoder looks for more before it leaves: a look costs a tenth of a ticket, and what comes
meanwhile shares a batch."""
BACK_IN_MS = 25
CLAIM_PAUSES_S = (0.1, 0.3, 1.0, 3.0)
PATIENCE_S = 30.0
"""How long past their deadline jobs are waited for before the lane is given up."""


def work(serving: Serving, model: str, *, with_ticket: bool = True) -> None:
    """Compute what waits for ``model`` until nothing does, if a lane is free.

    I/O: one Redis trip each time it asks. Raises: Reject, so that the ticket comes back, when Redis does not answer.
    """
    lanes = serving.lanes.get(model)
    if lanes is None:
        log.error("a ticket calls for a model that is not served here", extra={"model": model[:100]})
        return
    if not lanes.enter():
        _tell_others(model)
        return
    try:
        _work_in_lane(serving, lanes, model, with_ticket)
    except BaseException:
        lanes.give_up()
        raise


def _work_in_lane(serving: Serving, lanes: Lanes, model: str, with_ticket: bool) -> None:
    linger_until = 0.0
    while not serving.draining:
        encodes, lingers = lanes.kind == "encode", lanes.is_last and time.monotonic() < linger_until
        comes_back = encodes and (with_ticket or lingers)
        jobs = claim(model, lanes.kind, with_ticket=with_ticket, back_in_ms=BACK_IN_MS if comes_back else 0)
        with_ticket = False
        if jobs:
            _run(serving, jobs)
            linger_until = time.monotonic() + LINGER_S
        elif comes_back:
            # who said so must ask once more, and say that it leaves
            time.sleep(LOOK_EVERY_S if lingers else 0)
        elif lanes.leave():
            return
    lanes.give_up()


def work_beside(serving: Serving, model: str) -> None:
    """Do `work` on a thread of its own: another worker was called, and had no lane free."""
    lanes = serving.lanes.get(model)
    if lanes is not None and lanes.free and not serving.draining:
        threading.Thread(target=_work_quietly, args=(serving, model), name=f"lane-{model}", daemon=True).start()


def _work_quietly(serving: Serving, model: str) -> None:
    try:
        work(serving, model, with_ticket=False)
    except Reject:
        log.warning("work waits for Redis", extra={"model": model})


def claim(model: str, kind: str, *, with_ticket: bool, back_in_ms: int = 0) -> list[JobInHand]:
    """Take the next jobs from the queue. I/O: one Redis trip. Raises: Reject when Redis does not answer."""
    most = {} if kind == "generate" else {"most_jobs": ENCODER_JOBS, "most_tokens": ENCODER_TOKENS}
    for pause_s in (*CLAIM_PAUSES_S, None):
        now_ms = time.time_ns() // 1_000_000
        names, values = claim_arguments(
            kind, model, WORKER_ID, now_ms=now_ms, with_ticket=with_ticket, back_in_ms=back_in_ms, **most
        )
        try:
            _, *taken = run_script("claim", names, values)
            break
        except (RedisError, OSError) as error:
            if pause_s is None:
                raise Reject("Redis does not answer", requeue=True) from error
            time.sleep(pause_s)
    decode = codec.decode_generate_job if kind == "generate" else codec.decode_encode_job
    return [in_hand for job_id, attempt, payload in taken if (in_hand := _read(decode, job_id, attempt, payload))]


def _read(
    decode: Callable[[bytes], GenerateJob | EncodeJob], job_id: bytes, attempt: bytes, payload: bytes
) -> JobInHand | None:
    try:
        return JobInHand(job=decode(payload), attempt=int(attempt))
    except (msgspec.MsgspecError, codec.UnknownVersion) as error:
        log.error("a job cannot be read: %s", error, extra={"job_id": job_id.decode()})
    # another worker may know its version
    _hand_on(job_id.decode())
    return None


def _hand_on(job_id: str) -> None:
    """Have the reaper let others try a job that was claimed and not begun; it ends the job when nobody can. I/O: one Redis trip."""
    try:
        get_redis().zadd(keys.LEASES, {job_id: 0}, xx=True)
    except (RedisError, OSError):
        log.warning("the job's lease has to pass first", extra={"job_id": job_id})


def _run(serving: Serving, jobs: list[JobInHand]) -> None:
    """Compute jobs, and wait until their ends are in Redis."""
    for in_hand in jobs:
        if (order := serving.find_order(in_hand.job)) is not None:
            # it was admitted just before the order, or waited since before it
            serving.take(in_hand)
            serving.publisher.finish(in_hand, "killed", error=order.reason)
        elif not serving.submit(in_hand):
            _hand_on(in_hand.job.job_id)
    for in_hand in jobs:
        in_hand.published.wait(max(in_hand.job.deadline_at_ms / 1000 - time.time(), 0) + PATIENCE_S)
        serving.forget(in_hand.job.job_id)


def _tell_others(model: str) -> None:
    """Tell idle workers that this one has no lane free. I/O: one Redis trip. A failure is logged: the reaper calls again."""
    try:
        get_redis().publish(keys.CONTROL_CHANNEL, codec.encode_control(Control(order="work", scope=f"model:{model}")))
    except (RedisError, OSError) as error:
        log.warning("other workers cannot be told of work: %s", error, extra={"model": model})
