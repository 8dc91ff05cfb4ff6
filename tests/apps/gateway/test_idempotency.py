"""Idempotency-Key with a real worker and settlement (M7): one answer, one charge, whatever was sent how often and whatever died."""

import asyncio
from typing import Any

import pytest

from apps.accounts.callers import on_thread
from apps.gateway import idempotency_records
from apps.gateway.models import IdempotentRequest, StoredResponse
from apps.spend.models import UsageRecord
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange, read_events

pytestmark = pytest.mark.usefixtures("worker", "settling")
CHAT = "smollm2-135m-instruct"


def ask(cast: Cast, key: str = "k1", path: str = "/v1/chat/completions", **changes: Any) -> Exchange:
    value = {"model": CHAT, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5} | changes
    return Exchange("POST", path, key=cast.raw, value=value, headers={"idempotency-key": key})


async def count_charges(settled_s: float = 0.7) -> int:
    await asyncio.sleep(settled_s)
    return await on_thread(lambda: UsageRecord.objects.filter(cost_nanousd__gt=0).count())


async def test_a_request_sent_again_has_the_same_answer_and_is_charged_once(cast: Cast) -> None:
    """M7."""
    first, second = ask(cast), None
    body = await first.read()
    second = ask(cast)
    assert await second.read() == body and second.status == 200
    assert second.headers["idempotent-replayed"] == "true"
    assert second.headers["x-request-id"] == first.headers["x-request-id"]
    other = ask(cast, "k2")
    assert await other.read() != body and "idempotent-replayed" not in other.headers
    assert await count_charges() == 2


async def test_a_stream_is_sent_again_whole(cast: Cast) -> None:
    first = await ask(cast, stream=True).read()
    again = ask(cast, stream=True)
    assert await again.read() == first and again.headers["content-type"].startswith("text/event-stream")
    assert read_events(first)[-1] == "DONE"
    assert await count_charges() == 1


async def test_another_body_under_the_same_key_is_refused(cast: Cast) -> None:
    await ask(cast).read()
    for other in (ask(cast, max_tokens=6), ask(cast, path="/v1/completions")):
        assert (await other.read_json())["error"]["code"] == "idempotency_key_reused" and other.status == 422
    stranger = await on_thread(lambda: Cast("bob@example.com"))
    assert (await ask(stranger, max_tokens=6).read_json())["object"] == "chat.completion"


async def test_one_that_runs_is_not_run_beside_itself(cast: Cast) -> None:
    first = ask(cast, max_tokens=60)
    await asyncio.sleep(0.3)
    second = ask(cast, max_tokens=60)
    assert (await second.read_json())["error"]["code"] == "idempotency_key_in_use"
    assert second.status == 409 and second.headers["retry-after"] == "1"
    body = await first.read()
    assert await ask(cast, max_tokens=60).read() == body
    assert await count_charges() == 1


async def test_a_client_that_leaves_finds_its_answer(cast: Cast) -> None:
    """M7: the connection broke, the retry is neither billed again nor cut short."""
    for stream in (False, True):
        first = ask(cast, f"left-{stream}", max_tokens=30, stream=stream)
        await (first.next_part() if stream else asyncio.sleep(0.3))
        first.leave()
        await first.task
        for _ in range(100):
            second = ask(cast, f"left-{stream}", max_tokens=30, stream=stream)
            body = await second.read()
            if second.status != 409:
                break
            await asyncio.sleep(0.1)
        assert second.status == 200 and second.headers["idempotent-replayed"] == "true"
        assert b'"length"' in body
    assert await count_charges() == 2


async def test_a_try_whose_process_died_is_run_and_charged_once(cast: Cast) -> None:
    """M7: the first try died after it was charged and before it was answered; or before it was charged."""
    answer = await ask(cast).read_json()
    assert await count_charges() == 1

    def die() -> None:
        IdempotentRequest.objects.update(body=None, status=None, lease_until="2026-01-01T00:00:00Z")

    await on_thread(die)
    again = ask(cast)
    repeated = await again.read_json()
    assert again.status == 200 and "idempotent-replayed" not in again.headers
    assert repeated["id"] == answer["id"] and repeated["usage"]["total_tokens"] == answer["usage"]["total_tokens"]
    assert await count_charges() == 1
    # died before anything ran: the key stands for a request of which nobody knows
    await on_thread(lambda: IdempotentRequest.objects.update(request_id="req_never"))
    await on_thread(die)
    assert (await ask(cast).read_json())["id"] == "chatcmpl-never"
    assert await count_charges() == 2
    # died with an end that cost nothing: the next try has a name of its own, and pays
    await on_thread(die)
    row: Any = await on_thread(lambda: UsageRecord.objects.get(job_id="job_never"))
    await on_thread(lambda: IdempotentRequest.objects.update(request_id="req_failed"))
    row.pk, row.job_id, row.finish_reason, row.cost_nanousd = None, "job_failed", "error", 0
    await on_thread(row.save)
    assert (await ask(cast).read_json())["id"] not in ("chatcmpl-failed", "chatcmpl-never")
    assert await count_charges() == 3


async def test_what_was_refused_may_be_tried_again(cast: Cast) -> None:
    bad = ask(cast, messages=[])
    assert (await bad.read_json())["error"]["code"] == "invalid_request"
    assert await on_thread(IdempotentRequest.objects.count) == 0
    assert (await ask(cast).read_json())["object"] == "chat.completion"
    for key in ("", "x" * 256, "\xe9"):
        refused = ask(cast, key)
        assert (await refused.read_json())["error"]["param"] == "Idempotency-Key" and refused.status == 400


async def test_ten_at_once_are_one(cast: Cast) -> None:
    together = [ask(cast) for _ in range(10)]
    answers = await asyncio.gather(*(exchange.read() for exchange in together))
    statuses = sorted(exchange.status for exchange in together)
    assert set(statuses) <= {200, 409} and 200 in statuses
    assert len({body for body, exchange in zip(answers, together, strict=True) if exchange.status == 200}) == 1
    assert await count_charges() == 1


async def test_keys_are_forgotten_after_a_day(cast: Cast) -> None:
    await ask(cast).read()
    await on_thread(lambda: IdempotentRequest.objects.update(expires_at="2026-01-01T00:00:00Z"))
    fresh = ask(cast, max_tokens=3)
    assert (await fresh.read_json())["usage"]["completion_tokens"] == 3
    await on_thread(lambda: IdempotentRequest.objects.update(expires_at="2026-01-01T00:00:00Z"))
    assert await on_thread(idempotency_records.forget_expired) == 1


async def test_a_response_that_is_made_again_is_stored_once(cast: Cast) -> None:
    """Under the id that its first try told, or, where that try came to nothing, in its place."""

    def respond() -> Exchange:
        value = {"model": CHAT, "input": "Hello", "max_output_tokens": 5}
        return Exchange("POST", "/v1/responses", key=cast.raw, value=value, headers={"idempotency-key": "k1"})

    def die(**changes: Any) -> None:
        IdempotentRequest.objects.update(body=None, status=None, lease_until="2026-01-01T00:00:00Z", **changes)

    def list_ids() -> list[str]:
        return list(StoredResponse.objects.values_list("public_id", flat=True))

    made = await respond().read_json()
    assert await count_charges() == 1
    await on_thread(die)
    assert (await respond().read_json())["id"] == made["id"]
    assert await on_thread(list_ids) == [made["id"]]
    # another try, that ended without an answer and cost nothing
    row: Any = await on_thread(UsageRecord.objects.get)
    row.pk, row.job_id, row.finish_reason, row.cost_nanousd = None, "job_failed", "error", 0
    await on_thread(row.save)
    await on_thread(lambda: StoredResponse.objects.update(job_id="job_failed"))
    await on_thread(lambda: die(request_id="req_failed"))
    other = await respond().read_json()
    assert other["id"] != made["id"] and other["output"]
    assert await on_thread(list_ids) == [other["id"]]
