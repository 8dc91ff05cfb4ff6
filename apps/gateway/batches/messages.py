"""Answer ``/v1/messages/batches``: bulk jobs in Anthropic's dialect, with their requests in the body and one file of results."""

from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

import msgspec
from django.conf import settings
from django.db import transaction
from django.utils import timezone

from aiscale.errors import AiscaleError, Code
from apps.accounts.callers import Caller, on_thread
from apps.accounts.models import Organization
from apps.gateway import idempotency, parameters
from apps.gateway.batches.answers import MESSAGES, WINDOW, cancel, check_open, get, select
from apps.gateway.batches.requests import Requests, read_requests
from apps.gateway.exchange import Exchange
from apps.gateway.files import answers as files
from apps.gateway.files import keeping
from apps.gateway.messages import pages
from apps.gateway.messages.schema import check_version
from apps.gateway.models import Batch, BatchLine

INSERTED_AT_ONCE, INSERTED_BYTES = 500, 8 << 20
_ENDED = (Batch.Status.COMPLETED, Batch.Status.EXPIRED, Batch.Status.CANCELLED, Batch.Status.FAILED)


async def answer_creation(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Accept a bulk job; once for an Idempotency-Key. Raises: AiscaleError."""
    check_version(exchange)
    requests = await read_requests(exchange)
    try:
        key, work = exchange.find_header(idempotency.HEADER), partial(_store, exchange, caller, requests)
        if key is None:
            await work()
        else:
            await idempotency.answer(exchange, caller, key, requests.fingerprint, work)
    finally:
        requests.close()


async def _store(exchange: Exchange, caller: Caller, requests: Requests) -> None:
    row = await on_thread(lambda: _create(caller, requests, exchange.request_id))
    await exchange.send_json(200, describe(row))


async def answer_batch(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Describe one batch. Raises: AiscaleError (NOT_FOUND)."""
    await exchange.send_json(200, describe(await _get(exchange, caller)))


async def answer_list(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """List batches, newest first. Raises: AiscaleError."""
    served = parameters.QUERIES_OF_CLIENTS
    page = pages.read_page(parameters.read_query(exchange.query_string, known=pages.PARAMETERS, defaults_only=served))
    rows = select(caller.organization_id, of_messages=True)
    await exchange.send_json(200, await on_thread(lambda: pages.make_list(rows, page, describe)))


async def answer_cancellation(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Start no more requests; those that run come to their end. Raises: AiscaleError."""
    batch_id = exchange.path_values["message_batch_id"]
    row = await on_thread(lambda: cancel(caller.organization_id, batch_id, of_messages=True))
    await exchange.send_json(200, describe(row))


async def answer_results(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Send what came of each request, a line of JSON each. Raises: AiscaleError (NOT_FOUND; INVALID_REQUEST before the end)."""
    row = await _get(exchange, caller)
    if row.status not in _ENDED:
        message = f"The batch {row.public_id} has not ended; its results come when its processing_status is ended."
        raise AiscaleError(Code.INVALID_REQUEST, message, param="message_batch_id")
    file = await on_thread(lambda: keeping.get(caller.organization_id, row.output_file_id, param="message_batch_id"))
    await files.send_file(exchange, file)


async def answer_deletion(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Delete a batch that has ended, with its results. Raises: AiscaleError (NOT_FOUND, INVALID_REQUEST)."""
    row = await _get(exchange, caller)
    if row.status not in _ENDED:
        message = f"The batch {row.public_id} has not ended. Cancel it first."
        raise AiscaleError(Code.INVALID_REQUEST, message, param="message_batch_id")
    await on_thread(lambda: _delete(row))
    await exchange.send_json(200, {"id": row.public_id, "type": "message_batch_deleted"})


async def _get(exchange: Exchange, caller: Caller) -> Batch:
    batch_id = exchange.path_values["message_batch_id"]
    return await on_thread(lambda: get(caller.organization_id, batch_id, of_messages=True))


def _create(caller: Caller, requests: Requests, request_id: str) -> Batch:
    """Write a batch and its lines, named after its request: a try that died is repeated and makes no second one. Raises: AiscaleError."""
    batch_id, now = f"msgbatch_{request_id.removeprefix('req_')}", timezone.now()
    made = select(caller.organization_id, of_messages=True).filter(public_id=batch_id).first()
    if made is not None:
        return made
    check_open(caller.organization_id)
    with transaction.atomic():
        keeping.check_room(caller.organization_id, requests.size_bytes, "requests")
        row: Batch = Batch.objects.create(
            public_id=batch_id,
            organization=Organization.objects.get(public_id=caller.organization_id),
            key_digest=caller.key_digest or "",
            endpoint=MESSAGES,
            status=Batch.Status.IN_PROGRESS,
            times={"in_progress_at": int(now.timestamp())},
            total_count=requests.count,
            size_bytes=requests.size_bytes,
            expires_at=now + WINDOW,
        )
        for lines in _make_lines(row, requests):
            BatchLine.objects.bulk_create(lines)
    return row


def _make_lines(batch: Batch, requests: Requests) -> Iterator[list[BatchLine]]:
    """Yield a batch's lines, as many as are written at once."""
    lines, size_bytes = list[BatchLine](), 0
    for number, request in enumerate(requests, 1):
        body = msgspec.json.encode(request.params).decode()
        lines.append(BatchLine(batch=batch, number=number, custom_id=request.custom_id, body=body))
        size_bytes += len(body)
        if len(lines) >= INSERTED_AT_ONCE or size_bytes >= INSERTED_BYTES:
            yield lines
            lines, size_bytes = [], 0
    yield lines


def _delete(row: Batch) -> None:
    """I/O: SQL, the storage. A file that is gone already is no matter."""
    try:
        file = keeping.get(row.organization.public_id, row.output_file_id)
    except AiscaleError:
        file = None
    if file is not None:
        keeping.delete(file)
    row.delete()


def describe(row: Batch) -> dict[str, Any]:
    """Return the object as callers see it. Requests count as processing until the batch has ended."""
    ended = row.status in _ENDED
    cancels = Batch.Status.CANCELLING in (row.status, row.outcome) or row.outcome == Batch.Status.CANCELLED
    left = row.total_count - row.completed_count - row.failed_count
    cancelled_at, ended_at = row.times.get("cancelling_at"), row.times.get(f"{row.status}_at") if ended else None
    return {
        "id": row.public_id,
        "type": "message_batch",
        "processing_status": "ended" if ended else "canceling" if cancels else "in_progress",
        "request_counts": {
            "processing": 0 if ended else row.total_count,
            "succeeded": row.completed_count if ended else 0,
            "errored": row.failed_count if ended else 0,
            "canceled": left if row.status == Batch.Status.CANCELLED else 0,
            "expired": left if row.status == Batch.Status.EXPIRED else 0,
        },
        "created_at": _write_time(row.created_at.timestamp()),
        "expires_at": _write_time(row.expires_at.timestamp()),
        "cancel_initiated_at": _write_time(cancelled_at),
        "ended_at": _write_time(ended_at),
        "archived_at": None,
        "results_url": f"{settings.PUBLIC_URL}{MESSAGES}/batches/{row.public_id}/results" if ended else None,
    }


def describe_result(batch: Batch, line: BatchLine) -> dict[str, Any]:
    """Return what came of one request, as the file of results has it."""
    if line.state != BatchLine.State.DONE:
        kind = "expired" if batch.outcome == Batch.Status.EXPIRED else "canceled"
        return {"custom_id": line.custom_id, "result": {"type": kind}}
    answer = msgspec.Raw(line.answer.encode())
    if line.status_code == 200:
        return {"custom_id": line.custom_id, "result": {"type": "succeeded", "message": answer}}
    return {"custom_id": line.custom_id, "result": {"type": "errored", "error": answer}}


def _write_time(epoch_s: float | None) -> str | None:
    return None if epoch_s is None else f"{datetime.fromtimestamp(epoch_s, UTC):%Y-%m-%dT%H:%M:%SZ}"
