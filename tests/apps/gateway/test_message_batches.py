"""Bulk jobs in Anthropic's dialect with a real worker and settlement: their requests in the body, their results in one file."""

import json
from typing import Any
from urllib.parse import urlsplit

import pytest
from anthropic.types.messages import MessageBatch, MessageBatchIndividualResponse

from apps.accounts.callers import on_thread
from apps.gateway.batches import runner
from apps.gateway.batches import upkeep as batches
from apps.gateway.models import Batch, StoredFile
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
