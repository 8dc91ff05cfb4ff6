"""Answer one line of a batch as if it had been sent, and remember how, once."""

import logging
from typing import Any

import msgspec
from django.conf import settings
from django.db import transaction
from django.db.models import F

from aiscale.errors import AiscaleError, Code
from aiscale.redis import UNAVAILABLE, unavailable
from apps.accounts.callers import Caller, on_thread
from apps.gateway.batches import usage
from apps.gateway.endpoints import ROUTER
from apps.gateway.exchange import Exchange
from apps.gateway.models import Batch, BatchLine
from apps.inference import replays
from apps.inference.lanes import name_job
from apps.spend import refusal_log

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 5
"""Tries of a line that fails by our own fault."""
OUR_FAULT = frozenset({Code.WORKER_LOST, Code.ENGINE_FAILED, Code.DEADLINE_EXCEEDED})

UNTIL_LIFTED = frozenset({Code.KILLED, Code.ACCOUNT_INACTIVE})
"""What an administrator stopped and may let go on, while the batch's day lasts."""


class Later(Exception):
    """A limit says that this line must wait for ``seconds``."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Captured(Exchange):
    """Take an endpoint's answer instead of sending it."""

    def __init__(self, path: str, request_id: str) -> None:
        super().__init__({"method": "POST", "path": path, "headers": []}, _receive_nothing, _send_nothing)
        self.request_id = request_id
        self.status = 0
        self.value: Any = None

    async def send_json(self, status: int, value: Any, headers: Any = None) -> None:
        self.started, self.status, self.value = True, status, value


async def _receive_nothing() -> dict[str, Any]:
    return {"type": "http.disconnect"}


async def _send_nothing(message: dict[str, Any]) -> None:
    raise AssertionError("a line of a batch is not streamed")


async def run(batch: Batch, line: BatchLine, caller: Caller) -> None:
    """Answer a line and write the answer down; again after a crash without charging it twice.

    I/O: SQL, and what the request itself costs. Raises: Later; django.db.Error.
    """
    if line.state == BatchLine.State.RUNNING:
        await _look_back(line)
    else:
        line.attempt = max(line.attempt, 1)
    line.state = BatchLine.State.RUNNING
    # written before it runs: from here on its job can be found by its name
    await on_thread(lambda: line.save(update_fields=["state", "attempt"]))
    request_id = name_request(batch, line)
    captured = Captured(batch.endpoint, request_id)
    routes, _ = ROUTER.find(batch.endpoint)
    try:
        await routes["POST"].answer(captured, caller, line.body.encode())
    except AiscaleError as error:
        await _take_refusal(line, error, captured, caller)
    except UNAVAILABLE:
        await _wait(line, unavailable())
    except Exception:
        log.exception("a line of a batch failed", extra={"request_id": request_id})
        captured.status, captured.value = 500, captured.dialect.word_bug(request_id)
    await on_thread(lambda: _store(line, captured))


def name_request(batch: Batch, line: BatchLine) -> str:
    """Return the id of a line's request at its present try; always alike, so that it can be found again."""
    return f"req_{batch.public_id.partition('_')[2]}_{line.number}_{line.attempt}"


async def _look_back(line: BatchLine) -> None:
    """See what became of the try that was running when its process died."""
    job_id = name_job(name_request(line.batch, line))
    try:
        outcome = await replays.await_outcome(job_id, settings.ENV.request_deadline_s + 30.0)
    except AiscaleError as error:
        raise Later(error.retry_after_s or 5.0) from error
    except UNAVAILABLE as error:
        raise Later(5.0) from error
    if outcome == "free":
        line.attempt += 1


async def _take_refusal(line: BatchLine, error: AiscaleError, captured: Captured, caller: Caller) -> None:
    """Keep a refusal as the line's answer. Raises: Later, when it is to be tried again."""
    if error.code in OUR_FAULT and line.attempt < MAX_ATTEMPTS:
        line.attempt += 1
        await _wait(line, error)
    if error.retry_after_s is not None or error.code in UNTIL_LIFTED:
        await _wait(line, error)
    refusal_log.note(captured.request_id, error, source="batch", caller=caller)
    captured.status = captured.dialect.status_of(error)
    captured.value = captured.dialect.word(error, captured.request_id)


async def _wait(line: BatchLine, error: AiscaleError) -> None:
    line.state = BatchLine.State.WAITING
    await on_thread(lambda: line.save(update_fields=["state", "attempt"]))
    raise Later(error.retry_after_s or 5.0)


def _store(line: BatchLine, captured: Captured) -> None:
    """Write the answer and count it, together and once. I/O: one SQL transaction."""
    answer = msgspec.json.encode(captured.value).decode()
    counted = "completed_count" if captured.status == 200 else "failed_count"
    used = usage.read(captured.value) if captured.status == 200 else {}
    with transaction.atomic():
        stored = BatchLine.objects.filter(pk=line.pk, state=BatchLine.State.RUNNING, attempt=line.attempt).update(
            state=BatchLine.State.DONE, status_code=captured.status, answer=answer
        )
        if stored:
            # what is null, and so not counted, stays null
            counts = {name: F(name) + number for name, number in ({counted: 1} | used).items()}
            Batch.objects.filter(pk=line.batch_id).update(**counts)
