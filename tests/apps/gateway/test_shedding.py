"""A process that has too much to do says so at once, in the caller's dialect, before it reads or asks anything (D1)."""

import asyncio
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import REGISTRY

from aiscale import overload
from aiscale import redis as redis_clients
from aiscale.overload import Crowd
from apps.gateway import exchange as exchange_module
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange

CHAT = "smollm2-135m-instruct"
QUESTION = {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200}


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crowd]:
    """Be this process's crowd, with two places."""
    crowd = Crowd(0.15)
    crowd.places = 2
    monkeypatch.setattr(overload, "_crowd", crowd)
    # its epochs do not end within a test
    monkeypatch.setattr(overload, "EPOCH_S", 3_600.0)
    yield crowd


def count_refused() -> float:
    return REGISTRY.get_sample_value("aiscale_refusals_total", {"code": "overloaded"}) or 0.0


async def test_one_too_many_is_refused_before_anything_is_read_or_asked(
    cast: Cast, crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, before = [crowd.enter(), crowd.enter()], count_refused()
    with monkeypatch.context() as patch:
        patch.setattr(redis_clients, "get_async", None)
        exchange = Exchange("POST", "/v1/chat/completions", key=cast.raw, value=QUESTION)
        error = (await exchange.read_json())["error"]
    assert (exchange.status, error["code"], error["type"]) == (503, "overloaded", "server_error")
    assert "again" in error["message"]
    assert exchange.headers["retry-after"] == "1" and exchange.headers["x-request-id"].startswith("req_")
    assert "x-should-retry" not in exchange.headers, "the official clients try again by themselves"
    assert len(exchange.unread) == 1, "the body was not read"
    assert count_refused() == before + 1
    for place in places:
        assert place is not None
        place.leave()
    models = Exchange("GET", "/v1/models", key=cast.raw)
    assert (await models.read_json())["object"] == "list"
    await models.task
    assert crowd.count == 0


@pytest.mark.parametrize(
    ("path", "headers"),
    [("/v1/messages", {}), ("/v1/models", {"anthropic-version": "2023-06-01"})],
)
async def test_anthropics_clients_read_it_in_their_words(crowd: Crowd, path: str, headers: dict[str, str]) -> None:
    crowd.places = 0
    exchange = Exchange("POST", path, headers=headers)
    answer = await exchange.read_json()
    assert (exchange.status, answer["type"], answer["error"]["type"]) == (529, "error", "overloaded_error")
    assert answer["request_id"] == exchange.headers["request-id"] == exchange.headers["x-request-id"]


async def test_pages_of_other_origins_may_read_it(crowd: Crowd, settings: Any) -> None:
    settings.ENV = dataclasses.replace(settings.ENV, cors_origins=("https://app.example",))
    crowd.places = 0
    exchange = Exchange("POST", "/v1/embeddings", headers={"origin": "https://app.example"})
    await exchange.read_json()
    assert exchange.headers["access-control-allow-origin"] == "https://app.example"
    assert "retry-after" in exchange.headers["access-control-expose-headers"]


async def test_a_page_that_asks_first_is_told_yes_and_then_reads_the_refusal(crowd: Crowd, settings: Any) -> None:
    settings.ENV = dataclasses.replace(settings.ENV, cors_origins=("https://app.example",))
    crowd.places = 0
    asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
    exchange = Exchange("OPTIONS", "/v1/embeddings", headers=asked)
    await exchange.read()
    assert (exchange.status, exchange.headers["access-control-allow-origin"]) == (204, "https://app.example")
    stranger = Exchange("OPTIONS", "/v1/embeddings", headers=asked | {"origin": "https://evil.example"})
    assert (await stranger.read_json())["error"]["code"] == "overloaded"


async def test_pages_are_served_all_the_same(crowd: Crowd) -> None:
    crowd.places = 0
    exchange = Exchange("GET", "/healthz")
    assert await exchange.read() == b"Django" and exchange.status == 299


async def test_a_body_that_comes_slowly_keeps_nobody_out(cast: Cast, crowd: Crowd) -> None:
    crowd.places = 1
    slow = Exchange("POST", "/v1/embeddings", key=cast.raw, parts=[b"{", b"}"])
    slow.unread.pop()
    while slow.unread:
        await asyncio.sleep(0.01)
    assert crowd.count == 0 and not slow.task.done()
    models = Exchange("GET", "/v1/models", key=cast.raw)
    assert (await models.read_json())["object"] == "list"
    slow.leave()
    await asyncio.wait_for(slow.task, 20)


async def test_a_body_that_does_not_begin_keeps_nobody_out(cast: Cast, crowd: Crowd) -> None:
    crowd.places = 1
    silent = Exchange("POST", "/v1/embeddings", key=cast.raw)
    silent.unread.clear()
    while crowd.count or not crowd._finished:
        assert not silent.task.done()
        await asyncio.sleep(0.01)
    models = Exchange("GET", "/v1/models", key=cast.raw)
    assert (await models.read_json())["object"] == "list"
    silent.leave()
    error = (await silent.read_json())["error"]
    assert (silent.status, error["code"]) == (400, "body_cut_short")
    assert silent.headers["x-request-id"].startswith("req_")


async def test_a_body_that_does_not_come_is_not_waited_for(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "BODY_PATIENCE_S", 0.02)
    for path in ("/v1/embeddings", "/v1/files"):
        headers = {"content-type": "multipart/form-data; boundary=x"}
        slow = Exchange("POST", path, key=cast.raw, headers=headers, parts=[b"--x", b"--x--"])
        slow.unread.pop()
        error = (await slow.read_json())["error"]
        assert (slow.status, error["code"], error["type"]) == (408, "body_timeout", "invalid_request_error")


@pytest.mark.usefixtures("worker")
async def test_who_waits_for_a_worker_keeps_nobody_out(cast: Cast, crowd: Crowd) -> None:
    crowd.places = 1
    slow = Exchange("POST", "/v1/chat/completions", key=cast.raw, value=QUESTION | {"stream": True})
    assert await slow.next_part()
    assert crowd.count == 0 and not slow.task.done()
    models = Exchange("GET", "/v1/models", key=cast.raw)
    assert (await models.read_json())["object"] == "list"
    slow.leave()
    await asyncio.wait_for(slow.task, 20)
    assert crowd.count == 0
