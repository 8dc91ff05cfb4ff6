"""Count what a request costs in statements and Redis trips, by watching the drivers: for `manage.py io_report` and its test.

Only what the request itself waits for is counted: the reader of replies waits on a connection of its own, whatever comes.
"""

import asyncio
import contextlib
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import redis
import redis.asyncio as aioredis
from django.conf import settings
from django.db.backends.utils import CursorWrapper

from aiscale.redis import Batcher
from aiscale.wire.scripts import digest_script

Counts = dict[str, list[str]]
"""``sql``: verb and table of each statement; ``redis``: the commands of each trip, those of a pipeline joined by +."""

RUNS = 6
"""The cheapest of so many is a warm one: once a second the catalog and the plans are read anew."""
ANSWER_TIMEOUT_S = 60
IGNORED = ("XREAD", "XTRIM", "SET reader")
CHAT, EMBED = "smollm2-135m-instruct", "all-minilm-l6-v2"

_TABLE = re.compile(r'\b(?:FROM|INTO|UPDATE)\s+"?(\w+)', re.IGNORECASE)


@contextlib.contextmanager
def watch() -> Iterator[Counts]:
    """Collect every statement and every Redis trip of this process. Not for use in a server."""
    counts: Counts = {"sql": [], "redis": []}

    def note_trip(*commands: tuple[Any, ...]) -> None:
        names = [_name_command(command) for command in commands]
        if not all(name.startswith(IGNORED) for name in names):
            counts["redis"].append("+".join(names))

    def wrap_command(original: Any) -> Any:
        def execute(self: Any, *args: Any, **options: Any) -> Any:
            note_trip(args)
            return original(self, *args, **options)

        return execute

    def wrap_pipeline(original: Any) -> Any:
        def execute(self: Any, *args: Any, **options: Any) -> Any:
            if self.command_stack:
                note_trip(*(getattr(command, "args", None) or command[0] for command in self.command_stack))
            return original(self, *args, **options)

        return execute

    def wrap_batch(original: Any) -> Any:
        def ask(self: Any, commands: Any) -> Any:
            note_trip(*commands)
            return original(self, commands)

        return ask

    def wrap_statement(original: Any) -> Any:
        def execute(self: Any, statement: Any, *args: Any) -> Any:
            counts["sql"].append(_name_statement(str(statement)))
            return original(self, statement, *args)

        return execute

    with contextlib.ExitStack() as patches:
        for owner, name, wrap in (
            (redis.Redis, "execute_command", wrap_command),
            (aioredis.Redis, "execute_command", wrap_command),
            (redis.client.Pipeline, "execute", wrap_pipeline),
            (aioredis.client.Pipeline, "execute", wrap_pipeline),
            (Batcher, "_ask", wrap_batch),
            (CursorWrapper, "execute", wrap_statement),
            (CursorWrapper, "executemany", wrap_statement),
        ):
            original: Any = getattr(owner, name)
            setattr(owner, name, wrap(original))
            patches.callback(setattr, owner, name, original)
        yield counts


async def measure(key: str, session: str) -> dict[str, Counts]:
    """Walk each of the main paths, and return what it costs once it is warm. ``session`` is a browser's session key.

    I/O: whatever they cost, several times over; a worker must be there. Raises: AssertionError when a path fails.
    """
    paths: dict[str, Callable[[], Awaitable[None]]] = {
        "GET /v1/models": lambda: _ask("GET", "/v1/models", key),
        "POST /v1/chat/completions": lambda: _ask("POST", "/v1/chat/completions", key, _make_chat()),
        "POST /v1/chat/completions, streamed": lambda: _ask(
            "POST", "/v1/chat/completions", key, _make_chat() | {"stream": True}
        ),
        "POST /v1/embeddings": lambda: _ask(
            "POST", "/v1/embeddings", key, {"model": EMBED, "input": secrets.token_hex(8)}
        ),
        "POST /v1/embeddings, known": lambda: _ask("POST", "/v1/embeddings", key, {"model": EMBED, "input": "known"}),
    }
    measured = {name: await _find_least(walk) for name, walk in paths.items()}
    measured["WebSocket /ws/chat/, connect"] = await _find_least(lambda: _connect(session))
    measured["WebSocket /ws/chat/, a turn that is stopped"] = await _measure_turn(session)
    return measured


async def _find_least(walk: Callable[[], Awaitable[None]]) -> Counts:
    from apps.accounts import callers

    found = []
    for _ in range(RUNS):
        # a key that was used a moment ago is not looked up: the first use counts
        callers.forget()
        with watch() as counts:
            await asyncio.wait_for(walk(), ANSWER_TIMEOUT_S)
        found.append(counts)
    return min(found, key=_size)


def _size(counts: Counts) -> int:
    return len(counts["sql"]) + len(counts["redis"])


def _make_chat() -> dict[str, Any]:
    # never the same twice: an answer from a cache is another path
    content = f"Say {secrets.token_hex(8)}."
    return {"model": CHAT, "messages": [{"role": "user", "content": content}], "max_tokens": 3}


def _reach(scope: dict[str, Any]) -> Any:
    """Open one connection to the whole application, as a server does."""
    from asgiref import testing

    from aiscale.asgi import application

    communicator: Any = testing.ApplicationCommunicator
    return communicator(application, scope)


async def _ask(method: str, path: str, key: str, value: Any = None) -> None:
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")],
    }
    caller = _reach(scope)
    body = b"" if value is None else json.dumps(value).encode()
    await caller.send_input({"type": "http.request", "body": body, "more_body": False})
    start = await caller.receive_output(ANSWER_TIMEOUT_S)
    answer = b""
    while True:
        part = await caller.receive_output(ANSWER_TIMEOUT_S)
        answer += part["body"]
        if not part.get("more_body"):
            break
    await caller.wait(ANSWER_TIMEOUT_S)
    assert start["status"] == 200, answer


async def _open(session: str) -> Any:
    origin = settings.PUBLIC_URL.encode()
    cookie = f"{settings.SESSION_COOKIE_NAME}={session}".encode()
    headers = [(b"origin", origin), (b"host", origin.partition(b"//")[2]), (b"cookie", cookie)]
    scope = {"type": "websocket", "path": "/ws/chat/", "headers": headers, "query_string": b"", "subprotocols": []}
    socket = _reach(scope)
    await socket.send_input({"type": "websocket.connect"})
    assert (await socket.receive_output(ANSWER_TIMEOUT_S))["type"] == "websocket.accept"
    return socket


async def _connect(session: str) -> None:
    await _leave(await _open(session))


async def _leave(socket: Any) -> None:
    await socket.send_input({"type": "websocket.disconnect", "code": 1000})
    await socket.wait(ANSWER_TIMEOUT_S)


async def _measure_turn(session: str) -> Counts:
    socket = await _open(session)

    async def turn() -> None:
        frame = {"type": "send", "model": CHAT, "text": "Hello", "client_id": secrets.token_hex(8)}
        await socket.send_input({"type": "websocket.receive", "text": json.dumps(frame)})
        stops, kind = False, ""
        while kind != "finished":
            message = json.loads((await socket.receive_output(ANSWER_TIMEOUT_S))["text"])
            kind = message["type"]
            assert kind != "error" and message.get("status") != "failed", message
            if kind in ("delta", "block") and not stops:
                # an answer of any length costs the same
                stops = True
                stop = {"type": "stop", "message_id": message["message_id"]}
                await socket.send_input({"type": "websocket.receive", "text": json.dumps(stop)})

    try:
        return await _find_least(turn)
    finally:
        await _leave(socket)


def _name_statement(statement: str) -> str:
    verb = statement.split(None, 1)[0].upper()
    table = _TABLE.search(statement)
    return f"{verb} {table[1]}" if table else verb


def _name_command(command: tuple[Any, ...]) -> str:
    name = str(command[0]).upper()
    if name == "EVALSHA":
        return f"EVALSHA {_scripts().get(command[1], '?')}"
    if name == "EVAL":
        return "EVAL"
    key = command[1] if len(command) > 1 else ""
    text = key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)
    # what kind of key it is, not whose
    kind = text.removeprefix("aiscale:").split(":")[0]
    return f"{name} {kind}".strip()


def _scripts() -> dict[str, str]:
    from apps.spend.scripts import get_script

    known = {digest_script(name): name for name in ("enqueue", "cancel", "finish", "forget", "withdraw")}
    return known | {get_script(name).digest: name for name in ("admit", "settle")}
