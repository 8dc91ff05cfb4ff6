"""Route WebSockets: only from our own pages, with a session, to the chat."""

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from channels.auth import AuthMiddlewareStack
from channels.routing import URLRouter
from django.conf import settings
from django.urls import path

from apps.chat.consumers import STRAIGHT, ChatConsumer


class OwnOriginOnly:
    """Refuse a WebSocket that another site's page opens: it would carry our user's cookie."""

    def __init__(self, inner: Callable[[Any, Any, Any], Awaitable[None]]) -> None:
        self._inner = inner

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        if self._is_own(headers.get(b"origin", b"").decode("latin-1"), headers.get(b"host", b"").decode("latin-1")):
            await self._inner(scope | {STRAIGHT: send}, receive, send)
        else:
            # closed before it is accepted: the handshake is answered with 403
            await send({"type": "websocket.close", "code": 4403})

    @staticmethod
    def _is_own(origin: str, host: str) -> bool:
        try:
            netloc = urlsplit(origin).netloc
        except ValueError:
            return False
        return bool(netloc) and netloc in (host, urlsplit(settings.PUBLIC_URL).netloc)


async def _refuse(scope: Any, receive: Any, send: Any) -> Any:
    await send({"type": "websocket.close", "code": 4404})


websocket_application = OwnOriginOnly(
    AuthMiddlewareStack(URLRouter([path("ws/chat/", ChatConsumer.as_asgi()), path("<path:rest>", _refuse)]))
)
