"""Run a chat completion: check, tokenize, admit, queue, listen."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, Literal, Protocol

import msgspec
from django.conf import settings

from aiscale.errors import AiscaleError, Code
from aiscale.observability import FIRST_TOKEN_SECONDS, TOKEN_DELIVERY_SECONDS
from aiscale.wire.events import Delta, Event, Finished
from aiscale.wire.jobs import BillingTag, EncodeJob, GenerateJob, Grammar, Sampling
from apps.accounts import callers
from apps.accounts.callers import Caller, PlanLimits
from apps.inference import catalog, grammars, lanes, prompts, queue, traffic
from apps.inference.cache import policy
from apps.inference.cache.policy import Wish
from apps.inference.call_readers import read_calls
from apps.inference.catalog import CatalogModel
from apps.inference.prompts import ChatMessage
from apps.inference.tool_grammars import make_grammar
from apps.inference.tools import Style, Tools
from apps.inference.waiting import Wait
from apps.spend import admission


class CompletionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Ask for an answer to ``messages``, for what follows ``words`` (alone, or as what the answer to messages begins with), or for what
    follows ``prompt_token_ids``. ``max_tokens`` None: as many as plan and context allow, for each of ``n`` choices.

    How tokens are chosen is said as in `aiscale.wire.jobs.Sampling`.
    ``keep_log`` keeps the events for browsers that come back; ``job_id`` may be given by who wrote it down beforehand.
    """

    request_id: str
    source: Literal["api", "chat"]
    model: str
    messages: list[ChatMessage]
    words: str | None = None
    prompt_token_ids: list[int] | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    top_logprobs: int | None = None
    grammar: Grammar | None = None
    tools: Tools | None = None
    keep_log: bool = False
    job_id: str | None = None
    cache: Wish = policy.EVERYTHING

    @property
    def goes_on(self) -> bool:
        """Whether the prompt is more than a template filled with messages."""
        return self.words is not None or self.prompt_token_ids is not None


class Keeper(Protocol):
    """Look on while an answer is made, to keep it (`apps.inference.answering`)."""

    async def take(self, event: Event) -> None: ...

    async def close(self) -> None: ...


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """Hold a request as our workers will see it, checked against model and plan (as they hold for its lane)."""

    model: CatalogModel
    plan: PlanLimits
    prompt: list[int]
    sampling: Sampling


class Run:
    """Be an admitted and queued completion. Use it with ``async with``: who leaves before the end cancels it."""

    def __init__(self, job: GenerateJob, wait: Wait, headers: dict[str, str]) -> None:
        self.job_id = job.job_id
        self.model = job.model
        self.model_version = job.model_version
        self.prompt_tokens = len(job.prompt_token_ids)
        self.max_tokens = job.sampling.max_tokens
        self.n = job.sampling.n
        self.headers = headers
        self.created_at_s = job.billing.admitted_at_ms // 1000
        self._admitted_at_ms = job.billing.admitted_at_ms
        self._wait = wait
        self.tools: Tools | None = None
        """Set when what the model says may hold calls in its own way, which ``style`` is."""
        self.style = Style.HERMES
        self.keeper: Keeper | None = None
        self.rescue: Callable[[], Awaitable[Run]] | None = None
        """Starts another run in this one's place, should its worker be lost before the first token."""

    async def __aenter__(self) -> "Run":
        return self

    async def __aexit__(self, *_: Any) -> None:
        try:
            await self._wait.close()
        finally:
            if self.keeper is not None:
                await self.keeper.close()

    async def events(self) -> AsyncIterator[Event]:
        """Yield Started, Delta... and at last Finished. Raises: AiscaleError (WORKER_LOST)."""
        first, delivery = True, TOKEN_DELIVERY_SECONDS.labels(self.model)
        heard = self._listen()
        async for event in heard if self.tools is None else read_calls(heard, self.tools, self.style, self.n):
            if first and isinstance(event, Delta):
                first = False
                FIRST_TOKEN_SECONDS.labels(self.model).observe(max(time.time() - self._admitted_at_ms / 1000, 0))
            if isinstance(event, Delta) and event.made_at_ms:
                delivery.observe(max(time.time() - event.made_at_ms / 1000, 0))
            if self.keeper is not None:
                await self.keeper.take(event)
            yield event

    async def _listen(self) -> AsyncIterator[Event]:
        streamed = False
        async for event in self._wait.events():
            streamed = streamed or isinstance(event, Delta)
            lost = isinstance(event, Finished) and event.error_code in (Code.WORKER_LOST, Code.ENGINE_FAILED)
            if lost and not streamed and self.rescue is not None:
                try:
                    other = await self.rescue()
                except AiscaleError:
                    yield event
                    return
                self._wait, self.model, self.headers = other._wait, other.model, other.headers
                async for later in self._wait.events():
                    yield later
                return
            yield event

    def detach(self) -> None:
        """Stop listening, and let the job go on. For jobs with ``keep_log``, which `replies.follow` can take up again."""
        self._wait.detach()

    async def cancel(self, reason: str) -> None:
        """Stop the job. I/O: one Redis trip. Idempotent."""
        await self._wait.close(reason)


async def start(request: CompletionRequest, caller: Caller) -> Run:
    """Admit a request, and answer it from the cache, queue it, or have an upstream answer it: the model's own, or its fallback when our
    workers cannot.

    I/O: two Redis trips and no SQL once catalog and plan are warm; for what may be cached see `answering.start`.
    Raises: AiscaleError, with nothing spent and nothing held.
    """
    from apps.inference import answering  # it builds on this module

    model = await catalog.get_model(request.model, "generate")
    return await answering.start(request, caller, model)


async def compute(
    request: CompletionRequest, caller: Caller, model: CatalogModel, prepared: Prepared | None = None
) -> Run:
    """Admit a request and have it computed, whatever the cache knows. ``prepared`` is what `prepare` said of it, if it was asked.

    I/O, Raises: as `start`.
    """
    from apps.inference import overflow, relays  # both build on this module

    if model.upstream is not None:
        return await relays.start(request, caller, model)
    if model.fallback is not None:
        return await overflow.start(request, caller, model, prepared)
    return await start_local(request, caller, model, prepared)


async def prepare(request: CompletionRequest, caller: Caller, model: CatalogModel) -> Prepared:
    """Check a request for our own workers, and turn its prompt into tokens; what a canary cannot take is for the main version.

    I/O: none once warm. Raises: AiscaleError.
    """
    plan = await callers.get_plan(caller.plan)
    model, plan = lanes.apply(caller, model, plan)
    job_id = request.job_id or lanes.name_job(request.request_id)
    holds_ids = request.prompt_token_ids is not None or bool(request.logit_bias)
    chosen = await traffic.choose_version(model, job_id, holds_ids=holds_ids)
    try:
        return await _prepare_for(chosen, plan, request)
    except AiscaleError:
        if chosen.version == model.version:
            raise
        # another template, vocabulary or context: nobody asked for those
        return await _prepare_for(model, plan, request)


async def _prepare_for(model: CatalogModel, plan: PlanLimits, request: CompletionRequest) -> Prepared:
    prompt = await _build_prompt(model, request)
    param = "text" if request.source == "chat" else "messages" if request.messages else "prompt"
    max_tokens = choose_max_tokens(request.max_tokens, len(prompt), model, plan, param=param)
    sampling = make_sampling(request, model, max_tokens)
    if sampling.grammar is not None:
        await grammars.check(sampling.grammar, request.tools)
    return Prepared(model=model, plan=plan, prompt=prompt, sampling=sampling)


async def _build_prompt(model: CatalogModel, request: CompletionRequest) -> list[int]:
    if request.prompt_token_ids is not None:
        return request.prompt_token_ids
    words = [] if request.words is None else await prompts.encode_prompt(model, request.words)
    if request.words is not None and not request.messages:
        return words
    return [*await prompts.build_prompt(model, request.messages, request.tools), *words]


async def start_local(
    request: CompletionRequest, caller: Caller, model: CatalogModel, prepared: Prepared | None = None
) -> Run:
    """Admit a request and queue it for our own workers. I/O and Raises: as `start`."""
    from apps.inference.screening import screen  # builds on this module

    if prepared is None:
        prepared = await prepare(request, caller, model)
    model, plan, prompt, sampling = prepared.model, prepared.plan, prepared.prompt, prepared.sampling
    max_tokens = sampling.max_tokens
    job_id = request.job_id or lanes.name_job(request.request_id)
    came_as_ids = request.prompt_token_ids is not None and plan.moderation != "off"
    text = await prompts.decode(model, prompt) if came_as_ids else request.words or ""
    now_ms = time.time_ns() // 1_000_000
    deadline_at_ms = now_ms + settings.ENV.request_deadline_s * 1000
    hold_nanousd = model.terms.cost_nanousd(len(prompt), max_tokens * request.n)
    admitted = await admission.admit(
        admission.Ask(
            caller=caller,
            model=model.slug,
            job_id=job_id,
            worst_nanousd=hold_nanousd,
            worst_tokens=len(prompt) + max_tokens * request.n,
            deadline_at_ms=deadline_at_ms,
            priority=plan.priority,
            weight=plan.weight,
        )
    )
    tag = make_tag(caller, model, request.request_id, request.source, hold_nanousd, admitted)
    release = partial(admission.release, tag, model.slug, job_id)
    headers = admitted.headers | await screen(request, caller, plan, release, text)
    wait = Wait(job_id, deadline_at_ms)
    job = GenerateJob(
        job_id=job_id,
        model=model.slug,
        model_version=model.version,
        prompt_token_ids=prompt,
        sampling=sampling,
        billing=tag,
        reply_to=wait.process_id,
        deadline_at_ms=deadline_at_ms,
        keep_log=request.keep_log,
        prefix_scope=choose_prefix_scope(caller, plan),
    )
    await send(job, wait, plan)
    run = Run(job, wait, headers)
    run.tools, run.style = request.tools, prompts.get_reader(model).style or Style.HERMES
    return run


def choose_prefix_scope(caller: Caller, plan: PlanLimits) -> str:
    """Say with whom a request shares the keys and values of prompts that begin alike: how long an answer takes tells of it."""
    if plan.cache_scope == "site":
        return "site"
    if plan.cache_scope == "key":
        return f"{caller.organization_id}:{caller.key_id or caller.user_id}"
    return caller.organization_id


def make_sampling(request: CompletionRequest, model: CatalogModel, max_tokens: int) -> Sampling:
    """Say to the worker how tokens are chosen. Raises: AiscaleError (INVALID_REQUEST for a bias of no token)."""
    reader, tools = prompts.get_reader(model), request.tools
    vocab_size, style = reader.manifest.vocab_size, None if tools is None else reader.style
    keeps_control_tokens = style is not None and any(mark in reader.specials for mark in style.value)
    controls = [reader.added[token] for token in reader.specials] if keeps_control_tokens else []
    grammar = None if tools is None or style is None else make_grammar(tools, style, reader.find_token, controls)
    for token_id in request.logit_bias:
        if not 0 <= token_id < vocab_size:
            raise AiscaleError(
                Code.INVALID_REQUEST,
                f"logit_bias names the token {token_id}; the tokens of {model.slug} are 0 to {vocab_size - 1}.",
                param="logit_bias",
            )
    return Sampling(
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
        stop=request.stop,
        seed=request.seed,
        n=request.n,
        top_logprobs=request.top_logprobs,
        grammar=request.grammar or grammar,
        keep_control_tokens=keeps_control_tokens,
    )


async def send(job: GenerateJob | EncodeJob, wait: Wait, plan: PlanLimits, *, held: bool = True) -> None:
    """Queue an admitted job; if that fails, give back its hold, where it is ``held``. Raises: AiscaleError (QUEUE_FULL,
    BACKEND_UNAVAILABLE)."""
    try:
        # from here on the worker may have it: who is interrupted now cancels it
        wait.sent = True
        limit = min(plan.max_queued or settings.ENV.queue_limit, settings.ENV.queue_limit) if held else None
        await queue.enqueue(job, plan.priority, plan.weight, held=held, most_queued=limit)
    except AiscaleError:
        wait.sent = False
        await wait.close()
        if held:
            await admission.release(job.billing, job.model, job.job_id)
        raise
    except BaseException:
        queue.forsake(job.job_id)
        await wait.close()
        raise


def make_tag(
    caller: Caller,
    model: CatalogModel,
    request_id: str,
    source: Any,
    hold_nanousd: int,
    admitted: admission.Admitted,
) -> BillingTag:
    """Say who pays, at today's prices, and what the gate counted."""
    return BillingTag(
        organization_id=caller.organization_id,
        user_id=caller.user_id,
        key_id=caller.key_id,
        plan=admitted.plan,
        request_id=request_id,
        source="batch" if caller.lane == "batch" else source,
        hold_nanousd=hold_nanousd,
        admitted_at_ms=admitted.admitted_at_ms,
        hold_tokens=admitted.worst_tokens,
        price_id=model.price_id,
        **msgspec.structs.asdict(model.terms),
    )


def count_context_tokens(model: CatalogModel, plan: PlanLimits) -> int:
    """Return the longest sequence that a request may fill."""
    most = min(model.context_tokens, int(settings.ENV.context_tokens))
    return most if plan.context_tokens is None else min(most, plan.context_tokens)


def choose_max_tokens(
    asked: int | None, prompt_tokens: int, model: CatalogModel, plan: PlanLimits, *, param: str = "messages"
) -> int:
    """Return how many tokens the answer may have; ``param`` names what the prompt came as: ``text`` in the browser chat.

    Raises: AiscaleError (CONTEXT_LENGTH_EXCEEDED, INVALID_REQUEST).
    """
    context = count_context_tokens(model, plan)
    whose = f"The {plan.name} plan's" if context == plan.context_tokens else "This model's"
    room = context - prompt_tokens
    if room < 1:
        raise AiscaleError(
            Code.CONTEXT_LENGTH_EXCEEDED,
            f"{whose} maximum context length is {context} tokens, and {'your message' if param == 'text' else param} "
            f"has {prompt_tokens}. Please reduce the length of {'your message' if param == 'text' else f'the {param}'}.",
            param=param,
        )
    if asked is None:
        return min(room, plan.max_output_tokens)
    if asked > plan.max_output_tokens:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"max_tokens is {asked}; the {plan.name} plan allows at most {plan.max_output_tokens}. "
            "Ask for fewer, or upgrade your plan.",
            param="max_tokens",
        )
    if asked > room:
        raise AiscaleError(
            Code.CONTEXT_LENGTH_EXCEEDED,
            f"{whose} maximum context length is {context} tokens. {param} has {prompt_tokens} and max_tokens is "
            f"{asked}, {prompt_tokens + asked} in all. Please reduce the length of the {param} or max_tokens.",
            param="max_tokens",
        )
    return asked
