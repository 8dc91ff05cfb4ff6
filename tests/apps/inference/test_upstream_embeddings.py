"""Embeddings of an upstream: admitted, held, metered and settled; what it answers wrongly costs nothing."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from apps.accounts import audit
from apps.accounts.callers import on_thread
from apps.inference import catalog
from apps.inference.models import Model
from apps.spend import killswitch
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange
from tests.apps.inference.test_upstreams import Odd, enter, read_usage

GOOD = {
    "data": [{"index": 1, "embedding": [3, 4]}, {"index": 0, "embedding": [1.5, -2]}],
    "usage": {"prompt_tokens": 7},
}
WRONG = [
    {"data": GOOD["data"][:1]},  # type: ignore[index]
    {"data": [{"index": 0, "embedding": [1]}, {"index": 1, "embedding": [1, 2]}]},
    {"data": [{"index": 0, "embedding": "x"}, {"index": 1, "embedding": "y"}]},
    {"data": [{"index": 0, "embedding": []}, {"index": 1, "embedding": []}]},
    {"error": "none"},
    [],
]


class Embedding(Odd):
    async def answer(self, writer: asyncio.StreamWriter, step: str) -> None:
        if step.isdigit():
            await super().answer(writer, step)
            return
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(step)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + step.encode())
        await writer.drain()


@contextlib.asynccontextmanager
async def embedder(*answers: Any) -> AsyncIterator[Embedding]:
    """An upstream that answers so, and a model of it in the catalog, at 1,000 nano-dollars a token."""
    upstream = Embedding(*(answer if isinstance(answer, str) else json.dumps(answer) for answer in answers))
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    await on_thread(lambda: enter(server.sockets[0].getsockname()[1], "secret-key", "their-embedder", "acme-embed"))
    await on_thread(lambda: Model.objects.filter(slug="acme-embed").update(kind="embed"))
    catalog.forget()
    try:
        yield upstream
    finally:
        server.close()


@pytest.fixture(autouse=True)
def private(settings: Any) -> None:
    settings.ENV = dataclasses.replace(settings.ENV, upstreams_private=True)


def ask(cast: Cast, **changes: Any) -> Exchange:
    value = {"model": "acme-embed", "input": ["one", "two"]} | changes
    return Exchange("POST", "/v1/embeddings", key=cast.raw, value=value)


async def test_vectors_come_in_the_order_of_the_inputs(cast: Cast, settling: None) -> None:
    async with embedder(GOOD) as upstream:
        exchange = ask(cast, dimensions=2)
        answer = await exchange.read_json()
        assert exchange.status == 200, answer
        assert [row["embedding"] for row in answer["data"]] == [[1.5, -2.0], [3.0, 4.0]]
        assert (answer["model"], answer["usage"]["prompt_tokens"]) == ("acme-embed", 7)
        [asked] = upstream.asked
        assert (asked["model"], asked["input"], asked["dimensions"]) == ("their-embedder", ["one", "two"], 2)
        assert "bearer secret-key" in asked["head"]
        row = await read_usage(f"job_{exchange.headers['x-request-id'].removeprefix('req_')}")
        assert (row.prompt_tokens, row.completion_tokens, row.cost_nanousd) == (7, 0, 7000)
        listed = await Exchange("GET", "/v1/models/acme-embed", key=cast.raw).read_json()
        assert listed["aiscale"]["endpoints"] == ["embeddings"]


async def test_usage_that_is_not_told_is_counted(cast: Cast, settling: None) -> None:
    async with embedder({"data": GOOD["data"]}):
        counted = await ask(cast).read_json()
        assert 2 <= counted["usage"]["prompt_tokens"] <= 6
        ids = await ask(cast, input=[[1, 2, 3], [4]]).read_json()
        assert ids["usage"]["prompt_tokens"] == 4


async def test_wrong_answers_have_a_name_and_cost_nothing(cast: Cast, settling: None) -> None:
    async with embedder(*WRONG, "400"):
        for _ in WRONG:
            exchange = ask(cast)
            error = (await exchange.read_json())["error"]
            assert (exchange.status, error["code"]) == (502, "upstream_failed"), error
            row = await read_usage(f"job_{exchange.headers['x-request-id'].removeprefix('req_')}")
            assert (row.cost_nanousd, row.error_code) == (0, "upstream_failed")
        exchange = ask(cast)
        error = (await exchange.read_json())["error"]
        assert (exchange.status, error["message"]) == (400, "Said by the upstream.")


async def test_a_kill_switch_of_the_provider_holds(cast: Cast, settling: None) -> None:
    async with embedder(GOOD) as upstream:
        await on_thread(lambda: killswitch.trip("provider:acme", reason="A drill", by=audit.by_system("test")))
        assert (await ask(cast).read_json())["error"]["code"] == "killed" and not upstream.asked
