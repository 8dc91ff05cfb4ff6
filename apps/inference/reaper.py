"""Answer for jobs that nobody answers for: those whose worker died, whose deadline passed, or whose message was lost."""

import heapq
import logging
import threading
import time
from typing import Any

import msgspec
from kombu.exceptions import OperationalError

from aiscale import redis as redis_clients
from aiscale.wire import codec, keys
from aiscale.wire.broker import PRIORITY_STEPS
from aiscale.wire.events import Delta, Finished, Started
from aiscale.wire.jobs import EncodeJob, GenerateJob
from aiscale.wire.scripts import finish_arguments, read_script
from apps.inference import queue

log = logging.getLogger(__name__)

SWEEP_EVERY_S = 0.5
LOOK_FOR_LOST_EVERY_S = 5.0
BATCH = 200
BROKER_PREFIX = "aiscale:celery:"
PRIORITY_SEPARATOR = "\x06\x16"


def run(stop: threading.Event) -> None:
    """Sweep until ``stop`` is set. Outlives restarts of Redis. Several at once do no harm. I/O: Redis."""
    reaper, pause_s = Reaper(), SWEEP_EVERY_S
    while not stop.wait(pause_s):
        try:
            reaper.sweep()
            pause_s = SWEEP_EVERY_S
        except (*redis_clients.UNAVAILABLE, OperationalError) as error:
            log.warning("the reaper waits for Redis: %s", error)
            pause_s = min(pause_s * 2, 5.0)


class Reaper:
    """Remember what is to be sent again, and when. Not for use by several threads."""

    def __init__(self) -> None:
        self._again: list[tuple[float, str, str, str]] = []
        self._seen_waiting: set[str] = set()
        self._looked_at = time.monotonic()

    def sweep(self) -> int:
        """End or send again what is due. Returns how many jobs were touched. Raises: RedisError, OperationalError."""
        client: Any = redis_clients.get_sync()
        now_ms = time.time_ns() // 1_000_000
        due = client.zrangebyscore(keys.LEASES, "-inf", now_ms, start=0, num=BATCH)
        for job_id in due:
            self._take(client, job_id.decode(), now_ms)
        self._send_due()
        if time.monotonic() - self._looked_at >= LOOK_FOR_LOST_EVERY_S:
            self._looked_at = time.monotonic()
            self._look_for_lost(client)
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
        names = [keys.job_record(job_id), keys.LEASES, keys.queue_depth(job.model)]
        answer = client.eval(read_script("requeue"), 3, *names, job_id, now_ms, keys.MAX_ATTEMPTS)
        if answer[0] == b"requeued":
            kind, payload, queue_name, attempt = (part.decode() for part in answer[1:])
            back_off_s = 2.0 ** (int(attempt) - 1)
            log.warning("a worker is gone; its job is tried again in %g s", back_off_s, extra={"job_id": job_id})
            heapq.heappush(self._again, (time.monotonic() + back_off_s, kind, payload, queue_name))
        else:
            end_job(client, job, record, now_ms)

    def _send_due(self) -> None:
        while self._again and self._again[0][0] <= time.monotonic():
            _, kind, payload, queue_name = self._again[0]
            queue.send(kind, payload, queue_name, PRIORITY_STEPS[0])
            heapq.heappop(self._again)

    def _look_for_lost(self, client: Any) -> None:
        """Send again what is queued in the records but not in the broker, seen so twice: its message was lost (a web process that
        died before it sent, a worker that died before it claimed). A message too many does no harm."""
        waiting: set[str] = set()
        for key in client.scan_iter(match=keys.queue_depth("*"), count=1000):
            model = key.decode().removeprefix(keys.queue_depth(""))
            if not _count_messages(client, keys.celery_queue(model)):
                waiting.update(member.decode() for member in client.zrange(key, 0, BATCH - 1))
        for job_id in waiting & self._seen_waiting:
            fields = client.hmget(keys.job_record(job_id), "state", "kind", "payload", "queue")
            if fields[0] == b"queued" and None not in fields:
                log.warning("a job's message was lost and is sent again", extra={"job_id": job_id})
                kind, payload, queue_name = (field.decode() for field in fields[1:])
                queue.send(kind, payload, queue_name, PRIORITY_STEPS[0])
        self._seen_waiting = waiting


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
    keep_log = isinstance(job, GenerateJob) and job.keep_log
    if record.get("cancelled") and record["state"] == b"queued":
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
        prompt_tokens=0,
        completion_tokens=0,
        billing=job.billing,
        error_code=code,
        error_message="the worker was lost" if code == "worker_lost" else None,
        text=_read_text(client, job.job_id) if keep_log else None,
        duration_ms=max(now_ms - job.billing.admitted_at_ms, 0),
        finished_at_ms=now_ms,
    )
    names, values = finish_arguments(event, reply_to=job.reply_to, keep_log=keep_log, by="")
    ended = bool(client.eval(read_script("finish"), len(names), *names, *values))
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


def _count_messages(client: Any, queue_name: str) -> int:
    pipeline = client.pipeline(transaction=False)
    for step in PRIORITY_STEPS:
        suffix = f"{PRIORITY_SEPARATOR}{step}" if step else ""
        pipeline.llen(f"{BROKER_PREFIX}{queue_name}{suffix}")
    return sum(pipeline.execute())
