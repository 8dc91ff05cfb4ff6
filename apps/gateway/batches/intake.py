"""Read a batch's file into lines, or say what is wrong with it."""

import codecs
from collections.abc import Iterator
from typing import IO, Any

import msgspec
from django.conf import settings
from django.db import transaction

from aiscale.errors import AiscaleError, Code
from apps.gateway import parameters
from apps.gateway.files import keeping
from apps.gateway.models import Batch, BatchLine

MAX_LINES = 50_000
MAX_PROBLEMS = 50
MAX_CUSTOM_ID_CHARS = 512
MAX_MODEL_CHARS = 100
INSERTED_AT_ONCE = 500

_LINE_FIELDS = {"custom_id", "method", "url", "body"}


def take_in(batch: Batch) -> list[dict[str, Any]]:
    """Write a batch's lines, all or none. Returns the problems of its file; with any, nothing is written.

    I/O: reads the file, inserts its lines in one transaction. Again after a crash: what was written is replaced.
    """
    try:
        file = keeping.get(batch.organization.public_id, batch.input_file_id, param="input_file_id")
        with keeping.open_file(file) as data, transaction.atomic():
            problems = _write(batch, data)
            if problems:
                transaction.set_rollback(True)
            return problems
    except AiscaleError as error:
        return [_problem(error.code.value, error.message)]


def _write(batch: Batch, data: IO[bytes]) -> list[dict[str, Any]]:
    batch.lines.all().delete()
    problems: list[dict[str, Any]] = []
    seen: set[str] = set()
    models: set[Any] = set()
    rows: list[BatchLine] = []
    for count, (number, text) in enumerate(_iter_lines(data), 1):
        if count > MAX_LINES:
            problems.append(
                _problem("too_many_lines", f"The file has more than {MAX_LINES} requests. Split it.", number)
            )
            break
        try:
            custom_id, asked = _read_line(batch, text, seen)
        except AiscaleError as error:
            problems.append(_problem(error.code.value, error.message, number, error.param))
            if len(problems) >= MAX_PROBLEMS:
                break
            continue
        seen.add(custom_id)
        model, body = asked.get("model"), msgspec.json.encode(asked).decode()
        models.add(model if isinstance(model, str) else None)
        rows.append(BatchLine(batch=batch, number=number, custom_id=custom_id, body=body))
        if len(rows) >= INSERTED_AT_ONCE and not problems:
            BatchLine.objects.bulk_create(rows)
            rows.clear()
    if not problems and not seen:
        problems.append(_problem("empty_file", "The file holds no request. Write one JSON object on each line."))
    if not problems:
        BatchLine.objects.bulk_create(rows)
        batch.total_count = len(seen)
        batch.model = _name_model(models)
    return problems


def _name_model(models: set[Any]) -> str:
    """Return the one model that is asked for; '' for several, none, or a name that is no model's."""
    [model, *others] = models
    return "" if others or model is None or len(model) > MAX_MODEL_CHARS or not model.isprintable() else model


def _iter_lines(data: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers in the file, from 1. None is read beyond what may be sent at once.

    A byte order mark, as some editors write it, is none of the first line.
    """
    number, limit = 0, int(settings.ENV.body_limit_bytes) + 4096
    while line := data.readline(limit + 1):
        number += 1
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip() or len(line) > limit:
            yield number, line.strip()
        while len(line) > limit and not line.endswith(b"\n"):
            line = data.readline(limit + 1)


def _read_line(batch: Batch, text: bytes, seen: set[str]) -> tuple[str, dict[str, Any]]:
    """Return a line's custom id and its body. Raises: AiscaleError."""
    if len(text) > settings.ENV.body_limit_bytes:
        raise _bad(f"The line is larger than {settings.ENV.body_limit_bytes} bytes", None)
    value = parameters.read_object(text)
    if unknown := sorted(value.keys() - _LINE_FIELDS):
        raise _bad(
            f"The line holds {unknown[0][:100]!r}; it may hold custom_id, method, url and body", unknown[0][:100]
        )
    custom_id, body = value.get("custom_id"), value.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        raise _bad(f"custom_id must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters", "custom_id")
    if custom_id in seen:
        raise _bad(f"The custom_id {custom_id[:100]!r} was used before in this file", "custom_id")
    if value.get("method") != "POST":
        raise _bad("method must be POST", "method")
    if value.get("url") != batch.endpoint:
        raise _bad(f"url must be the batch's endpoint, {batch.endpoint}", "url")
    if not isinstance(body, dict):
        raise _bad("body must be a JSON object", "body")
    if body.get("stream"):
        raise _bad("A batch's requests cannot be streamed. Leave stream out", "body.stream")
    if body.get("background"):
        raise _bad("A batch's requests run in the background anyway. Leave background out", "body.background")
    return custom_id, body


def _bad(what: str, param: str | None) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, f"{what}.", param=param)


def _problem(code: str, message: str, line: int | None = None, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "line": line, "message": message, "param": param}
