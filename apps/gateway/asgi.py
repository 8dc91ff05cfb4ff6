"""Route ``/v1`` before Django: know the caller, read the body, answer, and cancel when the client leaves."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from django.conf import settings
from django.db import Error as DatabaseError

from aiscale import overload, request_ids
from aiscale.errors import AiscaleError, Code
from aiscale.redis import UNAVAILABLE, unavailable
from apps.accounts import callers
from apps.accounts.callers import Caller
from apps.gateway import idempotency, shedding
from apps.gateway.cors import make_preflight_headers
from apps.gateway.endpoints import ROUTER
from apps.gateway.exchange import Disconnected, Exchange, Receive, Scope, Send
from apps.gateway.parameters import QUERIES_OF_CLIENTS, read_query
from apps.spend import refusal_log

log = logging.getLogger(__name__)

WATCH_AFTER_S = 0.01
"""A request that is not answered by then is watched: its client may leave."""


class GatewayApplication:
    """Answer ``/v1`` and hand everything else to ``fallback``."""

    def __init__(self, fallback: Callable[[Any, Any, Any], Awaitable[None]]) -> None:
        self._fallback = fallback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if shedding.is_ours(scope["path"]):
            await _take_in(scope, receive, send)
        else:
            await self._fallback(scope, receive, request_ids.name(scope, send))


async def _take_in(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request, unless it is one too many."""
    if scope["method"] == "OPTIONS" and await _answer_preflight(Exchange(scope, receive, send)):
        # of a refusal in its place a page could read nothing, not even that it is one
        return
    place = overload.enter()
    if place is None:
        await shedding.refuse(scope, send)
        return
    try:
        if not place.has_turn:
            await place.wait_turn()
        await _answer(Exchange(scope, receive, send))
    finally:
        place.leave()


async def _answer(exchange: Exchange) -> None:
    """Route one request; whatever goes wrong ends in an error object."""
    try:
        await _route(exchange)
    except Disconnected:
        return
    except AiscaleError as error:
        refusal_log.note(exchange.request_id, error, source="api", caller=exchange.caller)
        await exchange.send_failure(error)
    except UNAVAILABLE as error:
        log.error("Redis failed: %s", error, extra={"request_id": exchange.request_id})
        await exchange.send_failure(unavailable())
    except DatabaseError as error:
        log.error("Postgres failed: %s", error, extra={"request_id": exchange.request_id})
        message = "The service cannot reach its database right now. Try again in a few seconds."
        await exchange.send_failure(AiscaleError(Code.BACKEND_UNAVAILABLE, message, retry_after_s=2))
    except Exception:  # the last line of defence: logged with the id that the caller gets
        log.exception("a request failed", extra={"request_id": exchange.request_id})
        value = exchange.dialect.word_bug(exchange.request_id)
        if exchange.started:
            await exchange.end_with(value)
        else:
            await exchange.send_json(500, value)


async def _route(exchange: Exchange) -> None:
    path, method = exchange.path.rstrip("/"), exchange.method
    # no path has a NUL character, and no database takes one
    methods, exchange.path_values = ({}, {}) if "\x00" in path else ROUTER.find(path)
    if not methods:
        shown = path[:200].replace("\x00", "%00")
        raise AiscaleError(
            Code.NOT_FOUND,
            f"Unknown request URL: {method} {shown}. What there is stands at {settings.PUBLIC_URL}/api/docs.",
        )
    route = methods.get("GET" if method == "HEAD" else method)
    if route is None:
        allowed = sorted({*methods, *(["HEAD"] if "GET" in methods else [])})
        raise AiscaleError(
            Code.METHOD_NOT_ALLOWED,
            f"{method[:20]} is not allowed for {exchange.path[:200]}. Use {' or '.join(allowed)}.",
            headers={"allow": ", ".join(allowed)},
        )
    caller = exchange.caller = await _authenticate(exchange)
    if exchange.query_string and not route.query:
        read_query(exchange.query_string, defaults_only=QUERIES_OF_CLIENTS)
    if route.body in ("large", "stream"):
        await route.answer(exchange, caller, b"")
        return
    body = await exchange.read_body() if route.body == "json" else b""
    key = exchange.find_header(idempotency.HEADER)
    if key is None or route.method != "POST":
        await _until_disconnect(exchange, route.answer(exchange, caller, body))
        return
    work = partial(route.answer, exchange, caller, body)
    await _to_the_end(exchange, idempotency.answer(exchange, caller, key, body, work))


async def _answer_preflight(exchange: Exchange) -> bool:
    """Tell a browser whether a page of another origin may ask. False when it may not, or this is no such question."""
    if exchange.find_header("access-control-request-method") is None:
        return False
    wanted = exchange.find_header("access-control-request-headers")
    headers = make_preflight_headers(settings.ENV.cors_origins, exchange.find_header("origin"), wanted)
    if headers is None:
        return False
    exchange.cors_headers = {}
    await exchange.start_download(headers, status=204)
    await exchange.end_stream()
    return True


async def _authenticate(exchange: Exchange) -> Caller:
    """Know the caller by the key, before anything of the body is read. Raises: AiscaleError."""
    scheme, _, raw = (exchange.find_header("authorization") or "").strip().partition(" ")
    if scheme.lower() != "bearer" or not raw.strip():
        # Anthropic's clients send the key so
        raw = exchange.find_header("x-api-key") or ""
    if not raw.strip():
        raise AiscaleError(
            Code.MISSING_API_KEY,
            "You didn't provide an API key. Send it as the header 'Authorization: Bearer YOUR_KEY'; keys are made on the "
            "API keys page.",
        )
    return await callers.get_by_key(raw.strip())


async def _until_disconnect(exchange: Exchange, work: Awaitable[None]) -> None:
    """Do the work, and drop it when the client leaves: its job is cancelled on the way out. Raises: Disconnected then.

    What is answered in moments is not watched over.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    watchers: list[asyncio.Task[None]] = []
    timer = loop.call_later(WATCH_AFTER_S, lambda: watchers.append(loop.create_task(_watch(exchange, task))))
    try:
        await work
    except asyncio.CancelledError:
        if exchange.disconnected:
            task.uncancel()
            raise Disconnected from None
        raise
    finally:
        timer.cancel()
        for watcher in watchers:
            watcher.cancel()


async def _watch(exchange: Exchange, task: asyncio.Task[Any]) -> None:
    """Cancel the request's task when its client leaves."""
    await exchange.wait_disconnect()
    exchange.disconnected = True
    # asked twice: before Python 3.12 `asyncio.wait_for` can forget a cancellation
    for patience_s in (2, 3):
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=patience_s)
        if done:
            break


async def _to_the_end(exchange: Exchange, work: Awaitable[None]) -> None:
    """Do the work, and leave it to go on by itself when the client leaves."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(exchange.wait_disconnect())
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            worker.result()
        else:
            exchange.left = True
            idempotency.go_on_alone(worker)
    finally:
        watcher.cancel()
        if not worker.done() and not exchange.left:
            worker.cancel()
