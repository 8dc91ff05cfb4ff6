"""Read a multipart upload: the file goes to disk as it comes, the fields to memory."""

import asyncio
import hashlib
import json
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import IO, Any

from django.conf import settings
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from aiscale.errors import AiscaleError, Code
from apps.gateway.exchange import Exchange

MAX_FIELDS = 16
MAX_FIELD_BYTES = 4_096
OVERHEAD_BYTES = 64 << 10
"""What boundaries, headers and fields may take besides the file."""
WRITE_BYTES = 1 << 20


@dataclass
class Upload:
    """Hold what was sent. ``file`` is an open temporary file that vanishes when it is closed."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""
    size_bytes: int = 0
    file: IO[bytes] | None = None
    digest: Any = field(default_factory=hashlib.sha256)
    """Of the file's bytes."""

    def summarize(self) -> bytes:
        """Return what tells this upload from another one, whatever boundary it was sent with."""
        return json.dumps([self.fields, self.filename, self.digest.hexdigest()], sort_keys=True).encode()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


async def read_upload(exchange: Exchange) -> Upload:
    """Read a body of multipart/form-data with one file in the field ``file``. The caller closes it.

    I/O: the file's bytes to a temporary file, on threads. Raises: AiscaleError (INVALID_REQUEST; what `Exchange.iter_body` raises).
    """
    kind, options = parse_options_header(exchange.find_header("content-type") or "")
    boundary = options.get("boundary")
    if kind != "multipart/form-data" or not boundary:
        raise _bad("Send the file as multipart/form-data, with the fields 'file' and 'purpose'", "file")
    if exchange.find_header("content-encoding") not in (None, "identity"):
        message = "A file's upload cannot be compressed. Leave Content-Encoding out."
        raise AiscaleError(Code.UNSUPPORTED_ENCODING, message, param="Content-Encoding")
    limit_bytes = settings.ENV.file_limit_bytes + OVERHEAD_BYTES
    upload = Upload()
    try:
        await _parse(upload, boundary, exchange.iter_body(limit_bytes))
        if upload.file is None:
            raise _bad("You must provide the parameter file", "file")
        if upload.size_bytes > settings.ENV.file_limit_bytes:
            message = f"The file is larger than {settings.ENV.file_limit_bytes} bytes. Split it."
            raise AiscaleError(Code.BODY_TOO_LARGE, message, param="file")
        await asyncio.to_thread(upload.file.seek, 0)
    except BaseException:
        upload.close()
        raise
    return upload


async def _parse(upload: Upload, boundary: str, parts: AsyncIterator[bytes]) -> None:
    reader = _Reader(upload)
    try:
        with PushMultipartParser(boundary, max_segment_count=MAX_FIELDS) as parser:
            async for part in parts:
                for event in parser.parse(part):
                    reader.take(event)
                if len(reader.unwritten) >= WRITE_BYTES:
                    await asyncio.to_thread(reader.write)
        await asyncio.to_thread(reader.write)
    except MultipartError as error:
        raise _bad(f"We could not parse the body of your request as multipart/form-data: {error}", "file") from error
    except UnicodeDecodeError as error:
        raise _bad("A field holds no clean Unicode text", None) from error


class _Reader:
    """Take the parser's events in turn."""

    def __init__(self, upload: Upload) -> None:
        self.unwritten = bytearray()
        self._upload = upload
        self._field: str | None = None
        self._value = bytearray()

    def take(self, event: Any) -> None:
        if isinstance(event, MultipartSegment):
            self._begin(event)
        elif event is None:
            self._end()
        elif self._field is None:
            self.unwritten += event
            self._upload.size_bytes += len(event)
        else:
            self._value += event
            if len(self._value) > MAX_FIELD_BYTES:
                raise _bad(f"{self._field} is longer than {MAX_FIELD_BYTES} bytes", self._field)

    def write(self) -> None:
        """I/O: writes what has come. On a thread."""
        if self._upload.file is not None and self.unwritten:
            self._upload.file.write(self.unwritten)
            self._upload.digest.update(self.unwritten)
            self.unwritten.clear()

    def _begin(self, segment: MultipartSegment) -> None:
        name = segment.name or ""
        if name == "file":
            if self._upload.file is not None:
                raise _bad("file is given twice; send one file at a time", "file")
            if segment.filename is None:
                raise _bad("file must be a file with a name", "file")
            self._field = None
            self._upload.filename = segment.filename
            # no name in any folder: whatever dies, nothing is left behind
            self._upload.file = tempfile.TemporaryFile()  # noqa: SIM115
        elif name in self._upload.fields:
            raise _bad(f"{name[:100]} is given twice", name[:100])
        else:
            self._field, self._value = name, bytearray()

    def _end(self) -> None:
        if self._field is not None:
            self._upload.fields[self._field] = self._value.decode()
        self._field = None


def _bad(what: str, param: str | None) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, f"{what.rstrip('.')}.", param=param)
