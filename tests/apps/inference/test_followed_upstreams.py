"""Identical requests to an upstream, and to a model whose fallback answers: who follows whom."""

import asyncio
import dataclasses
from typing import Any

import pytest

from apps.accounts.callers import on_thread
from apps.inference import catalog, presence
from apps.inference.models import Model
from tests.apps.conftest import Cast
from tests.apps.inference.test_upstreams import LOCAL, ask, enter, odd, read_usage

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def private(settings: Any) -> None:
    settings.ENV = dataclasses.replace(settings.ENV, upstreams_private=True)
    presence.forget()


async def test_identical_requests_ask_an_upstream_once(cast: Cast, settling: None) -> None:
    async with odd("good") as upstream:
        await on_thread(lambda: enter(upstream.port))
        answers = await asyncio.gather(*(ask(cast, cache={}).read_json() for _ in range(3)))
        assert [answer["choices"][0]["message"]["content"] for answer in answers] == ["one two three"] * 3
        assert len(upstream.asked) == 1
        rows = [await read_usage(f"job_{answer['id'].removeprefix('chatcmpl-')}") for answer in answers]
        assert sorted(row.cache for row in rows) == ["", "l1", "l1"]
        # a quarter of 1,000 and 3,000 a token
        assert all(
            row.cost_nanousd == row.prompt_tokens * 250 + row.completion_tokens * 750 for row in rows if row.cache
        )


async def test_nobody_follows_what_a_fallback_answers(
    cast: Cast, settling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is told by the model that it is charged for: nobody is told the fallback's words as the model's own."""

    async def is_served(*_: str) -> bool:
        return False

    monkeypatch.setattr(presence, "is_served", is_served)
    async with odd("good") as upstream:
        await on_thread(lambda: enter(upstream.port))
        await on_thread(lambda: Model.objects.filter(slug=LOCAL).update(fallback=Model.objects.get(slug="acme-large")))
        catalog.forget()
        answers = await asyncio.gather(*(ask(cast, model=LOCAL, cache={}).read_json() for _ in range(3)))
        assert [answer.get("model") for answer in answers] == ["acme-large"] * 3, answers
        assert len(upstream.asked) == 3
        rows = [await read_usage(f"job_{answer['id'].removeprefix('chatcmpl-')}") for answer in answers]
        assert {(row.model, row.cache) for row in rows} == {("acme-large", "")}
