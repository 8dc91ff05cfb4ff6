"""Keep this worker's leases alive, tell that it is here, and obey: cancel, kill.

An order comes twice: at once by pub/sub, and soon after by reading what it left in Redis. So none is missed.
"""

import logging
import threading
import time
from typing import Any

import msgspec
from redis.exceptions import RedisError

from aiscale.wire import codec, keys, metrics, scopes
from workers import intake
from workers.config import WORKER_ID, get_redis
from workers.orphans import Orphans
from workers.publish import JobInHand
from workers.serving import Serving
from workers.versions import read_traffic

log = logging.getLogger(__name__)

REFRESH_EVERY_S = 2.0
"""How soon a version that requests are to be sent to, or a model that is new on the disk, is loaded."""

READ_ORDERS_EVERY_S = 0.4
"""A kill order whose message was missed is in force within this; all of it must be within a second."""


def start_control(serving: Serving) -> None:
    """Start the heartbeat and the listener on threads of their own."""
    for work in (_beat, _listen, _refresh):
        threading.Thread(target=work, args=(serving,), name=f"control{work.__name__}", daemon=True).start()
    metrics.start_reporting("worker", get_redis)


def _beat(serving: Serving) -> None:
    from workers.bootsteps import exit_process

    orphans = Orphans()
    while True:
        started = time.monotonic()
        try:
            beat_once(serving, orphans)
        except (RedisError, OSError) as error:
            log.warning("the heartbeat waits for Redis: %s", error)
        if not serving.closing and (dead := serving.find_dead()) is not None:
            log.critical("the thread of %s is gone", dead, extra={"model": dead})
            serving.publisher.flush(2.0)
            exit_process()
        time.sleep(max(keys.HEARTBEAT_MS / 1000 - (time.monotonic() - started), 0.05))


def beat_once(serving: Serving, orphans: Orphans) -> None:
    """Push leases ahead, write presence, and obey what the jobs' records say. I/O: two Redis trips, one more when Redis was emptied.

    Raises: RedisError, OSError.
    """
    client = get_redis()
    jobs = [in_hand for in_hand in list(serving.jobs.values()) if not in_hand.ended]
    readers = orphans.list_readers(jobs)
    pipeline: Any = client.pipeline(transaction=False)
    for in_hand in jobs:
        pipeline.hmget(keys.job_record(in_hand.job.job_id), "worker", "cancelled", "state")
    for reader in readers:
        pipeline.exists(keys.reader_presence(reader))
    pipeline.get(keys.EPOCH)
    *records, epoch = pipeline.execute()
    serving.publisher.recent_ends.look(client, epoch)
    gone = orphans.find_gone(readers, [bool(there) for there in records[len(jobs) :]])
    pipeline = client.pipeline(transaction=False)
    now_ms = time.time_ns() // 1_000_000
    lease_end_ms = now_ms + keys.LEASE_MS
    renewed: list[JobInHand] = []
    for in_hand, (worker, cancelled, state) in zip(jobs, records, strict=False):
        if state != b"running" or worker is None or worker.decode() != WORKER_ID:
            if not in_hand.ended:
                log.warning("a job was taken from this worker", extra={"job_id": in_hand.job.job_id})
                serving.publisher.drop(in_hand)
                serving.abort(in_hand.job.job_id, "cancelled")
            continue
        pipeline.zadd(keys.LEASES, {in_hand.job.job_id: lease_end_ms}, xx=True)
        renewed.append(in_hand)
        if cancelled is not None:
            serving.abort(in_hand.job.job_id, "cancelled", cancelled.decode())
        elif in_hand.job.reply_to in gone and not in_hand.keep_log:
            log.warning("the process that waits for a job is gone", extra={"job_id": in_hand.job.job_id})
            serving.abort(in_hand.job.job_id, "cancelled", "the process that waited for it was lost")
    if not serving.closing:
        pipeline.set(keys.worker_presence(WORKER_ID), _describe(serving), ex=keys.WORKER_PRESENCE_TTL_S)
        for model in serving.versions:
            pipeline.set(keys.model_served(model), now_ms, ex=keys.MODEL_SERVED_TTL_S)
    pipeline.execute()
    for in_hand in renewed:
        in_hand.lease_end_ms = lease_end_ms


def read_traffic_at_start() -> dict[str, list[str]]:
    """Return what the catalog says, or nothing: then the newest of each is served, until it says something. I/O: one Redis trip."""
    try:
        return read_traffic()
    except (RedisError, OSError) as error:
        log.warning("the catalog's traffic is not known yet: %s", error)
        return {}


def _refresh(serving: Serving) -> None:
    from workers.bootsteps import take_tickets

    while not serving.closing:
        time.sleep(REFRESH_EVERY_S)
        try:
            for model in serving.refresh(read_traffic()):
                take_tickets(model)
        except (RedisError, OSError) as error:
            log.warning("models cannot be looked for: %s", error)
        except Exception:
            log.exception("what is to be served cannot be told")


def _listen(serving: Serving) -> None:
    while True:
        try:
            client: Any = get_redis()
            with client.pubsub(ignore_subscribe_messages=True) as channel:
                channel.subscribe(keys.CONTROL_CHANNEL)
                read_at = 0.0
                while True:
                    message = channel.get_message(timeout=READ_ORDERS_EVERY_S)
                    if message is not None:
                        obey(serving, message["data"])
                    if time.monotonic() - read_at >= READ_ORDERS_EVERY_S:
                        read_at = time.monotonic()
                        read_orders(serving)
        except (RedisError, OSError) as error:
            log.warning("the listener waits for Redis: %s", error)
            time.sleep(0.2)


def read_orders(serving: Serving) -> None:
    """Learn what is stopped, and end what is in hand of it. I/O: one Redis trip. Raises: RedisError, OSError."""
    fields: Any = get_redis().hgetall(keys.KILLED)
    serving.orders = scopes.read_orders(fields, time.time_ns() // 1_000_000)
    _end_stopped(serving)


def obey(serving: Serving, data: bytes) -> None:
    """Carry out one encoded `Control`; what cannot be read is logged and dropped."""
    try:
        control = codec.decode_control(data)
    except msgspec.DecodeError as error:
        log.warning("an order cannot be read: %s", error)
        return
    if control.order == "cancel":
        serving.abort(control.job_id, "cancelled", control.reason)
    elif control.order == "work":
        intake.work_beside(serving, control.scope.removeprefix("model:"))
    elif control.order == "kill":
        serving.orders = {**serving.orders, control.scope: scopes.Order(control.reason)}
        _end_stopped(serving)
    elif control.order == "release":
        serving.orders = {scope: order for scope, order in serving.orders.items() if scope != control.scope}


def _end_stopped(serving: Serving) -> None:
    if not serving.orders:
        return
    for in_hand in list(serving.jobs.values()):
        if not in_hand.ended and (order := serving.find_order(in_hand.job)) is not None:
            serving.abort(in_hand.job.job_id, "killed", order.reason)


def _describe(serving: Serving) -> bytes:
    running, waiting = serving.counts()
    return msgspec.json.encode(
        {
            "worker_id": WORKER_ID,
            "models": {name: versions[0] for name, versions in serving.versions.items()},
            "versions": serving.versions,
            "providers": serving.providers,
            "running": running,
            "waiting": waiting,
            "started_at_ms": serving.started_at_ms,
        }
    )
