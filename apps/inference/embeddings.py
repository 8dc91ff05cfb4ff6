"""Run an embedding request: check, tokenize, look for known vectors, and have what is not known computed."""

from typing import Any, Literal

import msgspec

from aiscale.errors import AiscaleError, Code
from apps.accounts import callers
from apps.accounts.callers import Caller, PlanLimits
from apps.inference import catalog, encodings, prompts
from apps.inference.cache import policy
from apps.inference.cache.policy import Wish
from apps.inference.catalog import CatalogModel

MAX_INPUTS = 2048


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Ask for one vector for each input: texts, or token ids without special tokens."""

    request_id: str
    source: Literal["api", "chat"]
    model: str
    inputs: list[str] | list[list[int]]
    dimensions: int | None = None
    """For an upstream that can make shorter vectors."""
    cache: Wish = policy.EVERYTHING


class EmbeddingResult(msgspec.Struct, frozen=True, kw_only=True):
    """Hold the vectors: float32, little endian, C order, ``[count, dimensions]``, each of length 1 where our own models made them."""

    model: str
    vectors: bytes
    count: int
    dimensions: int
    prompt_tokens: int
    cached_tokens: int = 0
    """Of ``prompt_tokens``, those of texts whose vectors were known."""
    headers: dict[str, str]


async def embed(request: EmbeddingRequest, caller: Caller) -> EmbeddingResult:
    """Embed all inputs, or none. What the cache knows is paid for at the plan's price for that, text by text.

    I/O: two Redis trips for the cache, and two to send; none of the latter when all is known, but one for the gate; one more for vectors
    of over a megabyte. Raises: AiscaleError.
    """
    model = await catalog.get_model(request.model, "embed")
    if model.upstream is not None:
        return await _ask_upstream(request, model, caller)
    inputs = await _tokenize(request, model, await callers.get_plan(caller.plan))
    rows = await encodings.encode(
        model, inputs, caller, request_id=request.request_id, source=request.source, wish=request.cache
    )
    return EmbeddingResult(
        model=model.slug,
        vectors=rows.data,
        count=rows.count,
        dimensions=rows.dimensions,
        prompt_tokens=sum(map(len, inputs)),
        cached_tokens=rows.cached_tokens,
        headers=rows.headers,
    )


async def _ask_upstream(request: EmbeddingRequest, model: CatalogModel, caller: Caller) -> EmbeddingResult:
    from apps.inference.embedding_relays import relay  # builds on this module

    check_count(request)
    return await relay(request, model, caller)


def check_count(request: EmbeddingRequest) -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for none or too many."""
    if not request.inputs or len(request.inputs) > MAX_INPUTS:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"input holds {len(request.inputs)} entries; send 1 to {MAX_INPUTS} at a time.",
            param="input",
        )


async def _tokenize(request: EmbeddingRequest, model: CatalogModel, plan: PlanLimits) -> list[list[int]]:
    check_count(request)
    texts: Any = request.inputs
    if isinstance(texts[0], str):
        inputs = await prompts.encode_texts(model, texts)
    else:
        inputs = [prompts.wrap_token_ids(model, ids) for ids in texts]
    most = min(model.context_tokens, plan.context_tokens or model.context_tokens)
    whose = "This model's" if most == model.context_tokens else f"The {plan.name} plan's"
    for index, ids in enumerate(inputs):
        if len(ids) > most:
            raise AiscaleError(
                Code.CONTEXT_LENGTH_EXCEEDED,
                f"{whose} maximum context length is {most} tokens, and entry {index} of input is "
                f"{len(ids)}. Please split it into shorter texts.",
                param="input",
            )
    return inputs
