"""Ask an OpenAI-compatible server for a stream of chunks: address checked, tried again before the first byte, and no longer than set."""

import asyncio
import ipaddress
import logging
import random
import socket
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
from django.conf import settings

from aiscale import sealing
from aiscale.errors import AiscaleError, Code
from apps.inference import breaker
from apps.inference.catalog import UpstreamRoute

log = logging.getLogger(__name__)

RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0
MAX_LINE_BYTES = 1 << 20
MAX_ANSWER_BYTES = 128 << 20
MAX_ERROR_BYTES = 64 << 10
_decode = msgspec.json.Decoder().decode

_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = weakref.WeakKeyDictionary()


def _get_client() -> httpx.AsyncClient:
    loop = asyncio.get_running_loop()
    client = _clients.get(loop)
    if client is None:
        limits = httpx.Limits(max_connections=1_000, max_keepalive_connections=100)
        client = _clients[loop] = httpx.AsyncClient(limits=limits, follow_redirects=False, trust_env=False)
    return client


def is_allowed(address: str) -> bool:
    """Tell whether an IP address may be asked: private ones only where the owner allows it (AISCALE_UPSTREAMS_PRIVATE)."""
    return settings.ENV.upstreams_private or ipaddress.ip_address(address.partition("%")[0]).is_global


async def resolve(url: str) -> tuple[str, str]:
    """Return an address of a URL's host, and the host. What is checked is what is asked: the name is not looked up again.

    I/O: a look-up of the name. Raises: AiscaleError (UPSTREAM_UNAVAILABLE).
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, parts.port or 443, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _unavailable(f"its name cannot be found: {error}") from error
    addresses = [str(item[4][0]) for item in found]
    if not all(is_allowed(address) for address in addresses):
        log.error("the upstream %s has a private address; AISCALE_UPSTREAMS_PRIVATE=1 would allow it", host)
        raise _unavailable("its address is private")
    return addresses[0], host


@asynccontextmanager
async def open_stream(route: UpstreamRoute, path: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[Any]]:
    """Send a request and give its chunks, decoded, as they come. I/O and Raises: as `open_answer`."""
    async with open_answer(route, path, body) as answer:
        yield _iter_chunks(answer)


async def fetch(route: UpstreamRoute, path: str, body: dict[str, Any]) -> bytes:
    """Send a request and return the whole answer. I/O and Raises: as `open_answer`."""
    whole = bytearray()
    async with open_answer(route, path, body) as answer:
        try:
            async for part in answer.response.aiter_bytes():
                whole += part
                if len(whole) > MAX_ANSWER_BYTES:
                    raise failed("its answer is too long")
        except httpx.HTTPError as error:
            raise failed("it broke off") from error
        await answer.praise()
    return bytes(whole)


class UpstreamAnswer:
    """Be an answer of which nothing is read yet."""

    def __init__(self, route: UpstreamRoute, response: httpx.Response) -> None:
        self.response = response
        self._route = route
        self._is_praised = False

    async def praise(self) -> None:
        """Say that what it sends can be used: a status alone is no proof. I/O: one Redis trip, the first time."""
        if not self._is_praised:
            self._is_praised = True
            await breaker.report(self._route.name, good=True)


@asynccontextmanager
async def open_answer(route: UpstreamRoute, path: str, body: dict[str, Any]) -> AsyncIterator[UpstreamAnswer]:
    """Send a request and give the answer; the breaker learns whether it could be used.

    Connection errors and statuses that promise better are tried again, ``route.retries`` times, before the first byte.
    I/O: HTTP, a Redis trip before and after.
    Raises: AiscaleError (UPSTREAM_UNAVAILABLE, UPSTREAM_FAILED; INVALID_REQUEST in the upstream's words).
    """
    await breaker.check(route.name)
    try:
        response = await _send(route, path, body)
        try:
            yield UpstreamAnswer(route, response)
        finally:
            await response.aclose()
    except AiscaleError as error:
        is_its_fault = error.code in (Code.UPSTREAM_UNAVAILABLE, Code.UPSTREAM_FAILED)
        await breaker.report(route.name, good=not is_its_fault)
        raise


async def _send(route: UpstreamRoute, path: str, body: dict[str, Any]) -> httpx.Response:
    url = f"{route.base_url.rstrip('/')}{path}"
    for attempt in range(route.retries + 1):
        pause_s = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S) * (0.75 + random.random() / 2)  # noqa: S311
        try:
            response = await _send_once(route, url, body)
        except httpx.HTTPError as error:
            log.warning("the upstream %s did not answer: %r", route.name, error)
            problem = _unavailable("it does not answer")
        else:
            if response.status_code == 200:
                return response
            try:
                problem = await _explain(route, response)
            finally:
                await response.aclose()
            if response.status_code not in RETRIED:
                raise problem
            pause_s = _read_pause_s(response) or pause_s
        if attempt == route.retries or pause_s > LONGEST_PAUSE_S:
            break
        await asyncio.sleep(pause_s)
    raise problem


async def _send_once(route: UpstreamRoute, url: str, body: dict[str, Any]) -> httpx.Response:
    address, host = await resolve(url)
    parts = httpx.URL(url)
    headers = {
        "content-type": "application/json",
        "accept": "text/event-stream, application/json",
        "host": parts.netloc.decode(),
    }
    if route.sealed_key:
        headers["authorization"] = f"Bearer {_unseal(route)}"
    timeout = httpx.Timeout(route.timeout_s, connect=min(route.timeout_s, 5.0))
    request = _get_client().build_request(
        "POST",
        parts.copy_with(host=address),
        content=msgspec.json.encode(body),
        headers=headers,
        timeout=timeout,
        extensions={"sni_hostname": host},
    )
    return await _get_client().send(request, stream=True)


def _unseal(route: UpstreamRoute) -> str:
    try:
        return sealing.unseal(route.sealed_key)
    except sealing.CannotUnseal as error:
        log.error("the key of the upstream %s cannot be read: %s", route.name, error)
        raise _unavailable("its key cannot be read") from error


async def _iter_chunks(answer: UpstreamAnswer) -> AsyncIterator[Any]:
    """Yield the values of server-sent events until ``[DONE]``. Raises: AiscaleError (UPSTREAM_FAILED)."""
    try:
        async for line in _iter_lines(answer.response):
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            value = _decode(data)
            if isinstance(value, dict) and value.get("error"):
                raise failed("it broke off with an error")
            yield value
            # whoever reads it could use it
            await answer.praise()
    except (httpx.HTTPError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.warning("an upstream's stream broke: %r", error)
        raise failed("it broke off") from error
    raise failed("it ended too early")


async def _iter_lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield whole lines as server-sent events have them: Unicode's other ends of lines stand in the middle of a text.

    Raises: AiscaleError (UPSTREAM_FAILED) for one that is too long, before more than that of it is in memory; httpx.HTTPError.
    """
    held = bytearray()
    async for part in response.aiter_bytes():
        held += part
        if b"\n" in part or b"\r" in part:
            *lines, last = bytes(held).replace(b"\r", b"\n").split(b"\n")
            held = bytearray(last)
            for line in lines:
                _check_length(line)
                yield line
        _check_length(held)
    if held:
        yield bytes(held)


def _check_length(line: bytes | bytearray) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise failed("it sent a line that is too long")


async def _explain(route: UpstreamRoute, response: httpx.Response) -> AiscaleError:
    """Word what an upstream answered instead of a stream. Only what it says of the request itself is passed on."""
    text = b""
    try:
        async for part in response.aiter_bytes():
            text += part
            if len(text) > MAX_ERROR_BYTES:
                break
    except httpx.HTTPError as error:
        log.warning("the upstream %s broke off: %r", route.name, error)
    status = response.status_code
    log.warning("the upstream %s answered %d", route.name, status)
    if status in (400, 413, 422):
        try:
            detail = _decode(text)["error"]
            message, param, code = str(detail["message"])[:500], detail.get("param"), detail.get("code")
        except (msgspec.MsgspecError, KeyError, TypeError, AttributeError):
            message, param, code = "the service behind this model refused the request", None, None
        known = Code.CONTEXT_LENGTH_EXCEEDED if code == "context_length_exceeded" else Code.INVALID_REQUEST
        return AiscaleError(known, message, param=param if isinstance(param, str) else None)
    if status in RETRIED:
        return _unavailable(f"it answered {status}")
    return failed(f"it answered {status}")


def _read_pause_s(response: httpx.Response) -> float | None:
    try:
        return float(response.headers.get("retry-after", ""))
    except ValueError:
        return None


def _unavailable(why: str) -> AiscaleError:
    return AiscaleError(
        Code.UPSTREAM_UNAVAILABLE,
        f"The service behind this model cannot be used right now: {why}. Try again in a few seconds.",
        retry_after_s=5,
    )


def failed(why: str) -> AiscaleError:
    """Say that an upstream answered in a way that is of no use."""
    return AiscaleError(
        Code.UPSTREAM_FAILED,
        f"The service behind this model failed: {why}. It is not charged. Try again.",
    )
