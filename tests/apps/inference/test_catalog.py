"""The catalog gives the price in force, at most a second old; a request keeps the price of its admission."""

import asyncio
import threading
import time
from datetime import timedelta

import msgspec
import pytest
from django.utils import timezone
from redis import Redis

from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from aiscale.wire.codec import decode_generate_job
from apps.accounts import audit
from apps.accounts.callers import on_thread
from apps.inference import catalog, completions
from apps.inference.completions import CompletionRequest
from apps.inference.models import Model
from apps.inference.prompts import ChatMessage
from apps.spend import prices
from apps.spend.models import Price
from tests.apps.conftest import Cast

MODEL = "smollm2-135m-instruct"


def change(prompt: int, *, after_s: float | None = None) -> Price:
    terms = prices.terms_of(prices.map_current()[MODEL])
    terms = msgspec.structs.replace(terms, prompt_nanousd_per_token=prompt, cached_prompt_nanousd_per_token=1)
    moment = None if after_s is None else timezone.now() + timedelta(seconds=after_s)
    return prices.change(MODEL, terms, valid_from=moment, reason="test", by=audit.by_system("test"))


async def wait_for_price(prompt: int) -> catalog.CatalogModel:
    ends_at = time.monotonic() + 20
    while (model := await catalog.get_model(MODEL)).terms.prompt_nanousd_per_token != prompt:
        assert time.monotonic() < ends_at
        await asyncio.sleep(0.05)
    return model


async def test_a_change_arrives_and_a_planned_one_begins_by_itself(cast: Cast) -> None:
    assert (await catalog.get_model(MODEL)).terms.prompt_nanousd_per_token == 50
    now = await on_thread(lambda: change(60))
    planned = await on_thread(lambda: change(70, after_s=1.5))
    assert (await wait_for_price(60)).price_id == now.public_id
    assert (await wait_for_price(70)).price_id == planned.public_id


async def test_a_burst_after_a_quiet_time_finds_no_old_copy(cast: Cast) -> None:
    """Not even those that come while the first of them reads it anew."""
    await catalog.get_model(MODEL)
    await on_thread(lambda: change(60))
    await asyncio.sleep(2 * catalog.FRESH_S + 0.1)
    found = await asyncio.gather(*(catalog.get_model(MODEL) for _ in range(20)))
    assert [model.terms.prompt_nanousd_per_token for model in found] == [60] * 20


async def test_nobody_waits_for_a_database_that_hangs(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    await catalog.get_model(MODEL)
    await asyncio.sleep(2 * catalog.FRESH_S + 0.1)
    going_on = threading.Event()
    monkeypatch.setattr(catalog, "_read", lambda: going_on.wait(30) and {})
    first = asyncio.create_task(catalog.get_model(MODEL))
    await asyncio.sleep(0.05)
    started = time.monotonic()
    found = await catalog.get_model(MODEL)
    assert found.terms.prompt_nanousd_per_token == 50 and time.monotonic() - started < catalog.PATIENCE_S + 1
    going_on.set()
    with pytest.raises(AiscaleError):
        await first
    catalog.forget()


async def test_a_request_keeps_the_price_of_its_admission(cast: Cast, redis_url: str) -> None:
    await on_thread(lambda: change(60))
    catalog.forget()
    request = CompletionRequest(
        request_id="req_1",
        source="api",
        model=MODEL,
        messages=[ChatMessage(role="user", content="Hello")],
        max_tokens=5,
    )
    async with await completions.start(request, cast.caller) as run:
        await on_thread(lambda: change(70))
        payload = Redis.from_url(redis_url).hget(keys.job_record(run.job_id), "payload")
        tag = decode_generate_job(payload).billing  # type: ignore[arg-type]
    first = await on_thread(lambda: Price.objects.get(public_id=tag.price_id))
    assert first.prompt_nanousd_per_token == tag.prompt_nanousd_per_token == 60
    assert (tag.cached_prompt_nanousd_per_token, tag.request_nanousd) == (1, 0)
    assert tag.hold_nanousd == run.prompt_tokens * 60 + 5 * 200


async def test_m10_what_has_no_price_is_not_served(cast: Cast) -> None:
    await on_thread(
        lambda: Model.objects.create(
            slug="priceless", name="Priceless", kind="generate", version="1", context_tokens=10
        )
    )
    catalog.forget()
    with pytest.raises(AiscaleError) as refused:
        await catalog.get_model("priceless")
    assert refused.value.code is Code.MODEL_NOT_FOUND
