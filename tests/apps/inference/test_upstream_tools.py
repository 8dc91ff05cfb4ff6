"""Tools go to an upstream in OpenAI's words, and its calls come back: whole, streamed, counted and paid for."""

import asyncio
import dataclasses
import json
from typing import Any

import pytest

from apps.accounts.callers import on_thread
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import read_events
from tests.apps.inference.test_upstreams import Odd, ask, enter, read_usage

PIECES: list[Any] = [
    {"content": "Let me see."},
    {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '"Paris"}'}}, "odd", {"function": 3}]},
    {"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "time", "arguments": "{}"}}]},
]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": n, "parameters": {"type": "object"}}} for n in ("weather", "time")
]
TOOLS[1]["function"]["strict"] = True


class Calling(Odd):
    async def answer(self, writer: asyncio.StreamWriter, step: str) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        for delta in [*PIECES, {}]:
            chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": None if delta else "tool_calls"}]}
            writer.write(f"data: {json.dumps(chunk)}\n\n".encode())
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()


@pytest.fixture
def private(settings: Any) -> None:
    settings.ENV = dataclasses.replace(settings.ENV, upstreams_private=True)


async def test_calls_of_an_upstream(cast: Cast, private: None, settling: None) -> None:
    upstream = Calling("call")
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    async with server:
        await on_thread(lambda: enter(server.sockets[0].getsockname()[1]))
        call = {"id": "c0", "type": "function", "function": {"name": "time", "arguments": "{}"}}
        messages = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c0", "content": "noon"},
        ]
        asking = {"messages": messages, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
        exchange = ask(cast, **asking)
        answer = await exchange.read_json()
        assert exchange.status == 200, answer
        [choice] = answer["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Let me see.", "tool_calls")
        made = [
            (call["id"], call["function"]["name"], call["function"]["arguments"])
            for call in choice["message"]["tool_calls"]
        ]
        assert made == [("c1", "weather", '{"city": "Paris"}'), ("c2", "time", "{}")]
        asked = upstream.asked[0]
        assert {name: asked[name] for name in asking} == asking
        *chunks, _ = read_events(await ask(cast, tools=TOOLS, stream=True).read())
        parts = [part for chunk in chunks for part in chunk["choices"][0]["delta"].get("tool_calls", ())]
        assert "".join(part["function"]["arguments"] for part in parts if part["index"] == 0) == '{"city": "Paris"}'
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        # the upstream tells no usage: what it called is counted too
        row = await read_usage(f"job_{answer['id'].removeprefix('chatcmpl-')}")
        assert row.completion_tokens > 6 and row.prompt_tokens > 20
