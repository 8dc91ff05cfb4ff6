"""Turn a generation job into sequences for its engine, and what they make into events."""

from collections.abc import Callable
from typing import Literal

import numpy as np

from aiscale.wire.events import TokenLogprob
from aiscale.wire.jobs import GenerateJob, Sampling
from workers.engine.detokenizer import Detokenizer
from workers.engine.sampler import make_rng
from workers.engine.sequence import EndReason, Logprob, Output, Params, Sequence
from workers.engine.vocabulary import Vocabulary
from workers.publish import JobInHand, Publisher

Ended = Literal["stop", "length"]


class Generation:
    """Gather the choices of one job. Its methods run on the engine's thread."""

    def __init__(
        self,
        in_hand: JobInHand,
        job: GenerateJob,
        vocabulary: Vocabulary,
        publisher: Publisher,
        abort: Callable[[str, EndReason, str | None], object],
        is_closing: Callable[[], bool],
    ) -> None:
        """``abort`` ends what is left of a job of which one choice failed."""
        self._in_hand = in_hand
        self._job = job
        self._vocabulary = vocabulary
        self._publisher = publisher
        self._abort = abort
        self._is_closing = is_closing
        self._made = [0] * job.sampling.n
        self._ends: dict[int, Ended] = {}

    def make_sequence(self) -> Sequence:
        """Return the first choice, with the others as its forks. Raises: ValueError for a grammar that cannot be followed."""
        first, *forks = (self._make_choice(index) for index in range(self._job.sampling.n))
        first.add_forks(forks)
        return first

    def _make_choice(self, index: int) -> Sequence:
        job, sampling, grammar = self._job, self._job.sampling, self._job.sampling.grammar
        detokenizer = Detokenizer(self._vocabulary.tokenizer, sampling.stop, sampling.keep_control_tokens)
        return Sequence(
            job_id=job.job_id,
            prompt=job.prompt_token_ids,
            params=make_params(sampling),
            # the queue has sorted by plan already; within the engine, the order of arrival
            priority=0,
            deadline_s=job.deadline_at_ms / 1000,
            detokenizer=detokenizer,
            on_output=lambda output: self._take(index, output, detokenizer.stopped_by),
            prefix_scope=job.prefix_scope,
            rng=make_rng(sampling.seed, index),
            matcher=None if grammar is None else self._vocabulary.grammars.make_matcher(grammar.kind, grammar.source),
        )

    def _take(self, index: int, output: Output, stopped_by: str | None) -> None:
        in_hand = self._in_hand
        if in_hand.ended:
            return
        self._made[index] = output.completion_tokens
        if index == 0:
            in_hand.stop_sequence = stopped_by
        in_hand.prompt_tokens = max(in_hand.prompt_tokens, output.prompt_tokens)
        in_hand.cached_tokens = max(in_hand.cached_tokens, output.cached_tokens)
        in_hand.completion_tokens = sum(self._made)
        if output.end == "error" and self._is_closing() and not in_hand.streamed and not output.text:
            self._publisher.drop(in_hand)
            return
        self._tell(index, output)
        if output.end == "stop" or output.end == "length":
            self._ends[index] = output.end
            if len(self._ends) == len(self._made):
                self._publisher.finish(in_hand, "length" if "length" in self._ends.values() else "stop")
        elif output.end is not None:
            code = "worker_lost" if output.end == "error" and self._is_closing() else None
            self._publisher.finish(in_hand, output.end, error=output.error, code=code)
            self._abort(self._job.job_id, "cancelled", None)

    def _tell(self, index: int, output: Output) -> None:
        several = len(self._made) > 1
        end: Ended | None = output.end if several and (output.end == "stop" or output.end == "length") else None
        if output.text or output.logprobs or end is not None:
            logprobs = tuple(self._describe(logprob) for logprob in output.logprobs)
            self._publisher.add_text(self._in_hand, output.text, index=index, logprobs=logprobs, end=end)

    def _describe(self, logprob: Logprob) -> TokenLogprob:
        bytes_of = self._vocabulary.bytes_of
        top = tuple((bytes_of(token_id), value) for token_id, value in logprob.top)
        return TokenLogprob(bytes_of(logprob.token_id), logprob.value, top)


def make_params(sampling: Sampling) -> Params:
    """Translate what a job says of sampling."""
    ids = np.array(list(sampling.logit_bias), np.int64)
    values = np.array(list(sampling.logit_bias.values()), np.float32)
    return Params(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        bias=(ids, values) if sampling.logit_bias else None,
        seed=sampling.seed,
        top_logprobs=sampling.top_logprobs,
    )
