"""Follow an identical request that is being computed, word by word, at the plan's price for known answers.

A follower is admitted first, with its hold, like any request. Then it is a job whose worker is this process (`relays`): it passes on what
the flight tells instead of what an upstream does. So leaving, cancel, kill, deadline and a process that dies are what they are there, and
it is charged once for what it was told. When the flight fails, the job is taken back as if it had never been, and the request is asked
again under the same name: it follows another flight, or is computed. What it was told already is left out then.
"""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from django.conf import settings

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from aiscale.wire.events import Delta, Event, Finished, FinishReason, Started
from aiscale.wire.jobs import LOCAL_PROVIDER, GenerateJob, Sampling
from apps.accounts.callers import Caller, PlanLimits
from apps.inference import completions, lanes, relays
from apps.inference.cache import telling
from apps.inference.cache.entries import Answer, Piece, decode_answer
from apps.inference.cache.flights import Flight
from apps.inference.cache.store import count_lookup
from apps.inference.catalog import CatalogModel
from apps.inference.completions import CompletionRequest, Prepared, Run
from apps.inference.relays import Relay
from apps.inference.waiting import Wait
from apps.spend import admission
from apps.spend.prices import Terms

log = logging.getLogger(__name__)

Again = Callable[[], Awaitable[Run]]


async def follow(
    request: CompletionRequest,
    caller: Caller,
    model: CatalogModel,
    plan: PlanLimits,
    prepared: Prepared | None,
    flight: Flight,
    again: Again,
    *,
    live: bool,
) -> "Following":
    """Admit a request that follows ``flight``; ``again`` asks it once more when that fails. ``model`` and ``plan`` as for its lane.

    Without ``live`` it is told nothing before the end: another try could give another answer. I/O: two Redis trips. Raises: AiscaleError.
    """
    if prepared is None:
        prompt_tokens, max_tokens = relays.measure(request, model, plan)
    else:
        prompt_tokens, max_tokens = len(prepared.prompt), prepared.sampling.max_tokens
    job_id = request.job_id or lanes.name_job(request.request_id)
    deadline_at_ms = time.time_ns() // 1_000_000 + settings.ENV.request_deadline_s * 1000
    priced = telling.price(model, plan)
    hold_nanousd = priced.terms.cost_nanousd(prompt_tokens, max_tokens * request.n)
    provider = LOCAL_PROVIDER if model.upstream is None else model.upstream.name
    admitted = await admission.admit(
        admission.Ask(
            caller=caller,
            model=model.slug,
            job_id=job_id,
            worst_nanousd=hold_nanousd,
            worst_tokens=prompt_tokens + max_tokens * request.n,
            deadline_at_ms=deadline_at_ms,
            priority=plan.priority,
            weight=plan.weight,
            provider=provider,
            queues=False,
        )
    )
    tag = completions.make_tag(caller, priced, request.request_id, request.source, hold_nanousd, admitted)
    tag = msgspec.structs.replace(tag, price_percent=plan.cached_price_percent, provider=provider)
    wait = Wait(job_id, deadline_at_ms)
    job = GenerateJob(
        job_id=job_id,
        model=model.slug,
        model_version=model.version,
        prompt_token_ids=[] if prepared is None else prepared.prompt,
        sampling=Sampling(max_tokens=max_tokens, n=request.n),
        billing=tag,
        reply_to=wait.process_id,
        deadline_at_ms=deadline_at_ms,
    )
    follower = Follower(job, wait, flight, (model.terms, priced.terms), live=live)
    follower.estimate = prompt_tokens
    await relays.begin(follower, "")
    run = Run(job, wait, {**admitted.headers, telling.HEADER: "l1"})
    run.prompt_tokens = prompt_tokens
    return Following(run, follower, again)


class Follower(Relay):
    """Be the worker of a job that is told what another one makes. ``terms``: the price of computing it, and what it costs so."""

    def __init__(self, job: GenerateJob, wait: Wait, flight: Flight, terms: tuple[Terms, Terms], *, live: bool) -> None:
        super().__init__(job, wait, None, {})
        self.is_lost = False
        """Whether the flight failed, and the job was taken back."""
        self._flight = flight
        self._terms, self._cheap = terms
        self._live = live
        self._told = Told()
        self._made_tokens = 0
        self._answer: Answer | None = None

    async def relay(self) -> None:
        await self.say(Started(job_id=self.job.job_id, seq=self.next_seq(), worker_id=self.worker_id, attempt=1))
        async for delta in self._flight.follow():
            if self._live:
                await self._pass_on(delta)
        value = self._flight.value
        try:
            answer = None if value is None else decode_answer(value)
        except msgspec.MsgspecError:
            answer = None
        if answer is None:
            raise lost()
        for piece in answer.pieces:
            await self._tell_rest(piece, answer.completion_tokens)
        self._answer, self.ends[0] = answer, answer.finish_reason
        count_lookup(self.job.model, "l1")

    async def _tell_rest(self, piece: Piece, completion_tokens: int) -> None:
        """Tell what of a choice was not told word by word. Raises: AiscaleError when it was told otherwise."""
        text, logprobs, is_over = self._told.find_rest(piece)
        end = piece.end if self.several and not is_over else None
        if text or logprobs or end is not None:
            whole = Delta(job_id="", seq=0, text=text, completion_tokens=completion_tokens, index=piece.index)
            await self._pass_on(msgspec.structs.replace(whole, logprobs=logprobs, end=end))

    async def _pass_on(self, delta: Delta) -> None:
        self._told.take(delta)
        self._made_tokens = delta.completion_tokens
        self.note_token()
        await self.say(msgspec.structs.replace(delta, job_id=self.job.job_id, seq=self.next_seq()))

    async def count(self) -> tuple[int, int]:
        """Return the tokens of what was told; nothing, while nothing was."""
        if self._answer is not None:
            return self._answer.prompt_tokens, self._answer.completion_tokens
        return (self.estimate if self._made_tokens else 0), self._made_tokens

    async def make_end(self, reason: FinishReason, code: str | None, message: str | None) -> Finished:
        event = await super().make_end(reason, code, message)
        tokens = event.prompt_tokens, event.completion_tokens
        return msgspec.structs.replace(
            event,
            cache="l1",
            cached_tokens=event.prompt_tokens,
            saved_nanousd=self._terms.cost_nanousd(*tokens) - self._cheap.cost_nanousd(*tokens),
            stop_sequence=None if self._answer is None else self._answer.stop_sequence,
        )

    async def finish(self, reason: FinishReason, code: str | None, message: str | None) -> None:
        """Say the end; or take the job back when there was nothing to follow. I/O: two Redis trips."""
        if reason != "error":
            await super().finish(reason, code, message)
            return
        job = self.job
        names = [
            keys.job_record(job.job_id),
            keys.LEASES,
            keys.queue_state(job.model),
            keys.queue_depth(job.model),
        ]
        async with self.beat_lock:
            self.is_withdrawn = True
        try:
            await redis_clients.run_script_async("withdraw", names, [job.job_id])
        except redis_clients.UNAVAILABLE:
            log.warning("the reaper takes a follower's job back", extra={"job_id": job.job_id})
        await admission.release(job.billing, job.model, job.job_id)
        self.is_lost = True
        self.wait.take(await self.make_end("error", code, message))


class Following(Run):
    """Tell what a follower is told; when its flight fails, ask again and go on where it was."""

    def __init__(self, run: Run, follower: Follower, again: Again) -> None:
        self._run, self._follower, self._again = run, follower, again
        self._heard = Told()
        self.keeper = None
        self.tools = None
        self.rescue = None
        self.created_at_s = run.created_at_s
        self._adopt()

    async def __aexit__(self, *exit_: Any) -> None:
        await self._run.__aexit__(*exit_)

    async def events(self) -> AsyncIterator[Event]:
        """Yield as `Run.events` does. Raises: AiscaleError, also for what the gate refuses when it is asked again."""
        async for event in self._run.events():
            if not self._follower.is_lost:
                if isinstance(event, Delta):
                    self._heard.take(event)
                yield event
        if not self._follower.is_lost:
            return
        await self._run.__aexit__(None, None, None)
        self._run = await self._again()
        self._adopt()
        async for event in self._run.events():
            # it may follow another flight, and be what comes after that
            self._adopt()
            fresh = self._heard.leave_out(event) if isinstance(event, Delta) else event
            if isinstance(event, Finished) and event.finish_reason in ("stop", "length"):
                self._heard.check_all_said_again()
            if fresh is not None:
                yield fresh

    def _adopt(self) -> None:
        run = self._run
        self.job_id, self.model, self.model_version = run.job_id, run.model, run.model_version
        self.prompt_tokens, self.max_tokens, self.n = run.prompt_tokens, run.max_tokens, run.n
        self.headers = run.headers

    def detach(self) -> None:
        """Nobody comes back to it: it keeps no log."""

    async def cancel(self, reason: str) -> None:
        await self._run.cancel(reason)


class Told:
    """Remember what was told of each choice, to leave it out when it is told again."""

    def __init__(self) -> None:
        self._texts: dict[int, str] = {}
        self._logprobs: dict[int, int] = {}
        self._ended: set[int] = set()
        self._said_again: dict[int, str] = {}
        self._logprobs_again: dict[int, int] = {}

    def take(self, delta: Delta) -> None:
        index = delta.index
        self._texts[index] = self._texts.get(index, "") + delta.text
        self._logprobs[index] = self._logprobs.get(index, 0) + len(delta.logprobs)
        if delta.end is not None:
            self._ended.add(index)

    def find_rest(self, piece: Piece) -> tuple[str, tuple[Any, ...], bool]:
        """Return what of a whole choice was not told, and whether its end was. Raises: AiscaleError (WORKER_LOST) when it differs."""
        told = self._texts.get(piece.index, "")
        if not piece.text.startswith(told):
            raise lost()
        return piece.text[len(told) :], piece.logprobs[self._logprobs.get(piece.index, 0) :], piece.index in self._ended

    def leave_out(self, delta: Delta) -> Delta | None:
        """Return what of this was not told before. Raises: AiscaleError (WORKER_LOST) when it differs."""
        index = delta.index
        told, again = self._texts.get(index, ""), self._said_again.get(index, "") + delta.text
        if not (told.startswith(again) or again.startswith(told)):
            raise lost()
        self._said_again[index] = again
        start = max(len(told) - (len(again) - len(delta.text)), 0)
        before = self._logprobs_again.get(index, 0)
        self._logprobs_again[index] = before + len(delta.logprobs)
        logprobs = delta.logprobs[max(self._logprobs.get(index, 0) - before, 0) :]
        end = None if index in self._ended else delta.end
        if not (delta.text[start:] or logprobs or end is not None):
            return None
        return msgspec.structs.replace(delta, text=delta.text[start:], logprobs=logprobs, end=end)

    def check_all_said_again(self) -> None:
        """Raise: AiscaleError (WORKER_LOST) when the new answer ends before what was told."""
        if any(len(self._said_again.get(index, "")) < len(text) for index, text in self._texts.items()):
            raise lost()


def lost() -> AiscaleError:
    """Say that an answer cannot be told to its end."""
    return AiscaleError(Code.WORKER_LOST, "The answer was lost while it was made. Try again to have it made anew.")
