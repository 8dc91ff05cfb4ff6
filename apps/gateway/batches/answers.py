"""Answer ``/v1/batches``: create, find, list, cancel."""

from datetime import timedelta
from typing import Any, Literal

import msgspec
from django.db import transaction
from django.db.models import QuerySet
from django.utils import timezone

from aiscale import listing
from aiscale.errors import AiscaleError, Code
from apps.accounts.callers import Caller, on_thread
from apps.accounts.models import Organization
from apps.gateway import parameters
from apps.gateway.batches import usage
from apps.gateway.exchange import Exchange
from apps.gateway.files import keeping
from apps.gateway.models import Batch
from apps.gateway.responses.schema import check_metadata

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/moderations", "/v1/responses"]
WINDOW = timedelta(hours=24)
MAX_OPEN = 50
"""Batches that an organization may have open at a time."""

MESSAGES = "/v1/messages"
"""The endpoint of batches that came in Anthropic's dialect (`apps.gateway.batches.messages`): in OpenAI's they do not exist."""
WITHOUT_USAGE = frozenset({"/v1/moderations"})
"""Endpoints whose answers do not say what they used."""
DEFAULTS_ONLY: dict[str, tuple[Any, ...]] = {"output_expires_after": ()}


class BatchBody(msgspec.Struct, kw_only=True):
    """The parameters that are honoured."""

    input_file_id: str
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: dict[str, str] = {}


async def answer_creation(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Accept a bulk job. Its file is checked, and its lines are run, by a task. Raises: AiscaleError."""
    wanted = parameters.convert(
        parameters.read_object(body), BatchBody, harmless=frozenset(), defaults_only=DEFAULTS_ONLY
    )
    check_metadata(wanted.metadata)
    row = await on_thread(lambda: _create(caller, wanted, exchange.request_id))
    await exchange.send_json(200, describe(row))


async def answer_batch(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Describe one batch with its progress. Raises: AiscaleError (NOT_FOUND)."""
    batch_id = exchange.path_values["batch_id"]
    await exchange.send_json(200, describe(await on_thread(lambda: get(caller.organization_id, batch_id))))


async def answer_list(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """List batches, newest first. Raises: AiscaleError."""
    query = parameters.read_query(exchange.query_string, known=("limit", "after"))
    page = listing.read_page(query, most=100, default=20)
    rows = select(caller.organization_id)
    await exchange.send_json(200, await on_thread(lambda: listing.make_list(rows, page, describe)))


async def answer_cancellation(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Start no more lines; those that run come to their end, and what was answered is written. Raises: AiscaleError."""
    batch_id = exchange.path_values["batch_id"]
    await exchange.send_json(200, describe(await on_thread(lambda: cancel(caller.organization_id, batch_id))))


def select(organization_id: str, *, of_messages: bool = False) -> QuerySet[Batch]:
    """Return an organization's own batches: those of one dialect."""
    rows = Batch.objects.of(organization_id)
    return rows.filter(endpoint=MESSAGES) if of_messages else rows.exclude(endpoint=MESSAGES)


def get(organization_id: str, batch_id: str, *, of_messages: bool = False) -> Batch:
    """Return an organization's own batch. I/O: one SQL statement. Raises: AiscaleError (NOT_FOUND)."""
    found = select(organization_id, of_messages=of_messages).filter(public_id=batch_id).first()
    if found is None:
        raise AiscaleError(Code.NOT_FOUND, f"No batch has the id {batch_id[:60]!r}.", param="batch_id")
    return found


def _create(caller: Caller, wanted: BatchBody, request_id: str) -> Batch:
    """Write a batch, named after its request: a try that died is repeated and makes no second one. Raises: AiscaleError."""
    batch_id = f"{Batch.PUBLIC_ID_PREFIX}_{request_id.removeprefix('req_')}"
    made: Batch | None = Batch.objects.of(caller.organization_id).filter(public_id=batch_id).first()
    if made is not None:
        return made
    file = keeping.get(caller.organization_id, wanted.input_file_id, param="input_file_id")
    if file.purpose != "batch":
        message = f"The file {file.public_id} has the purpose {file.purpose}; upload one with the purpose batch."
        raise AiscaleError(Code.INVALID_REQUEST, message, param="input_file_id")
    check_open(caller.organization_id)
    now = timezone.now()
    return Batch.objects.create(
        public_id=batch_id,
        organization=Organization.objects.get(public_id=caller.organization_id),
        key_digest=caller.key_digest or "",
        endpoint=wanted.endpoint,
        input_file_id=file.public_id,
        metadata=wanted.metadata,
        **({} if wanted.endpoint in WITHOUT_USAGE else usage.NOTHING),
        expires_at=now + WINDOW,
    )


def check_open(organization_id: str) -> None:
    """Raise: AiscaleError (TOO_MANY_IN_FLIGHT) where no more batches may be opened for now. I/O: one SQL statement."""
    if Batch.objects.of(organization_id).filter(status__in=Batch.OPEN).count() >= MAX_OPEN:
        message = f"Your organization has {MAX_OPEN} open batches. Wait until one of them is done."
        raise AiscaleError(Code.TOO_MANY_IN_FLIGHT, message, retry_after_s=60)


def cancel(organization_id: str, batch_id: str, *, of_messages: bool = False) -> Batch:
    """Have no more lines started. I/O: SQL. Raises: AiscaleError (NOT_FOUND; INVALID_REQUEST for one that has ended)."""
    with transaction.atomic():
        get(organization_id, batch_id, of_messages=of_messages)
        row: Batch = Batch.objects.select_for_update().get(public_id=batch_id)
        if row.status in (Batch.Status.VALIDATING, Batch.Status.IN_PROGRESS):
            row.status, row.due_at = Batch.Status.CANCELLING, None
            row.times["cancelling_at"] = int(timezone.now().timestamp())
            row.save(update_fields=["status", "due_at", "times", "updated_at"])
        elif row.status not in (Batch.Status.CANCELLING, Batch.Status.CANCELLED):
            message = (
                f"The batch {batch_id} is {row.status}; only one that is validating or in progress can be cancelled."
            )
            raise AiscaleError(Code.INVALID_REQUEST, message, param="batch_id")
    return row


def describe(row: Batch) -> dict[str, Any]:
    """Return the object as callers see it."""
    times = (
        "in_progress_at",
        "finalizing_at",
        "completed_at",
        "failed_at",
        "expired_at",
        "cancelling_at",
        "cancelled_at",
    )
    return {
        "id": row.public_id,
        "object": "batch",
        "endpoint": row.endpoint,
        "errors": {"object": "list", "data": row.problems} if row.problems else None,
        "input_file_id": row.input_file_id,
        "completion_window": "24h",
        "status": row.status,
        "output_file_id": row.output_file_id or None,
        "error_file_id": row.error_file_id or None,
        "created_at": int(row.created_at.timestamp()),
        "expires_at": int(row.expires_at.timestamp()),
        **{name: row.times.get(name) for name in times},
        "request_counts": {
            "total": row.total_count,
            "completed": row.completed_count,
            "failed": row.failed_count,
        },
        "model": row.model or None,
        "usage": usage.describe(row),
        "metadata": row.metadata,
    }
