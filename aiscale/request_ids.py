"""Give each answer of Django an id, as those of the gateway have one: people name it, and the log has it."""

from collections.abc import Awaitable, Callable
from typing import Any

from aiscale.db import make_public_id

HEADER = "x-request-id"
KEY = "aiscale.request_id"
"""Under which a request's scope holds its id."""

Send = Callable[[dict[str, Any]], Awaitable[None]]


def name(scope: dict[str, Any], send: Send) -> Send:
    """Name a request; return a ``send`` that says its id with the answer. No I/O."""
    scope[KEY] = make_public_id("req")
    pair = (HEADER.encode(), scope[KEY].encode())

    async def send_named(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = message | {"headers": [*message["headers"], pair]}
        await send(message)

    return send_named


def get(request: Any) -> str:
    """Return the id of one of Django's requests; a new one where no server named it."""
    scope = getattr(request, "scope", None) or {}
    return str(scope.get(KEY) or make_public_id("req"))
