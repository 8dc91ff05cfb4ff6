"""The Responses API with a real worker: made, streamed, kept, gone on from, in the background, cancelled, deleted."""

import asyncio
import json
from typing import Any

import pytest
from redis import Redis

from aiscale.wire import keys
from apps.accounts import audit
from apps.accounts.callers import on_thread
from apps.gateway.models import StoredResponse
from apps.gateway.responses import upkeep
from apps.spend import killswitch
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange, read_events

pytestmark = pytest.mark.usefixtures("worker")
CHAT = "smollm2-135m-instruct"


def ask(cast: Cast, **changes: Any) -> Exchange:
    value = {"model": CHAT, "input": "Hello", "max_output_tokens": 4, "temperature": 0} | changes
    return Exchange("POST", "/v1/responses", key=cast.raw, value=value)


async def fetch(cast: Cast, response_id: str, rest: str = "", method: str = "GET") -> tuple[int, Any]:
    exchange = Exchange(method, f"/v1/responses/{response_id}{rest}", key=cast.raw)
    value = await exchange.read_json()
    return exchange.status, value


async def test_a_response_is_made_kept_and_deleted(cast: Cast) -> None:
    exchange = ask(cast, instructions="Be short.", metadata={"trip": "7"})
    made = await exchange.read_json()
    assert exchange.status == 200, made
    assert (made["object"], made["status"]) == ("response", "incomplete")
    assert made["incomplete_details"] == {"reason": "max_output_tokens"}
    [message] = made["output"]
    assert message["role"] == "assistant" and message["content"][0]["text"]
    assert made["usage"]["output_tokens"] == 4 and made["usage"]["total_tokens"] == made["usage"]["input_tokens"] + 4
    assert (made["instructions"], made["metadata"]) == ("Be short.", {"trip": "7"})
    assert await fetch(cast, made["id"]) == (200, made)
    _, items = await fetch(cast, made["id"], "/input_items")
    assert [item["content"][0]["text"] for item in items["data"]] == ["Hello"]
    assert await fetch(cast, made["id"], method="DELETE") == (
        200,
        {"id": made["id"], "object": "response", "deleted": True},
    )
    status, gone = await fetch(cast, made["id"])
    assert (status, gone["error"]["code"]) == (404, "not_found")


async def test_a_response_in_json_of_a_schema(cast: Cast) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"enum": ["yes"]}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    made = await ask(cast, text={"format": form}, max_output_tokens=60).read_json()
    assert (made["status"], made["text"]) == ("completed", {"format": form})
    assert json.loads(made["output"][0]["content"][0]["text"]) == {"ok": "yes"}
    body = await ask(cast, text={"format": form}, max_output_tokens=60, stream=True).read()
    events = [json.loads(event.partition("\ndata: ")[2]) for event in body.decode().split("\n\n") if event]
    pieces = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert json.loads("".join(pieces)) == {"ok": "yes"}


async def test_what_is_not_to_be_stored_is_not(cast: Cast) -> None:
    made = await ask(cast, store=False).read_json()
    assert (await fetch(cast, made["id"]))[0] == 404
    assert await on_thread(StoredResponse.objects.count) == 0


async def test_another_organizations_response_does_not_exist(cast: Cast) -> None:
    made = await ask(cast).read_json()
    stranger = await on_thread(lambda: Cast("bob@example.com"))
    for method, rest in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        assert (await fetch(stranger, made["id"], rest, method))[0] == 404
    answer = await ask(stranger, previous_response_id=made["id"]).read_json()
    assert answer["error"]["param"] == "previous_response_id"
    assert (await fetch(cast, made["id"]))[0] == 200


async def test_the_events_of_a_stream(cast: Cast) -> None:
    exchange = ask(cast, stream=True)
    body = await exchange.read()
    lines = [event.partition("\ndata: ") for event in body.decode().split("\n\n") if event]
    events = read_events(b"\n\n".join(b"data: " + data.encode() for _, _, data in lines))
    kinds = [event["type"] for event in events]
    assert [head.removeprefix("event: ") for head, _, _ in lines] == kinds
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = "".join(event["delta"] for event in events[4:-4])
    final = events[-1]["response"]
    assert final["output"][0]["content"][0]["text"] == text == events[-4]["text"]
    assert events[0]["response"]["status"] == "in_progress" and final["id"] == events[0]["response"]["id"]
    assert await fetch(cast, final["id"]) == (200, final)


async def test_a_conversation_goes_on(cast: Cast) -> None:
    first = await ask(cast, input="One", instructions="Never repeated").read_json()
    second = await ask(cast, input=[{"role": "user", "content": "Two"}], previous_response_id=first["id"]).read_json()
    third = await ask(
        cast,
        input=[{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Three"}]}],
        previous_response_id=second["id"],
    ).read_json()
    assert third["previous_response_id"] == second["id"]
    said = lambda response: response["output"][0]["content"][0]["text"]  # noqa: E731
    by_hand = await ask(
        cast,
        input=[
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": said(first)},
            {"role": "user", "content": "Two"},
            {"role": "assistant", "content": [{"type": "output_text", "text": said(second)}]},
            {"role": "user", "content": "Three"},
        ],
    ).read_json()
    assert said(third) == said(by_hand)
    for name in ("input_tokens", "output_tokens"):
        assert third["usage"][name] == by_hand["usage"][name]
    await fetch(cast, first["id"], method="DELETE")
    broken = await ask(cast, previous_response_id=third["id"]).read_json()
    assert broken["error"]["code"] == "not_found"


async def test_a_background_response_ends_by_itself_or_is_cancelled(cast: Cast) -> None:
    made = await ask(cast, background=True).read_json()
    assert made["status"] == "in_progress" and made["output"] == []
    for _ in range(100):
        _, now = await fetch(cast, made["id"])
        if now["status"] != "in_progress":
            break
        await asyncio.sleep(0.1)
    assert now["status"] == "incomplete" and now["usage"]["output_tokens"] == 4 and now["output"][0]["content"]
    long = await ask(cast, background=True, max_output_tokens=3000).read_json()
    await asyncio.sleep(0.5)
    status, cancelled = await fetch(cast, long["id"], "/cancel", "POST")
    assert (status, cancelled["status"]) == (200, "cancelled")
    assert 0 < cancelled["usage"]["output_tokens"] < 3000
    # again: nothing changes
    assert await fetch(cast, long["id"], "/cancel", "POST") == (200, cancelled)
    status, refused = await fetch(cast, (await ask(cast).read_json())["id"], "/cancel", "POST")
    assert (status, refused["error"]["param"]) == (400, "response_id")


async def test_a_response_whose_web_process_died_is_finished_from_its_jobs_log(cast: Cast, redis_url: str) -> None:
    made = await ask(cast, background=True).read_json()
    client = Redis.from_url(redis_url)
    while not client.xlen(keys.FINISHED):
        await asyncio.sleep(0.05)
    await on_thread(lambda: StoredResponse.objects.update(created_at="2026-01-01T00:00:00Z"))
    assert await on_thread(upkeep.finish_lost) == 1
    row = await on_thread(lambda: StoredResponse.objects.get(public_id=made["id"]))
    assert row.status == "incomplete" and row.response["usage"]["output_tokens"] == 4
    # with its log gone nobody knows the answer any more, and it is said so
    await on_thread(lambda: StoredResponse.objects.update(status="in_progress"))
    client.flushall()
    assert await on_thread(upkeep.finish_lost) == 1
    row = await on_thread(lambda: StoredResponse.objects.get(public_id=made["id"]))
    assert row.status == "failed" and row.response["error"]["code"] == "worker_lost"


async def test_expired_responses_are_forgotten(cast: Cast) -> None:
    made = await ask(cast).read_json()
    await on_thread(lambda: StoredResponse.objects.update(expires_at="2026-01-01T00:00:00Z"))
    assert (await fetch(cast, made["id"]))[0] == 404
    assert await on_thread(upkeep.forget_expired) == 1


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "invalid_request", "input"),
    ({"input": []}, "invalid_request", "input"),
    ({"input": [{"type": "reasoning"}]}, "unsupported_parameter", "input[0].type"),
    ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "invalid_request", "input"),
    ({"input": [{"type": "function_call", "call_id": "x", "name": "f"}]}, "invalid_request", "input[0].arguments"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "invalid_request", "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "invalid_request", "input[0].content[0]"),
    ({"input": "word " * 5000}, "context_length_exceeded", "input"),
    ({"max_output_tokens": 0}, "invalid_request", "max_output_tokens"),
    ({"max_output_tokens": 5000}, "invalid_request", "max_output_tokens"),
    ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools[0].type"),
    ({"tools": [{"type": "function", "name": "f"}]}, "unsupported_parameter", "tools"),
    ({"text": {"format": {"type": "xml"}}}, "invalid_request", "text.format"),
    ({"text": {"format": {"type": "json_schema", "schema": 3}}}, "invalid_request", "text.format"),
    ({"text": {"format": {"type": "json_schema", "schema": {"enum": []}}}}, "invalid_request", "text.format"),
    ({"text": {"verbosity": "high"}}, "invalid_request", "text.verbosity"),
    ({"reasoning": {"effort": "high"}}, "unsupported_parameter", "reasoning"),
    ({"truncation": "auto"}, "unsupported_parameter", "truncation"),
    ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
    ({"background": True, "store": False}, "invalid_request", "store"),
    ({"previous_response_id": "resp_nope"}, "not_found", "previous_response_id"),
    ({"metadata": {"a": "b" * 600}}, "invalid_request", "metadata"),
    ({"messages": []}, "invalid_request", "messages"),
    ({"model": "all-minilm-l6-v2"}, "invalid_request", "model"),
]


@pytest.mark.parametrize(("changes", "code", "param"), BAD)
async def test_bad_requests_are_refused_by_name(cast: Cast, changes: dict[str, Any], code: str, param: str) -> None:
    exchange = ask(cast, **changes)
    error = (await exchange.read_json())["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert exchange.status in (400, 404) and "max_tokens" not in error["message"]
    assert await on_thread(StoredResponse.objects.count) == 0


async def test_what_was_said_comes_in_pages(cast: Cast) -> None:
    said = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    made = await ask(cast, input=said).read_json()

    async def page(query: str) -> tuple[int, Any]:
        path = f"/v1/responses/{made['id']}/input_items"
        exchange = Exchange("GET", path, key=cast.raw, query=query)
        value = await exchange.read_json()
        return exchange.status, value

    _, whole = await page("order=asc")
    ids = [item["id"] for item in whole["data"]]
    assert len(ids) == 3 and not whole["has_more"]
    assert [item["id"] for item in (await page(""))[1]["data"]] == ids[::-1]
    _, first = await page("order=asc&limit=2")
    assert [item["id"] for item in first["data"]] == ids[:2]
    assert (first["has_more"], first["first_id"], first["last_id"]) == (True, ids[0], ids[1])
    _, rest = await page(f"order=asc&limit=2&after={ids[1]}")
    assert [item["id"] for item in rest["data"]] == ids[2:] and not rest["has_more"]
    assert [item["id"] for item in (await page(f"after={ids[1]}"))[1]["data"]] == ids[:1]
    for query, name in (("limit=0", "limit"), ("order=up", "order"), ("after=msg_x", "after"), ("what=1", "what")):
        status, refused = await page(query)
        assert status in (400, 404) and refused["error"]["param"] == name, query


async def test_settings_of_which_nothing_is_given_are_no_wishes(cast: Cast) -> None:
    """Clients send back what a response said of itself."""
    made = await ask(cast).read_json()
    again = await ask(cast, reasoning=made["reasoning"], text=made["text"]).read_json()
    assert again["object"] == "response"
    refused = await ask(cast, reasoning={"effort": "low", "summary": None}).read_json()
    assert refused["error"]["param"] == "reasoning"


async def test_labels_are_told_again(cast: Cast) -> None:
    labels = {"user": "u-1", "safety_identifier": "s-1", "prompt_cache_key": "k-1"}
    made = await ask(cast, **labels).read_json()
    assert {name: made[name] for name in labels} == labels
    _, stored = await fetch(cast, made["id"])
    assert stored == made
    none = await ask(cast, store=False).read_json()
    assert {none[name] for name in labels} == {None}


async def test_tokens_of_an_input_are_counted_as_they_are_charged(cast: Cast) -> None:
    first = await ask(cast).read_json()
    for changes in (
        {"instructions": "Be short."},
        {"input": [{"role": "user", "content": "Hello"}]},
        {"previous_response_id": first["id"]},
    ):
        made = await ask(cast, **changes).read_json()
        value = {"model": CHAT, "input": "Hello"} | changes
        exchange = Exchange("POST", "/v1/responses/input_tokens", key=cast.raw, value=value)
        counted = await exchange.read_json()
        assert exchange.status == 200, counted
        assert counted == {"object": "response.input_tokens", "input_tokens": made["usage"]["input_tokens"]}
    for changes, status, param in (
        ({"model": "nobody"}, 404, "model"),
        ({"truncation": "auto"}, 400, "truncation"),
        ({"max_output_tokens": 3}, 400, "max_output_tokens"),
        ({"previous_response_id": "resp_nobody"}, 404, "previous_response_id"),
    ):
        value = {"model": CHAT, "input": "Hello"} | changes
        refused = Exchange("POST", "/v1/responses/input_tokens", key=cast.raw, value=value)
        error = (await refused.read_json())["error"]
        assert (refused.status, error["param"]) == (status, param), error


def read_named(body: bytes) -> list[Any]:
    """Read events that come with their names."""
    return [json.loads(line.removeprefix("data: ")) for line in body.decode().splitlines() if line.startswith("data: ")]


async def stream(cast: Cast, response_id: str, query: str = "", status: int = 200) -> Any:
    exchange = Exchange("GET", f"/v1/responses/{response_id}", key=cast.raw, query=f"stream=true{query}")
    body = await exchange.read()
    assert exchange.status == status, body
    return read_named(body) if status == 200 else json.loads(body)["error"]


async def test_the_events_of_a_stored_response_are_told_again(cast: Cast, redis_url: str) -> None:
    first = read_named(await ask(cast, stream=True, max_output_tokens=8).read())
    response_id = first[0]["response"]["id"]
    assert await stream(cast, response_id) == first
    assert await stream(cast, response_id, "&starting_after=3") == first[4:]
    assert await stream(cast, response_id, f"&starting_after={first[-1]['sequence_number']}") == []
    padded = await stream(cast, response_id, "&include_obfuscation=true")
    assert any("obfuscation" in event for event in padded)
    for query, param in (
        ("stream=maybe", "stream"),
        ("starting_after=3", "starting_after"),
        ("stream=true&starting_after=x", "starting_after"),
        ("include=a", "include"),
    ):
        refused = Exchange("GET", f"/v1/responses/{response_id}", key=cast.raw, query=query)
        assert (await refused.read_json())["error"]["param"] == param and refused.status == 400
    plain = Exchange("GET", f"/v1/responses/{response_id}", key=cast.raw, query="stream=false")
    assert await plain.read_json() == first[-1]["response"]
    stranger = await on_thread(lambda: Cast("bob@example.com"))
    await stream(stranger, response_id, status=404)
    Redis.from_url(redis_url).flushall()
    assert (await stream(cast, response_id, status=400))["param"] == "stream"


async def test_a_background_response_streams_and_is_come_back_to(cast: Cast) -> None:
    """Who leaves ends nothing, and finds every event once."""
    left = ask(cast, background=True, stream=True, max_output_tokens=40)
    seen = b""
    while seen.count(b"output_text.delta") < 6:
        seen += await left.next_part() or b""
    left.leave()
    await left.task
    known = read_named(seen[: seen.rindex(b"\n\n") + 2])
    response_id = known[0]["response"]["id"]
    rest = await stream(cast, response_id, f"&starting_after={known[-1]['sequence_number']}")
    assert [event["sequence_number"] for event in (*known, *rest)] == list(range(len(known) + len(rest)))
    final = rest[-1]["response"]
    assert rest[-1]["type"] == "response.incomplete" and final["usage"]["output_tokens"] == 40
    assert await fetch(cast, response_id) == (200, final)


async def test_a_cancelled_background_response_ends_its_streams(cast: Cast) -> None:
    going = ask(cast, background=True, stream=True, max_output_tokens=3000)
    seen = await going.next_part() or b""
    while b"output_text.delta" not in seen:
        seen += await going.next_part() or b""
    response_id = read_named(seen[: seen.index(b"\n\n") + 2])[0]["response"]["id"]
    _, cancelled = await fetch(cast, response_id, "/cancel", "POST")
    assert cancelled["status"] == "cancelled"
    # no event of the official client says "cancelled": the last one is of an answer that is not whole, and its response says it
    last = read_named(await going.read())[-1]
    assert last["type"] == "response.incomplete" and last["response"] == cancelled
    assert cancelled["incomplete_details"] is None and cancelled["output"][0]["status"] == "incomplete"
    assert await fetch(cast, response_id) == (200, cancelled)
    assert (await stream(cast, response_id))[-1] == last


async def test_a_background_response_that_is_killed_fails_with_what_was_made(cast: Cast) -> None:
    """However one asks: it was made, and is paid for."""
    going = ask(cast, background=True, stream=True, max_output_tokens=3000)
    seen = await going.next_part() or b""
    while b"output_text.delta" not in seen:
        seen += await going.next_part() or b""
    response_id = read_named(seen[: seen.index(b"\n\n") + 2])[0]["response"]["id"]
    await on_thread(lambda: killswitch.trip(f"model:{CHAT}", reason="A fire drill", by=audit.by_command()))
    last = read_named(await going.read())[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "killed" and last["response"]["usage"]["output_tokens"] > 0
    assert last["response"]["output"][0]["content"][0]["text"]
    assert await fetch(cast, response_id) == (200, last["response"])
