"""An upstream that sends what is no answer: each request ends with a named error that costs nothing, or with what can be read of it."""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from apps.accounts.callers import on_thread
from apps.inference import breaker
from apps.inference.upstream_words import PER_MESSAGE_TOKENS, TEMPLATE_TOKENS
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import read_events
from tests.apps.inference.test_upstreams import Odd, ask, enter, read_usage


class Raw(Odd):
    """Answer with these bytes as they are, and go on with them when they are a list: each after the next."""

    def __init__(self, *parts: bytes, head: bytes = b"") -> None:
        super().__init__("raw")
        self.parts = parts
        self.head = head or b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
        self.sent_bytes = 0

    async def answer(self, writer: asyncio.StreamWriter, step: str) -> None:
        writer.write(self.head)
        for part in self.parts:
            writer.write(part)
            await writer.drain()
            self.sent_bytes += len(part)


@contextlib.asynccontextmanager
async def upstream(*parts: bytes, head: bytes = b"") -> AsyncIterator[Raw]:
    raw = Raw(*parts, head=head)
    server = await asyncio.start_server(raw.serve, "127.0.0.1", 0)
    try:
        await on_thread(lambda: enter(server.sockets[0].getsockname()[1], retries=0))
        yield raw
    finally:
        server.close()


def tell(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def say(content: Any, **more: Any) -> bytes:
    return tell({"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None} | more]})


END = say("", finish_reason="stop") + b"data: [DONE]\n\n"


@pytest.fixture(autouse=True)
def private(settings: Any, settling: None) -> None:
    settings.ENV = dataclasses.replace(settings.ENV, upstreams_private=True)


GARBAGE: dict[str, bytes] = {
    "no JSON": b"data: {nope\n\n",
    "no Unicode": b'data: {"choices": [{"delta": {"content": "\xff"}}]}\n\n',
    "no list of choices": tell({"choices": 7}),
    "no choices in it": tell({"choices": [7]}),
    "a choice too many": say("x", index=1),
    "a choice of no number": say("x", index="0"),
    "no delta": tell({"choices": [{"index": 0, "delta": [1]}]}),
    "no text": say(7),
    "no reason": say("x", finish_reason=7),
    "an error": tell({"error": {"message": "Said by the upstream."}}),
    "nothing": b"",
    "a page": b"<html>\n<body>\n",
    "another stream's end": say("x") + b"data: [DON",
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_what_is_no_answer_has_a_name_and_costs_nothing(cast: Cast, name: str) -> None:
    async with upstream(GARBAGE[name]):
        for streams in (False, True):
            exchange = ask(cast, stream=streams)
            body = await exchange.read()
            error = (read_events(body)[-1] if exchange.status == 200 else json.loads(body))["error"]
            assert error["code"] == "upstream_failed" and error["type"] == "server_error", error
            assert "object" not in error["message"] and "Said by" not in error["message"]
            row = await read_usage(f"job_{exchange.headers['x-request-id'].removeprefix('req_')}")
            assert (row.cost_nanousd, row.finish_reason) == (0, "error")


async def test_a_line_without_end_is_not_gathered(cast: Cast) -> None:
    piece = b"x" * (256 << 10)
    async with upstream(b"data: ", *[piece] * 400) as raw:
        began = time.monotonic()
        exchange = ask(cast)
        assert (await exchange.read_json())["error"]["code"] == "upstream_failed" and exchange.status == 502
        assert raw.sent_bytes < 64 << 20, "it goes on only until that is too long"
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("status", "code"), [("400", "invalid_request"), ("503", "upstream_unavailable"), ("302", "upstream_failed")]
)
async def test_an_error_that_breaks_off_is_one(cast: Cast, status: str, code: str) -> None:
    head = f'HTTP/1.1 {status} X\r\ncontent-length: 1000\r\nconnection: close\r\n\r\n{{"error": {{"mess'
    async with upstream(head=head.encode()):
        error = (await ask(cast).read_json())["error"]
        assert error["code"] == code and "service behind this model" in error["message"], error


async def test_lines_end_where_events_have_their_ends(cast: Cast) -> None:
    """Unicode knows other ends of lines, which may stand in JSON as they are; and some servers send a text in parts."""
    text = "a\u2028b\u2029c\x85d"
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": " e"}]
    told = (say(text) + say(parts)).replace(b"\n", b"\r\n")
    async with upstream(told[:50], told[50:], b": a comment\n", b"event: message\n", END):
        answer = await ask(cast).read_json()
        assert answer["choices"][0]["message"]["content"] == text + " e", answer


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 10**30, "completion_tokens": 10**30},
        {"prompt_tokens": 10**6, "completion_tokens": 1},
        {"prompt_tokens": 1, "completion_tokens": 6},
        {"prompt_tokens": -1, "completion_tokens": True},
        {"prompt_tokens": "9", "completion_tokens": None, "prompt_tokens_details": [7]},
        [7],
    ],
)
async def test_usage_that_cannot_be_costs_no_more_than_was_held(cast: Cast, usage: Any) -> None:
    async with upstream(say("one two"), tell({"choices": [], "usage": usage}), END):
        answer = await ask(cast).read_json()
        row = await read_usage(f"job_{answer['id'].removeprefix('chatcmpl-')}")
        assert row.completion_tokens == answer["usage"]["completion_tokens"] and 1 <= row.completion_tokens <= 5
        assert (
            1 <= row.prompt_tokens <= len("Hello") + PER_MESSAGE_TOKENS + TEMPLATE_TOKENS
            and row.finish_reason == "stop"
        )


async def test_details_that_cannot_be_change_nothing(cast: Cast) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": [7]}
    async with upstream(say("one two"), tell({"choices": [], "usage": usage}), END):
        told = (await ask(cast).read_json())["usage"]
        assert (told["prompt_tokens"], told["completion_tokens"]) == (9, 2)


async def test_a_breaker_opens_for_one_that_only_seems_to_answer(cast: Cast) -> None:
    """A status of 200 is no proof: what follows must be of use."""
    async with upstream(tell({"choices": 7})) as raw:
        for _ in range(breaker.OPENS_AFTER):
            assert (await ask(cast).read_json())["error"]["code"] == "upstream_failed"
        assert (await ask(cast).read_json())["error"]["code"] == "upstream_unavailable"
        assert len(raw.asked) == breaker.OPENS_AFTER
