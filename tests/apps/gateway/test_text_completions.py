"""Legacy completions with a real worker: one job for each prompt, in order, whole and streamed."""

from typing import Any

import pytest

from aiscale.wire.events import TokenLogprob
from apps.accounts.callers import on_thread
from apps.accounts.keys import KeyTerms, create_key
from apps.gateway.text_choices import Offsets
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
    assert by_ids["usage"]["total_tokens"] == by_text["usage"]["total_tokens"]
    assert by_ids["usage"]["prompt_tokens"] == by_text["usage"]["prompt_tokens"] == len(ids)
    # which is why the second one is known
    assert by_ids["usage"]["prompt_tokens_details"] == {"cached_tokens": len(ids)}
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


async def test_each_prompt_has_several_choices(cast: Cast) -> None:
    exchange = ask(cast, prompt=["one", "two"], n=2, temperature=1, seed=7, echo=True)
    answer = await exchange.read_json()
    assert exchange.status == 200, answer
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][:3] for choice in answer["choices"]] == ["one", "one", "two", "two"]
    assert answer["usage"]["completion_tokens"] == 16
    streamed = ask(cast, prompt=["one", "two"], n=2, temperature=1, seed=7, echo=True, stream=True)
    *chunks, _ = read_events(await streamed.read())
    texts, ends = [""] * 4, [""] * 4
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] += choice["finish_reason"] or ""
    assert texts == [choice["text"] for choice in answer["choices"]] and ends == ["length"] * 4


async def test_the_best_is_the_likeliest_and_all_are_paid_for(cast: Cast) -> None:
    changes = {"temperature": 1, "seed": 3, "logprobs": 0}
    made = (await ask(cast, n=4, **changes).read_json())["choices"]
    best = await ask(cast, n=2, best_of=4, **changes).read_json()
    made.sort(key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["tokens"]))
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in made[:2]]
    assert best["usage"]["completion_tokens"] == 16
    silent = await ask(cast, best_of=4, temperature=1, seed=3).read_json()
    assert [(choice["text"], choice["logprobs"]) for choice in silent["choices"]] == [(made[0]["text"], None)]


async def test_legacy_logprobs_whole_and_streamed(cast: Cast) -> None:
    [choice] = (await ask(cast, logprobs=2).read_json())["choices"]
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"] and len(told["token_logprobs"]) == 4
    assert told["text_offset"] == [len("".join(told["tokens"][:index])) for index in range(4)]
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert logprob <= 0 and top[token] == max(top.values()) == logprob and len(top) == 2
    *chunks, _ = read_events(await ask(cast, logprobs=2, stream=True).read())
    pieces = [found for chunk in chunks if (found := chunk["choices"][0]["logprobs"])]
    assert {name: [entry for piece in pieces for entry in piece[name]] for name in told} == told


def test_offsets_count_characters_and_name_broken_tokens() -> None:
    told = [TokenLogprob("é".encode()[:1], -1.0), TokenLogprob("é".encode()[1:], -2.0), TokenLogprob(b"x", -3.0)]
    value = Offsets().describe(told)
    assert value["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "x"] and value["text_offset"] == [0, 0, 1]


async def test_penalties_and_biases_are_honoured(cast: Cast) -> None:
    from apps.inference import catalog, prompts

    plain = (await ask(cast, logprobs=0).read_json())["choices"][0]["logprobs"]["tokens"]
    model = await catalog.get_model(CHAT)
    [first, *_] = await prompts.encode_prompt(model, plain[0])
    [wanted] = await prompts.encode_prompt(model, "x")
    biased = await ask(cast, logit_bias={str(first): -100, str(wanted): 100}, max_tokens=2).read_json()
    assert biased["choices"][0]["text"] == "xx"
    tired = await ask(cast, logit_bias={str(wanted): 2}, frequency_penalty=2, presence_penalty=2).read_json()
    assert "xx" not in tired["choices"][0]["text"]
