"""Known answers: who gets them, what they cost, and when they are forgotten. Real worker (fake runner), Valkey, Postgres and settlement."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from asgiref.sync import sync_to_async
from django.db import connection
from django.utils import timezone
from redis import Redis

from aiscale import redis as redis_clients
from aiscale.wire import keys
from apps.accounts import audit, callers
from apps.accounts.keys import create_key
from apps.accounts.models import Plan
from apps.inference.cache import generations
from apps.inference.cache.store import get_store
from apps.inference.models import CachedAnswer
from apps.spend import prices, rerating
from apps.spend.models import UsageRecord
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange, read_events

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("worker", "settling")]

CHAT, EMBED = "smollm2-135m-instruct", "all-minilm-l6-v2"


def chat(said: str = "What is cached?", **more: Any) -> dict[str, Any]:
    return {
        "model": CHAT,
        "messages": [{"role": "user", "content": said}],
        "max_tokens": 6,
        "temperature": 0,
        **more,
    }


async def ask(raw: str, value: dict[str, Any], path: str = "/v1/chat/completions", **headers: str) -> Exchange:
    exchange = Exchange("POST", path, key=raw, value=value, headers=headers)
    exchange.body = await exchange.read()  # type: ignore[attr-defined]
    return exchange


def level(exchange: Exchange) -> str | None:
    return exchange.headers.get("x-aiscale-cache")


def text(exchange: Exchange) -> str:
    body = json.loads(exchange.body)  # type: ignore[attr-defined]
    return str(body["choices"][0]["message"]["content"])


async def wait_usage(count: int) -> list[UsageRecord]:
    """Return all usage records once there are so many."""
    ends_at = time.monotonic() + 20
    while True:
        rows = await sync_to_async(lambda: list(UsageRecord.objects.order_by("id")))()
        if len(rows) >= count:
            return rows
        assert time.monotonic() < ends_at, f"{len(rows)} of {count} usage records"
        await asyncio.sleep(0.05)


async def forget_local() -> None:
    get_store().local.clear()


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    client = Redis.from_url(redis_url)
    yield client
    client.close()


async def test_an_answer_is_found_at_each_level_and_brought_up(cast: Cast, redis: Redis) -> None:
    first = await ask(cast.raw, chat())
    assert (first.status, level(first)) == (200, "miss")
    assert level(await ask(cast.raw, chat())) == "l1"
    await forget_local()
    assert level(await ask(cast.raw, chat())) == "l2"
    assert level(await ask(cast.raw, chat())) == "l1"
    await get_store().flush()
    await forget_local()
    for name in redis.scan_iter(keys.PREFIX + "cached:*"):
        redis.delete(name)
    last = await ask(cast.raw, chat())
    assert (level(last), text(last)) == ("l3", text(first))
    await forget_local()
    assert level(await ask(cast.raw, chat())) == "l2"


async def test_a_hit_costs_the_plans_part_and_says_what_it_saved(cast: Cast) -> None:
    await sync_to_async(Plan.objects.filter(slug="enterprise").update)(cached_price_percent=40)
    callers._plans.clear()
    await ask(cast.raw, chat())
    hit = await ask(cast.raw, chat())
    computed, known = await wait_usage(2)
    assert level(hit) == known.cache == "l1"
    assert computed.cache == "" and computed.saved_nanousd == 0
    assert (known.prompt_tokens, known.completion_tokens) == (computed.prompt_tokens, computed.completion_tokens)
    prices = computed.prompt_nanousd_per_token, computed.completion_nanousd_per_token
    expected = sum(
        count * -(-price * 40 // 100)
        for count, price in zip((known.prompt_tokens, known.completion_tokens), prices, strict=True)
    )
    assert known.cost_nanousd == expected > 0
    assert known.saved_nanousd == computed.cost_nanousd - known.cost_nanousd > 0


async def test_rating_usage_again_at_the_same_prices_changes_nothing(cast: Cast) -> None:
    """M9: a re-rating knows what was cached, whole or in part, and at which part of the price."""
    began = timezone.now()
    await ask(cast.raw, chat())
    await ask(cast.raw, chat())
    for texts in (["one"], ["one", "two"], ["one", "two"]):
        await ask(cast.raw, {"model": EMBED, "input": texts}, "/v1/embeddings")
    rows = await wait_usage(5)
    assert {row.cache for row in rows} == {"", "l1"} and any(row.cached_tokens and not row.cache for row in rows)

    def preview(model: str, factor: int) -> list[rerating.Change]:
        terms = prices.terms_of(prices.map_current()[model])
        terms = prices.Terms(**{name: price * factor for name, price in msgspec.structs.asdict(terms).items()})
        return rerating.preview(rerating.Order(model, began, timezone.now(), terms))

    for model in (CHAT, EMBED):
        assert await sync_to_async(preview)(model, 1) == []
        [change] = await sync_to_async(preview)(model, 4)
        # parts of a nano-USD are rounded up, which weighs more at low prices
        assert 3.5 < change.after_nanousd / change.before_nanousd <= 4
        assert change.requests == sum(row.model == model for row in rows)


async def test_a_stream_is_answered_from_the_cache_too(cast: Cast) -> None:
    first = await ask(cast.raw, chat())
    streamed = await ask(cast.raw, chat(stream=True, stream_options={"include_usage": True}))
    events = read_events(streamed.body)  # type: ignore[attr-defined]
    assert level(streamed) == "l1" and events[-1] == "DONE"
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events[:-1] if event["choices"]]
    assert "".join(pieces) == text(first)
    assert events[-2]["usage"]["completion_tokens"] == 6


async def test_several_choices_with_logprobs_come_back_as_they_were(cast: Cast) -> None:
    wanted = chat(n=2, seed=5, temperature=1, logprobs=True, top_logprobs=1)
    first, again = await ask(cast.raw, wanted), await ask(cast.raw, wanted)
    assert (level(first), level(again)) == ("miss", "l1")
    one, two = (json.loads(exchange.body)["choices"] for exchange in (first, again))  # type: ignore[attr-defined]
    assert one == two and len(one) == 2 and one[0]["logprobs"]["content"]


async def test_chance_is_cached_only_when_the_caller_asks(cast: Cast) -> None:
    drawn = chat(temperature=1)
    for _ in range(2):
        assert level(await ask(cast.raw, drawn)) is None
    wished = {**drawn, "cache": {"use-cache": True}}
    assert [level(await ask(cast.raw, wished)) for _ in range(2)] == ["miss", "l1"]


@pytest.mark.parametrize("how", ["header", "body"])
async def test_no_cache_computes_anew_and_no_store_keeps_nothing(cast: Cast, how: str) -> None:
    def wish(word: str) -> tuple[dict[str, Any], dict[str, str]]:
        return (chat(), {"cache-control": word}) if how == "header" else (chat(cache={word: True}), {})

    value, headers = wish("no-store")
    assert level(await ask(cast.raw, value, **headers)) == "miss"
    assert level(await ask(cast.raw, chat())) == "miss"
    value, headers = wish("no-cache")
    assert level(await ask(cast.raw, value, **headers)) == "miss"
    assert level(await ask(cast.raw, chat())) == "l1"


async def test_an_unknown_cache_option_is_refused_by_name(cast: Cast) -> None:
    refused = await ask(cast.raw, chat(cache={"ttl": 5}))
    assert refused.status == 400 and b"cache" in refused.body  # type: ignore[attr-defined]


async def test_whatever_changes_the_answer_is_another_request(cast: Cast) -> None:
    await ask(cast.raw, chat())
    others = [
        chat("What is cached"),
        chat(max_tokens=7),
        chat(stop=["x"]),
        chat(logit_bias={"5": 1}),
        chat(frequency_penalty=0.5),
        chat(response_format={"type": "json_object"}, messages=[{"role": "user", "content": "What is cached? json"}]),
        chat(logprobs=True),
        chat(temperature=0.5, seed=1),
    ]
    for other in others:
        assert level(await ask(cast.raw, other)) == "miss", other
    # without chance these say nothing
    assert level(await ask(cast.raw, chat(top_p=0.5, seed=9))) == "l1"


@pytest.mark.parametrize(
    ("scope", "same_organization", "stranger"),
    [("key", "miss", "miss"), ("organization", "l1", "miss"), ("site", "l1", "l1")],
)
async def test_nobody_outside_the_plans_scope_is_given_an_answer_c1(
    cast: Cast, scope: str, same_organization: str, stranger: str
) -> None:
    """C1: another organization's answers do not exist, nor another key's where the plan says so."""
    await sync_to_async(Plan.objects.filter(slug="enterprise").update)(cache_scope=scope)
    callers._plans.clear()
    _, second = await sync_to_async(create_key)(cast.organization, cast.user, "second")
    other = await sync_to_async(Cast)("eve@example.com")
    await ask(cast.raw, chat())
    assert level(await ask(cast.raw, chat())) == "l1"
    assert level(await ask(second, chat())) == same_organization
    assert level(await ask(other.raw, chat())) == stranger


@pytest.mark.parametrize("scope", ["site", f"model:{CHAT}", "organization"])
async def test_a_purge_empties_all_levels_at_once(cast: Cast, scope: str) -> None:
    scope = f"organization:{cast.organization.public_id}" if scope == "organization" else scope
    await ask(cast.raw, chat())
    await get_store().flush()
    assert level(await ask(cast.raw, chat())) == "l1"
    by = audit.by_system("test")
    assert await sync_to_async(generations.purge)(scope, by=by) == 1
    assert level(await ask(cast.raw, chat())) == "miss"
    await sync_to_async(generations.purge)("model:another", by=by)
    assert level(await ask(cast.raw, chat())) == "l1"


@pytest.mark.parametrize("scope", ["site", f"model:{EMBED}", "organization"])
async def test_a_purge_empties_what_the_process_remembers_at_once(cast: Cast, scope: str) -> None:
    """A known vector takes one Redis trip, the gate's; it is the gate that sees that there was a purge."""
    value = {"model": EMBED, "input": "a text"}
    levels = [level(await ask(cast.raw, value, "/v1/embeddings")) for _ in range(3)]
    assert levels == ["miss", "l1", "l1"]
    scope = f"organization:{cast.organization.public_id}" if scope == "organization" else scope
    await sync_to_async(generations.purge)(scope, by=audit.by_system("test"))
    assert level(await ask(cast.raw, value, "/v1/embeddings")) == "miss"
    assert level(await ask(cast.raw, value, "/v1/embeddings")) == "l1"
    client: Any = redis_clients.get_async()
    await client.delete(keys.CACHE_GENERATIONS)
    assert level(await ask(cast.raw, value, "/v1/embeddings")) == "l1"
    assert len({row.job_id for row in await wait_usage(6)}) == 6


async def test_identical_requests_at_once_are_computed_once(cast: Cast) -> None:
    """One is computed; the others are told what came out, at the cached price."""
    answers = await asyncio.gather(*(ask(cast.raw, chat(stream=index % 2 == 0)) for index in range(12)))
    assert sorted(filter(None, map(level, answers))) == ["l1"] * 11 + ["miss"]
    rows = await wait_usage(12)
    assert sum(row.cache == "" for row in rows) == 1


async def test_when_the_first_leaves_another_one_computes(cast: Cast) -> None:
    """A flight that nobody finishes is taken over, so that nobody waits in vain."""
    first = Exchange("POST", "/v1/chat/completions", key=cast.raw, value=chat(max_tokens=200, stream=True))
    await first.next_part()
    others = [asyncio.create_task(ask(cast.raw, chat(max_tokens=200))) for _ in range(3)]
    await asyncio.sleep(0.3)
    first.leave()
    answers = await asyncio.wait_for(asyncio.gather(*others), 60)
    assert {answer.status for answer in answers} == {200}
    assert sorted(filter(None, map(level, answers))).count("miss") >= 1


async def test_vectors_are_known_text_by_text(cast: Cast) -> None:
    def value(*texts: str) -> dict[str, Any]:
        return {"model": EMBED, "input": list(texts)}

    first = await ask(cast.raw, value("one", "two", "one"), "/v1/embeddings")
    assert level(first) == "miss"
    mixed = await ask(cast.raw, value("three", "two"), "/v1/embeddings")
    assert level(mixed) == "miss"
    known = await ask(cast.raw, value("two", "three", "one"), "/v1/embeddings")
    assert level(known) == "l1"
    rows = [[entry["embedding"] for entry in json.loads(e.body)["data"]] for e in (first, mixed, known)]  # type: ignore[attr-defined]
    assert rows[0][0] == rows[0][2] == rows[2][2]
    assert rows[0][1] == rows[1][1] == rows[2][0]
    assert rows[1][0] == rows[2][1]
    a, b, c = await wait_usage(3)
    each = a.prompt_tokens // 3
    assert (a.cached_tokens, b.cached_tokens, c.cached_tokens) == (each, each, 3 * each)
    cheap = -(-b.prompt_nanousd_per_token * 25 // 100)
    assert b.cost_nanousd == each * (b.prompt_nanousd_per_token + cheap)
    assert c.cache == "l1" and c.cost_nanousd == 3 * each * cheap


async def test_a_hit_passes_the_gate(cast: Cast) -> None:
    """A known answer is limited, budgeted and refused like any other, and needs no place in flight."""
    await ask(cast.raw, chat())
    await sync_to_async(Plan.objects.filter(slug="enterprise").update)(max_in_flight=1)
    hits = await asyncio.gather(*(ask(cast.raw, chat()) for _ in range(8)))
    assert {hit.status for hit in hits} == {200}

    def limit() -> None:
        plan = Plan.objects.get(slug="enterprise")
        plan.requests_per_window = 10
        plan.save()

    await sync_to_async(limit)()
    await asyncio.sleep(0)
    last = [await ask(cast.raw, chat()) for _ in range(3)]
    assert [exchange.status for exchange in last] == [200, 429, 429]


async def test_what_tools_or_a_stored_conversation_gave_is_not_cached_c4(cast: Cast) -> None:
    """C4: such an answer may hold what others have no right to read; it is computed each time, for whoever asks."""
    stored = {"model": CHAT, "input": "Hello", "max_output_tokens": 4, "temperature": 0}
    for _ in range(2):
        assert level(await ask(cast.raw, stored, "/v1/responses")) is None
    assert not await sync_to_async(CachedAnswer.objects.exists)()
    assert [level(await ask(cast.raw, {**stored, "store": False}, "/v1/responses")) for _ in range(2)] == ["miss", "l1"]


async def test_many_at_once_take_no_thread_and_no_connection_each_d1_d4(cast: Cast) -> None:
    """D1, D4: sixty requests at once, none known, a part of them streamed, add neither a thread nor a database connection each."""

    def count_connections() -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
            return int(cursor.fetchone()[0])

    async def embed(number: int) -> int:
        return (await ask(cast.raw, {"model": EMBED, "input": f"text {number}"}, "/v1/embeddings")).status

    async def stream(number: int) -> int:
        return (await ask(cast.raw, chat(f"text {number}", stream=True))).status

    assert await embed(-1) == 200
    requests = asyncio.gather(*map(embed, range(40)), *map(stream, range(20)))
    most_threads = most_connections = 0
    while not requests.done():
        most_threads = max(most_threads, threading.active_count())
        most_connections = max(most_connections, await sync_to_async(count_connections)())
        await asyncio.sleep(0.02)
    assert set(await requests) == {200}
    assert most_threads < 50 and most_connections < 30


async def test_a_redis_that_is_away_is_a_miss_of_level_2(cast: Cast) -> None:
    """What cannot be read of the cache counts as not there; broken entries too."""
    await ask(cast.raw, chat())
    await get_store().flush()
    await forget_local()
    await sync_to_async(CachedAnswer.objects.update)(value=b"\xff not msgpack")
    for name in Redis.from_url(_url()).scan_iter(keys.PREFIX + "cached:*"):
        Redis.from_url(_url()).set(name, b"\xff")
    answer = await ask(cast.raw, chat())
    assert (answer.status, level(answer)) == (200, "miss")


def _url() -> str:
    from django.conf import settings

    return str(settings.REDIS_URL)
