"""Every documented parameter is honoured, changes nothing by its nature, or is refused by its name. None is ignored silently.

The lists are those of the official clients' own types, so a new release of a client that knows more shows here. Real worker (fake runner).
"""

import inspect
import json
from typing import Any

import pytest
from anthropic.types import message_create_params
from openai.types import completion_create_params, embedding_create_params, moderation_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from typing_extensions import get_type_hints

from apps.gateway import chat_schema, text_schema
from apps.gateway.embeddings import EmbeddingBody
from apps.gateway.messages import schema as messages_schema
from apps.gateway.moderations import ModerationBody
from apps.gateway.responses import schema as responses_schema
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange
from tests.apps.gateway.test_cache import CHAT, ask, chat

USER = frozenset({"user"})
SPOKEN: list[tuple[str, Any, type[Any], frozenset[str], Any]] = [
    ("/v1/chat/completions", chat_create_params, chat_schema.ChatBody, chat_schema.HARMLESS, chat_schema.DEFAULTS_ONLY),
    (
        "/v1/completions",
        completion_create_params,
        text_schema.TextBody,
        text_schema.HARMLESS,
        text_schema.DEFAULTS_ONLY,
    ),
    ("/v1/embeddings", embedding_create_params, EmbeddingBody, USER, {}),
    ("/v1/moderations", moderation_create_params, ModerationBody, frozenset(), {}),
    (
        "/v1/responses",
        response_create_params,
        responses_schema.ResponseBody,
        responses_schema.HARMLESS,
        responses_schema.DEFAULTS_ONLY,
    ),
    (
        "/v1/messages",
        message_create_params,
        messages_schema.MessagesBody,
        messages_schema.HARMLESS,
        messages_schema.DEFAULTS_ONLY,
    ),
]


def list_documented(params: Any) -> set[str]:
    """Return the names of all parameters that a client's types know for one endpoint."""
    kinds = [
        kind for name, kind in inspect.getmembers(params, inspect.isclass) if "CreateParams" in name or "Base" in name
    ]
    mine = [kind for kind in kinds if kind.__module__ == params.__name__ and hasattr(kind, "__total__")]
    wanted = [kind for kind in mine if kind.__name__.endswith(("CreateParamsBase", "CreateParams", "Streaming"))]
    return {name for kind in wanted for name in kind.__annotations__}


@pytest.mark.parametrize(
    ("path", "params", "body", "harmless", "defaults_only"), SPOKEN, ids=[row[0] for row in SPOKEN]
)
@pytest.mark.django_db(transaction=True)
async def test_each_one_is_honoured_or_refused_by_name(
    cast: Cast, path: str, params: Any, body: type[Any], harmless: frozenset[str], defaults_only: Any
) -> None:
    documented = list_documented(params)
    honoured = set(get_type_hints(body))
    assert len(documented) >= 2 and "model" in documented
    for name in sorted(documented - honoured - harmless):
        refused = await ask(cast.raw, {name: "something else"}, path)
        assert refused.status == 400, name
        error = json.loads(refused.body)["error"]  # type: ignore[attr-defined]
        assert name in (error.get("param") or error["message"]), (name, error)
    # what we say changes nothing is a label or a hint
    labels = {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user"}
    assert harmless <= labels | {"cache_control"}
    assert not honoured & set(defaults_only)


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_obfuscation_hides_the_length_of_what_is_told(cast: Cast, path: str) -> None:
    asked: dict[str, Any] = {
        "/v1/chat/completions": chat(),
        "/v1/completions": {"model": CHAT, "prompt": "Once upon", "max_tokens": 6},
        "/v1/responses": {"model": CHAT, "input": "Hello", "max_output_tokens": 6, "store": False},
    }[path]
    for wished in (False, True):
        value = asked | {"stream": True, "stream_options": {"include_obfuscation": wished}}
        exchange = Exchange("POST", path, key=cast.raw, value=value)
        lines = [part for part in (await exchange.read()).split(b"\n") if part.startswith(b"data: {")]
        told = [line for line in lines if b'"delta":' in line or (b'"text":' in line and b'"choices":[{' in line)]
        assert len(told) >= 3
        assert all((b'"obfuscation":"' in line) is wished for line in told)
        assert not wished or {(len(line) - len(b"data: ")) % 64 for line in told} == {0}


@pytest.mark.django_db(transaction=True)
async def test_extras_that_cannot_be_included_are_refused(cast: Cast) -> None:
    refused = await ask(
        cast.raw,
        {"model": CHAT, "input": "Hello", "include": ["reasoning.encrypted_content", "message.output_text.logprobs"]},
        "/v1/responses",
    )
    error = json.loads(refused.body)["error"]  # type: ignore[attr-defined]
    assert (refused.status, error["param"]) == (400, "include[1]")


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    ("path", "extra"),
    [
        ("/v1/chat/completions", {"verbosity": "medium", "reasoning_effort": "none"}),
        ("/v1/responses", {"text": {"verbosity": "medium"}, "reasoning": {"effort": "none"}}),
    ],
)
async def test_a_wish_for_what_is_so_anyway_is_no_refusal(cast: Cast, path: str, extra: dict[str, Any]) -> None:
    asked = {"/v1/chat/completions": chat(), "/v1/responses": {"model": CHAT, "input": "Hi", "max_output_tokens": 3}}
    assert (await ask(cast.raw, asked[path] | extra, path)).status == 200


SAID = [{"role": "user", "content": "Hi"}]
NESTED: list[tuple[str, dict[str, Any], str]] = [
    (
        "/v1/chat/completions",
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": "Hi", "odd": 1}]}]),
        "messages[0].content[0].odd",
    ),
    ("/v1/chat/completions", chat(stream=True, stream_options={"odd": 1}), "stream_options.odd"),
    ("/v1/chat/completions", chat(response_format={"type": "text", "odd": 1}), "response_format.odd"),
    ("/v1/chat/completions", chat(response_format={"type": "json_object", "odd": 1}), "response_format.odd"),
    (
        "/v1/chat/completions",
        chat(response_format={"type": "json_schema", "odd": 1, "json_schema": {"name": "x", "schema": {}}}),
        "response_format.odd",
    ),
    (
        "/v1/chat/completions",
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "odd": 1, "schema": {}}}),
        "response_format.json_schema.odd",
    ),
    ("/v1/chat/completions", chat(service_tier="flex"), "service_tier"),
    (
        "/v1/completions",
        {"model": CHAT, "prompt": "x", "stream": True, "stream_options": {"odd": 1}},
        "stream_options.odd",
    ),
    ("/v1/moderations", {"input": [{"type": "text", "text": "x", "odd": 1}]}, "input[0].odd"),
    (
        "/v1/responses",
        {"model": CHAT, "input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "odd": 1}]}]},
        "input[0].content[0].odd",
    ),
    ("/v1/responses", {"model": CHAT, "input": "x", "text": {"odd": 1}}, "text.odd"),
    ("/v1/responses", {"model": CHAT, "input": "x", "text": {"format": {"type": "text", "odd": 1}}}, "text.format.odd"),
    (
        "/v1/responses",
        {
            "model": CHAT,
            "input": "x",
            "text": {"format": {"type": "json_schema", "name": "x", "schema": {}, "odd": 1}},
        },
        "text.format.odd",
    ),
    ("/v1/responses", {"model": CHAT, "input": "x", "service_tier": "priority"}, "service_tier"),
    (
        "/v1/responses",
        {"model": CHAT, "input": "x", "stream": True, "stream_options": {"odd": 1}},
        "stream_options.odd",
    ),
    ("/v1/messages", {"model": CHAT, "messages": SAID, "max_tokens": 2, "service_tier": "priority"}, "service_tier"),
]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(("path", "value", "param"), NESTED)
async def test_no_part_of_a_body_holds_what_nobody_reads(
    cast: Cast, path: str, value: dict[str, Any], param: str
) -> None:
    refused = await ask(cast.raw, value, path)
    error = json.loads(refused.body)["error"]  # type: ignore[attr-defined]
    assert (refused.status, error["param"]) == (400, param), error
    assert param.rpartition(".")[2] in error["message"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("worker")
async def test_what_the_clients_send_back_is_taken(cast: Cast) -> None:
    """The text of an answer comes back with its annotations; hints for caches of prompts are no wishes."""
    part = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    said = [{"role": "assistant", "content": [part]}, {"role": "user", "content": "Go on"}]
    value = {"model": CHAT, "input": said, "store": False, "max_output_tokens": 2, "service_tier": "auto"}
    assert (await ask(cast.raw, value, "/v1/responses")).status == 200
    hinted = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    value = chat(messages=[{"role": "user", "content": [hinted]}], service_tier="default", max_tokens=2)
    assert (await ask(cast.raw, value)).status == 200


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("path", "value", "param"),
    [
        ("/v1/chat/completions", chat(metadata=5), "metadata"),
        ("/v1/chat/completions", chat(user=["ada"]), "user"),
        ("/v1/embeddings", {"model": "all-minilm-l6-v2", "input": "x", "user": 5}, "user"),
        ("/v1/responses", {"model": CHAT, "input": "x", "prompt_cache_key": {}}, "prompt_cache_key"),
        ("/v1/messages", {"model": CHAT, "messages": SAID, "max_tokens": 2, "metadata": "x"}, "metadata"),
    ],
)
async def test_labels_are_of_their_kind(cast: Cast, path: str, value: dict[str, Any], param: str) -> None:
    refused = await ask(cast.raw, value, path)
    error = json.loads(refused.body)["error"]  # type: ignore[attr-defined]
    assert (refused.status, error["param"]) == (400, param), error
