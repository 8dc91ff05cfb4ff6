"""Every limit is in force at the public API, and a change of it within a second, in processes that run (M4)."""

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone
from redis import Redis

from apps.accounts.callers import on_thread
from apps.accounts.models import Plan
from apps.spend import budgets, settlement, usage
from apps.spend.models import Budget, UsageRecord
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange

pytestmark = pytest.mark.usefixtures("worker")
CHAT, EMBED = "smollm2-135m-instruct", "all-minilm-l6-v2"
PROMPT = "Hello"


def chat(cast: Cast, **changes: Any) -> Exchange:
    value = {"model": CHAT, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2} | changes
    return Exchange("POST", "/v1/chat/completions", key=cast.raw, value=value)


def embed(cast: Cast, text: str) -> Exchange:
    return Exchange("POST", "/v1/embeddings", key=cast.raw, value={"model": EMBED, "input": text})


async def answer(exchange: Exchange) -> tuple[int, str, str]:
    """Return status, code and message."""
    value = await exchange.read_json()
    error = value.get("error") or {}
    return exchange.status, error.get("code", ""), error.get("message", "")


async def change_plan(**changes: Any) -> None:
    def change() -> None:
        plan = Plan.objects.get(slug="enterprise")
        for name, value in changes.items():
            setattr(plan, name, value)
        plan.save()

    await on_thread(change)


async def change_key(cast: Cast, **changes: Any) -> None:
    def change() -> None:
        for name, value in changes.items():
            setattr(cast.key, name, value)
        cast.key.save()

    await on_thread(change)


async def set_budget(scope: str, limit_nanousd: int, **changes: Any) -> None:
    await on_thread(lambda: Budget.objects.create(scope=scope, limit_nanousd=limit_nanousd, **changes))


async def settle(redis_url: str, jobs: int) -> None:
    """Have that many jobs settled."""

    def work() -> None:
        settler = settlement.Settler(Redis.from_url(redis_url))
        ends_at = time.monotonic() + 20
        while UsageRecord.objects.count() < jobs:
            assert time.monotonic() < ends_at
            settler.turn(100)

    await on_thread(work)


async def test_m4_requests_in_a_window(cast: Cast) -> None:
    assert (await answer(chat(cast)))[0] == 200
    await change_plan(requests_per_window=2)
    second = chat(cast)
    assert (await answer(second))[0] == 200
    assert (
        second.headers["x-ratelimit-limit-requests"] == "2" and second.headers["x-ratelimit-remaining-requests"] == "0"
    )
    third = chat(cast)
    status, code, message = await answer(third)
    assert (status, code) == (
        429,
        "rate_limit_exceeded",
    ) and "2 requests of this minute on the Enterprise plan" in message
    assert 1 <= int(third.headers["retry-after"]) <= 61


async def test_m4_tokens_a_minute_for_chat_and_embeddings(cast: Cast, redis_url: str) -> None:
    await change_plan(tokens_per_minute=200)
    first = chat(cast, max_tokens=100)
    value = await first.read_json()
    assert first.status == 200 and first.headers["x-ratelimit-limit-tokens"] == "200"
    worst = value["usage"]["prompt_tokens"] + 100
    assert first.headers["x-ratelimit-remaining-tokens"] == str(200 - worst)
    refused = chat(cast, max_tokens=100)
    status, code, message = await answer(refused)
    assert (status, code) == (429, "rate_limit_exceeded") and "of the 200 tokens a minute are left" in message
    assert 1 <= int(refused.headers["retry-after"]) <= 61
    status, code, message = await answer(embed(cast, "word " * 220))
    assert (status, code) == (429, "rate_limit_exceeded") and "200 a minute are allowed" in message
    # what was not used is there again
    await settle(redis_url, 1)
    again = chat(cast, max_tokens=2)
    assert (await answer(again))[0] == 200
    used = int(value["usage"]["total_tokens"])
    assert again.headers["x-ratelimit-remaining-tokens"] == str(200 - used - value["usage"]["prompt_tokens"] - 2)


async def test_m4_requests_in_flight(cast: Cast) -> None:
    await change_plan(max_in_flight=1)
    running = chat(cast, max_tokens=500, stream=True)
    await running.next_part()
    status, code, message = await answer(chat(cast))
    assert (status, code) == (429, "too_many_in_flight") and "allows 1 at a time" in message
    running.leave()


async def test_m4_context_and_output_tokens(cast: Cast) -> None:
    assert (await answer(chat(cast, max_tokens=60)))[0] == 200
    await change_plan(context_tokens=80, max_output_tokens=50)
    await asyncio.sleep(1.05)
    status, code, message = await answer(chat(cast, max_tokens=60))
    assert (status, code) == (400, "invalid_request") and "allows at most 50" in message
    status, code, message = await answer(chat(cast, messages=[{"role": "user", "content": "word " * 100}]))
    assert (status, code) == (400, "context_length_exceeded")
    assert "The Enterprise plan's maximum context length is 80 tokens" in message
    status, code, message = await answer(embed(cast, "word " * 100))
    assert (status, code) == (400, "context_length_exceeded") and "The Enterprise plan's" in message


async def test_m4_models_of_plan_and_key(cast: Cast) -> None:
    await change_key(cast, allowed_models=[EMBED])
    status, code, message = await answer(chat(cast))
    assert (status, code) == (403, "model_not_allowed") and "This API key" in message
    assert (await answer(embed(cast, "x")))[0] == 200
    await change_plan(allowed_models=[CHAT])
    status, code, message = await answer(embed(cast, "x"))
    assert (status, code) == (403, "model_not_allowed") and "The Enterprise plan" in message


async def test_m4_limits_of_a_key(cast: Cast) -> None:
    await change_key(cast, requests_per_window=1, window_s=60)
    assert (await answer(chat(cast)))[0] == 200
    status, code, message = await answer(chat(cast))
    assert (status, code) == (
        429,
        "rate_limit_exceeded",
    ) and "the one request of this minute for this API key" in message
    await change_key(cast, requests_per_window=None, window_s=None, tokens_per_minute=3)
    status, code, message = await answer(chat(cast))
    assert (status, code) == (429, "rate_limit_exceeded") and "3 a minute are allowed for this API key" in message
    await change_key(cast, tokens_per_minute=None, max_in_flight=1)
    running = chat(cast, max_tokens=500, stream=True)
    await running.next_part()
    assert (await answer(chat(cast)))[1] == "too_many_in_flight"
    running.leave()


SCOPES: list[Callable[[Cast], str]] = [
    lambda cast: "site",
    lambda cast: "plan:enterprise",
    lambda cast: f"model:{CHAT}",
    lambda cast: budgets.organization_scope(cast.organization.public_id),
    lambda cast: f"user:{cast.user.public_id}",
    lambda cast: f"key:{cast.key.public_id}",
]


@pytest.mark.parametrize("scope", SCOPES, ids=["site", "plan", "model", "organization", "user", "key"])
@pytest.mark.parametrize("period", ["daily", "monthly"])
async def test_m4_m5_budgets_of_every_scope(
    cast: Cast, redis_url: str, scope: Callable[[Cast], str], period: str
) -> None:
    """What one request cost is what the budget counts, and a budget of exactly that refuses the next one."""
    assert (await answer(chat(cast)))[0] == 200
    await settle(redis_url, 1)
    record = await on_thread(UsageRecord.objects.get)
    assert record.cost_nanousd > 0
    await set_budget(scope(cast), 3 * record.hold_nanousd, period=period)
    assert (await answer(chat(cast)))[0] == 200
    await settle(redis_url, 2)
    spent = await on_thread(lambda: sum(UsageRecord.objects.values_list("cost_nanousd", flat=True)))
    await on_thread(lambda: Budget.objects.get().delete())
    await set_budget(scope(cast), spent + record.hold_nanousd - 1, period=period)
    refused = chat(cast)
    status, code, message = await answer(refused)
    assert (status, code) == (429, "insufficient_quota"), message
    assert "x-should-retry" in refused.headers
    await on_thread(lambda: Budget.objects.get().delete())
    await set_budget(scope(cast), spent + record.hold_nanousd, period=period)
    assert (await answer(chat(cast)))[0] == 200


async def test_m4_the_plans_monthly_limit(cast: Cast) -> None:
    await change_plan(monthly_limit_nanousd=0, monthly_included_nanousd=0)
    status, code, message = await answer(chat(cast))
    assert (status, code) == (429, "insufficient_quota") and "Of your monthly limit of $0.00" in message
    summary = await on_thread(lambda: usage.month_summary(cast.organization.public_id))
    assert (summary.spent_nanousd, summary.held_nanousd, summary.limit_nanousd) == (0, 0, 0)


async def test_m4_an_expired_key(cast: Cast) -> None:
    await change_key(cast, expires_at=timezone.now() + timedelta(seconds=1))
    await asyncio.sleep(1.1)
    status, code, _ = await answer(chat(cast))
    assert (status, code) == (401, "key_expired")


# what a Redis that answers, but takes no writes, is set to
BREAKS = {
    "no memory": ("maxmemory", "1", "0"),
    "a lost replica": ("min-replicas-to-write", "1", "0"),
}


@pytest.mark.parametrize("name", BREAKS)
async def test_m3_a_redis_that_takes_no_writes_lets_nobody_past_the_limits(
    cast: Cast, redis_url: str, name: str
) -> None:
    """M3: what is known of the caller is still in memory, and the worker waits; still nothing is served that no budget knows of."""
    await set_budget("site", 10**12)
    assert await answer(chat(cast)) == (200, "", "")
    setting, broken, whole = BREAKS[name]
    with Redis.from_url(redis_url) as client:
        await settle(redis_url, 1)
        client.config_set(setting, broken)
        try:
            for exchange in (chat(cast), chat(cast, stream=True), embed(cast, PROMPT)):
                assert (await answer(exchange))[:2] == (503, "backend_unavailable")
                assert int(exchange.headers["retry-after"]) >= 1
        finally:
            client.config_set(setting, whole)
    assert await answer(chat(cast)) == (200, "", "")
    await settle(redis_url, 2)
    assert await on_thread(UsageRecord.objects.count) == 2
