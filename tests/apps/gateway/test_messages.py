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
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
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
