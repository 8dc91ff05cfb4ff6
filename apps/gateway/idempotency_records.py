"""Keep, for each Idempotency-Key of an organization, which request it stands for and what was answered."""

import zlib
from datetime import timedelta
from typing import Any, Literal

import msgspec
from django.db import transaction
from django.db.models.functions import Now
from django.utils import timezone

from apps.gateway.models import IdempotentRequest, StoredResponse
from apps.inference.lanes import name_job

KEPT = timedelta(hours=24)
LEASE = timedelta(seconds=15)
"""A try that has not renewed its lease for so long has died."""

Claim = Literal["new", "again", "other", "running", "done"]


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """Hold an answer as it was sent."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


def claim(
    organization_id: str, key: str, fingerprint: str, request_id: str, holder: str
) -> tuple[Claim, IdempotentRequest]:
    """Say what a key stands for, and take it when nobody works on it.

    ``new``: nothing yet; it stands for this request now. ``again``: its try has died; the row names the request to repeat. ``other``: for
    another request. ``running``: somebody works on it. ``done``: the row has the answer.
    I/O: one SQL transaction. The row's lock puts two that come at once one after the other.
    """
    values: dict[str, Any] = {
        "fingerprint": fingerprint,
        "request_id": request_id,
        "holder": holder,
        "lease_until": Now() + LEASE,
        "expires_at": Now() + KEPT,
    }
    with transaction.atomic():
        row, created = IdempotentRequest.objects.select_for_update().get_or_create(
            organization_id=organization_id, key=key, defaults=values
        )
        if created:
            return "new", row
        now = timezone.now()
        if row.expires_at <= now:
            row.delete()
            return "new", IdempotentRequest.objects.create(organization_id=organization_id, key=key, **values)
        if row.fingerprint != fingerprint:
            return "other", row
        if row.body is not None:
            return "done", row
        if row.lease_until > now:
            return "running", row
        row.holder, row.lease_until = holder, now + LEASE
        row.save(update_fields=["holder", "lease_until"])
        return "again", row


def renew(row: IdempotentRequest) -> bool:
    """Push the lease ahead. False when another try has taken over. I/O: one SQL statement."""
    return bool(_mine(row).update(lease_until=Now() + LEASE))


def rename(row: IdempotentRequest, request_id: str) -> None:
    """Let the key stand for a new try under another name; what the old one stored makes room for what this one will.

    I/O: two SQL statements.
    """
    StoredResponse.objects.of(row.organization_id).filter(job_id=name_job(row.request_id)).delete()
    row.request_id = request_id
    _mine(row).update(request_id=request_id)


def finish(row: IdempotentRequest, answer: Stored) -> bool:
    """Keep the answer. False when another try has taken over. I/O: one SQL statement."""
    body = zlib.compress(answer.body, 1)
    return bool(_mine(row).update(status=answer.status, headers=answer.headers, body=body, lease_until=Now()))


def drop(row: IdempotentRequest) -> None:
    """Let the key stand for nothing: there was no answer, and none was charged. I/O: one SQL statement."""
    _mine(row).delete()


def read(row: IdempotentRequest) -> Stored:
    """Return the answer of a row that is done."""
    assert row.body is not None and row.status is not None
    headers = [(str(name), str(value)) for name, value in row.headers]
    return Stored(status=row.status, headers=headers, body=zlib.decompress(bytes(row.body)))


def forget_expired() -> int:
    """Delete what has expired, a few at a time. Returns how many. I/O: SQL."""
    ids = IdempotentRequest.objects.filter(expires_at__lt=timezone.now()).values_list("pk", flat=True)[:500]
    deleted, _ = IdempotentRequest.objects.filter(pk__in=list(ids)).delete()
    return deleted


def _mine(row: IdempotentRequest) -> Any:
    return IdempotentRequest.objects.filter(pk=row.pk, holder=row.holder, body__isnull=True)
