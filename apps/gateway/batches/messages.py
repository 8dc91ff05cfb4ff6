"""Answer ``/v1/messages/batches``: bulk jobs in Anthropic's dialect, with their requests in the body and one file of results."""

import re
from datetime import UTC, datetime
from typing import Any

import msgspec
from django.conf import settings
from django.db import transaction
from django.utils import timezone

from aiscale.errors import AiscaleError, Code
from apps.accounts.callers import Caller, on_thread
from apps.accounts.models import Organization
from apps.gateway import parameters
from apps.gateway.batches.answers import MESSAGES, WINDOW, cancel, check_open, get, select
from apps.gateway.exchange import Exchange
from apps.gateway.files import answers as files
from apps.gateway.files import keeping
from apps.gateway.messages import pages
from apps.gateway.messages.schema import check_version
from apps.gateway.models import Batch, BatchLine

MAX_REQUESTS = 50_000
INSERTED_AT_ONCE = 500
CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ENDED = (Batch.Status.COMPLETED, Batch.Status.EXPIRED, Batch.Status.CANCELLED, Batch.Status.FAILED)


class MessageBatchRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    custom_id: str
    params: dict[str, Any]


class MessageBatchBody(msgspec.Struct, kw_only=True):
    """What each request asks is looked at when it is run, and answered by itself."""

    requests: list[MessageBatchRequest]


async def answer_creation(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Accept a bulk job. Raises: AiscaleError."""
    check_version(exchange)
    wanted = parameters.convert(parameters.read_object(body), MessageBatchBody, harmless=frozenset(), defaults_only={})
    _check(wanted.requests)
    row = await on_thread(lambda: _create(caller, wanted.requests, exchange.request_id))
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


def _check(requests: list[MessageBatchRequest]) -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for requests that could not be told apart, or not be answered in a file."""
    if not 1 <= len(requests) <= MAX_REQUESTS:
        message = f"requests holds {len(requests)} entries; send 1 to {MAX_REQUESTS}."
        raise AiscaleError(Code.INVALID_REQUEST, message, param="requests")
    seen: set[str] = set()
    for index, request in enumerate(requests):
        place, what = f"requests[{index}].custom_id", ""
        if not CUSTOM_ID.fullmatch(request.custom_id):
            what = f"{place} must be 1 to 64 letters, digits, _ and -"
        elif request.custom_id in seen:
            what = f"{place} is {request.custom_id!r}, as that of a request before it"
        elif request.params.get("stream"):
            place = f"requests[{index}].params.stream"
            what = "A batch's requests cannot be streamed. Leave stream out"
        if what:
            raise AiscaleError(Code.INVALID_REQUEST, f"{what}.", param=place)
        seen.add(request.custom_id)


def _create(caller: Caller, requests: list[MessageBatchRequest], request_id: str) -> Batch:
    """Write a batch and its lines, named after its request: a try that died is repeated and makes no second one. Raises: AiscaleError."""
    batch_id, now = f"msgbatch_{request_id.removeprefix('req_')}", timezone.now()
    made = select(caller.organization_id, of_messages=True).filter(public_id=batch_id).first()
    if made is not None:
        return made
    check_open(caller.organization_id)
    with transaction.atomic():
        row: Batch = Batch.objects.create(
            public_id=batch_id,
            organization=Organization.objects.get(public_id=caller.organization_id),
            key_digest=caller.key_digest or "",
            endpoint=MESSAGES,
            status=Batch.Status.IN_PROGRESS,
            times={"in_progress_at": int(now.timestamp())},
            total_count=len(requests),
            expires_at=now + WINDOW,
        )
        lines = [
            BatchLine(
                batch=row,
                number=number,
                custom_id=request.custom_id,
                body=msgspec.json.encode(request.params).decode(),
            )
            for number, request in enumerate(requests, 1)
        ]
        BatchLine.objects.bulk_create(lines, batch_size=INSERTED_AT_ONCE)
    return row


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
