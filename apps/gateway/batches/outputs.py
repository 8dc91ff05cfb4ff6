"""Write what came of a batch into its files."""

import tempfile
from collections.abc import Iterator
from typing import IO, Any

import msgspec
from django.db import transaction
from django.utils import timezone

from apps.gateway.batches.answers import MESSAGES
from apps.gateway.batches.lines import name_request
from apps.gateway.batches.messages import describe_result
from apps.gateway.files import keeping
from apps.gateway.models import Batch, BatchLine

READ_AT_ONCE = 200


def write(batch: Batch) -> None:
    """Write the output and the error file and close the batch. Again after a crash: the same files, written anew.

    In Anthropic's dialect it is one file, of all requests. I/O: reads all lines, writes up to two files, one SQL transaction.
    """
    answers = batch.lines.filter(state=BatchLine.State.DONE, status_code=200)
    errors = batch.lines.filter(state=BatchLine.State.DONE).exclude(status_code=200)
    if batch.outcome == Batch.Status.EXPIRED:
        errors = batch.lines.exclude(state=BatchLine.State.DONE, status_code=200)
    if batch.endpoint == MESSAGES:
        everything = batch.lines.order_by("number").iterator(chunk_size=READ_AT_ONCE)
        results = (describe_result(batch, line) for line in everything)
        batch.output_file_id = _write_file(batch, "o", "results", results)
    else:
        batch.output_file_id = _write_file(batch, "o", "output", _describe(batch, answers))
        batch.error_file_id = _write_file(batch, "e", "errors", _describe(batch, errors))
    with transaction.atomic():
        closed = Batch.objects.filter(pk=batch.pk, status=Batch.Status.FINALIZING).update(
            status=batch.outcome,
            output_file_id=batch.output_file_id,
            error_file_id=batch.error_file_id,
            times=batch.times | {f"{batch.outcome}_at": int(timezone.now().timestamp())},
            updated_at=timezone.now(),
        )
        if closed:
            # their answers are in the files now
            batch.lines.all().delete()


def _write_file(batch: Batch, suffix: str, name: str, entries: Iterator[dict[str, Any]]) -> str:
    """Write one file and return its id; '' when there is nothing to write."""
    with tempfile.TemporaryFile() as data:
        size_bytes = _fill(data, entries)
        if not size_bytes:
            return ""
        data.seek(0)
        row = keeping.keep(
            batch.organization.public_id,
            data,
            filename=f"{batch.public_id}_{name}.jsonl",
            purpose="batch_output",
            size_bytes=size_bytes,
            file_id=f"file_{batch.public_id.partition('_')[2]}{suffix}",
            within_quota=False,
        )
    return row.public_id


def _fill(data: IO[bytes], entries: Iterator[dict[str, Any]]) -> int:
    size_bytes = 0
    for entry in entries:
        size_bytes += data.write(msgspec.json.encode(entry) + b"\n")
    return size_bytes


def _describe(batch: Batch, lines: Any) -> Iterator[dict[str, Any]]:
    for line in lines.order_by("number").iterator(chunk_size=READ_AT_ONCE):
        request_id = name_request(batch, line)
        response, error = None, None
        if line.state == BatchLine.State.DONE:
            body = msgspec.Raw(line.answer.encode())
            response = {"status_code": line.status_code, "request_id": request_id, "body": body}
        else:
            error = {"code": "batch_expired", "message": "This request was not run before the batch expired."}
        yield {
            "id": f"batch_{request_id}",
            "custom_id": line.custom_id,
            "response": response,
            "error": error,
        }
