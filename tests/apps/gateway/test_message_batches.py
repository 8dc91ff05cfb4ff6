"""Bulk jobs in Anthropic's dialect with a real worker and settlement: their requests in the body, their results in one file."""

import dataclasses
import gzip
import itertools
import json
from typing import Any
from urllib.parse import urlsplit

import pytest
from anthropic.types.messages import MessageBatch, MessageBatchIndividualResponse

from apps.accounts.callers import on_thread
from apps.gateway.batches import runner
from apps.gateway.batches import upkeep as batches
from apps.gateway.batches.requests import Splitter
from apps.gateway.models import Batch, BatchLine, StoredFile
from apps.spend.models import UsageRecord
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange
from tests.apps.gateway.test_batches import storage, wait_for_charges
from tests.apps.gateway.test_files import get

__all__ = ["storage"]
pytestmark = pytest.mark.usefixtures("worker", "settling")
CHAT = "smollm2-135m-instruct"
PATH = "/v1/messages/batches"


def make_request(number: int, **changes: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": f"Hello {number}"}]
    return {"custom_id": f"r-{number}", "params": {"model": CHAT, "messages": said, "max_tokens": 3} | changes}


def create(cast: Cast, requests: list[Any], **headers: str) -> Exchange:
    return Exchange("POST", PATH, value={"requests": requests}, headers={"x-api-key": cast.raw} | headers)


async def ask(cast: Cast, rest: str, method: str = "GET", status: int = 200) -> Any:
    head, _, query = f"{PATH}{rest}".partition("?")
    exchange = Exchange(method, head, key=cast.raw, query=query)
    value = await exchange.read_json()
    assert exchange.status == status, value
    return value


async def read_results(cast: Cast, batch: Any) -> dict[str, Any]:
    status, content = await get(cast, urlsplit(batch["results_url"]).path)
    assert status == 200
    lines = [json.loads(line) for line in content.splitlines()]
    typed = [MessageBatchIndividualResponse.model_validate(line) for line in lines]
    assert len({line.custom_id for line in typed}) == len(lines)
    return {line["custom_id"]: line["result"] for line in lines}


async def test_a_batch_is_run_and_its_results_are_told(cast: Cast) -> None:
    exchange = create(cast, [make_request(1), make_request(2, max_tokens=0), make_request(3)])
    made = await exchange.read_json()
    assert exchange.status == 200, made
    typed = MessageBatch.model_validate(made)
    assert (typed.type, typed.processing_status, typed.results_url) == ("message_batch", "in_progress", None)
    assert made["request_counts"] == {"processing": 3, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
    await ask(cast, f"/{made['id']}/results", status=400)
    await ask(cast, f"/{made['id']}", "DELETE", status=400)
    assert await on_thread(batches.list_due) == [made["id"]]
    await runner.advance(made["id"])
    done = await ask(cast, f"/{made['id']}")
    assert done["processing_status"] == "ended" and done["ended_at"] >= done["created_at"]
    assert done["request_counts"] == {"processing": 0, "succeeded": 2, "errored": 1, "canceled": 0, "expired": 0}
    results = await read_results(cast, done)
    assert [results[name]["type"] for name in ("r-1", "r-2", "r-3")] == ["succeeded", "errored", "succeeded"]
    message = results["r-1"]["message"]
    assert message["type"] == "message" and message["content"][0]["text"] and message["usage"]["output_tokens"] == 3
    assert message["usage"]["service_tier"] == "batch"
    assert results["r-2"]["error"]["error"]["type"] == "invalid_request_error"
    await wait_for_charges(cast, 2)
    assert await on_thread(UsageRecord.objects.filter(source="batch").count) == 2
    assert (await ask(cast, f"/{made['id']}", "DELETE")) == {"id": made["id"], "type": "message_batch_deleted"}
    await ask(cast, f"/{made['id']}", status=404)
    assert await on_thread(StoredFile.objects.count) == 0


async def test_a_cancelled_batch_tells_what_was_not_run(cast: Cast) -> None:
    made = await create(cast, [make_request(number) for number in range(3)]).read_json()
    cancelled = await ask(cast, f"/{made['id']}/cancel", "POST")
    assert cancelled["processing_status"] == "canceling" and cancelled["cancel_initiated_at"]
    await runner.advance(made["id"])
    done = await ask(cast, f"/{made['id']}")
    assert done["processing_status"] == "ended" and done["request_counts"]["canceled"] == 3
    assert {result["type"] for result in (await read_results(cast, done)).values()} == {"canceled"}


async def test_a_batch_whose_day_is_over_tells_so(cast: Cast) -> None:
    made = await create(cast, [make_request(1)]).read_json()
    await on_thread(lambda: Batch.objects.update(expires_at="2026-01-01T00:00:00Z"))
    await runner.advance(made["id"])
    done = await ask(cast, f"/{made['id']}")
    assert done["request_counts"]["expired"] == 1
    assert (await read_results(cast, done))["r-1"] == {"type": "expired"}


async def test_lists_come_in_pages_and_each_dialect_has_its_own(cast: Cast) -> None:
    ids = [(await create(cast, [make_request(1)]).read_json())["id"] for _ in range(3)][::-1]
    first = await ask(cast, "?limit=2")
    assert ([row["id"] for row in first["data"]], first["has_more"]) == (ids[:2], True)
    rest = await ask(cast, f"?limit=2&after_id={first['last_id']}")
    assert ([row["id"] for row in rest["data"]], rest["has_more"]) == (ids[2:], False)
    before = await ask(cast, f"?limit=1&before_id={ids[2]}")
    assert ([row["id"] for row in before["data"]], before["has_more"]) == ([ids[1]], True)
    await ask(cast, "?after_id=nobody", status=404)
    openais = await Exchange("GET", "/v1/batches", key=cast.raw).read_json()
    assert openais["data"] == []
    for rest_of_path, method in (("", "GET"), ("/cancel", "POST")):
        other = Exchange(method, f"/v1/batches/{ids[0]}{rest_of_path}", key=cast.raw)
        assert (await other.read_json())["error"]["code"] == "not_found" and other.status == 404
    stranger = await on_thread(lambda: Cast("bob@example.com"))
    assert (await ask(stranger, ""))["data"] == []
    await ask(stranger, f"/{ids[0]}", status=404)


BAD: list[tuple[Any, str]] = [
    ([], "requests"),
    ([make_request(1), make_request(1)], "requests[1].custom_id"),
    ([make_request(1) | {"custom_id": "a b"}], "requests[0].custom_id"),
    ([make_request(1, stream=True)], "requests[0].params.stream"),
    ([make_request(1) | {"odd": 1}], "requests[0].odd"),
    ([{"custom_id": "a"}], "requests[0].params"),
    ([make_request(1), 0], "requests[1]"),
    ([make_request(1), [{"a": 1}]], "requests[1]"),
    ([0], "requests[0]"),
    ([make_request(1), {}], "requests[1].custom_id"),
    ({"a": make_request(1)}, "requests"),
    (None, "requests"),
    ([make_request(1) | {"custom_id": "a\x00"}], "requests[0].custom_id"),
]


@pytest.mark.parametrize(("requests", "param"), BAD)
async def test_bad_batches_are_refused_by_name(cast: Cast, requests: Any, param: str) -> None:
    refused = create(cast, requests)
    error = (await refused.read_json())["error"]
    assert (refused.status, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert await on_thread(Batch.objects.count) == 0


async def test_a_batch_that_is_sent_again_is_one(cast: Cast) -> None:
    made = [await create(cast, [make_request(1)], **{"idempotency-key": "k1"}).read_json() for _ in range(2)]
    assert made[0] == made[1] and await on_thread(Batch.objects.count) == 1


def write(*requests: Any, head: str = '{"requests": [', tail: str = "]}") -> bytes:
    return (head + ", ".join(json.dumps(request) for request in requests) + tail).encode()


BODIES: list[tuple[bytes, str, str | None]] = [
    (b"", "invalid_json", None),
    (b"[]", "invalid_json", None),
    (write(make_request(1), tail=""), "invalid_json", None),
    (write(make_request(1))[:60], "invalid_json", None),
    (write(make_request(1), tail=",]}"), "invalid_json", None),
    (write(make_request(1), tail="]}]}"), "invalid_json", None),
    (write(make_request(1), tail='], "odd": 1}'), "invalid_request", "odd"),
    (write(make_request(1), tail='], "requests": []}'), "invalid_request", "requests"),
    (write(make_request(1), head='{"other": ['), "invalid_request", "other"),
    (b'{"requests": [{"custom_id": "a", "custom_id": "b", "params": {}}]}', "invalid_request", "requests[0].custom_id"),
    (b'{"requests": [{"custom_id": "a", "params": {nope}}]}', "invalid_json", "requests[0]"),
    (b'{"requests": [{"custom_id": "a", "params": {"x": "\xff"}}]}', "invalid_json", "requests[0]"),
    (b'{"requests": "' + b"x" * 9_000 + b'"}', "invalid_request", "requests"),
    (write(make_request(1, system="x" * 9_000)), "invalid_request", "requests"),
    (write(make_request(1, system="x" * 7_000), make_request(2, system="x" * 7_000)), "body_too_large", None),
]


@pytest.mark.parametrize(("body", "code", "param"), BODIES)
async def test_bodies_that_are_no_batch_are_refused(
    cast: Cast, settings: Any, body: bytes, code: str, param: str | None
) -> None:
    settings.ENV = dataclasses.replace(settings.ENV, body_limit_bytes=8_000, message_batch_limit_bytes=12_000)
    refused = Exchange("POST", PATH, key=cast.raw, body=body)
    error = (await refused.read_json())["error"]
    assert (error["code"], error.get("param")) == (code, param), error
    assert refused.status in (400, 413) and await on_thread(Batch.objects.count) == 0


async def test_a_batch_is_larger_than_any_other_body_and_comes_in_pieces(cast: Cast, settings: Any) -> None:
    """Cut anywhere, with all that may stand in JSON; what is not asked for now is on disk, and counts as a file does."""
    odd = 'brackets ]}[{ "quotes\\" \\\\ \u00e9\U0001f600 \\u005d ' * 20
    requests = [make_request(number, system=odd + "x" * number) for number in range(40)]
    body = json.dumps({"requests": requests}, indent=1, ensure_ascii=False).encode()
    settings.ENV = dataclasses.replace(settings.ENV, body_limit_bytes=5_000, files_quota_bytes=len(body) * 3 // 2)
    assert len(body) > 5_000 * 4
    for size in (1, 7, 1_000, len(body)):
        parts = [body[start : start + size] for start in range(0, len(body), size)]
        split = list(itertools.chain.from_iterable(map((splitter := Splitter(5_000)).feed, parts)))
        assert [json.loads(raw) for raw in split] == requests and not splitter.is_inside
        assert json.loads(splitter.rest) == {"requests": [{}] * 40}
    headers = {"anthropic-version": "2023-06-01", "idempotency-key": "k2"}
    made = []
    for _ in range(2):
        exchange = Exchange("POST", PATH, key=cast.raw, parts=[body[:9_000], body[9_000:]], headers=headers)
        made.append(await exchange.read_json())
        assert exchange.status == 200, made
    assert made[0] == made[1] and made[0]["request_counts"]["processing"] == 40
    lines = await on_thread(lambda: list(BatchLine.objects.order_by("number").values_list("custom_id", "body")))
    assert [(name, json.loads(text)) for name, text in lines] == [(r["custom_id"], r["params"]) for r in requests]
    other = Exchange("POST", PATH, key=cast.raw, body=body, headers=headers | {"idempotency-key": "k3"})
    error = (await other.read_json())["error"]
    assert (error["code"], error["param"]) == ("storage_full", "requests") and other.status == 400
    reused = create(cast, [make_request(1)], **{"idempotency-key": "k2"})
    assert (await reused.read_json())["error"]["code"] == "idempotency_key_reused" and reused.status == 422
    packed = Exchange("POST", PATH, key=cast.raw, body=gzip.compress(body), headers={"content-encoding": "gzip"})
    assert (await packed.read_json())["error"]["code"] == "body_too_large" and packed.status == 413
    settings.ENV = dataclasses.replace(settings.ENV, body_limit_bytes=1 << 20, files_quota_bytes=1 << 30)
    packed = Exchange("POST", PATH, key=cast.raw, body=gzip.compress(body), headers={"content-encoding": "gzip"})
    assert (await packed.read_json())["request_counts"]["processing"] == 40
