"""Who asks what is being computed follows it: admitted first, told word by word, charged once, and never left alone.

Real worker (fake runner, 20 ms a token), Valkey, Postgres and settlement. A thread with an event loop of its own is another web process.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from asgiref.sync import sync_to_async

from apps.accounts import audit, callers
from apps.accounts.models import Plan
from apps.inference.cache import flights, generations
from apps.spend import killswitch
from apps.spend.models import UsageRecord
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange, read_events
from tests.apps.gateway.test_cache import CHAT, ask, chat, level, text, wait_usage

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("worker", "settling")]

LONG = 120


def stream(raw: str, **more: Any) -> Exchange:
    return Exchange("POST", "/v1/chat/completions", key=raw, value=chat(**{"max_tokens": LONG, "stream": True, **more}))


async def hear(exchange: Exchange) -> AsyncIterator[str]:
    """Yield the pieces of text as they come."""
    while (part := await exchange.next_part()) is not None:
        for event in read_events(part):
            if event == "DONE":
                return
            if event.get("choices"):
                yield event["choices"][0]["delta"].get("content") or ""


async def hear_some(exchange: Exchange, count: int) -> tuple[AsyncIterator[str], str]:
    """Return the rest of a stream, and its first so many pieces."""
    pieces, said = hear(exchange), ""
    while count:
        piece = await anext(pieces)
        said, count = said + piece, count - bool(piece)
    return pieces, said


async def elsewhere(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Do it in another web process."""
    return await asyncio.to_thread(lambda: asyncio.run(work()))


async def test_a_stream_that_follows_comes_as_the_first_one_does(cast: Cast) -> None:
    first = stream(cast.raw)
    rest, said = await hear_some(first, 5)
    second = stream(cast.raw)
    follows, heard = await hear_some(second, 8)
    assert level(second) == "l1" and level(first) == "miss"
    assert not first.task.done(), "the first one is still being made"
    said += "".join([piece async for piece in rest])
    heard += "".join([piece async for piece in follows])
    assert heard == said != ""
    computed, known = sorted(await wait_usage(2), key=lambda row: row.cache)
    assert (computed.cache, known.cache, known.completion_tokens) == ("", "l1", LONG)
    assert known.cost_nanousd + known.saved_nanousd == computed.cost_nanousd
    assert 0 < known.cost_nanousd < computed.cost_nanousd


async def test_it_comes_so_from_another_process_too(cast: Cast) -> None:
    ended = threading.Event()

    async def follow() -> tuple[str, bool, str | None]:
        exchange = stream(cast.raw)
        rest, heard = await hear_some(exchange, 8)
        was_early = not ended.is_set()
        return heard + "".join([piece async for piece in rest]), was_early, level(exchange)

    first = stream(cast.raw)
    rest, said = await hear_some(first, 3)
    following = asyncio.create_task(elsewhere(follow))
    said += "".join([piece async for piece in rest])
    ended.set()
    assert await following == (said, True, "l1")
    rows = await wait_usage(2)
    assert sorted(row.cache for row in rows) == ["", "l1"]


async def test_it_is_refused_before_it_follows_not_after(cast: Cast) -> None:
    """Limits and budgets are asked first: nobody waits for an answer that they may not have."""
    first = stream(cast.raw)
    await first.next_part()

    def limit() -> None:
        plan = Plan.objects.get(slug="enterprise")
        plan.requests_per_window = 1
        plan.save()

    await sync_to_async(limit)()
    refused = await ask(cast.raw, chat(max_tokens=LONG))
    assert refused.status == 429 and not first.task.done()
    first.leave()
    await wait_usage(1)


async def test_several_choices_and_what_is_not_streamed_follow_too(cast: Cast) -> None:
    wanted = chat(n=2, seed=3, temperature=1, logprobs=True, max_tokens=40)
    one, two = await asyncio.gather(ask(cast.raw, wanted), ask(cast.raw, wanted))
    assert {level(one), level(two)} == {"miss", "l1"}
    choices = [json.loads(exchange.body)["choices"] for exchange in (one, two)]  # type: ignore[attr-defined]
    assert choices[0] == choices[1] and len(choices[0][0]["logprobs"]["content"]) == 40


async def test_when_the_first_leaves_the_streams_go_on_where_they_were(cast: Cast) -> None:
    """M6: the first pays for what was made for it; one of the others has it made anew, and no word is told twice."""
    whole = text(await ask(cast.raw, chat(max_tokens=LONG)))
    await sync_to_async(generations.purge)("site", by=audit.by_system("test"))
    first = stream(cast.raw)
    await hear_some(first, 4)
    others = [stream(cast.raw) for _ in range(3)]
    heard = await asyncio.gather(*(hear_some(other, 6) for other in others))
    first.leave()
    texts = [said + "".join([piece async for piece in rest]) for rest, said in heard]
    assert texts == [whole] * 3
    rows = (await wait_usage(5))[1:]
    assert sorted((row.finish_reason, row.cache) for row in rows) == [
        ("cancelled", ""),
        ("length", ""),
        ("length", "l1"),
        ("length", "l1"),
    ]
    assert len({row.job_id for row in rows}) == 4
    assert next(row for row in rows if row.finish_reason == "cancelled").completion_tokens < LONG


async def test_who_stops_following_pays_the_cached_price_of_what_was_told(cast: Cast) -> None:
    """M6."""
    first = stream(cast.raw)
    rest, _ = await hear_some(first, 3)
    second = stream(cast.raw)
    await hear_some(second, 5)
    second.leave()
    assert len([piece async for piece in rest]) > 20
    rows = {row.finish_reason: row for row in await wait_usage(2)}
    left, whole = rows["cancelled"], rows["length"]
    assert left.cache == "l1" and 5 <= left.completion_tokens < LONG and left.prompt_tokens == whole.prompt_tokens
    part = -(-whole.completion_nanousd_per_token * 25 // 100)
    assert left.completion_nanousd_per_token == part
    assert left.cost_nanousd == left.prompt_tokens * left.prompt_nanousd_per_token + left.completion_tokens * part


async def test_a_kill_switch_ends_who_follows(cast: Cast) -> None:
    other = await sync_to_async(Cast)("eve@example.com")
    await sync_to_async(Plan.objects.filter(slug="enterprise").update)(cache_scope="site")
    callers._plans.clear()
    first = stream(cast.raw, max_tokens=200)
    rest, _ = await hear_some(first, 3)
    second = stream(other.raw, max_tokens=200)
    follows, _ = await hear_some(second, 3)
    assert level(second) == "l1"
    scope = f"organization:{other.organization.public_id}"
    await sync_to_async(killswitch.trip)(scope, reason="maintenance", by=audit.by_system("test"))
    told = [piece async for piece in follows]
    assert not first.task.done() and len(told) < 150
    assert len([piece async for piece in rest]) > len(told)
    rows = {row.organization_id: row for row in await wait_usage(2)}
    killed = rows[other.organization.public_id]
    assert (killed.finish_reason, killed.cache) == ("killed", "l1") and killed.completion_tokens < 200


async def test_when_the_process_that_computes_dies_one_who_follows_computes(
    cast: Cast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits in vain: the flight's lease ends, and the next one flies."""
    monkeypatch.setattr(flights, "LEASE_MS", 1_200)
    whole = text(await ask(cast.raw, chat(max_tokens=LONG)))
    await sync_to_async(generations.purge)("site", by=audit.by_system("test"))

    async def fly_and_die() -> asyncio.AbstractEventLoop:
        first = stream(cast.raw)
        await hear_some(first, 3)
        return asyncio.get_running_loop()

    async def bury() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    loop = asyncio.new_event_loop()
    await asyncio.to_thread(loop.run_until_complete, fly_and_die())
    # the loop stands still from here on, and holds what it has
    answer = await ask(cast.raw, chat(max_tokens=LONG))
    await asyncio.to_thread(loop.run_until_complete, bury())
    loop.close()
    assert (answer.status, level(answer), text(answer)) == (200, "miss", whole)
    assert (await UsageRecord.objects.filter(model=CHAT, finish_reason="length").acount()) >= 1
