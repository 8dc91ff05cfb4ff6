"""Have a worker encode texts that are not known: admit, queue, and wait for the rows of numbers. Embeddings and moderations share it."""

import time
from typing import Any, Literal

import msgspec

from aiscale import redis as redis_clients
from aiscale.wire.events import Encoded, Event, Finished
from aiscale.wire.jobs import BillingTag, EncodeJob
from apps.accounts import callers
from apps.accounts.callers import Caller, PlanLimits
from apps.inference import lanes, replies
from apps.inference.cache import policy, vectors
from apps.inference.cache.policy import Wish
from apps.inference.cache.vectors import Known
from apps.inference.catalog import CatalogModel
from apps.inference.completions import make_tag, send
from apps.inference.endings import make_failure
from apps.inference.waiting import Wait
from apps.spend import admission

DEADLINE_S = 30


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """Hold what came back: float32, little endian, C order, ``[count, dimensions]``; and the rate limit's state."""

    data: bytes
    count: int
    dimensions: int
    headers: dict[str, str]
    cached_tokens: int = 0
    """How many tokens of the request were not encoded for it."""


async def encode(
    model: CatalogModel,
    inputs: list[list[int]],
    caller: Caller,
    *,
    request_id: str,
    source: Literal["api", "chat"],
    wish: Wish = policy.EVERYTHING,
) -> Rows:
    """Encode all inputs, or none, at the caller's expense. What the cache knows costs the plan's part of the price, text by text.

    I/O: one Redis trip for the gate when this process knows all; else one more for the cache, and one to send; one more for rows of over a
    megabyte. Raises: AiscaleError.
    """
    plan = await callers.get_plan(caller.plan)
    model, plan = lanes.apply(caller, model, plan)
    try:
        known = await vectors.find(wish, model, plan, caller, inputs, recalls=True)
        headers, cached_tokens = await _answer(known, model, caller, plan, request_id, source)
    except admission.Purged:
        known = await vectors.find(wish, model, plan, caller, inputs)
        headers, cached_tokens = await _answer(known, model, caller, plan, request_id, source)
    data = known.join()
    dimensions = len(data) // 4 // len(inputs)
    return Rows(data=data, count=len(inputs), dimensions=dimensions, headers=headers, cached_tokens=cached_tokens)


async def _answer(
    known: Known, model: CatalogModel, caller: Caller, plan: PlanLimits, request_id: str, source: Literal["api", "chat"]
) -> tuple[dict[str, str], int]:
    """Have what is missing computed, if anything is. Returns the answer's headers, and how many tokens were known.

    Raises: AiscaleError; admission.Purged.
    """
    # once it is filled, all is known
    cached_tokens = known.cached_tokens
    try:
        if not known.missing:
            return await known.tell(request_id, source), cached_tokens
        rows = await _compute(known, model, caller, plan, request_id, source)
        known.fill(rows.data, rows.dimensions)
        return rows.headers | known.headers, cached_tokens
    finally:
        await known.close()


async def _compute(
    known: Known, model: CatalogModel, caller: Caller, plan: PlanLimits, request_id: str, source: Literal["api", "chat"]
) -> Rows:
    """Admit a request, and have what is missing computed."""
    model = known.price(model, plan)
    inputs, cached_tokens = known.missing, known.cached_tokens
    tokens = sum(map(len, inputs)) + cached_tokens
    job_id, deadline_at_ms = lanes.name_job(request_id), time.time_ns() // 1_000_000 + DEADLINE_S * 1000
    hold_nanousd = model.terms.cost_nanousd(tokens, 0, cached_tokens)
    admitted = await admission.admit(
        admission.Ask(
            caller=caller,
            model=model.slug,
            job_id=job_id,
            worst_nanousd=hold_nanousd,
            worst_tokens=tokens,
            deadline_at_ms=deadline_at_ms,
            makes_text=False,
            priority=plan.priority,
            weight=plan.weight,
            cache_generation=known.generation,
        )
    )
    tag = known.mark(make_tag(caller, model, request_id, source, hold_nanousd, admitted))
    return await _run(model, inputs, tag, plan, job_id, deadline_at_ms, admitted.headers, cached_tokens=cached_tokens)


async def encode_for_us(
    model: CatalogModel,
    inputs: list[list[int]],
    caller: Caller,
    *,
    request_id: str,
    source: Literal["api", "chat"],
    suffix: str,
    deadline_s: float,
) -> Rows:
    """Encode inputs of a request that is admitted already, for reasons of our own: it costs the caller nothing, counts for nothing
    and is in no usage record.

    ``suffix`` tells the job from the request's own. I/O: one Redis trip to send. Raises: AiscaleError.
    """
    plan = await callers.get_plan(caller.plan)
    now_ms = time.time_ns() // 1_000_000
    tag = BillingTag(
        organization_id=caller.organization_id,
        user_id=caller.user_id,
        key_id=caller.key_id,
        plan=plan.slug,
        request_id=request_id,
        source="batch" if caller.lane == "batch" else source,
        prompt_nanousd_per_token=0,
        completion_nanousd_per_token=0,
        hold_nanousd=0,
        admitted_at_ms=now_ms,
        is_internal=True,
    )
    job_id = lanes.name_job(request_id) + suffix
    return await _run(model, inputs, tag, plan, job_id, now_ms + int(deadline_s * 1000), {}, held=False)


async def _run(
    model: CatalogModel,
    inputs: list[list[int]],
    tag: BillingTag,
    plan: PlanLimits,
    job_id: str,
    deadline_at_ms: int,
    headers: dict[str, str],
    *,
    held: bool = True,
    cached_tokens: int = 0,
) -> Rows:
    wait = Wait(job_id, deadline_at_ms)
    job = EncodeJob(
        job_id=job_id,
        model=model.slug,
        model_version=model.version,
        inputs=inputs,
        billing=tag,
        reply_to=wait.process_id,
        deadline_at_ms=deadline_at_ms,
        cached_tokens=cached_tokens,
    )
    await send(job, wait, plan, held=held)
    try:
        encoded = await receive(wait, headers)
        data = encoded.vectors if encoded.vectors is not None else await _fetch(encoded)
    finally:
        await wait.close()
    return Rows(data=data, count=encoded.count, dimensions=encoded.dimensions, headers=headers)


async def receive(wait: Wait, headers: dict[str, str]) -> Encoded:
    """Wait for a job's rows and its good end. Raises: AiscaleError."""
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
