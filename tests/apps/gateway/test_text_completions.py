"""Legacy completions with a real worker: one job for each prompt, in order, whole and streamed."""

from typing import Any

import pytest

from apps.accounts.callers import on_thread
from apps.accounts.keys import KeyTerms, create_key
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange, read_events

pytestmark = pytest.mark.usefixtures("worker")
CHAT = "smollm2-135m-instruct"


def ask(cast: Cast, **changes: Any) -> Exchange:
    value = {"model": CHAT, "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0} | changes
    return Exchange("POST", "/v1/completions", key=cast.raw, value=value)


async def test_an_answer_has_openais_shape(cast: Cast) -> None:
    exchange = ask(cast)
    answer = await exchange.read_json()
    assert exchange.status == 200, answer
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    [choice] = answer["choices"]
    assert choice["text"] and (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 4


async def test_token_ids_say_the_same_as_their_text(cast: Cast) -> None:
    from apps.inference import catalog, prompts

    ids = await prompts.encode_prompt(await catalog.get_model(CHAT), "Once upon a time")
    by_text, by_ids = await ask(cast).read_json(), await ask(cast, prompt=ids).read_json()
    assert by_ids["choices"] == by_text["choices"]
    assert by_ids["usage"] == by_text["usage"] and by_text["usage"]["prompt_tokens"] == len(ids)
    echoed = await ask(cast, prompt=ids, echo=True).read_json()
    assert echoed["choices"][0]["text"] == "Once upon a time" + by_text["choices"][0]["text"]


async def test_many_prompts_are_many_jobs_and_wait_for_room(cast: Cast, settling: None) -> None:
    from apps.accounts.callers import on_thread
    from apps.accounts.models import Plan

    # two in flight at a time, five prompts: the rest waits for the first ones instead of being refused
    await on_thread(lambda: [setattr(plan := Plan.objects.get(slug="enterprise"), "max_in_flight", 2), plan.save()])
    given = ["one", "two", "three", "one", "five"]
    answer = await ask(cast, prompt=given, echo=True).read_json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4], answer
    texts = [choice["text"] for choice in answer["choices"]]
    assert all(text.startswith(start) for text, start in zip(texts, given, strict=True)) and texts[0] == texts[3]
    assert answer["usage"]["completion_tokens"] == 20


async def test_a_stream_tells_its_prompts_apart(cast: Cast) -> None:
    exchange = ask(cast, prompt=["one", "two"], stream=True, echo=True, stream_options={"include_usage": True})
    *chunks, done = read_events(await exchange.read())
    assert done == "DONE" and chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 8
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    texts = ["", ""]
    ends = [None, None]
    for chunk in chunks[:-1]:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] = choice["finish_reason"]
    whole = await ask(cast, prompt=["one", "two"], echo=True).read_json()
    assert texts == [choice["text"] for choice in whole["choices"]] and ends == ["length", "length"]


async def test_anthropics_clients_find_models_and_keys_their_way(cast: Cast) -> None:
    headers = {"x-api-key": cast.raw, "anthropic-version": "2023-06-01"}
    exchange = Exchange("GET", "/v1/models", headers=headers)
    listed = await exchange.read_json()
    assert [model["id"] for model in listed["data"]] == ["all-minilm-l6-v2", "moderation", CHAT]
    assert listed["data"][0]["type"] == "model" and exchange.headers["request-id"] == exchange.headers["x-request-id"]
    missing = Exchange("GET", "/v1/models/nope", headers=headers)
    answer = await missing.read_json()
    assert (missing.status, answer["type"], answer["error"]["type"]) == (404, "error", "not_found_error")


async def test_a_key_sees_the_models_that_it_may_use(cast: Cast) -> None:
    terms = KeyTerms(allowed_models=("all-minilm-l6-v2",))
    _, raw = await on_thread(lambda: create_key(cast.organization, cast.user, "search", terms))
    listed = await Exchange("GET", "/v1/models", key=raw).read_json()
    assert [model["id"] for model in listed["data"]] == ["all-minilm-l6-v2"]
    everything = await Exchange("GET", "/v1/models", key=cast.raw).read_json()
    assert len(everything["data"]) > 1
    for model, status in ((CHAT, 404), ("all-minilm-l6-v2", 200)):
        exchange = Exchange("GET", f"/v1/models/{model}", key=raw)
        await exchange.read()
        assert exchange.status == status
