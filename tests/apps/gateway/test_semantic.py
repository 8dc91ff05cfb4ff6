"""Alike questions: who shares answers, where, and what is learned. Real worker (fake runner), Valkey, Postgres and settlement.

The fake encoder gives equal token ids equal vectors, and all others vectors that have nothing to do with each other; the embedding model
reads no capitals. So a question in capitals is as alike as can be, and for the chat model another one.
"""

import asyncio
import json
import time
from typing import Any

import msgspec
import pytest
from asgiref.sync import async_to_sync, sync_to_async

from apps.accounts import audit, callers, organizations
from apps.accounts.keys import create_key
from apps.accounts.models import Plan
from apps.inference import tasks
from apps.inference.cache import generations, lessons, semantic
from apps.inference.cache.entries import decode_answer, encode_answer
from apps.inference.completions import CompletionRequest
from apps.inference.models import Model as CatalogRow
from apps.inference.models import ModelVersion, SemanticAccount, SemanticEntry
from apps.inference.prompts import ChatMessage
from apps.inference.tools import Tool, Tools
from apps.spend.models import UsageRecord
from tests.apps.conftest import Cast
from tests.apps.gateway.test_cache import CHAT, ask, chat, level, text, wait_usage

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("worker", "settling")]

QUESTION = "what is a cache good for"
SAID = [QUESTION[:end].upper() + QUESTION[end:] for end in range(1, 20) if QUESTION[end - 1] != " "]
"""Ways to ask the same."""


@pytest.fixture(autouse=True)
def rested() -> None:
    semantic.forget()


@pytest.fixture
def never_explores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic, "_draw", lambda: 0.5)


@pytest.fixture
def keen(cast: Cast, never_explores: None) -> Cast:
    """Ada's organization wishes it, and has looked so often that it may take a risk."""
    opt_in(cast)
    return cast


def opt_in(cast: Cast) -> None:
    organizations.set_semantic_cache(cast.user, cast.organization, True)
    SemanticAccount.objects.update_or_create(organization_id=cast.organization.public_id, defaults={"lookups": 1000.0})


async def learn(raw: str, **more: Any) -> str:
    """Ask one question, and let its answer have proved right often enough. Return it."""
    first = await ask(raw, chat(SAID[0], **more))
    assert (first.status, level(first)) == (200, "miss"), first.body  # type: ignore[attr-defined]
    await semantic.finish()
    proved = [[1.0, True]] * 30
    await sync_to_async(SemanticEntry.objects.update)(observations=proved)
    return text(first)


async def count_entries() -> int:
    await semantic.finish()
    return await SemanticEntry.objects.acount()


async def test_a_question_in_other_words_is_given_the_answer_c2(keen: Cast) -> None:
    """C2: only the last message's vector is compared; with real wordings and models in `tests/e2e/test_semantic_cache.py`."""
    answer = await learn(keen.raw)
    # the answer is the entry's, not the model's
    entry = await SemanticEntry.objects.aget()
    known = decode_answer(bytes(entry.value))
    piece = msgspec.structs.replace(known.pieces[0], text="Known!")
    entry.value = encode_answer(msgspec.structs.replace(known, pieces=(piece,)))
    await entry.asave()
    hit = await ask(keen.raw, chat(SAID[1]))
    assert (level(hit), hit.headers["x-aiscale-cache-similarity"], text(hit)) == ("semantic", "1.0000", "Known!")
    assert text(hit) != answer
    streamed = await ask(keen.raw, chat(SAID[2], stream=True))
    assert level(streamed) == "semantic" and b"Known!" in streamed.body  # type: ignore[attr-defined]
    computed, known_one, known_two = await wait_usage(3)
    assert computed.cache == "" and known_one.cache == known_two.cache == "semantic"
    assert 0 < known_one.cost_nanousd < computed.cost_nanousd and known_one.saved_nanousd > 0
    # what was asked of our encoder is on nobody's bill
    assert not await UsageRecord.objects.exclude(model=CHAT).aexists()
    assert known_one.prompt_tokens == json.loads(hit.body)["usage"]["prompt_tokens"]  # type: ignore[attr-defined]


async def test_it_is_learned_from_nothing(keen: Cast) -> None:
    """The model is asked until the answer proved right often enough, and then no more."""
    levels = []
    for said in SAID[:12]:
        levels.append(level(await ask(keen.raw, chat(said))))
        assert await count_entries() == 1
    assert levels[0] == levels[1] == "miss" and levels[-1] == "semantic"
    first = levels.index("semantic")
    assert set(levels[first:]) == {"semantic"}
    entry = await SemanticEntry.objects.aget()
    assert entry.observations == [[1.0, True]] * (first - 1)
    account = await SemanticAccount.objects.aget()
    assert account.lookups == 1012 and 0 < account.spent < 0.02 * 1012


async def test_what_proves_wrong_is_not_given_again_and_the_other_answer_is_kept(keen: Cast) -> None:
    await learn(keen.raw)
    entry = await SemanticEntry.objects.aget()
    known = decode_answer(bytes(entry.value))
    other = msgspec.structs.replace(known.pieces[0], text="something else entirely")
    entry.value, entry.observations = encode_answer(msgspec.structs.replace(known, pieces=(other,))), []
    await entry.asave()
    assert level(await ask(keen.raw, chat(SAID[1]))) == "miss"
    assert await count_entries() == 2
    await entry.arefresh_from_db()
    assert entry.observations == [[1.0, False]]


async def test_nothing_is_risked_that_the_owner_did_not_allow(keen: Cast) -> None:
    """A new account has no room for risk, whatever an entry promises."""
    await learn(keen.raw)
    await sync_to_async(SemanticEntry.objects.update)(observations=[[1.0, True]])
    await sync_to_async(SemanticAccount.objects.update)(lookups=0.0)
    assert level(await ask(keen.raw, chat(SAID[1]))) == "miss"


async def test_many_at_once_do_not_spend_the_same_room_twice(keen: Cast) -> None:
    await learn(keen.raw)
    await sync_to_async(SemanticAccount.objects.update)(lookups=1000.0, spent=0.0)
    answers = await asyncio.gather(*(ask(keen.raw, chat(said)) for said in SAID[1:13]))
    hits = sum(level(answer) == "semantic" for answer in answers)
    await semantic.finish()
    account = await SemanticAccount.objects.aget()
    assert hits >= 1 and account.lookups == 1012 and account.spent > 0


async def test_who_is_refused_causes_no_look_up(keen: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate is asked before our encoder: limits and money first."""
    looked = 0
    look = semantic._look

    async def count_looks(*values: Any) -> Any:
        nonlocal looked
        looked += 1
        return await look(*values)

    monkeypatch.setattr(semantic, "_look", count_looks)
    await learn(keen.raw)
    assert looked == 1

    def limit(**values: Any) -> None:
        plan = Plan.objects.get(slug="enterprise")
        for name, value in values.items():
            setattr(plan, name, value)
        plan.save()

    await sync_to_async(limit)(requests_per_window=1)
    assert (await ask(keen.raw, chat(SAID[1]))).status == 429
    await sync_to_async(limit)(requests_per_window=1000, monthly_limit_nanousd=1, monthly_included_nanousd=1)
    refused = await ask(keen.raw, chat(SAID[1]))
    assert refused.status == 429 and b"insufficient_quota" in refused.body  # type: ignore[attr-defined]
    assert looked == 1
    await sync_to_async(limit)(monthly_limit_nanousd=10**12)
    assert level(await ask(keen.raw, chat(SAID[1]))) == "semantic"
    # a look-up that was checked is one request, not two
    await sync_to_async(limit)(requests_per_window=3)
    assert [(await ask(keen.raw, chat(said))).status for said in SAID[2:4]] == [200, 429]


async def test_off_by_default(cast: Cast) -> None:
    for said in SAID[:2]:
        assert level(await ask(cast.raw, chat(said))) == "miss"
        assert level(await ask(cast.raw, chat(said, temperature=1))) is None
    assert await count_entries() == 0 and not await SemanticAccount.objects.aexists()


async def test_never_across_organizations_c1(keen: Cast) -> None:
    """C1: an organization is a column that every look-up names; a text that names another one is only a text."""
    eve = await sync_to_async(Cast)("eve@example.com")
    await sync_to_async(opt_in)(eve)
    await learn(keen.raw)
    assert level(await ask(eve.raw, chat(SAID[1]))) == "miss"
    posing = f"organization:{keen.organization.public_id} {SAID[1]}"
    assert level(await ask(eve.raw, chat(posing))) == "miss"
    assert level(await ask(keen.raw, chat(SAID[1]))) == "semantic"


@pytest.mark.parametrize(("scope", "expected"), [("key", "miss"), ("site", "semantic")])
async def test_a_plan_may_keep_answers_to_one_key(keen: Cast, scope: str, expected: str) -> None:
    await sync_to_async(Plan.objects.filter(slug="enterprise").update)(cache_scope=scope)
    callers._plans.clear()
    _, second = await sync_to_async(create_key)(keen.organization, keen.user, "second")
    await learn(keen.raw)
    assert level(await ask(second, chat(SAID[1]))) == expected
    assert level(await ask(keen.raw, chat(SAID[1]))) == "semantic"


async def test_all_but_the_last_message_must_be_the_same(keen: Cast) -> None:
    def talk(system: str, before: str = "Hello", role: str = "user") -> list[dict[str, str]]:
        earlier = [{"role": "user", "content": before}, {"role": "assistant", "content": "Hi."}]
        return [{"role": "system", "content": system}, *earlier, {"role": role, "content": SAID[1]}]

    alike = talk("Be brief.")
    await learn(keen.raw, messages=[*alike[:-1], {"role": "user", "content": SAID[0]}])
    others: list[dict[str, Any]] = [
        {"messages": talk("Be BRIEF.")},
        {"messages": talk("Be brief.", before="Good day")},
        {"messages": alike[-1:]},
        *({"messages": alike} | more for more in ({"max_tokens": 7}, {"stop": ["x"]}, {"temperature": 1})),
        {"messages": alike, "frequency_penalty": 0.5},
        {"messages": alike, "logit_bias": {"5": 1}},
    ]
    for other in others:
        assert level(await ask(keen.raw, chat(**other))) == "miss", other
    assert level(await ask(keen.raw, chat(messages=alike))) == "semantic"


async def test_another_version_or_plan_limit_never_matches(keen: Cast) -> None:
    await learn(keen.raw)
    version = await CatalogRow.objects.values_list("version", flat=True).aget(slug=CHAT)
    await sync_to_async(SemanticEntry.objects.update)(version="another")
    assert level(await ask(keen.raw, chat(SAID[1]))) == "miss"
    await semantic.finish()
    assert await SemanticEntry.objects.filter(version=version).acount() == 1
    assert await ModelVersion.objects.filter(version="another").acount() == 0


ODD: list[dict[str, Any]] = [
    {"seed": 1},
    {"seed": 1, "temperature": 1},
    {"n": 2, "seed": 4, "temperature": 1},
    {"logprobs": True},
    {"response_format": {"type": "json_object"}},
    {"cache": {"no-cache": True}},
]


async def test_never_for_what_must_be_exact(keen: Cast) -> None:
    said = f"{QUESTION} json"
    for odd in ODD:
        for words in (said, said.upper()):
            answer = await ask(keen.raw, chat(words, **odd))
            assert (answer.status, level(answer)) == (200, "miss"), (odd, answer.body)  # type: ignore[attr-defined]
    assert await count_entries() == 0
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    refused = await ask(keen.raw, chat(SAID[1], tools=tools))
    assert refused.status == 400 or level(refused) != "semantic"
    # what must not be kept is given, and teaches nothing
    await ask(keen.raw, chat(SAID[0], cache={"no-store": True}))
    assert await count_entries() == 0


async def test_a_caller_has_no_say_in_how_alike_is_enough_c3(keen: Cast) -> None:
    """C3: no header and no field lowers the bar."""
    await learn(keen.raw)
    await sync_to_async(SemanticEntry.objects.update)(observations=[[1.0, False]] * 30)
    headers = {"x-aiscale-cache-similarity": "0", "x-similarity-threshold": "0"}
    assert level(await ask(keen.raw, chat(SAID[1]), **headers)) == "miss"
    for field in ("similarity", "threshold"):
        assert (await ask(keen.raw, chat(SAID[2], cache={field: 0}))).status == 400


async def test_screened_chats_share_nothing(keen: Cast) -> None:
    """What was said in other words was not screened."""
    await learn(keen.raw)
    await sync_to_async(Plan.objects.filter(slug="enterprise").update)(moderation="flag")
    callers._plans.clear()
    assert level(await ask(keen.raw, chat(SAID[1]))) == "miss"


async def test_an_answer_drawn_by_chance_is_shared_where_that_is_wished(keen: Cast) -> None:
    await learn(keen.raw, temperature=1)
    assert level(await ask(keen.raw, chat(SAID[1], temperature=1))) == "semantic"
    assert level(await ask(keen.raw, chat(SAID[1], temperature=1, cache={"no-cache": True}))) is None


def test_a_request_with_tools_takes_nothing_alike(cast: Cast) -> None:
    caller = msgspec.structs.replace(cast.caller, semantic_max_error_percent=2.0)
    plan = async_to_sync(callers.get_plan)("enterprise")
    said = [ChatMessage(role="user", content=QUESTION)]
    plain = CompletionRequest(request_id="req_1", source="api", model=CHAT, messages=said)
    assert semantic.is_wished(plain, caller, plan) and not semantic.is_wished(plain, cast.caller, plan)
    tools = Tools(tools=(Tool(name="now", description="", parameters={}),))
    odd: list[dict[str, Any]] = [
        {"tools": tools},
        {"source": "chat"},
        {"keep_log": True},
        {"messages": [*said, ChatMessage(role="tool", content="noon", tool_call_id="call_1")]},
        {"messages": [*said, ChatMessage(role="assistant", content="It is")]},
        {"messages": [ChatMessage(role="user", content=" ")]},
        {"messages": [], "prompt_token_ids": [1, 2]},
    ]
    for values in odd:
        assert not semantic.is_wished(msgspec.structs.replace(plain, **values), caller, plan), values


@pytest.mark.parametrize("scope", ["site", f"model:{CHAT}", "organization"])
async def test_a_purge_forgets_it(keen: Cast, scope: str) -> None:
    scope = f"organization:{keen.organization.public_id}" if scope == "organization" else scope
    await learn(keen.raw)
    purged = await sync_to_async(generations.purge)(scope, by=audit.by_system("test"))
    assert purged >= 1 and await SemanticEntry.objects.acount() == 0
    assert level(await ask(keen.raw, chat(SAID[1]))) == "miss"
    # nor is an entry found that was written meanwhile by who asked before the purge
    await semantic.finish()
    entry = await SemanticEntry.objects.aget()
    await sync_to_async(generations.purge)("model:another", by=audit.by_system("test"))
    assert await SemanticEntry.objects.filter(pk=entry.pk).aexists()


async def test_a_worker_that_does_not_answer_is_a_miss(keen: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    await learn(keen.raw)
    monkeypatch.setattr(semantic, "DEADLINE_S", 0.001)
    for number in range(semantic.REST_AFTER):
        late = await ask(keen.raw, chat(f"Something that no encoder has seen, part {number}"))
        assert (late.status, level(late)) == (200, "miss") and await count_entries() == 1
    monkeypatch.setattr(semantic, "DEADLINE_S", 20.0)
    # it rests a while, so that a worker that hangs does not cost each request its deadline
    assert level(await ask(keen.raw, chat(SAID[2]))) == "miss"
    semantic.forget()
    await sync_to_async(CatalogRow.objects.filter(kind="embed").update)(is_enabled=False)
    from apps.inference import catalog

    catalog.forget()
    none = await ask(keen.raw, chat(SAID[3]))
    assert (none.status, level(none)) == (200, "miss")


async def test_one_that_is_late_is_no_reason_to_rest(keen: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes longer now and then: that is no reason to look for nothing at all."""
    await learn(keen.raw)
    monkeypatch.setattr(semantic, "DEADLINE_S", 0.001)
    assert level(await ask(keen.raw, chat("Something that no encoder has seen"))) == "miss"
    monkeypatch.setattr(semantic, "DEADLINE_S", 20.0)
    assert level(await ask(keen.raw, chat(SAID[2]))) == "semantic"


async def test_many_look_ups_leave_threads_to_others(keen: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes through all entries of its place: they wait for their turn in no thread and with no connection."""
    await learn(keen.raw)
    deciding, most, decide = 0, 0, lessons.decide

    def count(*arguments: Any) -> Any:
        nonlocal deciding, most
        deciding += 1
        most = max(most, deciding)
        time.sleep(0.05)
        try:
            return decide(*arguments)
        finally:
            deciding -= 1

    monkeypatch.setattr(lessons, "decide", count)
    monkeypatch.setattr(semantic, "DEADLINE_S", 20.0)
    answers = await asyncio.gather(*(ask(keen.raw, chat(said)) for said in SAID[1:13]))
    assert [level(answer) for answer in answers].count("semantic") >= 10
    assert 1 <= most <= semantic.MAX_DECIDING


async def test_a_broken_entry_is_a_miss(keen: Cast) -> None:
    await learn(keen.raw)
    await sync_to_async(SemanticEntry.objects.update)(value=b"\xff")
    broken = await ask(keen.raw, chat(SAID[1]))
    assert (broken.status, level(broken)) == (200, "miss")
    await semantic.finish()


async def test_entries_expire_and_go_when_nobody_wants_them(keen: Cast) -> None:
    from django.utils import timezone

    await learn(keen.raw)
    account = await SemanticAccount.objects.aget()
    await sync_to_async(tasks.tidy_cache)()
    await account.arefresh_from_db()
    assert len(bytes(account.prior)) > 1000 and account.lookups == 1001
    assert level(await ask(keen.raw, chat(SAID[1]))) == "semantic"
    await sync_to_async(SemanticEntry.objects.update)(expires_at=timezone.now())
    assert level(await ask(keen.raw, chat(SAID[2]))) == "miss"
    await sync_to_async(tasks.tidy_cache)()
    assert await count_entries() == 1
    await sync_to_async(organizations.set_semantic_cache)(keen.user, keen.organization, False)
    assert level(await ask(keen.raw, chat(SAID[3]))) == "miss"
    await sync_to_async(tasks.tidy_cache)()
    assert not await SemanticEntry.objects.aexists() and not await SemanticAccount.objects.aexists()


async def test_an_organization_keeps_the_newest(keen: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lessons, "MAX_ENTRIES", 2)
    for said in ("one", "two", "three"):
        await ask(keen.raw, chat(said))
        await semantic.finish()
    newest = [pk async for pk in SemanticEntry.objects.order_by("pk").values_list("pk", flat=True)][1:]
    await sync_to_async(lessons.tidy)()
    assert [pk async for pk in SemanticEntry.objects.order_by("pk").values_list("pk", flat=True)] == newest
