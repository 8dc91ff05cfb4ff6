"""Keep kill switches in force: have Redis say what the table says, and end what waits in the queue of a stopped scope.

Workers end what runs. What waits for one must not be computed later, nor hold its caller's budget until its deadline.
"""

import logging
import threading
import time
from typing import Any

import msgspec
from django.db import Error as DatabaseError
from django.db import InterfaceError, connection
from redis import Redis

from aiscale import redis as redis_clients
from aiscale.wire import codec, keys, scopes
from aiscale.wire.events import Finished
from aiscale.wire.jobs import EncodeJob, GenerateJob
from aiscale.wire.scopes import Order
from aiscale.wire.scripts import FROM_QUEUE, finish_arguments
from apps.inference.reaper import read_job
from apps.spend import killswitch

log = logging.getLogger(__name__)

EVERY_S = 0.4
BATCH = 500


def run(stop: threading.Event) -> None:
    """Do so until ``stop`` is set, at once when an order is given. Outlives restarts of Redis and Postgres. Several at once do no harm.

    I/O: Redis and Postgres.
    """
    while not stop.is_set():
        try:
            _keep(stop)
        except (*redis_clients.UNAVAILABLE, DatabaseError, InterfaceError) as error:
            log.error("kill switches wait for their servers: %s", error)
            connection.close()
            stop.wait(EVERY_S)
    connection.close()


def _keep(stop: threading.Event) -> None:
    client: Any = redis_clients.get_sync()
    stopper = Stopper(client)
    with client.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(keys.CONTROL_CHANNEL)
        while not stop.is_set():
            killswitch.restore()
            stopper.sweep()
            _wait(channel)


def _wait(channel: Any) -> None:
    """Wait for `EVERY_S`, or for a kill order."""
    ends_at = time.monotonic() + EVERY_S
    while (left_s := ends_at - time.monotonic()) > 0:
        message = channel.get_message(timeout=left_s)
        if message is None:
            continue
        try:
            if codec.decode_control(message["data"]).order == "kill":
                return
        except msgspec.DecodeError:
            log.warning("an order cannot be read")


class Stopper:
    """End queued jobs of stopped scopes, and remember which jobs lie in none. Not for use by several threads."""

    def __init__(self, client: Redis) -> None:
        self._client: Any = client
        self._orders: dict[str, Order] = {}
        self._free: set[str] = set()
        """Jobs that no order of ``_orders`` covers."""

    def sweep(self) -> int:
        """End what is queued and stopped. Returns how many jobs that were. I/O: one Redis trip while nothing is stopped; then one
        more for 500 new jobs, and one for each job that ends. Raises: RedisError, OSError."""
        now_ms = time.time_ns() // 1_000_000
        orders = scopes.read_orders(self._client.hgetall(keys.KILLED), now_ms)
        if orders != self._orders:
            self._orders, self._free = orders, set()
        if not orders:
            return 0
        living = {member.decode() for member in self._client.zrange(keys.LEASES, 0, -1)}
        self._free &= living
        unknown, ended = sorted(living - self._free), 0
        for start in range(0, len(unknown), BATCH):
            ended += self._end_stopped(unknown[start : start + BATCH], now_ms)
        return ended

    def _end_stopped(self, job_ids: list[str], now_ms: int) -> int:
        pipeline = self._client.pipeline(transaction=False)
        for job_id in job_ids:
            pipeline.hmget(keys.job_record(job_id), "state", "kind", "payload")
        ended = 0
        for job_id, (state, kind, payload) in zip(job_ids, pipeline.execute(), strict=True):
            if payload is None or state == b"done":
                continue
            try:
                job = read_job({"kind": kind, "payload": payload})
            except (msgspec.MsgspecError, codec.UnknownVersion):
                # the reaper ends it at its deadline
                continue
            order = scopes.find_order(self._orders, scopes.list_scopes(job), now_ms)
            if order is None:
                self._free.add(job_id)
            elif state == b"queued":
                ended += end_queued(self._client, job, order.reason, now_ms)
        return ended


def end_queued(client: Any, job: GenerateJob | EncodeJob, reason: str, now_ms: int) -> bool:
    """End a job that waits, as killed and free of charge. False when a worker has claimed it, or it has ended.

    Settlement gives its hold back. I/O: one Redis trip. Atomic. Raises: RedisError, OSError.
    """
    keep_log = isinstance(job, GenerateJob) and job.keep_log
    event = Finished(
        job_id=job.job_id,
        seq=0,
        kind="generate" if isinstance(job, GenerateJob) else "encode",
        model=job.model,
        model_version=job.model_version,
        finish_reason="killed",
        prompt_tokens=0,
        completion_tokens=0,
        billing=job.billing,
        error_code="killed",
        error_message=reason,
        text="" if keep_log else None,
        queued_ms=max(now_ms - job.billing.admitted_at_ms, 0),
        duration_ms=max(now_ms - job.billing.admitted_at_ms, 0),
        finished_at_ms=now_ms,
    )
    names, values = finish_arguments(event, reply_to=job.reply_to, keep_log=keep_log, by=FROM_QUEUE)
    return bool(redis_clients.run_script(client, "finish", names, values))
