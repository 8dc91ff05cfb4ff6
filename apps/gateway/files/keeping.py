"""Store files, open them and delete them, within an organization's quota."""

import hashlib
from datetime import timedelta
from typing import IO, Any

from django.conf import settings
from django.core.files import File
from django.core.files.storage import Storage, storages
from django.db import connection, transaction
from django.db.models import Sum
from django.utils import timezone

from aiscale.db import make_public_id
from aiscale.errors import AiscaleError, Code
from apps.accounts.models import Organization
from apps.gateway.models import Batch, StoredFile

MAX_FILES = 10_000
"""Of one organization."""


def get_storage() -> Storage:
    return storages["files"]


def keep(
    organization_id: str,
    data: IO[bytes],
    *,
    filename: str,
    purpose: str,
    size_bytes: int,
    file_id: str | None = None,
    lifetime: timedelta | None = None,
    within_quota: bool = True,
) -> StoredFile:
    """Store a file. With a ``file_id`` that is known already, what is stored under it is replaced. What we owe, such as the answers
    of a batch, is kept though the quota be full: ``within_quota`` False.

    I/O: two SQL transactions, the storage. Raises: AiscaleError (STORAGE_FULL); what the storage raises.
    """
    file_id = file_id or make_public_id(StoredFile.PUBLIC_ID_PREFIX)
    row = _reserve(organization_id, file_id, filename, purpose, size_bytes, lifetime, within_quota)
    storage = get_storage()
    storage.delete(row.storage_name)
    written = storage.save(row.storage_name, File(data))
    row.storage_name, row.state = written, StoredFile.State.READY
    row.save(update_fields=["storage_name", "state", "updated_at"])
    return row


def _reserve(
    organization_id: str,
    file_id: str,
    filename: str,
    purpose: str,
    size_bytes: int,
    lifetime: timedelta | None,
    within_quota: bool,
) -> StoredFile:
    """Write the row of a file to come, if the quota has room for it. Raises: AiscaleError (STORAGE_FULL)."""
    with transaction.atomic():
        if within_quota:
            check_room(organization_id, size_bytes, "file", replaces=file_id)
        values: dict[str, Any] = {
            "organization": Organization.objects.get(public_id=organization_id),
            "state": StoredFile.State.UPLOADING,
            "purpose": purpose,
            "filename": filename,
            "size_bytes": size_bytes,
            "storage_name": f"{organization_id}/{file_id}",
            "expires_at": timezone.now() + lifetime if lifetime else None,
        }
        row, _ = StoredFile.objects.update_or_create(public_id=file_id, defaults=values)
        return row


def check_room(organization_id: str, size_bytes: int, param: str, replaces: str = "") -> None:
    """See that an organization may store so much more; the requests of its open batches of messages count, too.

    Until the end of the transaction that it is called in, nobody else of the organization stores anything.
    I/O: four SQL statements. Raises: AiscaleError (STORAGE_FULL).
    """
    _lock(organization_id)
    kept = StoredFile.objects.of(organization_id).exclude(public_id=replaces)
    waiting = Batch.objects.of(organization_id).filter(status__in=Batch.OPEN)
    used, count = (rows.aggregate(total=Sum("size_bytes"))["total"] or 0 for rows in (kept, waiting)), kept.count()
    used_bytes, quota = sum(used), settings.ENV.files_quota_bytes
    if used_bytes + size_bytes > quota or count >= MAX_FILES:
        raise AiscaleError(
            Code.STORAGE_FULL,
            f"Your organization's files take {used_bytes} bytes in {count} files; {size_bytes} more would pass the "
            f"limit of {quota} bytes and {MAX_FILES} files. Delete some that you no longer need.",
            param=param,
        )


def _lock(organization_id: str) -> None:
    """Let one upload of an organization at a time count its files. Until the transaction's end."""
    number = int.from_bytes(hashlib.sha256(f"files:{organization_id}".encode()).digest()[:8], "big", signed=True)
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [number])


def get(organization_id: str, file_id: str, param: str = "file_id") -> StoredFile:
    """Return an organization's own file. I/O: one SQL statement. Raises: AiscaleError (NOT_FOUND)."""
    found = StoredFile.objects.of(organization_id).filter(public_id=file_id, state=StoredFile.State.READY).first()
    if found is None or (found.expires_at is not None and found.expires_at <= timezone.now()):
        raise AiscaleError(Code.NOT_FOUND, f"No such file: {file_id[:60]!r}.", param=param)
    return found  # type: ignore[no-any-return]


def open_file(row: StoredFile) -> IO[bytes]:
    """Open a file's bytes. I/O: the storage. Raises: AiscaleError (NOT_FOUND) when they are gone."""
    try:
        return get_storage().open(row.storage_name, "rb")
    except FileNotFoundError as error:
        raise AiscaleError(
            Code.NOT_FOUND, f"The bytes of the file {row.public_id} are gone.", param="file_id"
        ) from error


def delete(row: StoredFile) -> None:
    """Delete a file. From its first statement on it does not exist any more. I/O: two SQL statements, the storage. Idempotent."""
    StoredFile.objects.filter(pk=row.pk).update(state=StoredFile.State.DELETING, updated_at=timezone.now())
    get_storage().delete(row.storage_name)
    StoredFile.objects.filter(pk=row.pk).delete()
