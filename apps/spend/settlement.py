"""Charge finished jobs: from the stream of last events into the ledger, and from hold to spent, once for each job.

The order is what makes it safe at any crash. Usage record, ledger entries and the totals of budgets are committed together; after that
one script ends the holds, writes the totals into the fast copies and acknowledges the events (lua/settle.lua). So:

- died before the commit: the event is pending, nothing is written; it is read again.
- died after the commit: the event is pending; read again, its record exists already (unique by job id) and is not charged again. The
  hold counts until then, so at no moment is there too much room.
- a client that lost Redis's answer and asked again: totals are written as they are, not added, and the newer one wins.

Any number of processes may run this at once.
"""

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
from django.db import DatabaseError, DataError, IntegrityError, InterfaceError, connection
from redis import Redis
from redis.exceptions import ResponseError

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError
from aiscale.observability import CACHE_SAVED, JOBS_FINISHED, SETTLED, SETTLEMENT_LAG_SECONDS, TOKENS
from aiscale.wire import keys
from aiscale.wire.codec import decode_event
from aiscale.wire.events import Finished
from apps.accounts.keys import note_uses
from apps.spend import balance, budgets, holds, periods, receipts, recovery, stream, totals, usage

log = logging.getLogger(__name__)

BATCH_EVENTS = 500
BLOCK_MS = 500
CLAIM_IDLE_MS = 5_000
"""An entry that a consumer has not acknowledged for so long belongs to one that died."""
UNDECIDED_BLOCK_MS = 50
CLAIM_EACH_S = 2.0
CHORES_EACH_S = 5.0
CHANGED_WITHIN_S = 60
"""Totals that moved so recently are written into the copies again, with the chores."""
PRESENCE_EACH_S = 1.0
PRESENCE_TTL_S = 5
END_DETAIL_CHARS = 300
BACK_OFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Delivery(NamedTuple):
    """Pair an event with its entry in the stream (its id is '' for one that came another way)."""

    entry: stream.Entry
    event: Finished


class BadEvent(ValueError):
    """The entry cannot be charged, however often it is tried."""


def run(stop: threading.Event) -> None:
    """Settle until ``stop`` is set. Outlives restarts of Redis and Postgres: it backs off, and loses nothing.

    I/O: blocks on Redis for half a second at a time.
    """
    settler = Settler(redis_clients.get_sync())
    failures = 0
    log.info("settlement started", extra={"event": "settlement.start"})
    while not stop.is_set():
        try:
            stream.gather(stop, settler.turn(BLOCK_MS), BATCH_EVENTS)
            failures = 0
        except (*redis_clients.UNAVAILABLE, DatabaseError, InterfaceError) as error:
            pause_s = BACK_OFF_S[min(failures, len(BACK_OFF_S) - 1)]
            failures += 1
            log.error("settlement waits %.1f s: %s", pause_s, error, extra={"event": "settlement.wait"})
            settler.start_over()
            stop.wait(pause_s)
    connection.close()
    log.info("settlement stopped", extra={"event": "settlement.stop"})


def settle(event: Finished) -> bool:
    """Charge one job outside the stream. True when it was charged now, False when it had been.

    I/O: one SQL transaction, one SQL statement, one Redis trip. Idempotent. Raises: BadEvent; django.db.Error; RedisError.
    """
    fresh = _charge(redis_clients.get_sync(), [Delivery(stream.Entry("", b""), normalize(event, periods.now_ms()))])
    return bool(fresh)


def normalize(event: Finished, now_ms: int) -> Finished:
    """Check what the database would refuse, and bound the event's time by admission and by now, and its cached tokens by its prompt.

    A worker whose clock is wrong must not move a cost into another month. Raises: BadEvent.
    """
    event = msgspec.structs.replace(
        event,
        cached_tokens=min(max(event.cached_tokens, 0), max(event.prompt_tokens, 0)),
        error_message=(event.error_message or "").replace("\0", "")[:END_DETAIL_CHARS],
    )
    if not event.job_id or not event.billing.organization_id:
        raise BadEvent("it names no job or no payer")
    if "\0" in "".join(value for value in _texts(event)):
        raise BadEvent("a name in it holds a NUL character")
    try:
        usage.cost_of(event)
    except AiscaleError as error:
        raise BadEvent("its tokens or prices are negative, or beyond counting") from error
    if event.billing.admitted_at_ms < 0:
        raise BadEvent("it was admitted at a negative time")
    admitted_at_ms = min(event.billing.admitted_at_ms, now_ms)
    return msgspec.structs.replace(
        event,
        billing=msgspec.structs.replace(event.billing, admitted_at_ms=admitted_at_ms),
        finished_at_ms=min(max(event.finished_at_ms, admitted_at_ms), now_ms),
        text=None,
    )


class Settler:
    """Be one consumer of the stream. Not for use by several threads."""

    def __init__(self, client: Redis) -> None:
        self.client = client
        self.consumer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._next_claim = self._next_chores = self._next_presence = 0.0
        self._has_groups = False
        self._reads_own_pending = True
        self._uses: dict[str, int] = {}
        """When keys were used last (epoch ms), until the chores write it down. Lost with the process: the next use says it again."""
        self._undecided: list[stream.Entry] = []
        """Whether these were delivered is not known yet; they are pending in the stream."""

    def start_over(self) -> None:
        """Forget what is known of both servers, after one of them failed; entries in hand are read again first."""
        self._has_groups = False
        self._reads_own_pending = True
        self._undecided = []
        try:
            connection.close()
        except (DatabaseError, InterfaceError):
            log.debug("the broken connection could not be closed", exc_info=True)

    def turn(self, block_ms: int) -> int:
        """Do one round: read what is due, settle it, and the chores whose time has come. Returns the entries settled.

        I/O: Redis and Postgres. Raises: RedisError, OSError, django.db.Error; what was read is then still pending.
        """
        if not self._has_groups:
            stream.ensure_groups(self.client)
            self._has_groups = True
        entries = self._read(min(block_ms, UNDECIDED_BLOCK_MS) if self._undecided else block_ms)
        is_open = recovery.is_open(self.client)
        has_waited = is_open or recovery.has_waited(self.client)
        judged = receipts.judge(self.client, [*self._undecided, *entries], has_waited=has_waited)
        self._undecided = judged.undecided
        self.settle_entries(judged.delivered, judged.lost)
        if not (is_open or entries or self._undecided):
            recovery.try_open(self.client)
        now = time.monotonic()
        if now >= self._next_presence:
            # written only by a round that came through: a settlement that cannot settle is not there
            self.client.set(keys.SETTLEMENT_PRESENCE, periods.now_ms(), ex=PRESENCE_TTL_S)
            self._next_presence = now + PRESENCE_EACH_S
        if now >= self._next_chores:
            stream.trim(self.client)
            stream.forget_consumers(self.client)
            recovery.renew_after_restart(self.client)
            balance.restore(only_if_changed=True)
            # what somebody committed and could not tell Redis, or a Redis that restarted has forgotten
            holds.push(totals.list_changed(CHANGED_WITHIN_S, periods.now_ms()))
            self._note_uses()
            self._next_chores = now + CHORES_EACH_S
        return len(entries)

    def settle_entries(self, entries: Sequence[stream.Entry], lost: Sequence[stream.Entry] = ()) -> None:
        """Charge a batch, one SQL transaction; ``lost`` answers reached nobody and cost nothing. Entries that can never be charged go to
        `keys.FINISHED_DEAD`.

        Raises: RedisError, OSError, django.db.Error.
        """
        deliveries = [found for entry in entries if (found := self._decode(entry))]
        deliveries += [
            Delivery(entry, receipts.make_lost(found.event)) for entry in lost if (found := self._decode(entry))
        ]
        if not deliveries:
            return
        for each in deliveries:
            key_id, at_ms = each.event.billing.key_id, each.event.finished_at_ms
            if key_id:
                self._uses[key_id] = max(at_ms, self._uses.get(key_id, 0))
        try:
            _charge(self.client, deliveries)
        except (DataError, IntegrityError):
            # one of them is to blame: each for itself, so that the rest is not kept waiting
            for each in deliveries:
                self._charge_or_bury(each)

    def _note_uses(self) -> None:
        uses = {key_id: periods.to_datetime(at_ms) for key_id, at_ms in self._uses.items()}
        if uses:
            note_uses(uses)
        self._uses.clear()

    def _charge_or_bury(self, each: Delivery) -> None:
        try:
            _charge(self.client, [each])
        except (DataError, IntegrityError) as error:
            self._bury(each.entry, error)

    def _read(self, block_ms: int) -> list[stream.Entry]:
        now = time.monotonic()
        if now >= self._next_claim:
            self._next_claim = now + CLAIM_EACH_S
            claimed = stream.claim(self.client, self.consumer, idle_ms=CLAIM_IDLE_MS, count=BATCH_EVENTS)
            if claimed:
                return claimed
        try:
            if self._reads_own_pending:
                entries = stream.read(self.client, self.consumer, "0", count=BATCH_EVENTS)
                self._reads_own_pending = bool(entries)
                if entries:
                    return entries
            entries = stream.read(self.client, self.consumer, ">", count=BATCH_EVENTS, block_ms=block_ms)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            # somebody emptied Redis
            self._has_groups = False
            return []
        SETTLEMENT_LAG_SECONDS.set(stream.age_s(entries[0]) if entries else 0.0)
        return entries

    def _decode(self, entry: stream.Entry) -> Delivery | None:
        try:
            event = decode_event(entry.data)
            if not isinstance(event, Finished):
                raise BadEvent(f"it is a {type(event).__name__}, not a Finished")
            return Delivery(entry, normalize(event, periods.now_ms()))
        except (msgspec.DecodeError, BadEvent, ValueError, OverflowError) as error:
            self._bury(entry, error)
            return None

    def _bury(self, entry: stream.Entry, error: Exception) -> None:
        stream.bury(self.client, entry, f"{type(error).__name__}: {error}")
        SETTLED.labels("dead").inc()


def _charge(client: Redis, deliveries: Sequence[Delivery]) -> set[str]:
    """Write what the jobs cost, then end their holds and acknowledge them. Returns the job ids that were charged now."""
    fresh = usage.record(delivery.event for delivery in deliveries)
    by_job = {delivery.event.job_id: _make_end(delivery.event) for delivery in deliveries}
    scopes = {scope for end in by_job.values() for scope in end.scopes}
    # read after the commit, for those that were charged before too: the process that did it may have died before it told Redis
    spent = totals.read(scopes, periods.now_ms())
    entry_ids = [delivery.entry.entry_id for delivery in deliveries if delivery.entry.entry_id]
    holds.settle(client, list(by_job.values()), spent, entry_ids)
    _count_all(deliveries, fresh)
    return fresh


def _make_end(event: Finished) -> holds.End:
    used_tokens = 0 if event.finish_reason == "error" else event.prompt_tokens + event.completion_tokens
    return holds.End(
        job_id=event.job_id,
        hold_nanousd=event.billing.hold_nanousd,
        scopes=budgets.list_scopes_of(event.billing, event.model),
        unused_tokens=max(event.billing.hold_tokens - used_tokens, 0),
        admitted_at_ms=event.billing.admitted_at_ms,
    )


def _texts(event: Finished) -> Iterable[str]:
    billing = event.billing
    return (
        event.job_id,
        event.model,
        event.model_version,
        event.worker_id,
        event.error_code or "",
        billing.organization_id,
        billing.user_id or "",
        billing.key_id or "",
        billing.plan,
        billing.request_id,
        billing.price_id,
    )


def _count_all(deliveries: Sequence[Delivery], fresh: set[str]) -> None:
    counted: set[str] = set()
    for delivery in deliveries:
        job_id = delivery.event.job_id
        _count(delivery.event, fresh=job_id in fresh and job_id not in counted)
        counted.add(job_id)


def _count(event: Finished, *, fresh: bool) -> None:
    SETTLED.labels("charged" if fresh else "replay").inc()
    if fresh:
        JOBS_FINISHED.labels(event.model, event.finish_reason).inc()
        TOKENS.labels(event.model, "prompt").inc(event.prompt_tokens)
        TOKENS.labels(event.model, "completion").inc(event.completion_tokens)
        extra = {"job_id": event.job_id, "organization_id": event.billing.organization_id, "model": event.model}
        if saved_nanousd := usage.saved_of(event):
            CACHE_SAVED.labels(event.billing.organization_id).inc(saved_nanousd)
        if usage.cost_of(event) > event.billing.hold_nanousd:
            log.error("a job cost more than was held for it", extra=extra)
