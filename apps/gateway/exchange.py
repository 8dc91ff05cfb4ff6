"""Hold one HTTP request and its answer over plain ASGI."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from django.conf import settings

from aiscale import overload
from aiscale.db import make_public_id
from aiscale.errors import AiscaleError, Code
from apps.accounts.callers import Caller
from apps.gateway.compression import COMPRESSED_FROM_BYTES, choose_encoding, compress, decompress
from apps.gateway.cors import make_headers
from apps.gateway.dialects import Dialect, choose_dialect
from apps.gateway.obfuscation import pad

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_encode = msgspec.json.Encoder().encode


BODY_PATIENCE_S = 30.0
"""How long a client may leave us waiting for the next piece of its body."""
SLOW_BODY_S = 0.05
"""A body that lets us wait for so long gives its place to others: its client decides when it comes."""


class Disconnected(Exception):
    """The client left before its request was read."""


@dataclass
class Recording:
    """Hold an answer as it is sent."""

    most_bytes: int
    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)
    size_bytes: int = 0
    is_whole: bool = False


class Exchange:
    """Read a request once, answer it once."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.path_values: dict[str, str] = {}
        """The variable parts of the path, by the names that its route gives them."""
        self.query_string: bytes = scope.get("query_string", b"")
        self.request_id = make_public_id("req")
        self.caller: Caller | None = None
        """Who asks, once that is known."""
        self.failed = False
        """Whether the answer tells of a failure though its status was good: a stream that broke."""
        self.left = False
        """Whether the client is gone: nothing is sent any more."""
        self.disconnected = False
        """Whether the client was seen to leave, and the request is being dropped."""
        self._recording: Recording | None = None
        self.obfuscates = False
        """Whether the events of its stream are padded."""
        self.started = False
        """Whether the answer's status was sent."""
        self._began = time.perf_counter()
        self._receive = receive
        self._send = send
        self._headers = {name.lower(): value for name, value in scope["headers"]}
        self.cors_headers = make_headers(settings.ENV.cors_origins, self.find_header("origin"))
        self.dialect: Dialect = choose_dialect(self.path, has_anthropic_version=b"anthropic-version" in self._headers)

    def find_header(self, name: str) -> str | None:
        value = self._headers.get(name.encode())
        return None if value is None else value.decode("latin-1")

    async def read_body(self) -> bytes:
        """Read the whole body. Raises: AiscaleError (BODY_TOO_LARGE, BODY_TIMEOUT, BODY_CUT_SHORT)."""
        limit_bytes = settings.ENV.body_limit_bytes
        parts = [part async for part in self.iter_body(limit_bytes)]
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        encoding = self.find_header("content-encoding")
        return body if encoding is None else await decompress(body, encoding, limit_bytes)

    async def iter_body(self, limit_bytes: int) -> AsyncIterator[bytes]:
        """Yield the body as it comes. Raises: AiscaleError (BODY_TOO_LARGE, BODY_TIMEOUT, BODY_CUT_SHORT)."""
        declared = self.find_header("content-length")
        if declared is not None and declared.isdigit() and int(declared) > limit_bytes:
            raise _too_large(limit_bytes)
        size, more = 0, True
        while more:
            message = await self._receive_part()
            part, more = message.get("body", b""), message.get("more_body", False)
            if more:
                # it waits for its client, perhaps for long
                overload.wait_elsewhere()
            size += len(part)
            if size > limit_bytes:
                raise _too_large(limit_bytes)
            if part:
                yield part

    async def _receive_part(self) -> dict[str, Any]:
        """Wait for the next piece of the body, and keep nobody else waiting. Raises: AiscaleError (BODY_TIMEOUT, BODY_CUT_SHORT)."""
        slow = asyncio.get_running_loop().call_later(SLOW_BODY_S, overload.wait_elsewhere)
        try:
            async with asyncio.timeout(BODY_PATIENCE_S):
                message = await self._receive()
        except TimeoutError as error:
            text = f"The next piece of the request's body did not come within {BODY_PATIENCE_S:g} seconds. Send the request again."
            raise AiscaleError(Code.BODY_TIMEOUT, text) from error
        finally:
            slow.cancel()
        if message["type"] == "http.disconnect":
            text = "The request's body broke off, or was not framed as HTTP wants it. Nothing was done. Send the request again."
            raise AiscaleError(Code.BODY_CUT_SHORT, text)
        return message

    async def wait_disconnect(self) -> None:
        """Return when the client has left. Only after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def send_json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        body = _encode(value)
        await self._send_whole(status, {"content-type": "application/json", **(headers or {})}, body)

    async def send_again(
        self, status: int, headers: Iterable[tuple[str, str]], body: bytes, more: Mapping[str, str]
    ) -> None:
        """Send an answer as it was recorded, under the id of its own request."""
        values = dict(headers)
        self.request_id = values.get("x-request-id", self.request_id)
        await self._send_whole(status, {**values, **more}, body)

    async def _send_whole(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        pairs = dict(headers)
        if self._recording is not None:
            # kept as it is; only what is sent may be compressed
            self._recording.parts.append(body)
            self._recording.size_bytes += len(body)
            self._recording.is_whole = True
        if len(body) >= COMPRESSED_FROM_BYTES and "content-encoding" not in pairs:
            pairs["vary"] = "accept-encoding"
            encoding = choose_encoding(self.find_header("accept-encoding"))
            if encoding is not None and not pairs.get("content-type", "").startswith("text/event-stream"):
                body = await compress(body, encoding)
                pairs["content-encoding"] = encoding
        pairs["content-length"] = str(len(body))
        await self._start(status, pairs)
        await self._put({"type": "http.response.body", "body": b"" if self.method == "HEAD" else body})

    def record(self, most_bytes: int) -> None:
        """Remember the answer while it is sent, up to so many bytes."""
        self._recording = Recording(most_bytes)

    @property
    def recorded(self) -> Recording | None:
        """Return the whole answer that was sent; None when it was cut short, or too large to remember."""
        kept = self._recording
        return kept if kept is not None and kept.is_whole and kept.size_bytes <= kept.most_bytes else None

    async def _put(self, message: dict[str, Any]) -> None:
        """Send one message, unless the client is gone."""
        if self.left:
            return
        try:
            await self._send(message)
        except (OSError, RuntimeError):
            if self._recording is None:
                raise
            self.left = True

    async def start_download(self, headers: Mapping[str, str], status: int = 200) -> None:
        """Send the status of an answer that comes in parts (`send_part`, `end_stream`)."""
        await self._start(status, headers)

    async def start_stream(self, headers: Mapping[str, str]) -> None:
        """Send the status of a stream of server-sent events."""
        fixed = {
            "content-type": "text/event-stream; charset=utf-8",
            # proxies must pass every token on at once
            "cache-control": "no-cache, no-transform",
            "x-accel-buffering": "no",
        }
        await self._start(200, {**fixed, **headers})

    async def send_event(self, value: Any, name: str | None = None) -> None:
        """Send one server-sent event, under ``name`` when the dialect names its events."""
        if self.obfuscates:
            value = pad(value)
        head = b"event: " + name.encode() + b"\ndata: " if name else b"data: "
        await self.send_part(head + _encode(value) + b"\n\n")

    async def send_failure(self, error: AiscaleError) -> None:
        """End the answer with an error: as a status where that can still be, else as the stream's last event."""
        value = self.dialect.word(error, self.request_id)
        if self.started:
            await self.end_with(value)
        else:
            await self.send_json(self.dialect.status_of(error), value, self.dialect.headers_of(error))

    async def end_with(self, value: dict[str, Any]) -> None:
        """End a stream with an error."""
        self.failed = True
        await self.send_event(value, self.dialect.frame_error(value))
        await self.end_stream()

    async def send_part(self, part: bytes) -> None:
        self._remember(part)
        await self._put({"type": "http.response.body", "body": part, "more_body": True})

    async def end_stream(self, last: bytes = b"") -> None:
        self._remember(last)
        if self._recording is not None:
            self._recording.is_whole = True
        await self._put({"type": "http.response.body", "body": last})

    def _remember(self, part: bytes) -> None:
        kept = self._recording
        if kept is not None:
            kept.size_bytes += len(part)
            if kept.size_bytes <= kept.most_bytes:
                kept.parts.append(part)

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.started = True
        elapsed_ms = int((time.perf_counter() - self._began) * 1000)
        fixed = {
            "x-request-id": self.request_id,
            "openai-processing-ms": str(elapsed_ms),
            "x-content-type-options": "nosniff",
            **self.dialect.common_headers(self.request_id),
        }
        pairs = {"cache-control": "no-store", **fixed, **headers}
        if self._recording is not None:
            own = {"content-length", "content-encoding", "vary", *self.cors_headers}
            kept = [(name, value) for name, value in pairs.items() if name not in own]
            self._recording.status, self._recording.headers = status, kept
        if self.cors_headers:
            vary = ", ".join(filter(None, (pairs.get("vary"), self.cors_headers.get("vary"))))
            pairs |= self.cors_headers | ({"vary": vary} if vary else {})
        await self._put(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs.items()],
            }
        )


def _too_large(limit: int) -> AiscaleError:
    return AiscaleError(Code.BODY_TOO_LARGE, f"The request's body is larger than {limit} bytes. Send less at a time.")
