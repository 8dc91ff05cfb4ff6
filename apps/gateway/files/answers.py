"""Answer ``/v1/files``: upload, list, find, download, delete."""

import asyncio
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import quote

from django.db.models import Q
from django.utils import timezone

from aiscale import listing
from aiscale.errors import AiscaleError, Code
from apps.accounts.callers import Caller, on_thread
from apps.gateway import idempotency
from apps.gateway.exchange import Exchange
from apps.gateway.files import keeping
from apps.gateway.files.ranges import read_range
from apps.gateway.files.uploads import Upload, read_upload
from apps.gateway.models import StoredFile
from apps.gateway.parameters import read_query

PURPOSES = ("batch",)
LISTED_PURPOSES = (*PURPOSES, "batch_output")
MOST_LISTED = 1_000
READ_BYTES = 256 << 10
MIN_LIFETIME_S, MAX_LIFETIME_S = 3_600, 2_592_000


async def answer_upload(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Store one file; once for an Idempotency-Key. Raises: AiscaleError."""
    upload = await read_upload(exchange)
    try:
        key = exchange.find_header(idempotency.HEADER)
        if key is None:
            await _store(exchange, caller, upload)
        else:
            work = partial(_store, exchange, caller, upload)
            await idempotency.answer(exchange, caller, key, upload.summarize(), work)
    finally:
        upload.close()


async def _store(exchange: Exchange, caller: Caller, upload: Upload) -> None:
    purpose, lifetime = _read_fields(upload)
    assert upload.file is not None
    file = upload.file
    row = await on_thread(
        lambda: keeping.keep(
            caller.organization_id,
            file,
            filename=_clean_name(upload.filename),
            purpose=purpose,
            size_bytes=upload.size_bytes,
            # a try that died is repeated under the same id: what it left is replaced
            file_id=f"{StoredFile.PUBLIC_ID_PREFIX}_{exchange.request_id.removeprefix('req_')}",
            lifetime=lifetime,
        )
    )
    await exchange.send_json(200, describe(row))


async def answer_list(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """List files, newest first unless asked otherwise. Raises: AiscaleError."""
    query = read_query(exchange.query_string, known=("purpose", "limit", "after", "order"))
    page = listing.read_page(query, most=MOST_LISTED, default=MOST_LISTED)
    kept = Q(expires_at__isnull=True) | Q(expires_at__gt=timezone.now())
    rows = StoredFile.objects.of(caller.organization_id).filter(kept, state=StoredFile.State.READY)
    if purpose := query.get("purpose"):
        if purpose not in LISTED_PURPOSES:
            message = f"purpose is {purpose[:40]!r}; files have the purpose {' or '.join(LISTED_PURPOSES)}."
            raise AiscaleError(Code.INVALID_REQUEST, message, param="purpose")
        rows = rows.filter(purpose=purpose)
    await exchange.send_json(200, await on_thread(lambda: listing.make_list(rows, page, describe)))


async def answer_file(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Describe one file. Raises: AiscaleError (NOT_FOUND)."""
    await exchange.send_json(200, describe(await _get(exchange, caller)))


async def answer_content(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Send a file's bytes, or the range of them that is asked for, piece by piece.

    Raises: AiscaleError (NOT_FOUND, RANGE_NOT_SATISFIABLE).
    """
    await send_file(exchange, await _get(exchange, caller))


async def send_file(exchange: Exchange, row: StoredFile) -> None:
    """Answer with a file. I/O: the storage. Raises: as `answer_content`."""
    wanted = exchange.find_header("range") if exchange.method == "GET" else None
    asked = read_range(wanted, exchange.find_header("if-range"), row.size_bytes)
    start, end = asked or (0, row.size_bytes)
    file = await asyncio.to_thread(keeping.open_file, row)
    try:
        headers = {
            "content-type": "application/octet-stream",
            "content-length": str(end - start),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(row.filename)}",
            "accept-ranges": "bytes",
        }
        if asked is not None:
            headers["content-range"] = f"bytes {start}-{end - 1}/{row.size_bytes}"
            await asyncio.to_thread(file.seek, start)
        await exchange.start_download(headers, 200 if asked is None else 206)
        while start < end and (part := await asyncio.to_thread(file.read, min(READ_BYTES, end - start))):
            start += len(part)
            await exchange.send_part(part)
        await exchange.end_stream()
    finally:
        await asyncio.to_thread(file.close)


async def answer_deletion(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Delete one file. Raises: AiscaleError (NOT_FOUND)."""
    row = await _get(exchange, caller)
    await on_thread(lambda: keeping.delete(row))
    await exchange.send_json(200, {"id": row.public_id, "object": "file", "deleted": True})


async def _get(exchange: Exchange, caller: Caller) -> StoredFile:
    file_id = exchange.path_values["file_id"]
    return await on_thread(lambda: keeping.get(caller.organization_id, file_id))


def describe(row: StoredFile) -> dict[str, Any]:
    """Return the object as callers see it."""
    return {
        "id": row.public_id,
        "object": "file",
        "bytes": row.size_bytes,
        "created_at": int(row.created_at.timestamp()),
        "expires_at": int(row.expires_at.timestamp()) if row.expires_at else None,
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "processed",
        "status_details": None,
    }


def _read_fields(upload: Upload) -> tuple[str, timedelta | None]:
    fields = dict(upload.fields)
    purpose = fields.pop("purpose", None)
    if purpose not in PURPOSES:
        known = " or ".join(PURPOSES)
        message = (
            f"purpose must be {known}: files are kept for batches."
            if purpose
            else f"You must provide purpose: {known}."
        )
        raise AiscaleError(Code.INVALID_REQUEST, message, param="purpose")
    anchor, seconds = fields.pop("expires_after[anchor]", None), fields.pop("expires_after[seconds]", None)
    for name in fields:
        message = f"Unrecognized request argument supplied: {name[:100]}."
        raise AiscaleError(Code.INVALID_REQUEST, message, param=name[:100])
    if anchor is None and seconds is None:
        return purpose, None
    if (
        anchor != "created_at"
        or not (seconds or "").isdigit()
        or not MIN_LIFETIME_S <= int(seconds or 0) <= MAX_LIFETIME_S
    ):
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"expires_after must have the anchor created_at and {MIN_LIFETIME_S} to {MAX_LIFETIME_S} seconds.",
            param="expires_after",
        )
    return purpose, timedelta(seconds=int(seconds or 0))


def _clean_name(name: str) -> str:
    """Keep of a file's name what can be shown: no folders, no control characters."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(char for char in last if char.isprintable())[:255] or "file"
