"""Write answers into their conversations, from the stream of finished jobs. The only writer of how an answer ended well."""

import logging
import os
import secrets
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import msgspec
from django.conf import settings
from django.db import Error as DatabaseError
from django.db import InterfaceError, connection, transaction
from django.utils import timezone
from redis import Redis
from redis.exceptions import ResponseError

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from aiscale.wire.codec import decode_event
from aiscale.wire.events import Finished
from apps.chat import turns
from apps.chat.models import Message
from apps.inference.endings import make_failure
from apps.spend import stream

log = logging.getLogger(__name__)

BATCH = 500
BLOCK_MS = 500
CLAIM_IDLE_MS = 10_000
CHORES_EACH_S = 5.0
YOUNG_S = 20
"""A pending answer may be without a job for so long: its turn has just begun."""


def run(stop: threading.Event) -> None:
    """Write answers until ``stop`` is set. Outlives restarts of Redis and Postgres. Several at once do no harm."""
    writer, pause_s = Writer(redis_clients.get_sync()), 0.2
    while not stop.is_set():
        try:
            stream.gather(stop, writer.turn(), BATCH)
            pause_s = 0.2
        except (*redis_clients.UNAVAILABLE, DatabaseError, InterfaceError) as error:
            log.error("transcripts wait %.1f s: %s", pause_s, error)
            writer.start_over()
            stop.wait(pause_s)
            pause_s = min(pause_s * 2, 5.0)
    connection.close()


class Writer:
    """Be one consumer of the stream. Not for use by several threads."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._consumer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._next_chores = 0.0
        self._own_first = True
        self._has_groups = False

    def start_over(self) -> None:
        """After a failure: read again first what is in hand."""
        self._own_first, self._has_groups = True, False
        try:
            connection.close()
        except (DatabaseError, InterfaceError):
            log.debug("the broken connection could not be closed", exc_info=True)

    def turn(self, block_ms: int = BLOCK_MS) -> int:
        """Write what is due. Returns how many entries there were. Raises: RedisError, OSError, django.db.Error; what was read
        is then still pending."""
        if not self._has_groups:
            stream.ensure_groups(self._client)
            self._has_groups = True
        entries = self._read(block_ms)
        events = [event for entry in entries if (event := _decode(entry)) is not None]
        if events:
            with transaction.atomic():
                for event in events:
                    write(event)
        if entries:
            self._client.xack(keys.FINISHED, keys.GROUP_TRANSCRIPTS, *(entry.entry_id for entry in entries))
        if time.monotonic() >= self._next_chores:
            self._next_chores = time.monotonic() + CHORES_EACH_S
            sweep(self._client)
        return len(entries)

    def _read(self, block_ms: int) -> list[stream.Entry]:
        common: dict[str, Any] = {"count": BATCH, "group": keys.GROUP_TRANSCRIPTS}
        try:
            if self._own_first:
                entries = stream.read(self._client, self._consumer, "0", **common)
                self._own_first = bool(entries)
                if entries:
                    return entries
            entries = stream.claim(self._client, self._consumer, idle_ms=CLAIM_IDLE_MS, **common)
            return entries or stream.read(self._client, self._consumer, ">", block_ms=block_ms, **common)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            self._has_groups = False
            return []


def write(event: Finished) -> bool:
    """Write how an answer ended. Idempotent. False when no answer waits for this job. I/O: one SQL statement."""
    fields: dict[str, Any] = {
        "completion_tokens": max(event.completion_tokens, 0),
        "error_code": "",
        "error_message": "",
        "updated_at": timezone.now(),
    }
    if event.text is not None:
        fields["content"] = event.text.replace("\x00", "�")
    if event.finish_reason in ("stop", "length"):
        fields["status"] = Message.Status.COMPLETE
    elif event.finish_reason == "cancelled":
        fields["status"] = Message.Status.STOPPED
    else:
        failure = make_failure(event)
        fields |= {
            "status": Message.Status.FAILED,
            "error_code": failure.code.value,
            "error_message": failure.message[:500],
        }
    return bool(Message.objects.filter(job_id=event.job_id, conversation__deleted_at=None).update(**fields))


def sweep(client: Redis) -> int:
    """End pending answers whose job nobody knows: its process died before it was queued, or Redis was emptied.

    I/O: one SQL statement, one Redis trip, and one more statement for each. Returns how many were ended.
    """
    young = timezone.now() - timedelta(seconds=YOUNG_S)
    pending = Message.objects.filter(status=Message.Status.PENDING, created_at__lt=young)
    job_ids = [job_id for job_id in pending.values_list("job_id", flat=True)[:BATCH] if job_id]
    if not job_ids:
        return 0
    pipeline = client.pipeline(transaction=False)
    for job_id in job_ids:
        pipeline.hget(keys.job_record(job_id), "state")
    states = pipeline.execute()
    oldest = timezone.now() - timedelta(seconds=settings.ENV.request_deadline_s + YOUNG_S)
    ended = 0
    for job_id, state in zip(job_ids, states, strict=True):
        # one that is done has its end in the stream, and is written from there, unless the stream was lost
        if state is None or (state == b"done" and pending.filter(job_id=job_id, created_at__lt=oldest).exists()):
            message = "The answer was lost before it was finished, and is not charged. Send your message again."
            turns.fail(job_id, AiscaleError(Code.WORKER_LOST, message))
            ended += 1
    return ended


def _decode(entry: stream.Entry) -> Finished | None:
    """Read an entry of the chat. What cannot be read is settlement's to set aside."""
    try:
        event = decode_event(entry.data)
    except (msgspec.MsgspecError, ValueError):
        return None
    return event if isinstance(event, Finished) and event.billing.source == "chat" else None
