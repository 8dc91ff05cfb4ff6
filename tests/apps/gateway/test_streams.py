"""Streams with a real worker: their shape, what ends them, and what a client that leaves brings about."""

import asyncio
import json
from typing import Any

import pytest
from redis import Redis

from aiscale.wire import keys
from aiscale.wire.codec import decode_event
from aiscale.wire.events import Finished
from apps.accounts.callers import on_thread
from apps.accounts.keys import revoke_key
from apps.spend import killswitch
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange, read_events
from tests.apps.spend.cast import ADA

pytestmark = pytest.mark.usefixtures("worker")


def ask(cast: Cast, **changes: Any) -> Exchange:
    value = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 5,
        "temperature": 0,
    } | changes
    return Exchange("POST", "/v1/chat/completions", key=cast.raw, value=value)


async def find_finished(redis_url: str, count: int = 1) -> list[Finished]:
    """Wait for the ends of jobs."""
    client = Redis.from_url(redis_url)
    for _ in range(100):
        events = [decode_event(fields[b"0"]) for _, fields in client.xrange(keys.FINISHED)]
        if len(events) >= count:
            return [event for event in events if isinstance(event, Finished)]
        await asyncio.sleep(0.1)
    raise AssertionError(f"only {len(events)} of {count} jobs ended")


async def test_a_stream_has_openais_shape(cast: Cast, redis_url: str) -> None:
    exchange = ask(cast, stream=True, stream_options={"include_usage": True})
    *chunks, done = read_events(await exchange.read())
    assert exchange.status == 200 and exchange.headers["content-type"].startswith("text/event-stream")
    assert exchange.headers["x-ratelimit-remaining-requests"] == "499"
    assert done == "DONE"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 5
    [end] = await find_finished(redis_url)
    assert (end.finish_reason, end.completion_tokens) == ("length", 5)
    assert end.billing.organization_id == cast.organization.public_id


async def test_many_requests_share_the_batch_and_none_gets_anothers_text(cast: Cast) -> None:
    together = [ask(cast, max_tokens=n) for n in range(1, 25)]
    answers = await asyncio.gather(*(exchange.read_json() for exchange in together))
    assert [answer["usage"]["completion_tokens"] for answer in answers] == list(range(1, 25))
    alone = await ask(cast, max_tokens=24).read_json()
    text = alone["choices"][0]["message"]["content"]
    # an answer may be cut within a character
    assert all(text.startswith(answer["choices"][0]["message"]["content"].rstrip("\ufffd")) for answer in answers)


async def test_a_client_that_leaves_cancels_its_job(cast: Cast, redis_url: str) -> None:
    exchange = ask(cast, stream=True, max_tokens=4000)
    for _ in range(3):
        assert await exchange.next_part()
    exchange.leave()
    await exchange.task
    [end] = await find_finished(redis_url)
    assert end.finish_reason == "cancelled" and 0 < end.completion_tokens < 4000


async def test_leaving_before_the_whole_answer_cancels_too(cast: Cast, redis_url: str) -> None:
    exchange = ask(cast, max_tokens=4000)
    client = Redis.from_url(redis_url)
    # one that waits still would be ended by the reaper
    while not any(client.hget(name, "state") == b"running" for name in client.scan_iter(keys.job_record("*"))):
        assert not exchange.task.done()
        await asyncio.sleep(0.05)
    exchange.leave()
    await exchange.task
    [end] = await find_finished(redis_url)
    assert end.finish_reason == "cancelled"


async def test_a_kill_ends_a_stream_with_its_reason(cast: Cast, redis_url: str) -> None:
    exchange = ask(cast, stream=True, max_tokens=4000)
    assert await exchange.next_part()
    await on_thread(lambda: killswitch.trip("site", reason="A fire drill", by=ADA))
    *_, last = read_events(await exchange.read())
    assert last["error"]["code"] == "killed" and "A fire drill" in last["error"]["message"]
    [end] = await find_finished(redis_url)
    assert end.finish_reason == "killed" and end.completion_tokens > 0
    refused = ask(cast)
    assert (await refused.read_json())["error"]["code"] == "killed"
    assert refused.status == 503
    await on_thread(lambda: killswitch.release("site", by=ADA))
    assert (await ask(cast).read_json())["usage"]["completion_tokens"] == 5


async def test_embeddings_come_in_the_order_of_their_inputs(cast: Cast) -> None:
    def embed(value: Any) -> Exchange:
        body = {"model": "all-minilm-l6-v2", "input": value, "encoding_format": "float"}
        return Exchange("POST", "/v1/embeddings", key=cast.raw, value=body)

    answer = await embed(["one", "two", "one"]).read_json()
    first, second, third = (item["embedding"] for item in answer["data"])
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    assert first == third != second
    # one MiB and more goes another way (see INLINE_VECTORS_BYTES)
    many = await embed([f"text {n}" for n in range(800)]).read_json()
    assert len(many["data"]) == 800
    again = await embed(["text 700"]).read_json()
    assert many["data"][700]["embedding"] == again["data"][0]["embedding"]


async def test_choices_share_a_prompt_and_are_charged_exactly(cast: Cast, redis_url: str) -> None:
    alone = await ask(cast, max_tokens=7).read_json()
    answer = await ask(cast, n=3, max_tokens=7).read_json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    texts = {choice["message"]["content"] for choice in answer["choices"]}
    assert texts == {alone["choices"][0]["message"]["content"]}
    assert answer["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 21
    end = (await find_finished(redis_url, 2))[-1]
    assert end.completion_tokens == 21
    rates = end.billing.prompt_nanousd_per_token, end.billing.completion_nanousd_per_token
    assert end.billing.hold_nanousd == end.prompt_tokens * rates[0] + 21 * rates[1]


async def test_choices_are_streamed_side_by_side(cast: Cast) -> None:
    *chunks, done = read_events(await ask(cast, n=2, stream=True, max_tokens=4).read())
    assert done == "DONE"
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert [piece["finish_reason"] for piece in own] == [None] * (len(own) - 1) + ["length"]
        assert any(piece["delta"].get("content") for piece in own)


async def test_logprobs_have_openais_shape(cast: Cast) -> None:
    whole = await ask(cast, logprobs=True, top_logprobs=2, max_tokens=4).read_json()
    choice = whole["choices"][0]
    told = choice["logprobs"]["content"]
    assert len(told) == 4
    text = b"".join(bytes(entry["bytes"]) for entry in told).decode(errors="replace")
    assert text.startswith(choice["message"]["content"].rstrip("\ufffd"))
    for entry in told:
        assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["bytes"] == entry["bytes"], "greedy takes the likeliest"
    *chunks, _ = read_events(await ask(cast, logprobs=True, stream=True, max_tokens=4).read())
    streamed = [e for c in chunks if (found := c["choices"][0]["logprobs"]) for e in found["content"]]
    assert [entry["bytes"] for entry in streamed] == [entry["bytes"] for entry in told]
    assert all(entry["top_logprobs"] == [] for entry in streamed)
    assert (await ask(cast).read_json())["choices"][0]["logprobs"] is None


async def test_a_bias_forbids_a_token(cast: Cast) -> None:
    """The fake runner always says token 1000 first; without it the likeliest left is token 0, which ends the answer."""
    plain = (await ask(cast, max_tokens=1).read_json())["choices"][0]
    biased = (await ask(cast, max_tokens=1, logit_bias={"1000": -100}).read_json())["choices"][0]
    assert (plain["finish_reason"], biased["finish_reason"]) == ("length", "stop")
    assert plain["message"]["content"] and not biased["message"]["content"]


async def test_a_revoked_key_ends_what_it_streams(cast: Cast) -> None:
    call = ask(cast, stream=True, max_tokens=2000)
    assert await call.next_part()
    await on_thread(lambda: revoke_key(cast.key))
    events = read_events(await call.read())
    [refusal] = [event["error"] for event in events if "error" in event]
    assert refusal["code"] == "key_revoked" and "key was revoked" in refusal["message"]
    assert len(events) < 1000, "it would go on for 2000 tokens"


async def test_an_answer_in_json_of_a_schema(cast: Cast) -> None:
    """The fake runner says one token after the other; the grammar leaves it nothing but the schema."""
    wanted = {
        "type": "object",
        "properties": {"ok": {"enum": ["yes"]}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": wanted, "strict": True}}
    answer = await ask(cast, response_format=form, max_tokens=60).read_json()
    choice = answer["choices"][0]
    assert (json.loads(choice["message"]["content"]), choice["finish_reason"]) == ({"ok": "yes"}, "stop")
    free = await ask(cast, response_format={"type": "json_object"}, max_tokens=4).read_json()
    assert free["choices"][0]["message"]["content"].startswith("{")
