"""Tools in the words of the Responses API and of Anthropic's Messages: called, streamed, and gone on from."""

import asyncio
import json
import time
from itertools import groupby
from typing import Any

import pytest
from anthropic.types import Message
from openai.types.responses import Response

from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange
from tests.apps.gateway.test_tools import CHAT, CITY, tooled

__all__ = ["tooled"]
pytestmark = pytest.mark.usefixtures("worker", "tooled")

FLAT = [{"type": "function", "name": "weather", "description": "Tell the weather", "parameters": CITY, "strict": True}]
THEIRS = [{"name": "weather", "description": "Tell the weather", "input_schema": CITY}]


def respond(cast: Cast, **changes: Any) -> Exchange:
    value = {"model": CHAT, "input": "How is it in Paris?", "tools": FLAT, "max_output_tokens": 80, "temperature": 0}
    return Exchange("POST", "/v1/responses", key=cast.raw, value=value | changes)


def send(cast: Cast, path: str = "/v1/messages", **changes: Any) -> Exchange:
    value = {"model": CHAT, "messages": [{"role": "user", "content": "How is it?"}], "tools": THEIRS, "max_tokens": 80}
    headers = {"x-api-key": cast.raw, "anthropic-version": "2023-06-01"}
    return Exchange("POST", path, value={k: v for k, v in (value | changes).items() if v is not ...}, headers=headers)


def read_named(body: bytes) -> list[Any]:
    """Read events that come with their names."""
    return [json.loads(line.removeprefix("data: ")) for line in body.decode().splitlines() if line.startswith("data: ")]


async def test_a_response_calls_and_goes_on(cast: Cast) -> None:
    exchange = respond(cast, tool_choice={"type": "function", "name": "weather"})
    answer = await exchange.read_json()
    assert exchange.status == 200, answer
    [call] = Response.model_validate(answer).output
    assert call.type == "function_call" and (call.name, json.loads(call.arguments)) == ("weather", {"city": "Paris"})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"}
    # the call is in the stored response, and may be sent by the caller instead
    stored = await respond(cast, previous_response_id=answer["id"], input=[result], max_output_tokens=4).read_json()
    said = {"type": "message", "role": "user", "content": "How is it in Paris?"}
    sent = await respond(cast, input=[said, *answer["output"], result], max_output_tokens=4).read_json()
    assert stored["output"][0]["content"][0]["text"] == sent["output"][0]["content"][0]["text"], stored
    assert stored["usage"]["input_tokens"] == sent["usage"]["input_tokens"]
    path = f"/v1/responses/{sent['id']}/input_items"
    listed = await Exchange("GET", path, key=cast.raw, query="order=asc").read_json()
    assert [item["type"] for item in listed["data"]] == ["message", "function_call", "function_call_output"]
    orphan = respond(cast, input=[result])
    assert (await orphan.read_json())["error"]["param"] == "input" and orphan.status == 400


async def test_a_response_streams_its_call(cast: Cast) -> None:
    events = read_named(await respond(cast, tool_choice="required", parallel_tool_calls=False, stream=True).read())
    pieces = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert len(pieces) > 2 and json.loads("".join(pieces)) == {"city": "Paris"}
    assert [kind for kind, _ in groupby(event["type"] for event in events)] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert json.loads(events[-3]["arguments"]) == {"city": "Paris"} and events[2]["item"]["arguments"] == ""
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = read_named(await respond(cast, stream=True, max_output_tokens=3).read())
    assert text[-1]["response"]["output"][0]["type"] == "message"
    assert [event["type"] for event in text][2:4] == ["response.output_item.added", "response.content_part.added"]


async def test_a_background_response_calls(cast: Cast, redis_url: str) -> None:
    """Its call has one id, whoever tells it: the stream, the stream again, and the log when all web processes have died."""
    forced = {"tool_choice": "required", "parallel_tool_calls": False, "background": True}
    first = read_named(await respond(cast, stream=True, **forced).read())
    response = first[-1]["response"]
    [call] = response["output"]
    assert first[-1]["type"] == "response.completed" and call["type"] == "function_call", response
    assert first[0]["response"]["completed_at"] is None
    assert response["created_at"] <= response["completed_at"] <= time.time()
    again = Exchange("GET", f"/v1/responses/{response['id']}", key=cast.raw, query="stream=true")
    assert read_named(await again.read()) == first
    lone = await respond(cast, **forced).read_json()
    assert lone["status"] == "in_progress"
    while lone["status"] == "in_progress":
        await asyncio.sleep(0.1)
        lone = await Exchange("GET", f"/v1/responses/{lone['id']}", key=cast.raw).read_json()
    [other] = lone["output"]
    assert json.loads(other["arguments"]) == {"city": "Paris"} and other["call_id"] != call["call_id"]
    again = Exchange("GET", f"/v1/responses/{lone['id']}", key=cast.raw, query="stream=true")
    assert read_named(await again.read())[-1]["response"] == lone
    result = {"type": "function_call_output", "call_id": other["call_id"], "output": "18 degrees"}
    after = respond(cast, previous_response_id=lone["id"], input=[result], max_output_tokens=4, background=True)
    assert (await after.read_json())["status"] == "in_progress" and after.status == 200


async def test_tools_that_may_not_be_called_are_not_looked_for(cast: Cast) -> None:
    first = read_named(await respond(cast, tool_choice="none", stream=True, max_output_tokens=8).read())
    again = Exchange("GET", f"/v1/responses/{first[0]['response']['id']}", key=cast.raw, query="stream=true")
    assert read_named(await again.read()) == first


async def test_a_call_that_was_cut_breaks_nothing(cast: Cast) -> None:
    forced = {"tool_choice": {"type": "function", "name": "weather"}}
    for tokens in range(8, 40, 4):
        cut = await respond(cast, max_output_tokens=tokens, **forced).read_json()
        item = cut["output"][0]
        if item["type"] == "function_call" and item["arguments"] and not item["arguments"].endswith("}"):
            break
    else:
        raise AssertionError("no call was cut in the middle of its arguments")
    assert (cut["status"], item["status"]) == ("incomplete", "incomplete")
    after = respond(cast, previous_response_id=cut["id"], input="And?", max_output_tokens=3)
    assert (await after.read_json())["object"] == "response" and after.status == 200
    result = {"type": "function_call_output", "call_id": item["call_id"], "output": "18"}
    orphan = respond(cast, previous_response_id=cut["id"], input=[result])
    assert (await orphan.read_json())["error"]["param"] == "input" and orphan.status == 400
    theirs = send(cast, tool_choice={"type": "tool", "name": "weather"}, max_tokens=tokens)
    answer = await theirs.read_json()
    assert theirs.status == 200, answer
    assert (answer["content"][0]["input"], answer["stop_reason"]) == ({}, "max_tokens")


async def test_anthropics_blocks(cast: Cast) -> None:
    exchange = send(cast, tool_choice={"type": "tool", "name": "weather"})
    answer = await exchange.read_json()
    assert exchange.status == 200, answer
    typed = Message.model_validate(answer)
    [block] = typed.content
    assert block.type == "tool_use" and (block.name, block.input) == ("weather", {"city": "Paris"})
    assert typed.stop_reason == "tool_use"
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "18"}]}]
    messages = [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, *answer["content"]]},
        {"role": "user", "content": [*results, {"type": "text", "text": "And?"}]},
    ]
    after = send(cast, messages=messages, max_tokens=3)
    value = await after.read_json()
    assert after.status == 200 and value["content"][0]["type"] == "text", value
    counted = await send(cast, "/v1/messages/count_tokens", messages=messages, max_tokens=...).read_json()
    usage = value["usage"]
    assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    orphan = send(cast, messages=[{"role": "user", "content": results}])
    assert (await orphan.read_json())["error"]["type"] == "invalid_request_error" and orphan.status == 400


async def test_anthropics_stream_of_a_call(cast: Cast) -> None:
    events = read_named(
        await send(cast, tool_choice={"type": "any", "disable_parallel_tool_use": True}, stream=True).read()
    )
    assert [kind for kind, _ in groupby(event["type"] for event in events)] == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[1]["content_block"]["type"] == "tool_use" and events[1]["content_block"]["input"] == {}
    pieces = [event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"]
    assert len(pieces) > 2 and json.loads("".join(pieces)) == {"city": "Paris"}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
