"""Bulk jobs with a real worker and settlement: checked, run at half price, resumed, cancelled, expired; each line charged once."""

import asyncio
import json
import time
from copy import copy
from typing import Any

import pytest

from aiscale import redis as redis_clients
from aiscale.wire import keys
from apps.accounts import audit, organizations
from apps.accounts.callers import on_thread
from apps.accounts.keys import create_key, revoke_key
from apps.accounts.models import Plan
from apps.gateway.batches import leases, lines, runner
from apps.gateway.batches import upkeep as batches
from apps.gateway.models import Batch, BatchLine, IdempotentRequest, StoredFile, StoredResponse
from apps.gateway.responses.storage import create as create_response
from apps.spend import killswitch
from apps.spend.models import UsageRecord
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange
from tests.apps.gateway.test_files import get, make_body, upload

pytestmark = pytest.mark.usefixtures("worker", "settling")
CHAT, EMBED = "smollm2-135m-instruct", "all-minilm-l6-v2"
CHATS = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def storage(settings: Any, tmp_path: Any) -> None:
    backend = {"BACKEND": "django.core.files.storage.FileSystemStorage", "OPTIONS": {"location": str(tmp_path)}}
    settings.STORAGES = {**settings.STORAGES, "files": backend}


def make_line(number: int, url: str = CHATS, **body: Any) -> dict[str, Any]:
    said = {"messages": [{"role": "user", "content": f"Hello {number}"}], "max_tokens": 3, "temperature": 0}
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": {"model": CHAT} | (body or said)}


async def create(cast: Cast, lines: list[Any], endpoint: str = CHATS, **changes: Any) -> Any:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    file = await upload(cast, make_body(text.encode(), purpose="batch")).read_json()
    value = {"input_file_id": file["id"], "endpoint": endpoint, "completion_window": "24h"} | changes
    return await Exchange("POST", "/v1/batches", key=cast.raw, value=value).read_json()


async def read(cast: Cast, batch_id: str) -> Any:
    return json.loads((await get(cast, f"/v1/batches/{batch_id}"))[1])


async def read_lines(cast: Cast, file_id: str) -> list[Any]:
    _, content = await get(cast, f"/v1/files/{file_id}/content")
    return [json.loads(line) for line in content.splitlines()]


async def test_a_batch_is_run_at_half_price(cast: Cast) -> None:
    made = await create(
        cast, [make_line(1), make_line(2, messages=[], max_tokens=1), make_line(3)], metadata={"a": "b"}
    )
    assert (made["object"], made["status"], made["metadata"]) == ("batch", "validating", {"a": "b"})
    assert await on_thread(batches.list_due) == [made["id"]]
    await runner.advance(made["id"])
    done = await read(cast, made["id"])
    assert done["status"] == "completed", done
    assert done["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert done["completed_at"] >= done["finalizing_at"] >= done["in_progress_at"] >= done["created_at"]
    first, third = await read_lines(cast, done["output_file_id"])
    assert (first["custom_id"], third["custom_id"], first["error"]) == ("line-1", "line-3", None)
    body = first["response"]["body"]
    assert first["response"]["status_code"] == 200 and body["usage"]["completion_tokens"] == 3
    [second] = await read_lines(cast, done["error_file_id"])
    assert (second["custom_id"], second["response"]["status_code"]) == ("line-2", 400)
    assert second["response"]["body"]["error"]["param"] == "messages"
    await wait_for_charges(cast, 2)
    usages = await on_thread(lambda: list(UsageRecord.objects.filter(source="batch")))
    assert len(usages) == 2 and await on_thread(BatchLine.objects.count) == 0
    # 50 and 200 nano-dollars a token, halved
    assert all(usage.cost_nanousd == usage.prompt_tokens * 25 + usage.completion_tokens * 100 for usage in usages)
    assert await on_thread(batches.list_due) == []


async def test_every_endpoint_has_batches(cast: Cast) -> None:
    embed = make_line(1, "/v1/embeddings", model=EMBED, input="hello")
    text = make_line(1, "/v1/completions", prompt=["Once", "Twice"], max_tokens=2)
    judge = make_line(1, "/v1/moderations", model="moderation", input="hello")
    respond = {"custom_id": "line-1", "method": "POST", "url": "/v1/responses"}
    respond["body"] = {"model": CHAT, "input": "hello", "max_output_tokens": 3}  # type: ignore[assignment]
    for line, endpoint, kind in (
        (embed, "/v1/embeddings", "list"),
        (text, "/v1/completions", "text_completion"),
        (judge, "/v1/moderations", None),
        (respond, "/v1/responses", "response"),
    ):
        made = await create(cast, [line], endpoint)
        await runner.advance(made["id"])
        done = await read(cast, made["id"])
        [answer] = await read_lines(cast, done["output_file_id"])
        assert answer["response"]["status_code"] == 200 and answer["response"]["body"].get("object") == kind


async def test_the_response_of_a_try_that_died_makes_room_for_the_next(cast: Cast) -> None:
    """M7: what was charged is tried again under its own name, which the earlier response has."""
    line = {"custom_id": "line-1", "method": "POST", "url": "/v1/responses"}
    line["body"] = {"model": CHAT, "input": "hello", "max_output_tokens": 3, "temperature": 0}  # type: ignore[assignment]
    made = await create(cast, [line], "/v1/responses")
    await runner.advance(made["id"])
    done = await read(cast, made["id"])
    [answer] = await read_lines(cast, done["output_file_id"])
    stored = await StoredResponse.objects.aget()
    head = {**stored.response, "id": "resp_another"}

    await on_thread(lambda: create_response(cast.organization.public_id, head, stored.job_id, [], ""))
    assert await on_thread(lambda: list(StoredResponse.objects.values_list("public_id", "job_id"))) == [
        ("resp_another", stored.job_id)
    ]
    assert answer["response"]["body"]["id"] == stored.public_id


async def test_a_bad_file_fails_with_its_lines_named(cast: Cast) -> None:
    bad = [
        make_line(1),
        "{",
        make_line(1),
        make_line(4) | {"method": "GET"},
        make_line(5, "/v1/embeddings"),
        make_line(6, model=CHAT, stream=True),
        {"custom_id": 7},
        make_line(8) | {"extra": 1},
        make_line(9, model=CHAT, background=True),
    ]
    made = await create(cast, bad)
    await runner.advance(made["id"])
    failed = await read(cast, made["id"])
    assert failed["status"] == "failed" and failed["failed_at"]
    assert [(problem["line"], problem["param"]) for problem in failed["errors"]["data"]] == [
        (2, None),
        (3, "custom_id"),
        (4, "method"),
        (5, "url"),
        (6, "body.stream"),
        (7, "custom_id"),
        (8, "extra"),
        (9, "body.background"),
    ]
    assert await on_thread(BatchLine.objects.count) == 0
    empty = await create(cast, [""])
    await runner.advance(empty["id"])
    assert (await read(cast, empty["id"]))["errors"]["data"][0]["code"] == "empty_file"


async def test_a_file_as_editors_write_it(cast: Cast) -> None:
    """With a byte order mark, other ends of lines, and lines without anything, which have numbers all the same."""
    lines = ["\ufeff" + json.dumps(make_line(1)) + "\r", "\r", json.dumps(make_line(2)) + "\r", "", "  "]
    made = await create(cast, lines)
    await runner.advance(made["id"])
    done = await read(cast, made["id"])
    assert (done["status"], done["request_counts"]) == ("completed", {"total": 2, "completed": 2, "failed": 0})
    assert [line["custom_id"] for line in await read_lines(cast, done["output_file_id"])] == ["line-1", "line-2"]
    bad = await create(cast, [*lines, "{", json.dumps(make_line(2))])
    await runner.advance(bad["id"])
    assert [problem["line"] for problem in (await read(cast, bad["id"]))["errors"]["data"]] == [6, 7]


async def test_bad_requests_are_refused(cast: Cast) -> None:
    line = make_line(1)
    for changes, param in (
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file_nope"}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"colour": 1}, "colour"),
    ):
        answer = await create(cast, [line], **changes)
        assert param in answer["error"]["param"], answer
    assert (await get(cast, "/v1/batches/batch_nope"))[0] == 404
    made = await create(cast, [line])
    stranger = await on_thread(lambda: Cast("bob@example.com"))
    assert (await get(stranger, f"/v1/batches/{made['id']}"))[0] == 404
    assert json.loads((await get(stranger, "/v1/batches"))[1])["data"] == []
    assert [item["id"] for item in json.loads((await get(cast, "/v1/batches"))[1])["data"]] == [made["id"]]


async def test_a_limit_that_says_later_is_waited_for(cast: Cast) -> None:
    plan = await on_thread(lambda: Plan.objects.get(slug="enterprise"))
    plan.requests_per_window, plan.window_s = 2, 2
    await on_thread(plan.save)
    made = await create(cast, [make_line(number) for number in range(5)])
    for _ in range(60):
        await runner.advance(made["id"])
        done = await read(cast, made["id"])
        if done["status"] == "completed":
            break
        await asyncio.sleep(0.3)
    assert done["request_counts"] == {"total": 5, "completed": 5, "failed": 0}


async def test_a_kill_is_waited_for_and_a_lost_key_is_not(cast: Cast) -> None:
    made = await create(cast, [make_line(1), make_line(2)])
    by = audit.by_command()
    await on_thread(lambda: killswitch.trip("site", reason="Drill", by=by))
    await runner.advance(made["id"])
    paused = await read(cast, made["id"])
    assert (paused["status"], paused["request_counts"]["completed"]) == ("in_progress", 0)
    await on_thread(lambda: killswitch.release("site", by=by))
    await on_thread(lambda: revoke_key(cast.key))
    await on_thread(lambda: Batch.objects.update(due_at=None))
    await runner.advance(made["id"])
    row = await on_thread(lambda: Batch.objects.get(public_id=made["id"]))
    assert (row.status, row.failed_count) == ("completed", 2)


def list_charges(cast: Cast) -> list[tuple[str, int]]:
    """Return what was charged to this test's organization: what an earlier test left running is settled when it ends."""
    own = UsageRecord.objects.filter(organization_id=cast.organization.public_id)
    return sorted(own.values_list("job_id", "cost_nanousd"))


async def wait_for_charges(cast: Cast, count: int) -> list[tuple[str, int]]:
    """Return what was charged, once settlement has come so far."""
    ends_at = time.monotonic() + 20
    while True:
        charged = await on_thread(lambda: list_charges(cast))
        if len(charged) >= count or time.monotonic() > ends_at:
            return charged
        await asyncio.sleep(0.05)


async def test_two_runners_do_not_meet(cast: Cast) -> None:
    made = await create(cast, [make_line(number) for number in range(6)])
    await asyncio.gather(*(runner.advance(made["id"]) for _ in range(4)))
    done = await read(cast, made["id"])
    assert (done["status"], done["request_counts"]["completed"]) == ("completed", 6)
    assert len(await wait_for_charges(cast, 6)) == 6


async def test_a_line_whose_process_died_after_its_charge_is_not_charged_again(cast: Cast) -> None:
    """M7: a retry after a broken answer is not billed again, though it is made again."""
    made = await create(cast, [make_line(number) for number in range(4)])
    await runner.advance(made["id"])
    before = await wait_for_charges(cast, 4)

    def undo() -> None:
        """Put everything back to where it was when lines 0 and 1 were charged and not yet written down."""
        batch = Batch.objects.get(public_id=made["id"])
        StoredFile.objects.filter(purpose="batch_output").delete()
        for number in range(1, 5):
            state = "running" if number < 3 else "done"
            BatchLine.objects.create(
                batch=batch,
                number=number,
                custom_id=f"line-{number - 1}",
                body=json.dumps(make_line(number - 1)["body"]),
                state=state,
                attempt=1,
                status_code=None if number < 3 else 200,
                answer="{}",
            )
        batch.status, batch.completed_count, batch.output_file_id = "in_progress", 2, ""
        batch.lease_holder = "dead"
        batch.save()

    await on_thread(undo)
    await runner.advance(made["id"])
    done = await read(cast, made["id"])
    assert (done["status"], done["request_counts"]["completed"]) == ("completed", 4)
    answers = await read_lines(cast, done["output_file_id"])
    assert answers[0]["response"]["body"]["usage"]["completion_tokens"] == 3
    await asyncio.sleep(1)
    assert await on_thread(lambda: list_charges(cast)) == before


async def test_a_lease_that_ran_out_is_taken_over(cast: Cast) -> None:
    made = await create(cast, [make_line(1)])
    assert await on_thread(lambda: leases.take(made["id"], "first"))
    assert not await on_thread(lambda: leases.take(made["id"], "second"))
    assert await on_thread(batches.list_due) == []
    await on_thread(lambda: Batch.objects.update(lease_until="2026-01-01T00:00:00Z"))
    assert await on_thread(batches.list_due) == [made["id"]]
    assert await on_thread(lambda: leases.take(made["id"], "second"))
    assert await on_thread(lambda: leases.renew(made["id"], "first")) is None
    assert await on_thread(lambda: leases.renew(made["id"], "second")) == "validating"


async def test_cancelling_keeps_what_was_answered(cast: Cast) -> None:
    made = await create(cast, [make_line(number) for number in range(400)])
    working = asyncio.create_task(runner.advance(made["id"]))
    while (await read(cast, made["id"]))["request_counts"]["completed"] < 3:
        await asyncio.sleep(0.05)
    status, body = await get(cast, f"/v1/batches/{made['id']}/cancel", "POST")
    assert (status, json.loads(body)["status"]) == (200, "cancelling")
    await working
    done = await read(cast, made["id"])
    assert done["status"] == "cancelled" and done["cancelled_at"] >= done["cancelling_at"]
    completed = done["request_counts"]["completed"]
    assert 3 <= completed < 400 and len(await read_lines(cast, done["output_file_id"])) == completed
    assert (await get(cast, f"/v1/batches/{made['id']}/cancel", "POST"))[0] == 200


async def test_a_batch_whose_day_is_over_names_what_was_not_run(cast: Cast) -> None:
    made = await create(cast, [make_line(1), make_line(2)])
    await on_thread(lambda: Batch.objects.update(expires_at="2026-01-01T00:00:00Z"))
    await runner.advance(made["id"])
    done = await read(cast, made["id"])
    assert (done["status"], done["output_file_id"]) == ("expired", None)
    lines = await read_lines(cast, done["error_file_id"])
    assert [line["error"]["code"] for line in lines] == ["batch_expired", "batch_expired"]
    assert await on_thread(lambda: list_charges(cast)) == []


async def test_a_batch_of_an_organization_that_is_closed_ends(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner deletes it exactly when a line has begun: nothing of it stays, nothing is held, and nobody stumbles over it."""
    place = await on_thread(lambda: organizations.create(cast.user, "Acme"))
    _, raw = await on_thread(lambda: create_key(place.organization, cast.user))
    own = copy(cast)
    own.raw = raw
    made = await create(own, [make_line(1), make_line(2)])
    run = lines.run

    async def close_first(batch: Any, line: Any, caller: Any) -> None:
        await on_thread(lambda: closes and organizations.delete(cast.user, closes.pop()))
        await run(batch, line, caller)

    closes = [place.organization]
    monkeypatch.setattr(lines, "run", close_first)
    await runner.advance(made["id"])
    assert not closes and await on_thread(lambda: (Batch.objects.count(), BatchLine.objects.count())) == (0, 0)
    assert await on_thread(lambda: {file.state for file in StoredFile.objects.all()}) == {StoredFile.State.DELETING}
    assert made["id"] not in await on_thread(batches.list_due)
    assert not await redis_clients.get_async().exists(keys.holds(f"organization:{place.organization.public_id}"))


async def test_a_batch_of_a_suspended_organization_waits(cast: Cast) -> None:
    """What an administrator suspends goes on when they open it again, as after a kill."""
    made = await create(cast, [make_line(1)])
    organization = cast.organization

    def suspend(is_active: bool) -> None:
        organization.is_active = is_active
        organization.save()
        Batch.objects.update(due_at=None)

    await on_thread(lambda: suspend(True))
    await on_thread(lambda: suspend(False))
    await runner.advance(made["id"])
    row = await on_thread(lambda: Batch.objects.get(public_id=made["id"]))
    assert (row.status, row.failed_count, row.completed_count) == ("in_progress", 0, 0)
    await on_thread(lambda: suspend(True))
    await runner.advance(made["id"])
    done = await read(cast, made["id"])
    assert done["request_counts"] == {"total": 1, "completed": 1, "failed": 0}


async def test_a_kill_of_the_organization_is_waited_for(cast: Cast) -> None:
    made = await create(cast, [make_line(1)])
    scope = f"organization:{cast.organization.public_id}"
    await on_thread(lambda: killswitch.trip(scope, reason="Drill", by=audit.by_command()))
    await runner.advance(made["id"])
    assert (await read(cast, made["id"]))["request_counts"] == {"total": 1, "completed": 0, "failed": 0}
    await on_thread(lambda: killswitch.release(scope, by=audit.by_command()))
    await on_thread(lambda: Batch.objects.update(due_at=None))
    await runner.advance(made["id"])
    assert (await read(cast, made["id"]))["request_counts"] == {"total": 1, "completed": 1, "failed": 0}


async def test_a_batch_whose_maker_died_is_made_once(cast: Cast) -> None:
    """M7: its process died after it had written the batch, and before it had said so."""
    file = await upload(cast, make_body(json.dumps(make_line(1)).encode(), purpose="batch")).read_json()
    value = {"input_file_id": file["id"], "endpoint": CHATS, "completion_window": "24h"}

    def ask() -> Exchange:
        return Exchange("POST", "/v1/batches", key=cast.raw, value=value, headers={"idempotency-key": "k"})

    first = await ask().read_json()
    gone = {"body": None, "status": None, "lease_until": "2026-01-01T00:00:00Z"}
    await on_thread(lambda: IdempotentRequest.objects.update(**gone))
    assert (await ask().read_json())["id"] == first["id"]
    assert await on_thread(Batch.objects.count) == 1


async def test_a_cancellation_sent_again_has_the_same_answer(cast: Cast) -> None:
    made = await create(cast, [make_line(1)])
    path, headers = f"/v1/batches/{made['id']}/cancel", {"idempotency-key": "k"}
    first = await Exchange("POST", path, key=cast.raw, headers=headers).read_json()
    assert first["status"] == "cancelling"
    await runner.advance(made["id"])
    again = Exchange("POST", path, key=cast.raw, headers=headers)
    assert await again.read_json() == first and again.headers["idempotent-replayed"] == "true"
