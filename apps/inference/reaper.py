"""Answer for jobs that nobody answers for: those whose worker died, whose deadline passed, who were cancelled while they waited, or
whose ticket was lost.
"""

import logging
import threading
import time
from typing import Any

import msgspec

from aiscale import redis as redis_clients
from aiscale.wire import codec, keys
from aiscale.wire.broker import broker_list, make_ticket
from aiscale.wire.events import Delta, Finished, Started
from aiscale.wire.jobs import EncodeJob, GenerateJob
from aiscale.wire.scripts import BY_REAPER, finish_arguments

log = logging.getLogger(__name__)

SWEEP_EVERY_S = 0.25
LOOK_FOR_LOST_EVERY_S = 1.0
FIRST_REST_MS = 1_000
"""How long a job rests after its first worker was lost; twice as long after the second."""
BATCH = 200


def run(stop: threading.Event) -> None:
    """Sweep until ``stop`` is set. Outlives restarts of Redis. Several at once do no harm. I/O: Redis."""
    reaper, pause_s = Reaper(), SWEEP_EVERY_S
    while not stop.wait(pause_s):
        try:
            # a full batch: there is more to do
            while reaper.sweep() == BATCH and not stop.is_set():
                pass
            pause_s = SWEEP_EVERY_S
        except redis_clients.UNAVAILABLE as error:
            log.warning("the reaper waits for Redis: %s", error)
            pause_s = min(pause_s * 2, 5.0)


class Reaper:
    """Look at what is due. All that it must remember is in Redis. Not for use by several threads."""

    def __init__(self) -> None:
        self._looked_at = time.monotonic()

    def sweep(self) -> int:
        """End or queue again what is due. Returns how many jobs were touched. Raises: RedisError, OSError."""
        client: Any = redis_clients.get_sync()
        now_ms = time.time_ns() // 1_000_000
        due = client.zrangebyscore(keys.LEASES, "-inf", now_ms, start=0, num=BATCH)
        for job_id in due:
            self._take(client, job_id.decode(), now_ms)
        if time.monotonic() - self._looked_at >= LOOK_FOR_LOST_EVERY_S:
            self._looked_at = time.monotonic()
            call_workers(client)
        return len(due)

    def _take(self, client: Any, job_id: str, now_ms: int) -> None:
        record = {name.decode(): value for name, value in client.hgetall(keys.job_record(job_id)).items()}
        if not record or record["state"] == b"done":
            client.zrem(keys.LEASES, job_id)
            return
        try:
            job = read_job(record)
        except (msgspec.MsgspecError, codec.UnknownVersion, KeyError) as error:
            log.error("a job's record cannot be read and is dropped: %s", error, extra={"job_id": job_id})
            client.zrem(keys.LEASES, job_id)
            return
        answer = requeue(client, job, now_ms)
        if answer[0] == b"resting":
            log.warning(
                "a worker is gone; its job is tried again in %s ms", answer[1].decode(), extra={"job_id": job_id}
            )
        elif answer[0] == b"no":
            end_job(client, job, record, now_ms)


def requeue(client: Any, job: GenerateJob | EncodeJob, now_ms: int) -> list[bytes]:
    """Take a job back from its worker, or end its rest; see ``lua/requeue.lua``. I/O: one Redis trip. Raises: RedisError, OSError."""
    names = [
        keys.job_record(job.job_id),
        keys.LEASES,
        keys.queue_state(job.model),
        keys.queue_depth(job.model),
        broker_list(job.model),
    ]
    ticket = make_ticket("generate" if isinstance(job, GenerateJob) else "encode", job.model)
    values: list[str | int | bytes] = [job.job_id, now_ms, keys.MAX_ATTEMPTS, FIRST_REST_MS, ticket]
    answer: list[bytes] = redis_clients.run_script(client, "requeue", names, values)
    return answer


def call_workers(client: Any) -> int:
    """Send a ticket for each model whose jobs wait although none is on its way: it was lost with its worker. Returns how many.

    I/O: one Redis trip, and one more for each model. Raises: RedisError, OSError.
    """
    sent = 0
    for name, kind in client.hgetall(keys.QUEUES).items():
        model = name.decode()
        names = [keys.queue_state(model), keys.queue_depth(model), broker_list(model)]
        values: list[str | int | bytes] = [time.time_ns() // 1_000_000, make_ticket(kind.decode(), model)]
        sent += redis_clients.run_script(client, "call", names, values)
    return sent


def read_job(record: dict[str, bytes]) -> GenerateJob | EncodeJob:
    """Decode the job of a record. Raises: KeyError, msgspec.MsgspecError, UnknownVersion."""
    decode: Any = codec.decode_generate_job if record["kind"] == b"generate" else codec.decode_encode_job
    job: GenerateJob | EncodeJob = decode(record["payload"])
    return job


def end_job(client: Any, job: GenerateJob | EncodeJob, record: dict[str, bytes], now_ms: int) -> bool:
    """Write the end of a job that no worker will end. An answer that was lost is not charged. False when it had ended.

    I/O: one or two Redis trips. Raises: RedisError, OSError.
    """
    late = job.deadline_at_ms <= now_ms
    seen = [int(record.get(name, 0)) for name in ("seen_prompt_tokens", "seen_completion_tokens")]
    keep_log = isinstance(job, GenerateJob) and job.keep_log
    if seen[1]:
        # an upstream's answer whose web process died: what was seen is paid for
        reason, code = "cancelled", "worker_lost"
    elif record.get("cancelled") and record["state"] == b"queued":
        reason, code = "cancelled", "cancelled"
    elif late and record.get("streamed") != b"1":
        reason, code = "deadline", "deadline_exceeded"
    else:
        reason, code = "error", "worker_lost"
    event = Finished(
        job_id=job.job_id,
        seq=0,
        kind="generate" if isinstance(job, GenerateJob) else "encode",
        model=job.model,
        model_version=job.model_version,
        finish_reason=reason,  # type: ignore[arg-type]
        prompt_tokens=seen[0] if seen[1] else 0,
        completion_tokens=seen[1],
        billing=job.billing,
        error_code=code,
        error_message="the worker was lost" if code == "worker_lost" else record.get("cancelled", b"").decode() or None,
        text=_read_text(client, job.job_id) if keep_log else None,
        duration_ms=max(now_ms - job.billing.admitted_at_ms, 0),
        finished_at_ms=now_ms,
    )
    names, values = finish_arguments(event, reply_to=job.reply_to, keep_log=keep_log, by=BY_REAPER)
    ended = bool(redis_clients.run_script(client, "finish", names, values))
    if ended:
        log.warning("a job was ended by the reaper: %s", code, extra={"job_id": job.job_id, "code": code})
    return ended


def _read_text(client: Any, job_id: str) -> str:
    """Put together what a job's last attempt said before its worker was lost."""
    text: list[str] = []
    for _, fields in client.xrange(keys.job_log(job_id)):
        for _, data in sorted((int(number), data) for number, data in fields.items()):
            event = codec.decode_event(data)
            if isinstance(event, Started):
                text.clear()
            elif isinstance(event, Delta):
                text.append(event.text)
    return "".join(text)
