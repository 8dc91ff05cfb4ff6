"""The OpenAPI document says what is served, and the page shows it."""

import html
import json
import re
from typing import Any

import anthropic.types.messages
import msgspec
import openai.types.chat
import openai.types.responses
import pydantic
import pytest
from django.test import Client
from drf_spectacular.validation import validate_schema

from apps.gateway import shapes
from apps.gateway.endpoints import ROUTER
from apps.gateway.errors import STATUSES
from apps.gateway.messages import batch_shapes
from apps.gateway.reference import document, examples
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange

OFFICIAL: dict[Any, Any] = {
    shapes.ChatCompletion: openai.types.chat.ChatCompletion,
    shapes.TextCompletion: openai.types.Completion,
    shapes.EmbeddingList: openai.types.CreateEmbeddingResponse,
    shapes.Moderation: openai.types.ModerationCreateResponse,
    shapes.Response: openai.types.responses.Response,
    shapes.InputTokenCount: openai.types.responses.InputTokenCountResponse,
    shapes.Message: anthropic.types.Message,
    shapes.TokenCount: anthropic.types.MessageTokensCount,
    batch_shapes.MessageBatch: anthropic.types.messages.MessageBatch,
}
"""What the official clients read answers as. They construct it without a check: a field that is missing fails in the caller's program."""

EVENTS: dict[str, Any] = {
    "/v1/chat/completions": openai.types.chat.ChatCompletionChunk,
    "/v1/responses": openai.types.responses.ResponseStreamEvent,
    "/v1/messages": anthropic.types.RawMessageStreamEvent,
}


def test_the_document_names_every_route_and_is_valid() -> None:
    made = json.loads(document.encode_document())
    validate_schema(made)
    for route in ROUTER.routes:
        operation = made["paths"][route.path.replace(":path", "")][route.method.lower()]
        assert operation["summary"] and operation["tags"]
        assert {"401", "429", "500", "503"} <= set(operation["responses"])
    names = [item["operationId"] for path in made["paths"].values() for item in path.values()]
    assert len(names) == len(set(names))
    assert not [name for name in made["components"]["schemas"] if name.startswith("apps.")]


def test_each_landmark_of_the_page_has_a_name_of_its_own(client: Client) -> None:
    page = client.get("/api/docs").content.decode()
    names = [re.sub(r"<.*?>", "", heading) for _, heading in re.findall(r'<h2 id="([\w-]+)"[^>]*>(.*?)</h2>', page)]
    regions = re.findall(r'role="region" aria-label="([^"]*)"', page)
    assert len(names) > 8 and len(regions) > 20
    assert len({*names, *regions}) == len(names) + len(regions)


def test_every_status_that_errors_have_is_described() -> None:
    ours_alone = {499, 410}
    assert {status for status, _ in STATUSES.values()} - ours_alone <= set(document.STATUSES)


def test_parameters_come_from_the_types_that_read_them() -> None:
    schemas = document.make_document()["components"]["schemas"]
    chat = schemas["ChatBody"]
    assert chat["required"] == ["model", "messages"] and chat["additionalProperties"] is False
    assert {"temperature", "top_p", "stop", "seed", "user", "store"} <= set(chat["properties"])
    assert chat["properties"]["store"]["enum"] == [None, False]


async def test_answers_have_the_shapes_that_are_documented(cast: Cast, worker: None) -> None:
    async def ask(method: str, path: str, value: Any = None, **headers: str) -> bytes:
        exchange = Exchange(method, path, key=cast.raw, value=value, headers=headers)
        body = await exchange.read()
        assert exchange.status == 200, body
        return body

    made = [route for route in ROUTER.routes if route.example is not None and route.path != "/v1/batches"]
    assert len(made) >= 6
    for route in made:
        body = await ask("POST", route.path, dict(route.example or {}))
        if route.response is not None:
            msgspec.json.decode(body, type=route.response)
            OFFICIAL[route.response].model_validate_json(body)
        if route.path == "/v1/responses":
            stored = json.loads(body)["id"]
    msgspec.json.decode(await ask("GET", f"/v1/responses/{stored}"), type=shapes.Response)
    msgspec.json.decode(await ask("GET", f"/v1/responses/{stored}/input_items"), type=shapes.InputItemList)
    listed = await ask("GET", "/v1/models")
    assert [openai.types.Model.model_validate(item) for item in json.loads(listed)["data"]]
    msgspec.json.decode(listed, type=shapes.ModelList)
    models = json.loads(await ask("GET", "/v1/models", **{"anthropic-version": "2023-06-01"}))["data"]
    told = {item["id"]: anthropic.types.ModelInfo.model_validate(item) for item in models}
    chat, embed = told["smollm2-135m-instruct"], told["all-minilm-l6-v2"]
    assert chat.max_tokens and chat.max_input_tokens and chat.max_tokens <= chat.max_input_tokens
    assert (chat.lifecycle, embed.max_tokens) == ("active", None)


@pytest.mark.parametrize("path", EVENTS)
async def test_events_are_what_the_official_clients_read(cast: Cast, worker: None, path: str) -> None:
    reader = pydantic.TypeAdapter[Any](EVENTS[path])
    [example] = [route.example for route in ROUTER.routes if (route.method, route.path) == ("POST", path)]
    exchange = Exchange("POST", path, key=cast.raw, value={**(example or {}), "stream": True})
    body = await exchange.read()
    assert exchange.status == 200, body
    events = [line.removeprefix(b"data: ") for line in body.splitlines() if line.startswith(b"data: ")]
    # clients drop pings before they read them
    told = [reader.validate_json(event) for event in events if event != b"[DONE]" and b'"ping"' not in event]
    assert len(told) > 2


@pytest.mark.django_db
def test_the_page_shows_every_route_with_programs_that_compile(client: Client) -> None:
    page = client.get("/api/docs")
    assert page.status_code == 200
    text = html.unescape(page.content.decode())
    for route in ROUTER.routes:
        assert route.path.replace(":path", "") in text and route.summary in text
        compile(examples.write_python(route, "http://x"), route.path, "exec")
    assert "style=" not in text and "<script>" not in text
    answer = client.get("/api/openapi.json")
    assert answer.headers["Access-Control-Allow-Origin"] == "*" and answer.json()["openapi"] == "3.1.0"
    assert client.post("/api/openapi.json").status_code == 405
