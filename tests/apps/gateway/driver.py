"""Speak ASGI to the gateway as a server does, and read what it answers, message by message."""

import asyncio
import json
from typing import Any

from apps.gateway.asgi import GatewayApplication


async def fall_back(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 299, "headers": []})
    await send({"type": "http.response.body", "body": b"Django"})


class Exchange:
    """Run one request as a task. ``leave`` is what a client does that closes its connection."""

    def __init__(
        self,
        method: str,
        path: str,
        *,
        key: str | None = None,
        body: bytes = b"",
        value: Any = None,
        headers: dict[str, str] | None = None,
        parts: list[bytes] | None = None,
        query: str = "",
    ) -> None:
        body = json.dumps(value).encode() if value is not None else body
        pairs = dict(headers or {})
        if key is not None:
            pairs["authorization"] = f"Bearer {key}"
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(name.encode(), text.encode()) for name, text in pairs.items()],
        }
        pieces = parts or [body]
        self.unread = [
            {"type": "http.request", "body": piece, "more_body": index < len(pieces) - 1}
            for index, piece in enumerate(pieces)
        ]
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.left = asyncio.Event()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.task = asyncio.create_task(GatewayApplication(fall_back)(scope, self._receive, self.sent.put))

    async def _receive(self) -> dict[str, Any]:
        if self.unread:
            return self.unread.pop(0)
        await self.left.wait()
        return {"type": "http.disconnect"}

    def leave(self) -> None:
        self.left.set()

    async def next_part(self) -> bytes | None:
        """Return the next piece of the body, or None at its end."""
        message = await asyncio.wait_for(self.sent.get(), 20)
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return await self.next_part()
        return message["body"] if message.get("more_body") or message["body"] else None

    async def read(self) -> bytes:
        """Return the whole body."""
        body = b""
        while True:
            message = await asyncio.wait_for(self.sent.get(), 20)
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
                continue
            body += message["body"]
            if not message.get("more_body"):
                await self.task
                return body

    async def read_json(self) -> Any:
        return json.loads(await self.read())


def read_events(body: bytes) -> list[Any]:
    """Read server-sent events: JSON values, and the word DONE."""
    lines = [line for line in body.decode().split("\n\n") if line.startswith("data: ")]
    return ["DONE" if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]
