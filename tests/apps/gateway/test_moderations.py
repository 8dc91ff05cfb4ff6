"""``/v1/moderations`` in OpenAI's shape: strings, arrays, parts, long texts, prices, and bad input."""

import json
from typing import Any

import pytest
from openai.types import ModerationCreateResponse

from apps.accounts.callers import on_thread
from apps.inference import moderation
from apps.spend import prices
from apps.spend.models import UsageRecord
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange


async def ask(cast: Cast, value: Any) -> tuple[int, Any, dict[str, str]]:
    exchange = Exchange("POST", "/v1/moderations", key=cast.raw, value=value)
    body = await exchange.read()
    return exchange.status, json.loads(body), exchange.headers


async def test_each_text_gets_a_verdict(cast: Cast, worker: None) -> None:
    status, body, headers = await ask(cast, {"input": ["a threat of identity_hate", "nothing", "prompt_injection"]})
    assert status == 200 and body["model"] == "moderation" and body["id"].startswith("modr-")
    first, second, third = body["results"]
    assert [verdict["flagged"] for verdict in body["results"]] == [True, False, True]
    assert {name for name, holds in first["categories"].items() if holds} == {
        *("threat", "identity_hate", "violence", "hate", "hate/threatening", "harassment/threatening")
    }
    assert not any(second["categories"].values())
    assert third["categories"]["prompt_injection"] and third["category_scores"]["prompt_injection"] > 0.9
    assert set(first["categories"]) == set(first["category_scores"]) == set(first["category_applied_input_types"])
    assert "x-ratelimit-limit-requests" in headers
    typed = ModerationCreateResponse.model_validate(body)
    assert typed.results[0].categories.hate_threatening and typed.results[1].category_scores.violence < 0.1


@pytest.mark.parametrize(
    "value",
    [
        {"input": "an insult"},
        {"input": "an insult", "model": "omni-moderation-latest"},
        {"input": ["an insult"], "model": "moderation"},
        {"input": [{"type": "text", "text": "an"}, {"type": "text", "text": "insult"}]},
    ],
)
async def test_strings_arrays_and_parts(cast: Cast, worker: None, value: Any) -> None:
    status, body, _ = await ask(cast, value)
    assert status == 200 and len(body["results"]) == 1 and body["results"][0]["categories"]["insult"]


async def test_a_long_text_is_judged_by_its_worst_part(cast: Cast, worker: None) -> None:
    text = "x" * 8190 + "obscene" + "y" * 20_000
    status, body, _ = await ask(cast, {"input": [text, "z" * 9000]})
    assert status == 200
    assert [verdict["categories"]["obscene"] for verdict in body["results"]] == [True, False]


def test_pieces_overlap_and_lose_nothing() -> None:
    text = "".join(chr(65 + n % 26) for n in range(5000))
    pieces, owners = moderation.cut([text, "b"], 1024)
    assert max(map(len, pieces)) <= 1024 and owners[-1] == 1 and set(owners[:-1]) == {0}
    assert all(text[at : at + 512] in "\n".join(pieces) for at in range(0, 4488, 97))


async def test_it_is_priced_limited_and_settled_like_all_else(cast: Cast, worker: None, redis_url: str) -> None:
    from redis import Redis

    from apps.inference import catalog
    from apps.spend import settlement

    terms = prices.Terms(prompt_nanousd_per_token=3, cached_prompt_nanousd_per_token=3, completion_nanousd_per_token=0)
    from apps.accounts import audit

    await on_thread(lambda: prices.change("moderation", terms, reason="test", by=audit.by_command(), confirmed=True))
    catalog.forget()
    assert (await ask(cast, {"input": "ten chars."}))[0] == 200
    settler = settlement.Settler(Redis.from_url(redis_url))
    for _ in range(50):
        await on_thread(lambda: settler.turn(100))
        if await on_thread(UsageRecord.objects.exists):
            break
    record = await on_thread(UsageRecord.objects.get)
    assert (record.model, record.prompt_tokens, record.cost_nanousd) == ("moderation", 10, 30)


@pytest.mark.parametrize(
    ("value", "param", "words"),
    [
        ({}, "input", "must provide"),
        ({"input": []}, "input", "holds 0 entries"),
        ({"input": ""}, "input", "is empty"),
        ({"input": ["a", ""]}, "input", "is empty"),
        ({"input": ["a", 3]}, "input", "must be a string"),
        ({"input": 7}, "input", "must be a string"),
        ({"input": [{"type": "image_url", "image_url": {"url": "x"}}]}, "input", "only text"),
        ({"input": [{"type": "text"}]}, "input", "not empty"),
        ({"input": "a", "model": "nobody"}, "model", "does not exist"),
        ({"input": "a", "model": "smollm2-135m-instruct"}, "model", "chat completions only"),
        ({"input": "a", "tone": "x"}, "tone", "Unrecognized"),
        ({"input": ["a"] * 1025}, "input", "1 to 1024"),
    ],
)
async def test_bad_input_is_named(cast: Cast, value: Any, param: str, words: str) -> None:
    status, body, _ = await ask(cast, value)
    assert status in (400, 404), body
    assert body["error"]["param"] == param and words in body["error"]["message"]
