"""What a batch says of its usage and its model, with a real worker and settlement: what its requests are charged for."""

from typing import Any

import pytest
from django.db.models import Sum
from openai.types import Batch as OpenAIBatch

from apps.accounts.callers import on_thread
from apps.gateway.batches import runner
from apps.gateway.models import Batch
from apps.spend.models import UsageRecord
from tests.apps.conftest import Cast
from tests.apps.gateway.test_batches import CHAT, EMBED, create, make_line, read, storage, wait_for_charges

__all__ = ["storage"]
pytestmark = pytest.mark.usefixtures("worker", "settling")


async def run(cast: Cast, lines: list[Any], endpoint: str = "/v1/chat/completions") -> OpenAIBatch:
    """Return a batch that has ended, as the official client reads it."""
    made = await create(cast, lines, endpoint)
    await runner.advance(made["id"])
    return OpenAIBatch.model_validate(await read(cast, made["id"]))


async def charge(cast: Cast, batch: OpenAIBatch, count: int) -> list[int]:
    """Return the tokens that a batch's requests are charged for, known ones apart, once ``count`` requests are charged in all."""
    assert len(await wait_for_charges(cast, count)) == count
    own = UsageRecord.objects.filter(request_id__startswith=f"req_{batch.id.partition('_')[2]}_")
    sums = await on_thread(lambda: own.aggregate(*map(Sum, ("prompt_tokens", "cached_tokens", "completion_tokens"))))
    return list(sums.values())


def list_usage(batch: OpenAIBatch) -> list[int]:
    told = batch.usage
    assert told is not None and told.total_tokens == told.input_tokens + told.output_tokens
    return [told.input_tokens, told.input_tokens_details.cached_tokens, told.output_tokens]


async def test_a_chats_batch_tells_what_is_charged(cast: Cast) -> None:
    made = await create(cast, [make_line(1)])
    assert made["usage"]["total_tokens"] == 0 and made["model"] is None
    done = await run(cast, [make_line(1), make_line(2, messages=[], max_tokens=1), make_line(3)])
    assert list_usage(done) == await charge(cast, done, 2) and done.model == CHAT


@pytest.mark.parametrize(
    ("endpoint", "bodies"),
    [
        ("/v1/embeddings", [{"model": EMBED, "input": texts} for texts in (["known", "new"], ["known", "newer"])]),
        ("/v1/completions", [{"model": CHAT, "prompt": "Once", "max_tokens": 2, "temperature": 0}] * 2),
        ("/v1/responses", [{"model": CHAT, "input": "hello", "max_output_tokens": 3, "temperature": 0}] * 2),
    ],
)
async def test_known_tokens_are_told_apart(cast: Cast, endpoint: str, bodies: list[dict[str, Any]]) -> None:
    """What an earlier batch made known costs a later one less, and both say so."""
    for charged in (1, 2):
        done = await run(cast, [make_line(charged, endpoint, **bodies[charged - 1])], endpoint)
        assert list_usage(done) == await charge(cast, done, charged)
    if endpoint != "/v1/responses":
        assert done.usage is not None and done.usage.input_tokens_details.cached_tokens > 0


@pytest.mark.parametrize("other", ["another", "no\nname", "long" * 100])
async def test_a_model_is_named_where_all_ask_for_one_that_may_be(cast: Cast, other: str) -> None:
    mixed = await run(cast, [make_line(1), make_line(2, model=other, messages=[])])
    assert mixed.model is None and mixed.usage is not None and mixed.usage.output_tokens == 3
    alone = await run(cast, [make_line(1, model=other, messages=[])])
    assert alone.model == (other if other == "another" else None)


async def test_what_was_not_counted_from_its_beginning_is_not_told(cast: Cast) -> None:
    """A batch that an earlier version began; one whose answers do not say what they used."""
    made = await create(cast, [make_line(1)])
    await on_thread(lambda: Batch.objects.update(input_tokens=None, cached_tokens=None, output_tokens=None))
    await runner.advance(made["id"])
    done = await read(cast, made["id"])
    assert done["request_counts"]["completed"] == 1 and done["usage"] is None
    judged = await run(cast, [make_line(1, "/v1/moderations", input="hello", model="moderation")], "/v1/moderations")
    assert judged.usage is None and judged.model == "moderation"
