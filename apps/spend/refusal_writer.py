"""Write down what web processes noted of refusals (`apps.spend.refusal_log`), and forget it after a while.

What is kept is bounded: `KEEP_DAYS`, and `MOST_ROWS` at the most. A batch that was written and could not be acknowledged is written again:
single refusals are not doubled then, counts may be.
"""

import logging
import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec
from django.db import DatabaseError, InterfaceError, connection, transaction
from django.utils import timezone
from redis import Redis
from redis.exceptions import ResponseError

from aiscale import redis as redis_clients
from aiscale.wire import keys
from apps.spend import periods
from apps.spend.models import RefusalCount, RefusedRequest
from apps.spend.refusal_log import Refused, RefusedBatch

log = logging.getLogger(__name__)

KEEP_DAYS, KEEP_COUNTS_DAYS = 30, 400
MOST_ROWS = 500_000
BATCH_ENTRIES = 20
BLOCK_MS = 1_000
CLAIM_IDLE_MS = 30_000
PRUNE_EACH_S = 600.0
PRUNE_ROWS = 5_000
BACK_OFF_S = 2.0

_decode = msgspec.msgpack.Decoder(RefusedBatch).decode


def run(stop: threading.Event) -> None:
    """Write until ``stop`` is set. Outlives restarts of Redis and Postgres. I/O: blocks on Redis for a second at a time."""
    writer = Writer(redis_clients.get_sync())
    while not stop.is_set():
        try:
            writer.turn(BLOCK_MS)
        except (*redis_clients.UNAVAILABLE, DatabaseError, InterfaceError) as error:
            log.warning("refusals are not written down for now: %s", error)
            writer.start_over()
            stop.wait(BACK_OFF_S)
    connection.close()


class Writer:
    """Be one consumer of the stream. Not for use by several threads."""

    def __init__(self, client: Redis) -> None:
        self.client = client
        self.consumer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._has_group = False
        self._next_prune = 0.0

    def start_over(self) -> None:
        """Forget what is known of both servers, after one of them failed."""
        self._has_group = False
        try:
            connection.close()
        except (DatabaseError, InterfaceError):
            log.debug("the broken connection could not be closed", exc_info=True)

    def turn(self, block_ms: int) -> int:
        """Write what is there, and prune when it is time. Returns the entries written. I/O: Redis and SQL. Raises: RedisError,
        OSError, django.db.Error."""
        if not self._has_group:
            self._make_group()
        entries = self._read(block_ms)
        if entries:
            write([batch for _, data in entries if (batch := _read_batch(data)) is not None])
            ids = [entry_id for entry_id, _ in entries]
            pipeline = self.client.pipeline(transaction=True)
            pipeline.xack(keys.REFUSED, keys.GROUP_REFUSALS, *ids)
            pipeline.xdel(keys.REFUSED, *ids)
            pipeline.execute()
        if time.monotonic() >= self._next_prune:
            prune()
            self._next_prune = time.monotonic() + PRUNE_EACH_S
        return len(entries)

    def _make_group(self) -> None:
        try:
            self.client.xgroup_create(keys.REFUSED, keys.GROUP_REFUSALS, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        self._has_group = True

    def _read(self, block_ms: int) -> list[tuple[bytes, bytes]]:
        try:
            claimed: Any = self.client.xautoclaim(
                keys.REFUSED, keys.GROUP_REFUSALS, self.consumer, min_idle_time=CLAIM_IDLE_MS, count=BATCH_ENTRIES
            )
            rows = claimed[1]
            if not rows:
                answer: Any = self.client.xreadgroup(
                    keys.GROUP_REFUSALS, self.consumer, {keys.REFUSED: ">"}, count=BATCH_ENTRIES, block=block_ms
                )
                rows = answer[0][1] if answer else []
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            # somebody emptied Redis
            self._has_group = False
            return []
        return [(entry_id, (fields or {}).get(b"0", b"")) for entry_id, fields in rows]


def write(batches: Sequence[RefusedBatch]) -> None:
    """Write counts and single refusals, all or none. I/O: two SQL statements. Raises: django.db.Error."""
    counts: Counter[tuple[str, datetime, str]] = Counter()
    for batch in batches:
        hour = periods.to_datetime(batch.at_ms).replace(minute=0, second=0, microsecond=0)
        for organization_id, code, count in batch.counts:
            counts[organization_id, hour, code] += count
    # in one order in every process: two of them cannot deadlock (M8)
    rows = sorted(counts.items())
    with transaction.atomic():
        RefusedRequest.objects.bulk_create(
            [_make_row(refused) for batch in batches for refused in batch.kept], ignore_conflicts=True
        )
        with connection.cursor() as cursor:
            cursor.execute(
                f"""
                INSERT INTO {RefusalCount._meta.db_table} AS known (organization_id, hour, code, count)
                SELECT * FROM unnest(%s::text[], %s::timestamptz[], %s::text[], %s::bigint[])
                ON CONFLICT (organization_id, hour, code) DO UPDATE SET count = known.count + excluded.count
                """,  # noqa: S608 - the table's name is Django's
                [
                    [name[0] for name, _ in rows],
                    [name[1] for name, _ in rows],
                    [name[2] for name, _ in rows],
                    [count for _, count in rows],
                ],
            )


def prune() -> int:
    """Forget what is old, and the oldest of what is too much. Returns how many rows went. I/O: SQL, in small pieces."""
    gone = 0
    now = timezone.now()
    newest = RefusedRequest.objects.order_by("-pk").values_list("pk", flat=True).first() or 0
    outdated: tuple[Any, ...] = (
        RefusedRequest.objects.filter(occurred_at__lt=now - timedelta(days=KEEP_DAYS)),
        RefusedRequest.objects.filter(pk__lte=newest - MOST_ROWS),
        RefusalCount.objects.filter(hour__lt=now - timedelta(days=KEEP_COUNTS_DAYS)),
    )
    for old in outdated:
        while True:
            deleted, _ = old.model.objects.filter(pk__in=old.values("pk")[:PRUNE_ROWS]).delete()
            gone += deleted
            if deleted < PRUNE_ROWS:
                break
    return gone


def _make_row(refused: Refused) -> RefusedRequest:
    values = msgspec.structs.asdict(refused)
    occurred_at = periods.to_datetime(values.pop("occurred_at_ms"))
    return RefusedRequest(**values, occurred_at=occurred_at)


def _read_batch(data: bytes) -> RefusedBatch | None:
    try:
        return _decode(data)
    except (msgspec.DecodeError, ValueError) as error:
        log.error("an entry of refusals cannot be read and is dropped: %s", error)
        return None
