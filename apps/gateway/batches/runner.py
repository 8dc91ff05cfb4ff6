"""Go on with a batch: from its file to its lines, from its lines to their answers, from there to its files."""

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from functools import partial
from typing import Any

import msgspec
from django.core.exceptions import ObjectDoesNotExist
from django.db import DatabaseError, transaction
from django.utils import timezone

from aiscale.errors import AiscaleError
from apps.accounts import callers
from apps.accounts.callers import Caller, on_thread
from apps.gateway.batches import intake, leases, lines, outputs
from apps.gateway.batches.lines import Later
from apps.gateway.models import Batch, BatchLine

log = logging.getLogger(__name__)

MOST_AT_ONCE = 16
"""Lines of one batch that run together; at most half of what the plan lets run, so that interactive requests have room."""
SHORT_WAIT_S = 2.0
LONGEST_WAIT_S = 60.0
LOOK_EACH_S = 1.0

closing = threading.Event()
"""Set when this process is about to end: no more lines are started."""


async def advance(batch_id: str) -> None:
    """Work on a batch until it is done, must wait, or this process ends. Nothing happens while another one works on it.

    I/O: SQL, Redis, the storage. Raises: django.db.Error, OSError; the lease then runs out, and somebody goes on.
    """
    holder = secrets.token_hex(8)
    if not await on_thread(lambda: leases.take(batch_id, holder)):
        return
    batch = await on_thread(lambda: Batch.objects.select_related("organization").get(public_id=batch_id))
    keeper = leases.Keeper(batch_id, holder, batch.status)
    renewing, wait_s = asyncio.create_task(keeper.run()), 0.0
    try:
        wait_s = await _work(batch, keeper)
    except (ObjectDoesNotExist, DatabaseError):
        if await on_thread(lambda: Batch.objects.filter(public_id=batch_id).exists()):
            raise
        log.info("a batch's organization was closed under it", extra={"event": "batch.gone", "batch_id": batch_id})
    finally:
        renewing.cancel()
        await on_thread(lambda: leases.release(batch_id, holder, wait_s))


async def _work(batch: Batch, keeper: leases.Keeper) -> float:
    """Do what the batch's status asks for, step by step. Returns for how many seconds nothing can be done."""
    while not closing.is_set() and not keeper.lost.is_set():
        if batch.status == Batch.Status.VALIDATING:
            await on_thread(lambda: _validate(batch))
        elif batch.status in (Batch.Status.IN_PROGRESS, Batch.Status.CANCELLING):
            wait_s = await _Lines(batch, keeper).run()
            if wait_s is not None:
                return wait_s
        elif batch.status == Batch.Status.FINALIZING:
            await on_thread(lambda: outputs.write(batch))
        else:
            return 0.0
        await on_thread(lambda: batch.refresh_from_db(fields=_CHANGING))
        keeper.status = batch.status
    return 0.0


_CHANGING = ["status", "outcome", "times", "total_count", "output_file_id", "error_file_id"]


def _validate(batch: Batch) -> None:
    problems = intake.take_in(batch)
    now_s = int(timezone.now().timestamp())
    status = Batch.Status.FAILED if problems else Batch.Status.IN_PROGRESS
    Batch.objects.filter(pk=batch.pk, status=Batch.Status.VALIDATING).update(
        status=status,
        problems=problems,
        total_count=0 if problems else batch.total_count,
        model="" if problems else batch.model,
        times=batch.times | {f"{status.value}_at": now_s},
        updated_at=timezone.now(),
    )


class _Lines:
    """Run the lines of one batch, several at a time, in their order."""

    def __init__(self, batch: Batch, keeper: leases.Keeper) -> None:
        self._batch = batch
        self._keeper = keeper
        self._running: dict[asyncio.Task[None], int] = {}
        self._resume_at = 0.0
        self._pauses = 0

    async def run(self) -> float | None:
        """Run lines until none is left, and None; or until a limit asks for a long wait, and its seconds.

        Raises: django.db.Error, OSError.
        """
        try:
            while True:
                if self._must_stop():
                    await self._finish_running()
                    return 0.0
                ending = self._find_ending()
                if ending is None and time.monotonic() >= self._resume_at:
                    ending = await self._fill()
                if not self._running:
                    if ending is not None:
                        await on_thread(partial(_close, self._batch, ending))
                        return None
                    wait_s = self._resume_at - time.monotonic()
                    if wait_s > SHORT_WAIT_S:
                        return wait_s
                await self._wait()
        finally:
            for task in self._running:
                task.cancel()
            if self._running:
                await asyncio.wait(self._running, timeout=5)

    def _must_stop(self) -> bool:
        return closing.is_set() or self._keeper.lost.is_set()

    def _find_ending(self) -> Batch.Status | None:
        """Return what the batch comes to though lines may be left: it was cancelled, or its day is over."""
        if self._keeper.status == Batch.Status.CANCELLING or self._batch.status == Batch.Status.CANCELLING:
            return Batch.Status.CANCELLED
        return Batch.Status.EXPIRED if self._batch.expires_at <= timezone.now() else None

    async def _fill(self) -> Batch.Status | None:
        """Start lines while there is room. COMPLETED when none is left."""
        caller, most = await self._find_caller()
        room = most - len(self._running)
        if room <= 0:
            return None
        found = await on_thread(lambda: self._list_open(room))
        for line in found:
            line.batch = self._batch
            task = asyncio.create_task(lines.run(self._batch, line, caller))
            self._running[task] = line.number
        return None if self._running else Batch.Status.COMPLETED

    async def _find_caller(self) -> tuple[Caller, int]:
        """Return who asks, as of now. A key that no longer works is refused by the gate, line by line."""
        try:
            caller = await callers.get_by_digest(self._batch.key_digest)
            plan = await callers.get_plan(caller.plan)
            return msgspec.structs.replace(caller, lane="batch"), max(1, min(MOST_AT_ONCE, plan.max_in_flight // 2))
        except AiscaleError as error:
            if error.retry_after_s is not None:
                raise OSError(error.message) from error
            plan_slug = await on_thread(lambda: self._batch.organization.plan.slug)
            organization_id = self._batch.organization.public_id
            stranger = Caller(
                organization_id=organization_id,
                user_id=None,
                key_id=None,
                key_digest=self._batch.key_digest,
                plan=plan_slug,
                lane="batch",
            )
            return stranger, MOST_AT_ONCE

    def _list_open(self, count: int) -> list[BatchLine]:
        """List lines to start: first those that were running when somebody died, then the next ones."""
        mine = list(self._running.values())
        left = self._batch.lines.exclude(number__in=mine)
        found = list(left.filter(state=BatchLine.State.RUNNING).order_by("number")[:count])
        if len(found) < count:
            waiting = left.filter(state=BatchLine.State.WAITING).order_by("number")
            found += list(waiting[: count - len(found)])
        return found

    async def _wait(self) -> None:
        """Wait until a line has ended, or a moment. Raises: what a line raised, but for `Later`."""
        if not self._running:
            await asyncio.sleep(min(max(self._resume_at - time.monotonic(), 0.05), LOOK_EACH_S))
            return
        done, _ = await asyncio.wait(self._running, timeout=LOOK_EACH_S, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            del self._running[task]
            try:
                task.result()
                self._pauses = 0
            except Later as later:
                # a limit that says "later" again and again is asked less and less often
                self._pauses += 1
                pause_s = min(max(later.seconds, 0.2 * 2 ** min(self._pauses, 8)), LONGEST_WAIT_S)
                if later.seconds <= SHORT_WAIT_S:
                    pause_s = min(pause_s, SHORT_WAIT_S)
                self._resume_at = max(self._resume_at, time.monotonic() + pause_s)

    async def _finish_running(self) -> None:
        """Let what runs come to its end for a moment; what does not is found again by whoever goes on."""
        if self._running:
            await asyncio.wait(self._running, timeout=5)
            # abandoned, not cancelled: a job that goes on is paid for once, and its line asks for it again
            for task in list(self._running):
                if not task.done():
                    with contextlib.suppress(KeyError):
                        del self._running[task]
                    _abandoned.add(task)


_abandoned: set[asyncio.Task[Any]] = set()


def _close(batch: Batch, outcome: Batch.Status) -> None:
    """Say what the batch comes to once its files are written."""
    with transaction.atomic():
        row = Batch.objects.select_for_update().get(pk=batch.pk)
        if row.status in (Batch.Status.IN_PROGRESS, Batch.Status.CANCELLING):
            row.status, row.outcome = Batch.Status.FINALIZING, outcome
            row.times["finalizing_at"] = int(timezone.now().timestamp())
            row.save(update_fields=["status", "outcome", "times", "updated_at"])
