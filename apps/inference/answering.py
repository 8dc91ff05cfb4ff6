"""Answer a completion from the cache, from an identical one that runs already, or by having it computed.

What is drawn by chance is computed each time, unless the caller asks for the cache; so are answers with a log, and those to requests with
tools. Where an organization wishes it, the answer to an alike question will do (`cache.semantic`). An answer that is known passes the
gate like any other request, at the plan's price for cached answers; its end goes to settlement in the same step (`cache.telling`).
"""

import logging
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, NamedTuple

import msgspec

from aiscale.wire.events import Delta, Event, Finished
from aiscale.wire.jobs import LOCAL_PROVIDER, Sampling
from apps.accounts import callers
from apps.accounts.callers import Caller, PlanLimits
from apps.inference import completions, followers, lanes, relays
from apps.inference.answer_keeper import AnswerKeeper
from apps.inference.cache import generations, policy, semantic, telling
from apps.inference.cache.entries import Answer, Level, decode_answer, derive_key
from apps.inference.cache.flights import get_flights
from apps.inference.cache.policy import Policy
from apps.inference.cache.store import count_lookup, get_store
from apps.inference.catalog import CatalogModel
from apps.inference.completions import CompletionRequest, Prepared, Run
from apps.inference.screening import HEADER as SCREENED_HEADER
from apps.spend import admission

log = logging.getLogger(__name__)

MOST_FLIGHTS = 2
"""Flights that a request follows; when all of them failed, it is computed for itself."""


async def start(request: CompletionRequest, caller: Caller, model: CatalogModel) -> Run:
    """Answer from the cache, or as `completions.compute`.

    I/O: one Redis trip more for what may be cached; for what level 1 does not know one more, and one SQL statement; then as
    `semantic.look` for those who wish that. Raises: as `completions.start`.
    """
    plan = await callers.get_plan(caller.plan)
    chosen = (
        policy.OFF
        if request.keep_log or request.tools is not None
        else policy.choose(
            request.cache, deterministic=is_deterministic(request), plan_scope=plan.cache_scope, caller=caller
        )
    )
    takes_alike = semantic.is_wished(request, caller, plan)
    if chosen.is_off and not takes_alike:
        return await completions.compute(request, caller, model)
    prepared = await completions.prepare(request, caller, model) if model.upstream is None else None
    if prepared is not None:
        priced, plan = prepared.model, prepared.plan
    else:
        priced, plan = lanes.apply(caller, model, plan)
    generation = await generations.find(model.slug, caller.organization_id)
    if generation is None:
        return await completions.compute(request, caller, model, prepared)
    key = _derive_key(request, priced, prepared, f"{chosen.scope} {plan.moderation}", generation)
    if chosen.read:
        found = (await get_store().find_many([key])).get(key)
        answer = None if found is None else _read(found.value)
        if found is not None and answer is not None:
            return await tell(request, caller, priced, plan, answer, found.level)
    asked = None
    if takes_alike:
        # a look-up costs us an inference: who may not be answered causes none
        await _check(request, caller, priced, plan, prepared)
        asked = await semantic.look(request, caller, priced, plan, generation)
    question = Question(request, caller, model, priced, plan, prepared, key, chosen, asked)
    if asked is not None and asked.nearest is not None and asked.nearest.is_given:
        told = await question.tell_alike(asked.nearest.value)
        if told is not None:
            told.headers[semantic.HEADER] = f"{asked.nearest.similarity:.4f}"
            return told
    return await _fly(question)


async def _check(
    request: CompletionRequest, caller: Caller, model: CatalogModel, plan: PlanLimits, prepared: Prepared | None
) -> None:
    """Ask the gate whether the request could be computed, but for the queue. I/O: one Redis trip. Raises: AiscaleError."""
    if prepared is None:
        prompt_tokens, max_tokens = relays.measure(request, model, plan)
    else:
        prompt_tokens, max_tokens = len(prepared.prompt), prepared.sampling.max_tokens
    await admission.check(
        admission.Ask(
            caller=caller,
            model=model.slug,
            job_id=request.job_id or lanes.name_job(request.request_id),
            worst_nanousd=model.terms.cost_nanousd(prompt_tokens, max_tokens * request.n),
            worst_tokens=prompt_tokens + max_tokens * request.n,
            deadline_at_ms=time.time_ns() // 1_000_000 + telling.TOLD_WITHIN_MS,
            priority=plan.priority,
            weight=plan.weight,
            provider=LOCAL_PROVIDER if model.upstream is None else model.upstream.name,
            queues=False,
        )
    )


def is_deterministic(request: CompletionRequest) -> bool:
    """Tell whether the same request gets the same answer again."""
    return request.temperature == 0 or request.seed is not None


def normalize(sampling: Sampling) -> Sampling:
    """Return equal samplings for requests that get equal answers: what only shapes chance means nothing without it."""
    if sampling.temperature:
        return sampling
    return msgspec.structs.replace(sampling, top_p=1.0, top_k=0, min_p=0.0, seed=None)


async def tell(
    request: CompletionRequest, caller: Caller, model: CatalogModel, plan: PlanLimits, answer: Answer, level: Level
) -> "Told":
    """Admit a request whose answer is known, at the plan's price for that. ``model`` and ``plan`` as they hold for the caller's lane.

    I/O: one Redis trip. Raises: AiscaleError.
    """
    told = Told(request, model, answer)
    known = telling.Known(
        kind="generate",
        level=level,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        finish_reason=answer.finish_reason,
        stop_sequence=answer.stop_sequence,
        pieces=len(answer.pieces),
    )
    told.end, told.headers = await telling.admit_known(
        known, caller, model, plan, job_id=told.job_id, request_id=request.request_id, source=request.source
    )
    return told


class Told(Run):
    """Tell an answer that is known."""

    def __init__(self, request: CompletionRequest, model: CatalogModel, answer: Answer) -> None:
        self.job_id = request.job_id or lanes.name_job(request.request_id)
        self.model = model.slug
        self.model_version = model.version
        self.prompt_tokens = answer.prompt_tokens
        self.max_tokens = request.max_tokens or answer.completion_tokens
        self.n = request.n
        self.headers: dict[str, str] = {}
        self.created_at_s = int(time.time())
        self.keeper = None
        self.tools = None
        self.rescue = None
        self.answer = answer
        self.end: Finished | None = None

    async def __aexit__(self, *_: Any) -> None:
        """It has ended already."""

    async def events(self) -> AsyncIterator[Event]:
        """Yield a Delta for each choice, and Finished."""
        several = len(self.answer.pieces) > 1
        for seq, piece in enumerate(self.answer.pieces):
            yield Delta(
                job_id=self.job_id,
                seq=seq + 1,
                text=piece.text,
                completion_tokens=self.answer.completion_tokens,
                index=piece.index,
                logprobs=piece.logprobs,
                end=piece.end if several else None,
            )
        assert self.end is not None, "it was admitted, so its end was made"
        yield self.end

    def detach(self) -> None:
        """There is nothing to stop listening to."""

    async def cancel(self, reason: str) -> None:
        """It has ended already."""


class Question(NamedTuple):
    """Hold a request whose answer is not known: ``model`` as the catalog has it, ``priced`` and ``plan`` as they hold for its lane."""

    request: CompletionRequest
    caller: Caller
    model: CatalogModel
    priced: CatalogModel
    plan: PlanLimits
    prepared: Prepared | None
    key: bytes
    policy: Policy
    asked: semantic.Asked | None = None
    """What was looked for among alike questions: the answer will teach it."""
    tries: int = 0
    """How many flights it followed that failed."""

    async def tell(self, value: bytes | None, level: Level) -> "Told | None":
        answer = None if value is None else _read(value)
        if answer is None:
            return None
        return await tell(self.request, self.caller, self.priced, self.plan, answer, level)

    async def tell_alike(self, value: bytes) -> "Told | None":
        """Tell another question's answer; the prompt is this one's."""
        answer = _read(value)
        if answer is None:
            return None
        if self.prepared is not None:
            answer = msgspec.structs.replace(answer, prompt_tokens=len(self.prepared.prompt))
        return await tell(self.request, self.caller, self.priced, self.plan, answer, "semantic")


async def _fly(question: Question) -> Run:
    """Compute the answer for all who want it now, or follow another request that does."""
    key, store = question.key, get_store()
    flights = get_flights()
    # who has nothing kept is followed by nobody
    shares = question.policy.read and question.policy.write
    owns = shares and bool(await flights.claim([key]))
    if shares and not owns and question.tries < MOST_FLIGHTS:
        return await _follow(question)
    keeper = AnswerKeeper(
        key,
        model=question.priced.slug,
        version=question.priced.version,
        scope=question.policy.scope,
        keeps=question.policy.write,
        owns=owns,
        asked=question.asked if question.request.cache.write else None,
    )
    try:
        # it may have come in between our look and our claim
        near = (await store.find_near([key])).get(key) if owns else None
        told = None if near is None else await question.tell(near.value, near.level)
        if near is not None and told is not None:
            await keeper.close(near.value)
            return told
        return await _compute(question, keeper)
    except BaseException:
        await keeper.close()
        raise


async def _follow(question: Question) -> Run:
    flight = get_flights().join(question.key)
    return await followers.follow(
        question.request,
        question.caller,
        question.priced,
        question.plan,
        question.prepared,
        flight,
        partial(_fly, question._replace(tries=question.tries + 1)),
        live=is_deterministic(question.request),
    )


async def _compute(question: Question, keeper: AnswerKeeper) -> Run:
    run = await completions.compute(question.request, question.caller, question.model, question.prepared)
    count_lookup(question.model.slug, "miss")
    run.headers[telling.HEADER] = "miss"
    run.keeper, keeper.run = keeper, run
    if SCREENED_HEADER in run.headers:
        # what was noted of a message must be told each time: such an answer is not kept, and nobody follows it
        keeper.keeps = False
        await keeper.close()
    return run


def _derive_key(
    request: CompletionRequest, model: CatalogModel, prepared: Prepared | None, scope: str, generation: str
) -> bytes:
    if prepared is not None:
        return derive_key(scope, generation, model.slug, model.version, normalize(prepared.sampling), prepared.prompt)
    # an upstream has a tokenizer of its own: what it is told counts, whole
    words = msgspec.structs.replace(request, request_id="", source="api", job_id=None, cache=policy.EVERYTHING)
    route = model.upstream
    where = "" if route is None else f"{route.base_url} {route.model}"
    return derive_key(scope, generation, model.slug, f"{model.version} {where}", words, [])


def _read(value: bytes) -> Answer | None:
    try:
        return decode_answer(value)
    except (msgspec.DecodeError, msgspec.ValidationError):
        log.warning("an entry of the cache cannot be read; it counts as a miss")
        return None
