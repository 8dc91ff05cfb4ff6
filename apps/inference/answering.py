"""Answer a completion from the cache, from an identical one that runs already, or by having it computed.

What is drawn by chance is computed each time, unless the caller asks for the cache; so are answers with a log, and those to requests with
tools. Where an organization wishes it, the answer to an alike question will do (`cache.semantic`). An answer that is known passes the
gate like any other request, at the plan's price for cached answers; its end goes to settlement in the same step (`cache.telling`).
"""

import logging
import time
from collections.abc import AsyncIterator
from typing import Any, Literal, NamedTuple

import msgspec

from aiscale.wire.events import Delta, Event, Finished, Started
from aiscale.wire.jobs import Sampling
from apps.accounts import callers
from apps.accounts.callers import Caller, PlanLimits
from apps.inference import completions, lanes
from apps.inference.cache import generations, policy, semantic, telling
from apps.inference.cache.entries import Answer, Level, Piece, decode_answer, derive_key, encode_answer
from apps.inference.cache.flights import get_flights
from apps.inference.cache.policy import Policy
from apps.inference.cache.store import count_lookup, get_store
from apps.inference.catalog import CatalogModel
from apps.inference.completions import CompletionRequest, Prepared, Run
from apps.inference.screening import HEADER as SCREENED_HEADER

log = logging.getLogger(__name__)

FLIGHT_PATIENCE_S = 120.0
"""How long a request waits for an identical one before it is computed itself."""


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
    asked = await semantic.look(request, caller, priced, plan, generation) if takes_alike else None
    question = Question(request, caller, model, priced, plan, prepared, key, chosen, asked)
    if asked is not None and asked.nearest is not None and asked.nearest.is_given:
        told = await question.tell_alike(asked.nearest.value)
        if told is not None:
            told.headers[semantic.HEADER] = f"{asked.nearest.similarity:.4f}"
            return told
    return await _fly(question)


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
    flights = get_flights(store)
    owns = question.policy.read and bool(await flights.claim([key]))
    if question.policy.read and not owns:
        return Following(question)
    keeper = AnswerKeeper(question, owns=owns)
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


async def _compute(question: Question, keeper: "AnswerKeeper") -> Run:
    run = await completions.compute(question.request, question.caller, question.model, question.prepared)
    count_lookup(question.model.slug, "miss")
    # what was noted of a message must be told each time: such an answer is not kept
    keeper.keeps = question.policy.write and SCREENED_HEADER not in run.headers
    run.headers[telling.HEADER] = "miss"
    run.keeper = keeper
    return run


class Following(Run):
    """Wait for what an identical request computes, and tell it; should that one fail or leave, compute it after all.

    It is admitted when there is something to tell or to compute: until then it costs nothing and is in nobody's way.
    """

    def __init__(self, question: Question) -> None:
        request, prepared = question.request, question.prepared
        self.job_id = request.job_id or lanes.name_job(request.request_id)
        self.model = question.priced.slug
        self.model_version = question.priced.version
        self.prompt_tokens = 0 if prepared is None else len(prepared.prompt)
        self.max_tokens = (request.max_tokens or 0) if prepared is None else prepared.sampling.max_tokens
        self.n = request.n
        self.headers: dict[str, str] = {}
        self.created_at_s = int(time.time())
        self.keeper = None
        self.tools = None
        self.rescue = None
        self._question = question
        self._run: Run | None = None

    async def __aexit__(self, *exit_: Any) -> None:
        if self._run is not None:
            await self._run.__aexit__(*exit_)

    async def events(self) -> AsyncIterator[Event]:
        """Yield as `Run.events` does, after a while. Raises: AiscaleError, also for what the gate refuses."""
        question, flights = self._question, get_flights(get_store())
        value = await flights.wait(question.key, FLIGHT_PATIENCE_S)
        self._run = await question.tell(value, "l1")
        if self._run is None:
            keeper = AnswerKeeper(question, owns=bool(await flights.claim([question.key])))
            try:
                self._run = await _compute(question, keeper)
            except BaseException:
                await keeper.close()
                raise
        self.model, self.model_version, self.headers = self._run.model, self._run.model_version, self._run.headers
        async for event in self._run.events():
            yield event

    def detach(self) -> None:
        """Nobody comes back to it: it keeps no log."""

    async def cancel(self, reason: str) -> None:
        if self._run is not None:
            await self._run.cancel(reason)


class AnswerKeeper:
    """Gather the answer that passes, put it into the cache when it ends well, and let go of its flight however it ends."""

    def __init__(self, question: Question, *, owns: bool) -> None:
        self.keeps = question.policy.write
        self._key = question.key
        self._model = question.priced
        self._scope = question.policy.scope
        self._asked = question.asked if question.request.cache.write else None
        self._texts: dict[int, list[str]] = {}
        self._logprobs: dict[int, list[Any]] = {}
        self._ends: dict[int, Literal["stop", "length"]] = {}
        self._landed = not owns

    async def take(self, event: Event) -> None:
        if isinstance(event, Started):
            self._texts, self._logprobs, self._ends = {}, {}, {}
        elif isinstance(event, Delta):
            self._texts.setdefault(event.index, []).append(event.text)
            self._logprobs.setdefault(event.index, []).extend(event.logprobs)
            if event.end is not None:
                self._ends[event.index] = event.end
        elif isinstance(event, Finished):
            await self._end(event)

    async def close(self, value: bytes | None = None) -> None:
        if not self._landed:
            self._landed = True
            await get_flights(get_store()).land(self._key, value)

    async def _end(self, event: Finished) -> None:
        is_good = event.finish_reason in ("stop", "length")
        is_ours = (event.model, event.model_version) == (self._model.slug, self._model.version)
        answer = self._make_answer(event) if is_good and is_ours else None
        if answer is not None and self._asked is not None:
            semantic.learn(self._asked, answer)
        if answer is None or not self.keeps:
            await self.close()
            return
        value = encode_answer(answer)
        store = get_store()
        await store.keep_many({self._key: value}, model=self._model.slug, scope=self._scope)
        if not self._landed:
            self._landed = True
            await get_flights(store).land(self._key, value)

    def _make_answer(self, event: Finished) -> Answer:
        reason: Any = event.finish_reason
        pieces = tuple(
            Piece(
                index=index,
                text="".join(self._texts[index]),
                end=self._ends.get(index, reason),
                logprobs=tuple(self._logprobs[index]),
            )
            for index in sorted(self._texts)
        )
        return Answer(
            pieces=pieces,
            finish_reason=reason,
            prompt_tokens=event.prompt_tokens,
            completion_tokens=event.completion_tokens,
            stop_sequence=event.stop_sequence,
        )


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
