"""Anthropic's dialect with a real worker: answers, events, endings and errors in its shapes."""

import dataclasses
from typing import Any

import pytest

from apps.accounts.callers import on_thread
from apps.accounts.models import Plan
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange, read_events

pytestmark = pytest.mark.usefixtures("worker")
CHAT = "smollm2-135m-instruct"
HELLO = [{"role": "user", "content": "Hello"}]


def ask(cast: Cast, path: str = "/v1/messages", **changes: Any) -> Exchange:
    value = {"model": CHAT, "messages": HELLO, "max_tokens": 4, "temperature": 0} | changes
    headers = {"x-api-key": cast.raw, "anthropic-version": "2023-06-01"}
    return Exchange("POST", path, value={k: v for k, v in value.items() if v is not ...}, headers=headers)


def count_input(message: Any) -> int:
    """Return the tokens of the prompt, kept ones included."""
    return int(message["usage"]["input_tokens"]) + int(message["usage"]["cache_read_input_tokens"])


async def test_an_answer_has_anthropics_shape(cast: Cast) -> None:
    exchange = ask(cast, system=[{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}])
    answer = await exchange.read_json()
    assert exchange.status == 200, answer
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", CHAT)
    assert answer["content"][0]["type"] == "text" and answer["content"][0]["text"]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("max_tokens", None)
    assert answer["usage"]["output_tokens"] == 4 and answer["usage"]["input_tokens"] > 5
    assert exchange.headers["request-id"] == exchange.headers["x-request-id"]


async def test_the_events_of_a_stream(cast: Cast) -> None:
    whole = await ask(cast).read_json()
    body = (await ask(cast, stream=True).read()).decode()
    pairs = [event.partition("\ndata: ") for event in body.split("\n\n") if event]
    events = read_events("\n\n".join(f"data: {data}" for _, _, data in pairs).encode())
    kinds = [event["type"] for event in events]
    assert [head.removeprefix("event: ") for head, _, _ in pairs] == kinds
    assert kinds[:3] == ["message_start", "content_block_start", "ping"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert "".join(event["delta"]["text"] for event in events[3:-3]) == whole["content"][0]["text"]
    assert count_input(events[0]["message"]) == count_input(whole)
    nothing = {"stop_sequence": None, "stop_details": None, "container": None}
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", **nothing}
    assert nothing.items() <= whole.items()
    assert events[0]["message"].keys() == whole.keys() and events[0]["message"]["usage"].keys() == whole["usage"].keys()
    assert count_input(events[-2]) == count_input(whole)
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


async def test_a_stop_sequence_is_named(cast: Cast) -> None:
    text = (await ask(cast, max_tokens=12).read_json())["content"][0]["text"]
    stop = text[4:8]
    answer = await ask(cast, max_tokens=12, stop_sequences=["never said", stop]).read_json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
    assert answer["content"][0]["text"] == text[: text.index(stop)]


async def test_an_answer_goes_on_from_the_assistants_words(cast: Cast) -> None:
    from apps.inference import catalog, prompts
    from apps.inference.prompts import ChatMessage

    answer = await ask(cast, messages=[*HELLO, {"role": "assistant", "content": "The best answer is ("}]).read_json()
    model = await catalog.get_model(CHAT)
    before = await prompts.build_prompt(model, [ChatMessage(role="user", content="Hello")])
    ids = [*before, *await prompts.encode_prompt(model, "The best answer is (")]
    by_hand = Exchange(
        "POST",
        "/v1/completions",
        key=cast.raw,
        value={"model": CHAT, "prompt": ids, "max_tokens": 4, "temperature": 0},
    )
    assert (await by_hand.read_json())["choices"][0]["text"] == answer["content"][0]["text"]
    assert count_input(answer) == len(ids)


async def test_tokens_are_counted_as_they_are_charged(cast: Cast) -> None:
    messages = [*HELLO, {"role": "user", "content": "and again"}, {"role": "assistant", "content": "Well"}]
    counted = await ask(
        cast, "/v1/messages/count_tokens", messages=messages, max_tokens=..., temperature=...
    ).read_json()
    charged = await ask(cast, messages=messages).read_json()
    assert counted == {"input_tokens": count_input(charged)}


BAD: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"max_tokens": ...}, 400, "invalid_request_error", "max_tokens"),
    ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
    ({"messages": []}, 400, "invalid_request_error", "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, 400, "invalid_request_error", "messages[0].role"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_request_error", "messages"),
    (
        {"messages": [*HELLO, {"role": "assistant", "content": "x "}]},
        400,
        "invalid_request_error",
        "messages[1].content",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        400,
        "invalid_request_error",
        "messages[0].content[0].type",
    ),
    ({"temperature": 1.5}, 400, "invalid_request_error", "temperature"),
    ({"stop_sequences": [" "]}, 400, "invalid_request_error", "stop_sequences"),
    ({"tools": [{"name": "f"}]}, 400, "invalid_request_error", "tools[0].input_schema"),
    ({"tools": [{"name": "f", "input_schema": {}}]}, 400, "invalid_request_error", "tools"),
    ({"tools": [{"name": "bash", "type": "bash_20250124"}]}, 400, "invalid_request_error", "tools[0].type"),
    ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice"),
    ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, 400, "invalid_request_error", "thinking"),
    ({"n": 2}, 400, "invalid_request_error", "n"),
    ({"model": "claude"}, 404, "not_found_error", "model"),
]


@pytest.mark.parametrize(("changes", "status", "kind", "param"), BAD)
async def test_bad_requests(cast: Cast, changes: dict[str, Any], status: int, kind: str, param: str) -> None:
    exchange = ask(cast, **changes)
    answer = await exchange.read_json()
    assert (exchange.status, answer["type"], answer["error"]["type"]) == (status, "error", kind), answer
    assert answer["error"].get("param") == param and answer["request_id"] == exchange.headers["request-id"]


async def test_refusals_have_anthropics_names(cast: Cast) -> None:
    stranger = Exchange("POST", "/v1/messages", value={}, headers={"x-api-key": "sk-aiscale-no"})
    assert (await stranger.read_json())["error"]["type"] == "authentication_error" and stranger.status == 401
    version = Exchange("POST", "/v1/messages", value={}, key=cast.raw, headers={"anthropic-version": "2020-01-01"})
    assert "anthropic-version" in (await version.read_json())["error"]["message"]
    for method, path, headers, status in (
        ("GET", "/v1/messages", {}, 405),
        ("POST", "/v1/messages", {"content-encoding": "br"}, 415),
    ):
        mistaken = Exchange(method, path, value={}, key=cast.raw, headers=headers)
        assert (await mistaken.read_json())["error"]["type"] == "invalid_request_error" and mistaken.status == status
    plan = await on_thread(lambda: Plan.objects.get(slug="enterprise"))
    plan.requests_per_window = 1
    await on_thread(plan.save)
    assert (await ask(cast).read_json())["type"] == "message"
    hurried = ask(cast)
    assert (await hurried.read_json())["error"]["type"] == "rate_limit_error"
    assert hurried.status == 429 and int(hurried.headers["retry-after"]) >= 1


async def test_a_full_queue_is_overloaded(cast: Cast, settings: Any) -> None:
    settings.ENV = dataclasses.replace(settings.ENV, queue_limit=0)
    exchange = ask(cast)
    answer = await exchange.read_json()
    assert (exchange.status, answer["error"]["type"], answer["error"]["code"]) == (
        529,
        "overloaded_error",
        "queue_full",
    )


async def list_models(cast: Cast, query: str, status: int = 200) -> Any:
    headers = {"x-api-key": cast.raw, "anthropic-version": "2023-06-01"}
    exchange = Exchange("GET", "/v1/models", headers=headers, query=query)
    answer = await exchange.read_json()
    assert exchange.status == status, answer
    return answer


async def test_models_come_in_pages(cast: Cast) -> None:
    ids = [model["id"] for model in (await list_models(cast, ""))["data"]]
    assert len(ids) == 3
    first = await list_models(cast, "limit=2")
    assert ([model["id"] for model in first["data"]], first["has_more"]) == (ids[:2], True)
    assert (first["first_id"], first["last_id"]) == (ids[0], ids[1])
    rest = await list_models(cast, f"limit=2&after_id={ids[1]}")
    assert ([model["id"] for model in rest["data"]], rest["has_more"]) == (ids[2:], False)
    before = await list_models(cast, f"limit=1&before_id={ids[2]}&beta=true")
    assert ([model["id"] for model in before["data"]], before["has_more"]) == ([ids[1]], True)
    none = await list_models(cast, f"before_id={ids[0]}")
    assert none == {"data": [], "has_more": False, "first_id": None, "last_id": None}
    assert (await list_models(cast, "limit=0", 400))["error"]["param"] == "limit"
    assert (await list_models(cast, "after_id=a&before_id=b", 400))["error"]["param"] == "before_id"
    assert (await list_models(cast, "after_id=nobody", 404))["error"]["param"] == "after_id"
    assert (await list_models(cast, "order=asc", 400))["error"]["param"] == "order"
    openais = await Exchange("GET", "/v1/models", key=cast.raw, query=f"after_id={ids[0]}").read_json()
    assert [model["id"] for model in openais["data"]] == ids[1:] and openais["object"] == "list"


async def test_an_answer_in_json_of_a_schema(cast: Cast) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"enum": ["yes"]}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    config = {"format": {"type": "json_schema", "schema": schema}}
    answer = await ask(cast, output_config=config, max_tokens=30).read_json()
    assert answer["content"][0]["text"] == '{"ok": "yes"}' and answer["stop_reason"] == "end_turn"
    plain = ask(cast, output_config={"effort": "high", "format": None})
    assert (await plain.read_json())["type"] == "message" and plain.status == 200
    counted = ask(cast, "/v1/messages/count_tokens", output_config=config, max_tokens=..., temperature=...)
    assert (await counted.read_json())["input_tokens"] > 3
    tool = {"name": "f", "input_schema": {"type": "object"}}
    begun = [*HELLO, {"role": "assistant", "content": "{"}]
    for changes, param in (
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"output_config": {"odd": 1}}, "output_config.odd"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
            "output_config.format",
        ),
        ({"output_config": config, "tools": [tool]}, "output_config.format"),
        ({"output_config": config, "messages": begun}, "output_config.format"),
    ):
        refused = ask(cast, **changes)
        error = (await refused.read_json())["error"]
        assert (refused.status, error["param"]) == (400, param), error
        assert "response_format" not in error["message"]
