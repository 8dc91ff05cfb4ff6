"""Have an upstream answer a request: admitted, held, metered and settled like one that our own workers compute.

The web process that relays is the job's worker: it has the lease, pushes it ahead each second together with what was seen so far, obeys
cancel and kill, and ends the job through finish.lua. When it dies, the reaper ends the job and charges what was seen.
"""

import asyncio
import logging
import time
from functools import partial
from typing import Any, Literal

import msgspec
from django.conf import settings

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import codec, keys
from aiscale.wire.events import RELAY, Delta, Event, Finished, FinishReason, Started, ToolCallPart
from aiscale.wire.jobs import EncodeJob, GenerateJob, Sampling
from aiscale.wire.scripts import finish_arguments
from apps.accounts import callers
from apps.accounts.callers import Caller, PlanLimits
from apps.inference import catalog, completions, lanes, prompts, queue, relay_orders, screening
from apps.inference.catalog import CatalogModel, UpstreamRoute
from apps.inference.completions import CompletionRequest, Run
from apps.inference.tools import name_call
from apps.inference.upstream_client import open_stream
from apps.inference.upstream_words import (
    Piece,
    bound_prompt_tokens,
    make_body,
    read_count,
    read_pieces,
    read_usage,
    write_prompt,
)
from apps.inference.waiting import Wait
from apps.spend import admission

log = logging.getLogger(__name__)

FINISH_TRIES = 30

_relays: set[asyncio.Task[None]] = set()


async def start(request: CompletionRequest, caller: Caller, model: CatalogModel, suffix: str = "") -> Run:
    """Admit a request and have the model's upstream answer it.

    I/O: two Redis trips, then HTTP in the background. Raises: AiscaleError, with nothing spent and nothing held.
    """
    route = model.upstream
    assert route is not None
    plan = await callers.get_plan(caller.plan)
    model, plan = lanes.apply(caller, model, plan)
    bound, max_tokens = measure(request, model, plan)
    job_id = (request.job_id or lanes.name_job(request.request_id)) + suffix
    deadline_at_ms = time.time_ns() // 1_000_000 + settings.ENV.request_deadline_s * 1000
    hold_nanousd = model.terms.cost_nanousd(bound, max_tokens * request.n)
    admitted = await admission.admit(
        admission.Ask(
            caller=caller,
            model=model.slug,
            job_id=job_id,
            worst_nanousd=hold_nanousd,
            worst_tokens=bound + max_tokens * request.n,
            deadline_at_ms=deadline_at_ms,
            priority=plan.priority,
            provider=route.name,
        )
    )
    tag = completions.make_tag(caller, model, request.request_id, request.source, hold_nanousd, admitted)
    tag = msgspec.structs.replace(tag, provider=route.name)
    headers = admitted.headers | await screening.screen(
        request, caller, plan, partial(admission.release, tag, model.slug, job_id)
    )
    wait = Wait(job_id, deadline_at_ms)
    job = GenerateJob(
        job_id=job_id,
        model=model.slug,
        model_version=model.version,
        prompt_token_ids=[],
        sampling=Sampling(max_tokens=max_tokens, n=request.n),
        billing=tag,
        reply_to=wait.process_id,
        deadline_at_ms=deadline_at_ms,
        keep_log=request.keep_log,
    )
    run = Run(job, wait, headers)
    relay = Relay(job, wait, route, make_body(request, route, max_tokens))
    run.prompt_tokens = await begin(relay, write_prompt(request))
    return run


def measure(request: CompletionRequest, model: CatalogModel, plan: PlanLimits) -> tuple[int, int]:
    """Return how many tokens the prompt may have for the upstream, at the most, and each choice of the answer.

    Raises: AiscaleError (UNSUPPORTED_PARAMETER for what cannot be passed on, INVALID_REQUEST).
    """
    _check(request, model)
    bound = bound_prompt_tokens(request)
    context = completions.count_context_tokens(model, plan)
    max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = max(min(plan.max_output_tokens, context - min(bound, context - 1)), 1)
    elif max_tokens > plan.max_output_tokens:
        completions.choose_max_tokens(max_tokens, 0, model, plan)
    return bound, max_tokens


async def begin(relay: "Relay", prompt: str) -> int:
    """Begin an admitted request's relay; if that fails, give back its hold. Returns the prompt's tokens by our own count."""
    job, wait = relay.job, relay.wait
    try:
        relay.estimate = relay.estimate or await count_tokens(prompt)
        await relay.begin()
    except BaseException as error:
        await wait.close()
        await asyncio.shield(admission.release(job.billing, job.model, job.job_id))
        if isinstance(error, redis_clients.UNAVAILABLE):
            raise redis_clients.unavailable() from error
        raise
    wait.sent = True
    return relay.estimate


def _check(request: CompletionRequest, model: CatalogModel) -> None:
    """Raise: AiscaleError (UNSUPPORTED_PARAMETER) for what cannot be passed on."""
    if request.goes_on:
        what, param = "go on from a text", "prompt"
    elif request.top_logprobs is not None:
        what, param = "tell logprobs", "logprobs"
    elif request.grammar is not None and request.grammar.kind != "json_schema":
        what, param = "keep to this grammar", "response_format"
    else:
        return
    message = f"The model {model.slug!r} is served by another service and cannot {what}. Choose another model."
    raise AiscaleError(Code.UNSUPPORTED_PARAMETER, message, param=param)


async def count_tokens(text: str) -> int:
    """Count a text's tokens by a tokenizer of our own, for an upstream that tells no usage. I/O: as `prompts.encode_prompt`."""
    if not text:
        return 0
    for model in await catalog.list_local("generate"):
        try:
            return len(await prompts.encode_prompt(model, text))
        except AiscaleError:
            continue
    return -(-len(text.encode()) // 4)


class Relay:
    """Be the worker of one job that an upstream computes."""

    def __init__(
        self, job: GenerateJob | EncodeJob, wait: Wait, route: UpstreamRoute | None, body: dict[str, Any]
    ) -> None:
        self.estimate = 0
        """Prompt tokens by our own count, until the upstream tells its own."""
        self.job = job
        self.wait = wait
        self.route = route
        self.body = body
        self._keeps_log = isinstance(job, GenerateJob) and job.keep_log
        self._choices = job.sampling.n if isinstance(job, GenerateJob) else 1
        self.several = self._choices > 1
        self._kind: Literal["generate", "encode"] = "generate" if isinstance(job, GenerateJob) else "encode"
        self.worker_id = f"{RELAY}{wait.process_id}"
        self.beat_lock = asyncio.Lock()
        self.is_withdrawn = False
        """Whether its record is gone: a beat must not bring it back."""
        self._seq = 0
        self._text: dict[int, list[str]] = {}
        self._called: list[str] = []
        self._calls: set[tuple[int, int]] = set()
        """The calls that have begun, by choice and number."""
        self.ends: dict[int, str] = {}
        """How each choice ended."""
        self.usage: dict[str, Any] | None = None
        self._chunks = 0
        self._first_token_at_ms = 0
        self._reason: tuple[FinishReason, str] | None = None
        """Why it was stopped from outside."""

    async def begin(self) -> None:
        """Write the job's record, and go on in the background. I/O: one Redis trip. Raises: RedisError, OSError."""
        job, now_ms = self.job, time.time_ns() // 1_000_000
        names = [keys.job_record(job.job_id), keys.LEASES]
        values: list[str | int | bytes] = [
            job.job_id,
            codec.encode_job(job),
            job.model,
            job.deadline_at_ms,
            settings.ENV.request_deadline_s + keys.JOB_RECORD_AFTER_S,
            self.worker_id,
            now_ms + keys.LEASE_MS,
            job.billing.organization_id,
            " ".join(queue.list_in_flight(job)),
            keys.MAX_ATTEMPTS,
            self.estimate,
            self._kind,
        ]
        await redis_clients.run_script_async("begin", names, values)
        task = asyncio.create_task(self._run(), name=f"relay-{job.job_id}")
        _relays.add(task)
        task.add_done_callback(_relays.discard)

    async def _run(self) -> None:
        """Relay until the end, and say it. Nothing that goes wrong in here is lost: the lease passes, and the reaper ends the job."""
        relaying = asyncio.create_task(self.relay())
        beating = asyncio.create_task(self._beat(relaying))
        left_s = max(self.job.deadline_at_ms / 1000 - time.time(), 0.1)
        reason: FinishReason
        code = message = None
        try:
            with relay_orders.watch(self.job, partial(self._stop, relaying, "killed")):
                async with asyncio.timeout(left_s):
                    await relaying
            reason = "length" if "length" in self.ends.values() else "stop"
        except TimeoutError:
            reason, code = "deadline", "deadline_exceeded"
        except asyncio.CancelledError:
            reason, message = self._reason or ("cancelled", "")
            code = "killed" if reason == "killed" else "cancelled"
        except AiscaleError as error:
            reason, code, message = "error", error.code.value, error.message
        except Exception as error:
            log.exception("a relay failed", extra={"job_id": self.job.job_id})
            reason, code, message = "error", Code.UPSTREAM_FAILED.value, str(error)[:200]
        finally:
            relaying.cancel()
        try:
            await self.finish(reason, code, message)
        finally:
            beating.cancel()

    async def relay(self) -> None:
        await self.say(Started(job_id=self.job.job_id, seq=self.next_seq(), worker_id=self.worker_id, attempt=1))
        assert self.route is not None
        async with open_stream(self.route, "/chat/completions", self.body) as chunks:
            async for chunk in chunks:
                self.usage = read_usage(chunk) or self.usage
                for piece in read_pieces(chunk, self._choices):
                    await self._take(piece)

    async def _take(self, piece: Piece) -> None:
        index, text, calls, end = piece
        calls = tuple(self._name(index, part) for part in calls)
        if end is not None:
            self.ends[index] = end
        if text or calls:
            self.note_token()
            self._text.setdefault(index, []).append(text)
            self._called += [part.name + part.arguments for part in calls]
            self._chunks += 1
        several = self.several
        if text or calls or (several and end is not None):
            await self.say(
                Delta(
                    job_id=self.job.job_id,
                    seq=self.next_seq(),
                    text=text,
                    completion_tokens=self._chunks,
                    index=index if several else 0,
                    end=end if several else None,
                    tool_calls=calls,
                )
            )

    def _name(self, choice: int, part: ToolCallPart) -> ToolCallPart:
        """Give a call an id where the upstream gives it none: its result could not be told otherwise."""
        if (choice, part.index) in self._calls:
            return part
        self._calls.add((choice, part.index))
        given = part.id or name_call(self.job.job_id, choice, part.index)
        return msgspec.structs.replace(part, id=given)

    def note_token(self) -> None:
        """Note when the first one came."""
        self._first_token_at_ms = self._first_token_at_ms or time.time_ns() // 1_000_000

    def next_seq(self) -> int:
        self._seq += 1
        return self._seq - 1

    async def say(self, event: Event) -> None:
        """Hand an event to who waits here, and keep it for who comes back."""
        self.wait.take(event)
        if self._keeps_log:
            client: Any = redis_clients.get_async()
            name = keys.job_log(self.job.job_id)
            pipeline = client.pipeline(transaction=True)
            pipeline.xadd(name, {"0": codec.encode_event(event)})
            pipeline.expire(name, keys.JOB_LOG_TTL_S)
            try:
                await pipeline.execute()
            except redis_clients.UNAVAILABLE as error:
                raise redis_clients.unavailable() from error

    async def _beat(self, relaying: asyncio.Task[None]) -> None:
        """Push the lease ahead with what was seen, and obey who cancels (`relay_orders` who kills). I/O: one Redis trip a second."""
        name = keys.job_record(self.job.job_id)
        while True:
            try:
                async with self.beat_lock:
                    if self.is_withdrawn:
                        return
                    prompt, completion = await self.count()
                    client: Any = redis_clients.get_async()
                    pipeline = client.pipeline(transaction=False)
                    pipeline.hmget(name, "worker", "cancelled", "state")
                    pipeline.hset(name, mapping={"seen_prompt_tokens": prompt, "seen_completion_tokens": completion})
                    now_ms = time.time_ns() // 1_000_000
                    pipeline.zadd(keys.LEASES, {self.job.job_id: now_ms + keys.LEASE_MS}, xx=True)
                    (worker, cancelled, state), *_ = await pipeline.execute()
                    if cancelled is not None or state != b"running" or worker != self.worker_id.encode():
                        self._stop(relaying, "cancelled", "")
            except redis_clients.UNAVAILABLE:
                log.warning("a relay's lease could not be renewed", extra={"job_id": self.job.job_id})
            if self.wait.left:
                self._stop(relaying, "cancelled", "")
            try:
                async with asyncio.timeout(keys.HEARTBEAT_MS / 1000):
                    await self.wait.gone.wait()
                self._stop(relaying, "cancelled", "")
                await asyncio.sleep(keys.HEARTBEAT_MS / 1000)
            except TimeoutError:
                pass

    def _stop(self, relaying: asyncio.Task[None], reason: FinishReason, message: str) -> None:
        if not relaying.done():
            self._reason = self._reason or (reason, message)
            relaying.cancel()

    async def count(self) -> tuple[int, int]:
        """Return the tokens of prompt and answer: the upstream's own figures, else our tokenizer's. Never more than was held."""
        most_prompt, most_completion = self._find_most()
        prompt, completion = (read_count(self.usage, name) for name in ("prompt_tokens", "completion_tokens"))
        if prompt is not None and completion is not None:
            if prompt > most_prompt or completion > most_completion:
                log.warning("an upstream told of more tokens than there can be", extra={"job_id": self.job.job_id})
            return min(prompt, most_prompt), min(completion, most_completion)
        texts = ["".join(parts) for parts in self._text.values()]
        made = sum([await count_tokens(text) for text in (*texts, "".join(self._called))])
        made = max(made, min(self._chunks, 1))
        return min(self.estimate if texts else 0, most_prompt), min(made, most_completion)

    def _find_most(self) -> tuple[int, int]:
        """Return the most tokens of prompt and answer that were held for."""
        made = self.job.sampling.max_tokens * self._choices if isinstance(self.job, GenerateJob) else 0
        return max(self.job.billing.hold_tokens - made, 0), made

    async def finish(self, reason: FinishReason, code: str | None, message: str | None) -> None:
        """Say the end, once; again until Redis takes it, or the lease has passed and the reaper has said it."""
        job, event = self.job, await self.make_end(reason, code, message)
        names, values = finish_arguments(event, reply_to=job.reply_to, keep_log=self._keeps_log, by=self.worker_id)
        for _ in range(FINISH_TRIES):
            try:
                await redis_clients.run_script_async("finish", names, values)
                return
            except redis_clients.UNAVAILABLE:
                log.warning("the end of a relay waits for Redis", extra={"job_id": job.job_id})
                await asyncio.sleep(0.5)

    async def make_end(self, reason: FinishReason, code: str | None, message: str | None) -> Finished:
        job, now_ms = self.job, time.time_ns() // 1_000_000
        admitted_at_ms = job.billing.admitted_at_ms
        prompt, completion = await self.count() if reason != "error" else (0, 0)
        cached = read_count((self.usage or {}).get("prompt_tokens_details"), "cached_tokens") or 0
        return Finished(
            job_id=job.job_id,
            seq=self.next_seq(),
            kind=self._kind,
            model=job.model,
            model_version=job.model_version,
            finish_reason=reason,
            prompt_tokens=prompt,
            completion_tokens=completion,
            cached_tokens=min(cached, prompt),
            billing=job.billing,
            error_code=code,
            error_message=message,
            text="".join(self._text.get(0, [])) if self._keeps_log else None,
            worker_id=self.worker_id,
            first_token_ms=max(self._first_token_at_ms - admitted_at_ms, 0) if self._first_token_at_ms else None,
            duration_ms=max(now_ms - admitted_at_ms, 0),
            finished_at_ms=now_ms,
        )
