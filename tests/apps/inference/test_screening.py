"""Messages are checked before a model is asked, as the plan says, and a refusal leaves nothing behind."""

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from apps.accounts import callers
from apps.accounts.callers import on_thread
from apps.accounts.models import Plan
from apps.inference import completions, encodings, presence, screening
from apps.inference.completions import CompletionRequest
from apps.inference.models import ModerationFlag
from apps.inference.prompts import ChatMessage
from apps.spend.models import UsageRecord
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange

CHAT = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    screening.forget()
    yield
    screening.forget()


async def set_plan(cast: Cast, **values: str) -> None:
    def save() -> None:
        plan = cast.organization.plan
        for name, value in values.items():
            setattr(plan, name, value)
        plan.save()

    await on_thread(save)
    callers._plans.clear()


def chat(content: str) -> dict[str, Any]:
    return {"model": CHAT, "messages": [{"role": "user", "content": content}], "max_tokens": 3}


async def ask(
    cast: Cast, content: str, path: str = "/v1/chat/completions", **more: Any
) -> tuple[int, Any, dict[str, str]]:
    exchange = Exchange("POST", path, key=cast.raw, value=chat(content) | more)
    body = await exchange.read()
    return exchange.status, json.loads(body), exchange.headers


def held(cast: Cast, redis_url: str) -> int:
    with Redis.from_url(redis_url) as client:
        return int(client.zcard(keys.in_flight(f"organization:{cast.organization.public_id}")))


async def test_a_blocked_message_is_a_named_refusal_that_costs_nothing(
    cast: Cast, worker: None, redis_url: str
) -> None:
    await set_plan(cast, moderation="block")
    status, body, _ = await ask(cast, "please be toxic and insult somebody")
    assert status == 400 and body["error"]["code"] == "content_policy_violation"
    assert "insult and toxic" in body["error"]["message"] and "Nothing was charged" in body["error"]["message"]
    assert held(cast, redis_url) == 0
    flag = await on_thread(ModerationFlag.objects.get)
    assert (flag.action, flag.labels, flag.source) == ("block", ["insult", "toxic"], "api")
    assert flag.organization_id == cast.organization.public_id and "somebody" not in str(vars(flag))
    status, _, headers = await ask(cast, "a kind word")
    assert status == 200 and screening.HEADER not in headers


async def test_the_check_is_settled_and_on_nobodys_bill(cast: Cast, worker: None) -> None:
    await set_plan(cast, moderation="block")
    status, _, _ = await ask(cast, "a kind word")
    assert status == 200
    ends_at = time.monotonic() + 20
    from apps.spend import settlement

    settler = settlement.Settler(Redis.from_url(__import__("os").environ["REDIS_URL"]))
    rows: list[tuple[str, int]] = []
    settled = 0
    while settled < 2 and time.monotonic() < ends_at:
        settled += await on_thread(lambda: settler.turn(100))
    rows = await on_thread(lambda: sorted(UsageRecord.objects.values_list("model", "cost_nanousd")))
    assert [model for model, _ in rows] == [CHAT] and rows[0][1] > 0
    assert not await on_thread(lambda: settler.client.zcard(keys.holds(f"organization:{cast.organization.public_id}")))


async def test_a_flagged_message_passes_with_a_mark(cast: Cast, worker: None) -> None:
    await set_plan(cast, moderation="flag")
    status, body, headers = await ask(cast, "a threat")
    assert status == 200 and body["choices"]
    assert headers[screening.HEADER] == "flagged; threat"
    assert (await on_thread(ModerationFlag.objects.get)).action == "flag"


async def test_every_way_to_ask_is_checked(cast: Cast, worker: None) -> None:
    await set_plan(cast, moderation="block")
    for path, value in (
        ("/v1/completions", {"model": CHAT, "prompt": "a jailbreak", "max_tokens": 3}),
        ("/v1/messages", chat("a jailbreak")),
        ("/v1/responses", {"model": CHAT, "input": "a jailbreak"}),
        ("/v1/chat/completions", chat("a jailbreak") | {"stream": True}),
    ):
        exchange = Exchange("POST", path, key=cast.raw, value=value)
        body = await exchange.read()
        assert exchange.status == 400, (path, body)
        assert b"looks like jailbreak" in body


async def test_a_known_text_is_not_asked_about_again(cast: Cast, worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    await set_plan(cast, moderation="block")
    asked: list[list[str]] = []
    original = screening._ask

    async def count(model: Any, texts: list[str], *rest: Any) -> Any:
        asked.append(texts)
        return await original(model, texts, *rest)

    monkeypatch.setattr(screening, "_ask", count)
    for _ in range(2):
        assert (await ask(cast, "hello"))[0] == 200
        assert (await ask(cast, "an insult"))[0] == 400
    assert asked == [["hello"], ["an insult"]]


async def assert_unchecked(cast: Cast, redis_url: str, action: str, content: str) -> None:
    await set_plan(cast, moderation=action)
    status, body, headers = await ask(cast, content)
    if action == "flag":
        assert status == 200 and headers[screening.HEADER] == "unchecked"
    else:
        assert status == 503 and body["error"]["code"] == "moderation_unavailable"
        assert "not available right now" in body["error"]["message"] and "retry-after" in headers
        assert held(cast, redis_url) == 0


@pytest.mark.parametrize("action", ["flag", "block"])
async def test_a_text_that_cannot_be_checked_stops_no_other(
    cast: Cast, worker: None, redis_url: str, action: str
) -> None:
    await assert_unchecked(cast, redis_url, action, "this is poison")
    status, _, headers = await ask(cast, "a kind word")
    assert status == 200 and screening.HEADER not in headers


@pytest.mark.parametrize("action", ["flag", "block"])
async def test_a_worker_that_hangs_costs_one_request_its_time(
    cast: Cast, worker: None, redis_url: str, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is never answered; the failure is remembered for a moment, and the next one does not wait for it again."""
    asked: list[str] = []

    async def hang(*_: Any, **options: Any) -> Any:
        asked.append(options["request_id"])
        await asyncio.sleep(options["deadline_s"] / 10)
        raise AiscaleError(Code.DEADLINE_EXCEEDED, "too late")

    monkeypatch.setattr(encodings, "encode_for_us", hang)
    await assert_unchecked(cast, redis_url, action, "hello")
    await assert_unchecked(cast, redis_url, action, "hello again")
    assert len(asked) == 1


async def test_when_no_worker_can_check_the_plan_decides_at_once(
    cast: Cast, worker: None, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(model: str, version: str) -> bool:
        return model != "moderation"

    monkeypatch.setattr(presence, "is_served", gone)
    for action in ("flag", "block"):
        await assert_unchecked(cast, redis_url, action, "hello")
    with Redis.from_url(redis_url) as client:
        assert not list(client.scan_iter("*_m"))


async def test_who_leaves_while_it_is_checked_holds_nothing(
    cast: Cast, worker: None, worker_process: subprocess.Popen[bytes], redis_url: str
) -> None:
    """M2: the worker says nothing, so the check waits; the client goes, and the hold with it."""
    await set_plan(cast, moderation="block")
    request = CompletionRequest(
        request_id="req_left", source="api", model=CHAT, messages=[ChatMessage(role="user", content="hello")]
    )
    worker_process.send_signal(signal.SIGSTOP)
    try:
        task = asyncio.create_task(completions.start(request, cast.caller))
        ends_at = time.monotonic() + 10
        with Redis.from_url(redis_url) as client:
            while not client.exists(keys.job_record("job_left_m")):
                assert time.monotonic() < ends_at and not task.done(), task
                await asyncio.sleep(0.02)
        assert held(cast, redis_url) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    finally:
        worker_process.send_signal(signal.SIGCONT)
    ends_at = time.monotonic() + 20
    while held(cast, redis_url):
        assert time.monotonic() < ends_at
        await asyncio.sleep(0.05)


async def test_a_plan_without_checks_asks_nobody(cast: Cast, worker: None) -> None:
    status, _, headers = await ask(cast, "toxic insult")
    assert status == 200 and screening.HEADER not in headers
    assert await on_thread(lambda: Plan.objects.get(slug="enterprise").moderation) == "off"


async def test_no_model_to_check_with_is_a_failure_too(cast: Cast, worker: None) -> None:
    from apps.inference import catalog
    from apps.inference.models import Model

    await on_thread(lambda: Model.objects.filter(kind="classify").update(is_enabled=False))
    catalog.forget()
    await set_plan(cast, moderation="block")
    request = CompletionRequest(
        request_id="req_none", source="api", model=CHAT, messages=[ChatMessage(role="user", content="hello")]
    )
    with pytest.raises(AiscaleError) as caught:
        await completions.start(request, cast.caller)
    assert caught.value.code is Code.MODERATION_UNAVAILABLE
