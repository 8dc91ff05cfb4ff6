"""Run an embedding request: check, tokenize, admit, queue, and wait for the vectors."""

import time
from typing import Any, Literal

import msgspec

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire.events import Encoded, Event, Finished
from aiscale.wire.jobs import EncodeJob
from apps.accounts import callers
from apps.accounts.callers import Caller, PlanLimits
from apps.inference import catalog, lanes, prompts, replies
from apps.inference.catalog import CatalogModel
from apps.inference.completions import make_tag, send
from apps.inference.endings import make_failure
from apps.inference.waiting import Wait
from apps.spend import admission

DEADLINE_S = 30
MAX_INPUTS = 2048


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Ask for one vector for each input: texts, or token ids without special tokens."""

    request_id: str
    source: Literal["api", "chat"]
    model: str
    inputs: list[str] | list[list[int]]


class EmbeddingResult(msgspec.Struct, frozen=True, kw_only=True):
    """Hold the vectors: float32, little endian, C order, ``[count, dimensions]``, each of length 1."""

    model: str
    vectors: bytes
    count: int
    dimensions: int
    prompt_tokens: int
    headers: dict[str, str]


async def embed(request: EmbeddingRequest, caller: Caller) -> EmbeddingResult:
    """Embed all inputs, or none.

    I/O: two Redis trips to send, one more for vectors of over a megabyte. Raises: AiscaleError.
    """
    model = await catalog.get_model(request.model, "embed")
    plan = await callers.get_plan(caller.plan)
    model, plan = lanes.apply(caller, model, plan)
    inputs = await _tokenize(request, model, plan)
    prompt_tokens = sum(map(len, inputs))
    job_id, now_ms = lanes.name_job(request.request_id), time.time_ns() // 1_000_000
    deadline_at_ms = now_ms + DEADLINE_S * 1000
    hold_nanousd = model.terms.cost_nanousd(prompt_tokens, 0)
    admitted = await admission.admit(
        admission.Ask(
            caller=caller,
            model=model.slug,
            job_id=job_id,
            worst_nanousd=hold_nanousd,
            worst_tokens=prompt_tokens,
            deadline_at_ms=deadline_at_ms,
            priority=plan.priority,
            weight=plan.weight,
        )
    )
    wait = Wait(job_id, deadline_at_ms)
    job = EncodeJob(
        job_id=job_id,
        model=model.slug,
        model_version=model.version,
        inputs=inputs,
        billing=make_tag(caller, model, request.request_id, request.source, hold_nanousd, admitted),
        reply_to=wait.process_id,
        deadline_at_ms=deadline_at_ms,
    )
    await send(job, wait, plan)
    try:
        encoded = await _receive(wait, admitted.headers)
        vectors = encoded.vectors if encoded.vectors is not None else await _fetch(encoded)
    finally:
        await wait.close()
    return EmbeddingResult(
        model=model.slug,
        vectors=vectors,
        count=encoded.count,
        dimensions=encoded.dimensions,
        prompt_tokens=prompt_tokens,
        headers=admitted.headers,
    )


async def _tokenize(request: EmbeddingRequest, model: CatalogModel, plan: PlanLimits) -> list[list[int]]:
    if not request.inputs or len(request.inputs) > MAX_INPUTS:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"input holds {len(request.inputs)} entries; send 1 to {MAX_INPUTS} at a time.",
            param="input",
        )
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


async def _receive(wait: Wait, headers: dict[str, str]) -> Encoded:
    encoded: Encoded | None = None
    event: Event
    async for event in wait.events():
        if isinstance(event, Encoded):
            encoded = event
        elif isinstance(event, Finished) and event.finish_reason != "stop":
            raise make_failure(event, headers)
    if encoded is None:
        raise replies.lost(wait.job_id)
    return encoded


async def _fetch(encoded: Encoded) -> bytes:
    client: Any = redis_clients.get_async()
    try:
        data = await client.get(encoded.result_key)
    except redis_clients.UNAVAILABLE as error:
        raise redis_clients.unavailable() from error
    if data is None:
        raise replies.lost(encoded.job_id)
    return bytes(data)
