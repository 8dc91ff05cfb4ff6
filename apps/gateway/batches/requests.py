"""Read the requests of a batch of messages from its body as it comes: one of them is in memory at a time, the rest is on disk."""

import asyncio
import hashlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import msgspec
from django.conf import settings

from aiscale.errors import AiscaleError, Code
from apps.gateway import parameters
from apps.gateway.exchange import Exchange

MAX_REQUESTS = 100_000
CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
FEED_BYTES = 1 << 20
_STRUCTURE = re.compile(rb'["\\{}\[\]]')
_QUOTE, _BACKSLASH = b'"\\'
_OPENING = b"{["
_CUT = b"{}"
"""Stands for a request in what is left of the body, where no object is."""


class MessageBatchRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    custom_id: str
    params: dict[str, Any]


class MessageBatchBody(msgspec.Struct, kw_only=True):
    """What each request asks is looked at when it is run, and answered by itself."""

    requests: list[MessageBatchRequest]


class _Rest(msgspec.Struct, kw_only=True):
    requests: list[Any]


class Splitter:
    """Cut the objects out of an object's list, however the bytes come. ``rest`` is what is left, with an empty object for each of them."""

    def __init__(self, most_bytes: int) -> None:
        """``most_bytes``: of one object, and of the rest."""
        self.rest = bytearray()
        self.is_inside = False
        """Whether an object has begun that has not ended."""
        self._most_bytes = most_bytes
        self._object = bytearray()
        self._depth = 0
        self._in_string = False
        self._skip = 0
        """Bytes of the next piece that a backslash has spoken for."""

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Yield the objects that end in this piece. Raises: AiscaleError (INVALID_REQUEST) for one that is too large."""
        begin, skip_to = 0, self._skip
        self._skip = 0
        for found in _STRUCTURE.finditer(piece):
            at = found.start()
            if at < skip_to:
                continue
            byte = piece[at]
            if self._in_string:
                if byte == _QUOTE:
                    self._in_string = False
                elif byte == _BACKSLASH:
                    skip_to = at + 2
            elif byte == _QUOTE:
                self._in_string = True
            elif byte in _OPENING:
                self._depth += 1
                if self._depth == 3 and byte == b"{"[0]:
                    self._keep(piece[begin:at])
                    self.is_inside, begin = True, at
            elif byte != _BACKSLASH:
                self._depth -= 1
                if self.is_inside and self._depth == 2:
                    self._keep(piece[begin : at + 1])
                    yield bytes(self._object)
                    self.is_inside, begin = False, at + 1
                    self._object.clear()
                    self.rest += _CUT
        self._keep(piece[begin:])
        self._skip = max(skip_to - len(piece), 0)

    def _keep(self, piece: bytes) -> None:
        kept = self._object if self.is_inside else self.rest
        kept += piece
        if len(kept) > self._most_bytes:
            what = "A request" if self.is_inside else "What the body holds besides its requests"
            raise _refuse(f"{what} is larger than {self._most_bytes} bytes", "requests")


class Requests:
    """Hold checked requests in a temporary file that vanishes when it is closed."""

    def __init__(self) -> None:
        self.count = 0
        self.size_bytes = 0
        self._splitter = Splitter(settings.ENV.body_limit_bytes)
        self._seen: set[str] = set()
        self._digest = hashlib.sha256()
        # no name in any folder: whatever dies, nothing is left behind
        self._file = tempfile.TemporaryFile()  # noqa: SIM115

    @property
    def fingerprint(self) -> bytes:
        """Tell this body from another one."""
        return self._digest.digest()

    def feed(self, piece: bytes) -> None:
        """Take the next bytes of the body. I/O: writes to disk. Raises: AiscaleError."""
        self._digest.update(piece)
        for raw in self._splitter.feed(piece):
            with parameters.within(f"requests[{self.count}]"):
                request = parameters.convert(
                    parameters.read_object(raw), MessageBatchRequest, harmless=frozenset(), defaults_only={}
                )
                self._check(request)
            self.size_bytes += self._file.write(msgspec.json.encode(request) + b"\n")
            self.count += 1

    def end(self) -> None:
        """Check what is around the requests: nothing more comes. Raises: AiscaleError."""
        if self._splitter.is_inside:
            raise AiscaleError(
                Code.INVALID_JSON, "We could not parse the body of your request as JSON: it ends in the middle."
            )
        rest = parameters.read_object(bytes(self._splitter.rest))
        found = parameters.convert(rest, _Rest, harmless=frozenset(), defaults_only={}).requests
        for index, entry in enumerate(found):
            if entry != {}:
                raise _refuse(f"requests[{index}] must be an object", f"requests[{index}]")
        if not found:
            raise _refuse(f"requests holds no entry; send 1 to {MAX_REQUESTS}", "requests")

    def __iter__(self) -> Iterator[MessageBatchRequest]:
        """I/O: reads from disk."""
        self._file.seek(0)
        for line in self._file:
            yield msgspec.json.decode(line, type=MessageBatchRequest)

    def close(self) -> None:
        self._file.close()

    def _check(self, request: MessageBatchRequest) -> None:
        """Raise: AiscaleError (INVALID_REQUEST) for one that could not be told apart, or not be answered in a file."""
        if self.count >= MAX_REQUESTS:
            raise _refuse(f"a batch holds at most {MAX_REQUESTS} requests", None)
        if not CUSTOM_ID.fullmatch(request.custom_id):
            raise _refuse("custom_id must be 1 to 64 letters, digits, _ and -", "custom_id")
        if request.custom_id in self._seen:
            raise _refuse(f"custom_id is {request.custom_id!r}, as that of a request before it", "custom_id")
        if request.params.get("stream"):
            raise _refuse("A batch's requests cannot be streamed. Leave stream out", "params.stream")
        self._seen.add(request.custom_id)


async def read_requests(exchange: Exchange) -> Requests:
    """Read and check a body. The caller closes what it gets. One that is compressed is no larger, unpacked, than any other body.

    I/O: the requests to a temporary file, on threads. Raises: AiscaleError (INVALID_JSON, INVALID_REQUEST; what `Exchange.iter_body`
    raises).
    """
    requests, unread = Requests(), bytearray()
    try:
        if exchange.find_header("content-encoding") is not None:
            await asyncio.to_thread(requests.feed, await exchange.read_body())
        else:
            async for part in exchange.iter_body(settings.ENV.message_batch_limit_bytes):
                unread += part
                if len(unread) >= FEED_BYTES:
                    await asyncio.to_thread(requests.feed, bytes(unread))
                    unread.clear()
            await asyncio.to_thread(requests.feed, bytes(unread))
        await asyncio.to_thread(requests.end)
    except BaseException:
        requests.close()
        raise
    return requests


def _refuse(what: str, param: str | None) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, f"{what}.", param=param)
