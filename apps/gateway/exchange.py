"""Hold one HTTP request and its answer over plain ASGI."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import msgspec
from django.conf import settings

from aiscale.db import make_public_id
from aiscale.errors import AiscaleError, Code
from apps.gateway.dialects import Dialect, choose_dialect

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_encode = msgspec.json.Encoder().encode


class Disconnected(Exception):
    """The client left before its request was read."""


class Exchange:
    """Read a request once, answer it once."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.path_values: dict[str, str] = {}
        """The variable parts of the path, by the names that its route gives them."""
        self.query_string: bytes = scope.get("query_string", b"")
        self.request_id = make_public_id("req")
        self.started = False
        """Whether the answer's status was sent."""
        self._began = time.perf_counter()
        self._receive = receive
        self._send = send
        self._headers = {name.lower(): value for name, value in scope["headers"]}
        self.dialect: Dialect = choose_dialect(self.path, has_anthropic_version=b"anthropic-version" in self._headers)

    def find_header(self, name: str) -> str | None:
        value = self._headers.get(name.encode())
        return None if value is None else value.decode("latin-1")

    async def read_body(self) -> bytes:
        """Read the whole body. Raises: AiscaleError (BODY_TOO_LARGE), Disconnected."""
        return b"".join([part async for part in self.iter_body(settings.ENV.body_limit_bytes)])

    async def iter_body(self, limit_bytes: int) -> AsyncIterator[bytes]:
        """Yield the body as it comes. Raises: AiscaleError (BODY_TOO_LARGE), Disconnected."""
        declared = self.find_header("content-length")
        if declared is not None and declared.isdigit() and int(declared) > limit_bytes:
            raise _too_large(limit_bytes)
        size, more = 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size > limit_bytes:
                raise _too_large(limit_bytes)
            if part:
                yield part

    async def wait_disconnect(self) -> None:
        """Return when the client has left. Only after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def send_json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        body = _encode(value)
        await self._start(
            status, {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        )
        await self._send({"type": "http.response.body", "body": b"" if self.method == "HEAD" else body})

    async def start_download(self, headers: Mapping[str, str]) -> None:
        """Send the status of an answer that comes in parts (`send_part`, `end_stream`)."""
        await self._start(200, headers)

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
        await self.send_event(value, self.dialect.frame_error(value))
        await self.end_stream()

    async def send_part(self, part: bytes) -> None:
        await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def end_stream(self, last: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": last})

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
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs.items()],
            }
        )


def _too_large(limit: int) -> AiscaleError:
    return AiscaleError(Code.BODY_TOO_LARGE, f"The request's body is larger than {limit} bytes. Send less at a time.")
