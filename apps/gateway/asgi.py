"""Route ``/v1`` before Django: know the caller, read the body, answer, and cancel when the client leaves."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

from django.db import Error as DatabaseError

from aiscale.errors import AiscaleError, Code
from aiscale.redis import UNAVAILABLE, unavailable
from apps.accounts import callers
from apps.accounts.callers import Caller
from apps.gateway.chat_completions import answer_chat
from apps.gateway.embeddings import answer_embeddings
from apps.gateway.errors import STATUSES, error_headers, error_object, internal_error
from apps.gateway.exchange import Disconnected, Exchange, Receive, Scope, Send
from apps.gateway.model_list import answer_model, answer_models

log = logging.getLogger(__name__)

_POSTS: dict[str, Callable[[Exchange, Caller, bytes], Awaitable[None]]] = {
    "/v1/chat/completions": answer_chat,
    "/v1/embeddings": answer_embeddings,
}
_MODEL = re.compile(r"/v1/models/(?P<slug>.+)")


class GatewayApplication:
    """Answer ``/v1`` and hand everything else to ``fallback``."""

    def __init__(self, fallback: Callable[[Any, Any, Any], Awaitable[None]]) -> None:
        self._fallback = fallback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/v1" or scope["path"].startswith("/v1/"):
            await _answer(Exchange(scope, receive, send))
        else:
            await self._fallback(scope, receive, send)


async def _answer(exchange: Exchange) -> None:
    """Route one request; whatever goes wrong ends in an error object."""
    try:
        await _route(exchange)
    except Disconnected:
        return
    except AiscaleError as error:
        await _send_error(exchange, error)
    except UNAVAILABLE as error:
        log.error("Redis failed: %s", error, extra={"request_id": exchange.request_id})
        await _send_error(exchange, unavailable())
    except DatabaseError as error:
        log.error("Postgres failed: %s", error, extra={"request_id": exchange.request_id})
        message = "The service cannot reach its database right now. Try again in a few seconds."
        await _send_error(exchange, AiscaleError(Code.BACKEND_UNAVAILABLE, message, retry_after_s=2))
    except Exception:  # the last line of defence: logged with the id that the caller gets
        log.exception("a request failed", extra={"request_id": exchange.request_id})
        if exchange.started:
            await exchange.send_event(internal_error(exchange.request_id))
            await exchange.end_stream()
        else:
            await exchange.send_json(500, internal_error(exchange.request_id))


async def _route(exchange: Exchange) -> None:
    path, method = exchange.path.rstrip("/"), exchange.method
    if path in _POSTS:
        if method != "POST":
            await _refuse_method(exchange, "POST")
            return
        caller = await _authenticate(exchange)
        body = await exchange.read_body()
        await _until_disconnect(exchange, _POSTS[path](exchange, caller, body))
        return
    model = _MODEL.fullmatch(path)
    if path != "/v1/models" and model is None:
        raise AiscaleError(
            Code.NOT_FOUND,
            f"Unknown request URL: {method} {exchange.path[:200]}. There are /v1/chat/completions, /v1/embeddings "
            "and /v1/models.",
        )
    if method not in ("GET", "HEAD"):
        await _refuse_method(exchange, "GET, HEAD")
        return
    caller = await _authenticate(exchange)
    if model is None:
        await answer_models(exchange, caller)
    else:
        await answer_model(exchange, caller, model["slug"])


async def _authenticate(exchange: Exchange) -> Caller:
    """Know the caller by the bearer key, before anything of the body is read. Raises: AiscaleError."""
    header = exchange.find_header("authorization")
    scheme, _, raw = (header or "").strip().partition(" ")
    if not header or scheme.lower() != "bearer" or not raw.strip():
        raise AiscaleError(
            Code.MISSING_API_KEY,
            "You didn't provide an API key. Send it as the header 'Authorization: Bearer YOUR_KEY'; keys are made on the "
            "API keys page.",
        )
    return await callers.get_by_key(raw.strip())


async def _until_disconnect(exchange: Exchange, work: Awaitable[None]) -> None:
    """Do the work, and drop it when the client leaves: its job is cancelled on the way out."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(exchange.wait_disconnect())
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            worker.result()
    finally:
        watcher.cancel()
        if not worker.done():
            worker.cancel()
            await asyncio.wait({worker}, timeout=5)


async def _refuse_method(exchange: Exchange, allowed: str) -> None:
    error = AiscaleError(
        Code.INVALID_REQUEST, f"{exchange.method[:20]} is not allowed for {exchange.path[:200]}. Use {allowed}."
    )
    await exchange.send_json(405, error_object(error), {"allow": allowed})


async def _send_error(exchange: Exchange, error: AiscaleError) -> None:
    if exchange.started:
        await exchange.send_event(error_object(error))
        await exchange.end_stream()
    else:
        await exchange.send_json(STATUSES[error.code][0], error_object(error), error_headers(error))
