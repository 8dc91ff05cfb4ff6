"""How requests and answers travel: compressed, from other origins, and always with an id."""

import dataclasses
import gzip
import json
import zlib
from typing import Any

import pytest
import zstandard

from apps.gateway import cors, idempotency
from apps.gateway.compression import choose_encoding
from apps.inference import screening
from apps.inference.cache import semantic, telling
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange

CHAT, EMBED = "smollm2-135m-instruct", "all-minilm-l6-v2"
HELLO = {"model": CHAT, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        (None, None),
        ("", None),
        ("gzip", "gzip"),
        ("gzip, deflate, br, zstd", "zstd"),
        ("zstd;q=0.5, gzip;q=0.9", "gzip"),
        ("zstd;q=0, gzip", "gzip"),
        ("*", "zstd"),
        ("br, identity", None),
        ("gzip;q=nonsense", None),
        ("GZIP;Q=1", "gzip"),
    ],
)
def test_what_is_accepted(header: str | None, encoding: str | None) -> None:
    assert choose_encoding(header) == encoding


async def test_large_answers_are_compressed(cast: Cast, worker: None) -> None:
    def embed(accepted: str, count: int = 20) -> Exchange:
        value = {"model": EMBED, "input": ["text"] * count, "encoding_format": "float"}
        return Exchange("POST", "/v1/embeddings", key=cast.raw, value=value, headers={"accept-encoding": accepted})

    await embed("identity").read()
    # what is known says so
    plain = json.loads(await embed("identity").read())
    for accepted, unpack in (("gzip", gzip.decompress), ("gzip, zstd", zstandard.decompress)):
        exchange = embed(accepted)
        body = await exchange.read()
        assert exchange.headers["content-encoding"] == accepted.rsplit(" ", 1)[-1]
        assert exchange.headers["vary"] == "accept-encoding" and exchange.headers["content-length"] == str(len(body))
        assert json.loads(unpack(body)) == plain
    small = Exchange("GET", "/v1/models", key=cast.raw, headers={"accept-encoding": "gzip"})
    assert (await small.read_json())["object"] == "list" and "content-encoding" not in small.headers


async def test_streams_are_not_compressed(cast: Cast, worker: None) -> None:
    headers = {"accept-encoding": "gzip, zstd"}
    exchange = Exchange("POST", "/v1/chat/completions", key=cast.raw, value=HELLO | {"stream": True}, headers=headers)
    assert (await exchange.read()).endswith(b"data: [DONE]\n\n") and "content-encoding" not in exchange.headers


async def test_compressed_requests_are_read(cast: Cast, worker: None) -> None:
    body = json.dumps(HELLO).encode()
    packed = {"gzip": gzip.compress(body), "zstd": zstandard.compress(body), "identity": body}
    for encoding, data in packed.items():
        headers = {"content-encoding": encoding}
        exchange = Exchange("POST", "/v1/chat/completions", key=cast.raw, body=data, headers=headers)
        assert (await exchange.read_json())["usage"]["completion_tokens"] == 5, encoding


async def test_compressed_requests_may_come_in_several_members(cast: Cast) -> None:
    body = json.dumps({"model": "nobody's", "messages": []}).encode()
    halves = body[:9], body[9:]
    packed = {"gzip": map(gzip.compress, halves), "zstd": map(zstandard.compress, halves)}
    for encoding, members in packed.items():
        headers = {"content-encoding": encoding}
        exchange = Exchange("POST", "/v1/chat/completions", key=cast.raw, body=b"".join(members), headers=headers)
        assert (await exchange.read_json())["error"]["param"] == "messages", encoding


async def test_bombs_and_nonsense_are_refused(cast: Cast, settings: Any) -> None:
    huge = b"0" * (200 << 20)
    cases = [
        ("gzip", gzip.compress(huge, 9), 413, "body_too_large"),
        ("zstd", zstandard.compress(huge), 413, "body_too_large"),
        ("gzip", b"nonsense", 400, "invalid_request"),
        ("gzip", gzip.compress(b"x" * 999)[:-9], 400, "invalid_request"),
        ("zstd", b"nonsense", 400, "invalid_request"),
        ("zstd", zstandard.compress(b"x" * 999)[:-3], 400, "invalid_request"),
        # nothing that is sent is dropped silently
        ("gzip", gzip.compress(b"{}") + b"nonsense", 400, "invalid_request"),
        ("gzip", gzip.compress(b"{}") + gzip.compress(b"x")[:-9], 400, "invalid_request"),
        ("zstd", zstandard.compress(b"{}") + b"nonsense", 400, "invalid_request"),
        ("br", b"{}", 415, "unsupported_encoding"),
        ("deflate", zlib.compress(b"{}"), 415, "unsupported_encoding"),
    ]
    for encoding, data, status, code in cases:
        headers = {"content-encoding": encoding}
        exchange = Exchange("POST", "/v1/chat/completions", key=cast.raw, body=data, headers=headers)
        error = (await exchange.read_json())["error"]
        assert (exchange.status, error["code"]) == (status, code), (encoding, error)


async def test_other_origins_may_call_where_the_owner_says_so(cast: Cast, settings: Any) -> None:
    page, question = {"origin": "https://app.example"}, {"access-control-request-method": "POST"}
    off = Exchange("OPTIONS", "/v1/chat/completions", headers=page | question)
    await off.read()
    assert off.status == 405 and "access-control-allow-origin" not in off.headers
    settings.ENV = dataclasses.replace(settings.ENV, cors_origins=("https://app.example",))
    asked = page | question | {"access-control-request-headers": "authorization, x-stainless-os"}
    exchange = Exchange("OPTIONS", "/v1/chat/completions", headers=asked)
    await exchange.read()
    assert exchange.status == 204 and exchange.headers["access-control-allow-origin"] == "https://app.example"
    assert exchange.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
    assert "POST" in exchange.headers["access-control-allow-methods"]
    # errors too can be read by the page
    for key, status in ((cast.raw, 200), (None, 401)):
        answer = Exchange("GET", "/v1/models", key=key, headers=page)
        await answer.read()
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (status, "https://app.example")
        assert "x-request-id" in answer.headers["access-control-expose-headers"] and answer.headers["vary"] == "origin"
        assert "access-control-allow-credentials" not in answer.headers
    stranger = Exchange("GET", "/v1/models", key=cast.raw, headers={"origin": "https://evil.example"})
    await stranger.read()
    assert "access-control-allow-origin" not in stranger.headers
    settings.ENV = dataclasses.replace(settings.ENV, cors_origins=("*",))
    anybody = Exchange("GET", "/v1/models", key=cast.raw, headers={"origin": "null"})
    await anybody.read()
    assert anybody.headers["access-control-allow-origin"] == "*"


async def test_a_page_may_read_all_that_we_say_of_an_answer() -> None:
    """Each header of our own, wherever it is made, is named to browsers."""
    ours = [telling.HEADER, semantic.HEADER, screening.HEADER, *idempotency.REPLAYED, "retry-after", "x-should-retry"]
    assert set(ours) <= set(cors.EXPOSED.split(", "))
