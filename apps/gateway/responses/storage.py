"""Write responses down, and read what a conversation said before."""

from datetime import timedelta
from typing import Any

from django.db import IntegrityError, connection, transaction
from django.utils import timezone

from aiscale.errors import AiscaleError, Code
from apps.accounts.callers import on_thread
from apps.accounts.models import Organization
from apps.gateway.models import StoredResponse
from apps.gateway.responses import items
from apps.gateway.responses.items import recall, recall_output
from apps.inference.prompts import ChatMessage

KEPT = timedelta(days=30)
MAX_TURNS = 500
"""The most responses that one may go on from, each from the one before it."""

_CHAIN = """
WITH RECURSIVE chain AS (
    SELECT r.id, r.previous_id, r.organization_id, 1 AS depth FROM gateway_storedresponse r
    JOIN accounts_organization o ON o.id = r.organization_id
    WHERE r.public_id = %s AND o.public_id = %s AND r.expires_at > now()
    UNION ALL
    SELECT r.id, r.previous_id, r.organization_id, chain.depth + 1 FROM gateway_storedresponse r
    JOIN chain ON r.public_id = chain.previous_id AND r.organization_id = chain.organization_id
    WHERE chain.depth < %s AND r.expires_at > now()
)
SELECT r.input_items, r.response, r.previous_id, r.status FROM chain JOIN gateway_storedresponse r ON r.id = chain.id
ORDER BY chain.depth DESC
"""


def read_conversation(organization_id: str, response_id: str) -> list[ChatMessage]:
    """Return what was said up to and with a response, oldest first.

    I/O: one SQL statement. Raises: AiscaleError (NOT_FOUND) for a response that is not there, or one before it that is not;
    INVALID_REQUEST for one that has no answer to go on from.
    """
    with connection.cursor() as cursor:
        cursor.execute(_CHAIN, [response_id, organization_id, MAX_TURNS])
        rows = cursor.fetchall()
    if not rows or rows[0][2]:
        raise AiscaleError(
            Code.NOT_FOUND,
            f"The response {response_id[:60]!r}, or one that it goes on from, does not exist. It was deleted, not stored, or has expired.",
            param="previous_response_id",
        )
    if rows[-1][3] not in (StoredResponse.Status.COMPLETED, StoredResponse.Status.INCOMPLETE):
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"The response {response_id[:60]!r} is {rows[-1][3]}; only one with an answer can be gone on from.",
            param="previous_response_id",
        )
    messages: list[ChatMessage] = []
    for said, response, _, _ in rows:
        said, response = _parse(said), _parse(response)
        messages += [recall(item) for item in said]
        messages += recall_output(response["output"])
    return messages


def create(
    organization_id: str, head: dict[str, Any], job_id: str, messages: list[ChatMessage], previous_id: str
) -> None:
    """Write a response down before anything of it is sent. One of an earlier try, whose process died, makes room for it.

    I/O: two SQL statements; three more after an earlier try.
    """
    row = StoredResponse(
        public_id=head["id"],
        organization=Organization.objects.get(public_id=organization_id),
        status=StoredResponse.Status.IN_PROGRESS,
        job_id=job_id,
        previous_id=previous_id,
        input_items=[items.keep(message) for message in messages],
        response=head,
        is_background=head["background"],
        expires_at=timezone.now() + KEPT,
    )
    try:
        with transaction.atomic():
            row.save(force_insert=True)
    except IntegrityError:
        with transaction.atomic():
            StoredResponse.objects.filter(organization=row.organization, job_id=job_id).delete()
            row.save(force_insert=True)


def finish(response: dict[str, Any]) -> bool:
    """Write down how a response ended, once. False when it had ended, or was deleted. I/O: one SQL statement."""
    changed = StoredResponse.objects.filter(public_id=response["id"], status=StoredResponse.Status.IN_PROGRESS).update(
        status=response["status"], response=response, updated_at=timezone.now()
    )
    return bool(changed)


async def keep(response: dict[str, Any]) -> None:
    """Write down how a response ended, if it is to be stored. I/O: one SQL statement."""
    if response["store"]:
        await on_thread(lambda: finish(response))


def get(organization_id: str, response_id: str) -> StoredResponse:
    """Return an organization's own response. I/O: one SQL statement. Raises: AiscaleError (NOT_FOUND)."""
    found = StoredResponse.objects.of(organization_id).filter(public_id=response_id).first()
    if found is None or found.is_expired:
        raise AiscaleError(Code.NOT_FOUND, f"The response {response_id[:60]!r} does not exist.", param="response_id")
    return found  # type: ignore[no-any-return]


def _parse(value: Any) -> Any:
    """Read JSON that a raw statement gave as text."""
    import json

    return json.loads(value) if isinstance(value, str) else value
