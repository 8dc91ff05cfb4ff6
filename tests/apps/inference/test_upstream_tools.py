"""Tools go to an upstream in OpenAI's words, and its calls come back: whole, streamed, counted and paid for."""

import asyncio
import dataclasses
import json
from typing import Any

import pytest

from apps.accounts.callers import on_thread
from apps.gateway.models import StoredResponse
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange, read_events
from tests.apps.gateway.test_tools_elsewhere import read_named
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
    pieces = PIECES

    async def answer(self, writer: asyncio.StreamWriter, step: str) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        for delta in [*self.pieces, {}]:
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
        asking["max_tokens"] = 50
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


BY_TURNS: list[Any] = [
    {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": ""}}]},
    {"tool_calls": [{"index": 1, "id": "c2", "type": "function", "function": {"name": "time", "arguments": ""}}]},
    {
        "tool_calls": [
            {"index": 0, "function": {"arguments": '{"city": '}},
            {"index": 1, "function": {"arguments": "{"}},
        ]
    },
    {"content": "Wait."},
    {"tool_calls": [{"index": 1, "function": {"arguments": "}"}}, {"index": 0, "function": {"arguments": '"Oslo"}'}}]},
    {"tool_calls": [{"index": 2, "id": "c3", "function": {"name": "time", "arguments": "{}"}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": "garbage"}}]},
]


def accumulate(events: list[Any]) -> list[dict[str, Any]]:
    """Build a message's content as Anthropic's clients do, and see that each block is opened and closed once."""
    blocks: list[dict[str, Any]] = []
    closed: list[int] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"] | {"json": ""})
        elif event["type"] == "content_block_delta":
            assert event["index"] not in closed
            blocks[event["index"]]["json"] += event["delta"].get("partial_json", "")
            blocks[event["index"]]["text"] = blocks[event["index"]].get("text", "") + event["delta"].get("text", "")
        elif event["type"] == "content_block_stop":
            closed.append(event["index"])
    assert sorted(closed) == list(range(len(blocks)))
    return blocks


async def test_calls_by_turns_in_anthropics_dialect(cast: Cast, private: None, settling: None) -> None:
    upstream = Calling("call")
    empty = {"index": 3, "function": {"name": "time", "arguments": ""}}
    cut = {"index": 4, "id": "c5", "function": {"name": "weather", "arguments": '{"city": "Os'}}
    upstream.pieces = [*BY_TURNS, {"tool_calls": [empty, cut]}]
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    async with server:
        await on_thread(lambda: enter(server.sockets[0].getsockname()[1]))
        tools = [{"name": name, "input_schema": {"type": "object"}} for name in ("weather", "time")]
        said = [{"role": "user", "content": "Hello"}]
        value = {"model": "acme-large", "messages": said, "tools": tools, "max_tokens": 50}
        headers = {"anthropic-version": "2023-06-01"}
        whole = Exchange("POST", "/v1/messages", key=cast.raw, value=value, headers=headers)
        answer = await whole.read_json()
        assert whole.status == 200, answer
        inputs = [block["input"] for block in answer["content"] if block["type"] == "tool_use"]
        # of one that has no arguments, or was cut, nothing is known
        assert inputs[1:] == [{}, {}, {}, {}] and answer["stop_reason"] == "tool_use"
        streamed = Exchange("POST", "/v1/messages", key=cast.raw, value=value | {"stream": True}, headers=headers)
        blocks = accumulate(read_named(await streamed.read()))
        named = blocks[4].pop("id")
        assert named.startswith("call_") and len(named) > 20, "whose server gives it no id"
        assert [(block.get("id"), block["json"]) for block in blocks] == [
            ("c1", '{"city": "Oslo"}'),
            ("c2", "{}"),
            (None, ""),
            ("c3", "{}"),
            (None, ""),
            ("c5", '{"city": "Os'),
        ]
        assert blocks[2]["text"] == "Wait."


async def test_calls_by_turns_are_each_opened_and_closed_once(cast: Cast, private: None, settling: None) -> None:
    """In the Responses API, where an item is open as long as something of it may come; told again and stored alike."""
    upstream = Calling("call")
    upstream.pieces = BY_TURNS
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    async with server:
        await on_thread(lambda: enter(server.sockets[0].getsockname()[1]))
        flat = [{"type": "function", **tool["function"], "strict": False} for tool in TOOLS]
        value = {"model": "acme-large", "input": "Hello", "tools": flat, "stream": True, "background": True}
        body = await Exchange("POST", "/v1/responses", key=cast.raw, value=value).read()
        events = read_named(body)
        for kind in ("response.output_item.added", "response.output_item.done"):
            assert sorted(event["output_index"] for event in events if event["type"] == kind) == [0, 1, 2, 3], body
        done: set[int] = set()
        for event in events:
            assert event.get("output_index", -1) not in done, "an item that is closed is told no more of"
            done |= {event["output_index"]} if event["type"] == "response.output_item.done" else set()
        response = events[-1]["response"]
        assert [(item.get("call_id"), item.get("arguments")) for item in response["output"]] == [
            ("c1", '{"city": "Oslo"}'),
            ("c2", "{}"),
            (None, None),
            ("c3", "{}"),
        ]
        assert [item["status"] for item in response["output"]] == ["completed"] * 4
        ended = {event["output_index"]: event["item"] for event in events if "item" in event}
        assert [ended[place] for place in range(4)] == response["output"]
        again = Exchange("GET", f"/v1/responses/{response['id']}", key=cast.raw, query="stream=true")
        assert read_named(await again.read()) == events
        await on_thread(lambda: StoredResponse.objects.update(status="in_progress"))
        found = await Exchange("GET", f"/v1/responses/{response['id']}", key=cast.raw).read_json()
        assert found == response, "what its log tells when its web process has died"
