"""Every bad request ends in an error object with the right status, code and param, and costs nothing."""

from typing import Any

import pytest
from django.utils import timezone
from redis import Redis

from apps.accounts.keys import revoke_key
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange

CHAT, EMBED = "smollm2-135m-instruct", "all-minilm-l6-v2"
HELLO = [{"role": "user", "content": "Hello"}]


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": CHAT, "messages": HELLO} | changes


def say(**message: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": "x"} | message])


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


def nest(depth: int) -> dict[str, Any]:
    return {"type": "array", "items": nest(depth - 1)} if depth else {"type": "string"}


BAD_CHATS: list[tuple[Any, int, str, str | None]] = [
    (chat(model="gpt-4"), 404, "model_not_found", "model"),
    (chat(model=EMBED), 400, "invalid_request", "model"),
    (chat(model=None), 400, "invalid_request", "model"),
    (chat(model=7), 400, "invalid_request", "model"),
    (chat(messages=[]), 400, "invalid_request", "messages"),
    (chat(messages="hi"), 400, "invalid_request", "messages"),
    (chat(messages=["hi"]), 400, "invalid_request", "messages[0]"),
    (chat(messages=None), 400, "invalid_request", "messages"),
    (say(role="wizard"), 400, "invalid_request", "messages[0].role"),
    (say(role="tool"), 400, "invalid_request", "messages[0].tool_call_id"),
    (say(role="function"), 400, "invalid_request", "messages[0].role"),
    (say(role=3), 400, "invalid_request", "messages[0].role"),
    (say(content=None), 400, "invalid_request", "messages[0].content"),
    (say(content=5), 400, "invalid_request", "messages[0].content"),
    (say(content=[{"type": "image_url"}]), 400, "invalid_request", "messages[0].content[0]"),
    (say(content="a\x00b"), 400, "invalid_request", "messages[0].content"),
    (say(content="\ud83d"), 400, "invalid_request", "messages[0].content"),
    (say(name="ada"), 400, "unsupported_parameter", "messages[0].name"),
    (say(content="word " * 5000), 400, "context_length_exceeded", "messages"),
    (chat(max_tokens=0), 400, "invalid_request", "max_tokens"),
    (chat(max_completion_tokens=-5), 400, "invalid_request", "max_completion_tokens"),
    (chat(max_tokens=5000), 400, "invalid_request", "max_tokens"),
    (chat(max_tokens=4096), 400, "context_length_exceeded", "max_tokens"),
    (chat(max_tokens=1.5), 400, "invalid_request", "max_tokens"),
    (chat(max_tokens=True), 400, "invalid_request", "max_tokens"),
    (chat(max_tokens=3, max_completion_tokens=4), 400, "invalid_request", "max_tokens"),
    (chat(temperature=2.1), 400, "invalid_request", "temperature"),
    (chat(temperature=-0.1), 400, "invalid_request", "temperature"),
    (chat(temperature="warm"), 400, "invalid_request", "temperature"),
    (chat(top_p=0), 400, "invalid_request", "top_p"),
    (chat(seed=1 << 63), 400, "invalid_request", "seed"),
    (chat(stop=["a", "b", "c", "d", "e"]), 400, "invalid_request", "stop"),
    (chat(stop=""), 400, "invalid_request", "stop"),
    (chat(stream="yes"), 400, "invalid_request", "stream"),
    (chat(stream_options={"include_usage": True}), 400, "invalid_request", "stream_options"),
    (chat(n=0), 400, "invalid_request", "n"),
    (chat(n=9), 400, "invalid_request", "n"),
    (chat(n=True), 400, "invalid_request", "n"),
    (chat(top_k=-2), 400, "invalid_request", "top_k"),
    (chat(min_p=1.5), 400, "invalid_request", "min_p"),
    (chat(presence_penalty=3), 400, "invalid_request", "presence_penalty"),
    (chat(frequency_penalty=-3), 400, "invalid_request", "frequency_penalty"),
    (chat(repetition_penalty=0), 400, "invalid_request", "repetition_penalty"),
    (chat(logit_bias={"x": 1}), 400, "invalid_request", "logit_bias"),
    (chat(logit_bias={"5": 101}), 400, "invalid_request", "logit_bias"),
    (chat(logit_bias={"49152": 1}), 400, "invalid_request", "logit_bias"),
    (chat(logit_bias={"-1": 1}), 400, "invalid_request", "logit_bias"),
    (chat(logit_bias=[1]), 400, "invalid_request", "logit_bias"),
    (chat(logit_bias={str(n): 1 for n in range(2000)}), 400, "invalid_request", "logit_bias"),
    (chat(top_logprobs=3), 400, "invalid_request", "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), 400, "invalid_request", "top_logprobs"),
    (chat(logprobs=3), 400, "invalid_request", "logprobs"),
    (chat(tools=[{"type": "function"}]), 400, "invalid_request", "tools[0].function"),
    (chat(response_format={"type": "xml"}), 400, "invalid_request", "response_format"),
    (chat(response_format={"type": "json_schema"}), 400, "invalid_request", "response_format"),
    (chat(response_format=schema({"type": "nonsense"})), 400, "invalid_request", "response_format"),
    (
        chat(response_format=schema({"minLength": 5, "maxLength": 2, "type": "string"})),
        400,
        "invalid_request",
        "response_format",
    ),
    (
        chat(response_format=schema({"type": "object", "required": ["a"], "properties": {"a": False}})),
        400,
        "invalid_request",
        "response_format",
    ),
    (
        chat(response_format=schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})),
        400,
        "invalid_request",
        "response_format",
    ),
    (chat(response_format=schema({"not": {"type": "string"}})), 400, "invalid_request", "response_format"),
    (chat(response_format=schema({"$ref": "http://example.com/x"})), 400, "invalid_request", "response_format"),
    (chat(response_format=schema({"type": "string", "pattern": "("})), 400, "invalid_request", "response_format"),
    (chat(response_format=schema({"enum": ["x" * 70_000]})), 400, "invalid_request", "response_format"),
    (chat(response_format=schema(nest(40))), 400, "invalid_request", "response_format"),
    (chat(temprature=1), 400, "invalid_request", "temprature"),
]

BAD_TEXTS: list[tuple[Any, int, str, str | None]] = [
    ({"model": CHAT}, 400, "invalid_request", "prompt"),
    ({"model": CHAT, "prompt": ""}, 400, "invalid_request", "prompt"),
    ({"model": CHAT, "prompt": []}, 400, "invalid_request", "prompt"),
    ({"model": CHAT, "prompt": ["a", 1]}, 400, "invalid_request", "prompt"),
    ({"model": CHAT, "prompt": [[1], ["x"]]}, 400, "invalid_request", "prompt"),
    ({"model": CHAT, "prompt": [10**9]}, 400, "invalid_request", "prompt"),
    ({"model": CHAT, "prompt": ["a"] * 33}, 400, "invalid_request", "prompt"),
    ({"model": CHAT, "prompt": {"text": "a"}}, 400, "invalid_request", "prompt"),
    ({"model": CHAT, "prompt": "word " * 5000}, 400, "context_length_exceeded", "prompt"),
    ({"model": CHAT, "prompt": "a", "max_tokens": 0}, 400, "invalid_request", "max_tokens"),
    ({"model": CHAT, "prompt": "a", "suffix": "z"}, 400, "unsupported_parameter", "suffix"),
    ({"model": CHAT, "prompt": "a", "best_of": 9}, 400, "invalid_request", "best_of"),
    ({"model": CHAT, "prompt": "a", "best_of": 2, "n": 3}, 400, "invalid_request", "best_of"),
    ({"model": CHAT, "prompt": "a", "best_of": 2, "stream": True}, 400, "invalid_request", "best_of"),
    ({"model": CHAT, "prompt": "a", "logprobs": 21}, 400, "invalid_request", "logprobs"),
    ({"model": CHAT, "prompt": "a", "logprobs": 1, "echo": True}, 400, "unsupported_parameter", "echo"),
    ({"model": CHAT, "prompt": "a", "logit_bias": {"x": 1}}, 400, "invalid_request", "logit_bias"),
    ({"model": CHAT, "prompt": "a", "presence_penalty": 3}, 400, "invalid_request", "presence_penalty"),
    ({"model": CHAT, "prompt": "a", "suffix": "b"}, 400, "unsupported_parameter", "suffix"),
    ({"model": CHAT, "prompt": "a", "messages": []}, 400, "invalid_request", "messages"),
    ({"model": CHAT, "prompt": "a", "stream_options": {}}, 400, "invalid_request", "stream_options"),
    ({"model": EMBED, "prompt": "a"}, 400, "invalid_request", "model"),
    ({"model": "nope", "prompt": "a"}, 404, "model_not_found", "model"),
]

BAD_EMBEDDINGS: list[tuple[Any, int, str, str | None]] = [
    ({"model": EMBED}, 400, "invalid_request", "input"),
    ({"model": EMBED, "input": ""}, 400, "invalid_request", "input"),
    ({"model": EMBED, "input": []}, 400, "invalid_request", "input"),
    ({"model": EMBED, "input": ["a", 1]}, 400, "invalid_request", "input"),
    ({"model": EMBED, "input": [[1], []]}, 400, "invalid_request", "input"),
    ({"model": EMBED, "input": [[1, "x"]]}, 400, "invalid_request", "input"),
    ({"model": EMBED, "input": [10**9]}, 400, "invalid_request", "input"),
    ({"model": EMBED, "input": {"text": "a"}}, 400, "invalid_request", "input"),
    ({"model": EMBED, "input": ["a"] * 10_000}, 400, "invalid_request", "input"),
    ({"model": EMBED, "input": "word " * 400}, 400, "context_length_exceeded", "input"),
    ({"model": EMBED, "input": "a", "encoding_format": "hex"}, 400, "invalid_request", "encoding_format"),
    ({"model": EMBED, "input": "a", "dimensions": 5}, 400, "invalid_request", "dimensions"),
    ({"model": CHAT, "input": "a"}, 400, "invalid_request", "model"),
    ({"model": "nope", "input": "a"}, 404, "model_not_found", "model"),
]

BAD_BODIES: list[tuple[bytes, int, str]] = [
    (b"", 400, "invalid_json"),
    (b"{", 400, "invalid_json"),
    (b"[1]", 400, "invalid_json"),
    (b"\xff\xfe", 400, "invalid_json"),
    (b"[" * 100_000, 400, "invalid_json"),
]


async def refuse(path: str, status: int, code: str, param: str | None = None, **request: Any) -> Exchange:
    """Ask, and check that the answer is this error and nothing else."""
    exchange = Exchange("POST", path, **request)
    answer = await exchange.read_json()
    error = answer["error"]
    assert (exchange.status, error["code"], error["param"]) == (status, code, param), error
    assert set(error) == {"message", "type", "param", "code"} and error["message"].endswith(".")
    assert exchange.headers["x-request-id"].startswith("req_")
    return exchange


def list_traces(redis_url: str) -> list[bytes]:
    """List what a request leaves that was counted, held or queued."""
    client = Redis.from_url(redis_url)
    return [key for name in ("rate", "holds", "job", "queued") for key in client.scan_iter(f"aiscale:{name}:*")]


@pytest.mark.parametrize(("value", "status", "code", "param"), BAD_CHATS)
async def test_chat(cast: Cast, redis_url: str, value: Any, status: int, code: str, param: str | None) -> None:
    await refuse("/v1/chat/completions", status, code, param, key=cast.raw, value=value)
    assert list_traces(redis_url) == []


@pytest.mark.parametrize(("value", "status", "code", "param"), BAD_TEXTS)
async def test_texts(cast: Cast, redis_url: str, value: Any, status: int, code: str, param: str | None) -> None:
    await refuse("/v1/completions", status, code, param, key=cast.raw, value=value)
    assert list_traces(redis_url) == []


@pytest.mark.parametrize(("value", "status", "code", "param"), BAD_EMBEDDINGS)
async def test_embeddings(cast: Cast, redis_url: str, value: Any, status: int, code: str, param: str | None) -> None:
    await refuse("/v1/embeddings", status, code, param, key=cast.raw, value=value)
    assert list_traces(redis_url) == []


@pytest.mark.parametrize(("body", "status", "code"), BAD_BODIES)
async def test_bodies(cast: Cast, body: bytes, status: int, code: str) -> None:
    await refuse("/v1/chat/completions", status, code, key=cast.raw, body=body)


async def test_a_body_over_the_limit(cast: Cast, settings: Any) -> None:
    limit = settings.ENV.body_limit_bytes
    declared = {"content-length": str(limit + 1)}
    await refuse("/v1/chat/completions", 413, "body_too_large", key=cast.raw, headers=declared)
    parts = [b"x" * (limit // 2), b"x" * (limit // 2), b"x"]
    await refuse("/v1/chat/completions", 413, "body_too_large", key=cast.raw, parts=parts)


async def test_keys(cast: Cast, django_db_blocker: Any) -> None:
    path, value = "/v1/chat/completions", chat()
    exchange = await refuse(path, 401, "missing_api_key", value=value)
    assert exchange.headers["www-authenticate"] == "Bearer" and exchange.unread, "the body was read before the key"
    await refuse(path, 401, "missing_api_key", headers={"authorization": "Basic abc"}, value=value)
    await refuse(path, 401, "invalid_api_key", key="sk-aiscale-" + "x" * 43, value=value)
    await refuse(path, 401, "invalid_api_key", key="\xe9" * 5000, value=value)


def change(cast: Cast, how: str) -> None:
    if how == "revoked":
        revoke_key(cast.key)
    elif how == "expired":
        cast.key.expires_at = timezone.now()
        cast.key.save()
    elif how == "suspended":
        cast.organization.is_active = False
        cast.organization.save()


@pytest.mark.parametrize(
    ("how", "status", "code"),
    [("revoked", 401, "key_revoked"), ("expired", 401, "key_expired"), ("suspended", 403, "account_inactive")],
)
async def test_keys_that_no_longer_work(cast: Cast, how: str, status: int, code: str) -> None:
    from apps.accounts.callers import on_thread

    await on_thread(lambda: change(cast, how))
    await refuse("/v1/chat/completions", status, code, key=cast.raw, value=chat())


async def test_paths_and_methods(cast: Cast) -> None:
    await refuse("/v1/nothing", 404, "not_found", key=cast.raw)
    wrong = Exchange("GET", "/v1/chat/completions", key=cast.raw)
    assert (await wrong.read_json())["error"]["code"] == "method_not_allowed"
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    await refuse("/v1/models", 405, "method_not_allowed", key=cast.raw, value={})
    deleted = Exchange("DELETE", f"/v1/models/{CHAT}", key=cast.raw)
    assert (await deleted.read_json())["error"]["code"] == "model_not_allowed"
    assert deleted.status == 403
    for path in ("/v1/files/\x00", "/v1/batches/a\x00", "/v1/responses/\x00", "/v1/models/\x00", "/v1/\x00"):
        nobody = Exchange("GET", path, key=cast.raw)
        error = (await nobody.read_json())["error"]
        assert (nobody.status, error["code"]) == (404, "not_found") and "\x00" not in error["message"]
    for method, path, query, name in (
        ("GET", "/v1/models", "order=asc", "order"),
        ("GET", "/v1/models", "limit=1&limit=2", "limit"),
        ("GET", "/v1/files", "after=a&limit=1&after=a", "after"),
        ("POST", "/v1/embeddings", "api-version=1", "api-version"),
        ("GET", "/v1/responses/resp_x", "stop=true", "stop"),
    ):
        ignored = Exchange(method, path, key=cast.raw, value={}, query=query)
        assert (await ignored.read_json())["error"]["param"] == name and ignored.status == 400
    asked = Exchange("GET", "/v1/models", key=cast.raw, query="beta=true")
    assert (await asked.read_json())["object"] == "list"
    django = Exchange("GET", "/v1beta")
    assert (await django.read(), django.status) == (b"Django", 299)
    assert django.headers["x-request-id"].startswith("req_")


async def test_without_redis_nothing_is_served(cast: Cast, settings: Any) -> None:
    """M3."""
    settings.REDIS_URL = "unix:///nowhere/valkey.sock"
    exchange = await refuse("/v1/chat/completions", 503, "backend_unavailable", key=cast.raw, value=chat())
    assert int(exchange.headers["retry-after"]) >= 1


TWICE: list[tuple[str, str, str]] = [
    ("/v1/chat/completions", '{"model": "m", "messages": [], "temperature": 0, "temperature" : 1}', "temperature"),
    ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "a: b", "content": "c"}]}', "content"),
    ("/v1/responses", '{"metadata": {"a": "1", "\\u0061": "1"}}', "a"),
    ("/v1/embeddings", '{"input": "x", "model": "m", "model": "m"}', "model"),
]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(("path", "body", "name"), TWICE)
async def test_a_name_that_stands_twice_is_refused(cast: Cast, path: str, body: str, name: str) -> None:
    refused = Exchange("POST", path, key=cast.raw, body=body.encode())
    error = (await refused.read_json())["error"]
    assert (refused.status, error["code"], error["param"]) == (400, "invalid_request", name)
    assert f"'{name}' stands twice" in error["message"]


CHOICES: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "/v1/messages",
        {"messages": [{"role": "bot", "content": "x"}], "model": "m", "max_tokens": 1},
        "messages[0].role",
        '"assistant" or "user"',
    ),
    ("/v1/responses", {"model": "m", "input": "x", "text": {"verbosity": "low"}}, "text.verbosity", '"medium"'),
    ("/v1/responses", {"model": "m", "input": "x", "service_tier": "flex"}, "service_tier", '"auto" or "default"'),
    (
        "/v1/embeddings",
        {"model": "m", "input": "x", "encoding_format": "hex"},
        "encoding_format",
        '"base64" or "float"',
    ),
]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(("path", "value", "param", "choices"), CHOICES)
async def test_a_refused_choice_names_the_others(
    cast: Cast, path: str, value: dict[str, Any], param: str, choices: str
) -> None:
    refused = Exchange("POST", path, key=cast.raw, value=value)
    error = (await refused.read_json())["error"]
    assert refused.status == 400 and error["param"] == param and choices in error["message"], error
