"""Run one model's sequences in continuous batches, on a thread of its own."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from workers.engine.prefix_cache import PrefixCache
from workers.engine.runner import Chunk, Runner
from workers.engine.sampler import NOT_FINITE, Chosen, choose
from workers.engine.scheduler import STALL_S, Pace, Scheduler
from workers.engine.sequence import EndReason, Logprob, Output, Sequence
from workers.engine.speculation import MOST_STREAMS, Guesser, Speculates, may_guess
from workers.engine.step_report import StepReport

log = logging.getLogger(__name__)


class Engine:
    """Serve sequences until stopped. `submit` and `abort` may be called from any thread."""

    def __init__(
        self,
        runner: Runner,
        eos_token_ids: tuple[int, ...],
        on_step: Callable[[StepReport], None] | None = None,
        kv_tokens: int | None = None,
        step_tokens: int | None = None,
        stall_s: float = STALL_S,
        speculates: Speculates = "never",
    ) -> None:
        """``on_step`` is called after each step, on the engine's thread. ``kv_tokens`` bounds the memory of keys and values, kept
        beginnings included (None: as many as the slots can hold); ``step_tokens`` the prompt tokens of a step (None: as many as keep
        running streams waiting for ``stall_s``). ``speculates`` says for which requests tokens are guessed (`speculation`)."""
        self.runner = runner
        self._eos = frozenset(eos_token_ids)
        self._on_step = on_step
        self._pace = Pace(stall_s)
        self._step_tokens = step_tokens
        self._speculates = speculates
        budget_tokens = runner.slots * runner.context_tokens if kv_tokens is None else kv_tokens
        self._scheduler = Scheduler(runner.slots, max(budget_tokens, runner.context_tokens), runner.context_tokens)
        self._prefixes = PrefixCache(runner.kept_places)
        self._report = StepReport()
        self._whole: NDArray[np.float32] | None = None
        """The logits of the last call, when none of its rows failed."""
        self._arrived: deque[Sequence] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._known: dict[str, list[Sequence]] = {}
        self._lock = threading.Lock()
        self.failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self, name: str = "engine") -> None:
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread. What still runs ends as an error."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def counts(self) -> tuple[int, int]:
        """Return (running, waiting)."""
        return len(self._scheduler.running), self._scheduler.waiting + len(self._arrived)

    def submit(self, sequence: Sequence) -> None:
        """Take a sequence and its forks. Their ``on_output`` is called until an output has an end. Raises: ValueError, RuntimeError."""
        choices = 1 + len(sequence.forks)
        if choices > self.runner.slots or self._scheduler.longest_of(sequence) > self._scheduler.kv_tokens:
            raise ValueError(f"there is no room for {choices} choices at once; ask for fewer, or for fewer tokens")
        if not sequence.prompt or len(sequence.prompt) >= self.runner.context_tokens:
            raise ValueError(
                f"a prompt is 1 to {self.runner.context_tokens - 1} tokens; this is {len(sequence.prompt)}"
            )
        if min(sequence.prompt) < 0 or max(sequence.prompt) >= self.runner.vocab_size:
            raise ValueError(f"a token id lies outside 0 to {self.runner.vocab_size - 1}")
        with self._lock:
            if self._stopping or self.failure is not None:
                raise RuntimeError("the engine has stopped")
            self._known[sequence.job_id] = [sequence, *sequence.forks]
            self._arrived.append(sequence)
        self._wake.set()

    def abort(self, job_id: str, reason: EndReason, message: str | None = None) -> bool:
        """End all sequences of a job at the next step. False when none is here."""
        with self._lock:
            found = [s for s in self._known.get(job_id, ()) if s.abort_reason is None]
            for sequence in found:
                sequence.abort_message, sequence.abort_reason = message, reason
        self._wake.set()
        return bool(found)

    def _run(self) -> None:
        try:
            while not self._stopping:
                if not self.step():
                    self._wake.wait(0.05)
                    self._wake.clear()
        except BaseException as error:
            log.exception("the engine's thread failed")
            self.failure = error
        finally:
            with self._lock:
                self._stopping = True
                left = [s for sequences in self._known.values() for s in sequences]
            for sequence in left:
                self._end(sequence, "error", error="the worker stopped")

    def step(self) -> bool:
        """Do one step: ends that are due, some prompts, one decode of all. False when there was nothing to do."""
        started = time.monotonic()
        self._report = report = StepReport()
        while self._arrived:
            self._scheduler.add(self._arrived.popleft())
        self._end_due()
        for sequence in self._scheduler.admit():
            self._reuse(sequence)
        decoding = self._scheduler.list_decoding()
        self._prefill(streams_run=bool(decoding))
        self._decode([sequence for sequence in decoding if not sequence.ended])
        worked = bool(decoding) or report.prefilled > 0
        if worked and self._on_step is not None:
            report.seconds = time.monotonic() - started
            report.running, report.waiting = self.counts()
            report.decoded = len(decoding)
            report.kv_tokens, report.kept_tokens = self._scheduler.reserved_tokens, self._prefixes.tokens
            self._on_step(report)
        return worked

    def _end_due(self) -> None:
        for sequence in self._scheduler.list_due():
            for each in (sequence, *sequence.forks):
                if each.abort_reason is not None:
                    self._end(each, each.abort_reason, error=each.abort_message)
                else:
                    self._end(each, "deadline", error="the request's deadline passed")

    def _reuse(self, sequence: Sequence) -> None:
        """Begin a prompt with what is kept of it."""
        for place in self._prefixes.shrink(self._scheduler.kv_tokens - self._scheduler.reserved_tokens):
            self.runner.drop(place)
        self._report.asked += len(sequence.prompt)
        hit = self._prefixes.find(sequence.prefix_scope, sequence.prompt)
        if hit is None:
            return
        try:
            self.runner.restore(hit.place, sequence.slot, hit.tokens)
        except Exception:
            # it is computed anew: what was kept was a saving and no more
            log.exception("a kept prefix could not be used", extra={"job_id": sequence.job_id})
            self._prefixes.forget(hit.place)
            self.runner.release(sequence.slot)
            return
        sequence.prefilled = sequence.cached = hit.tokens
        self._report.reused += hit.tokens

    def _keep(self, sequence: Sequence) -> None:
        """Keep a computed prompt for those that begin alike."""
        room_tokens = self._scheduler.kv_tokens - self._scheduler.reserved_tokens
        keeping, dropped = self._prefixes.plan(sequence.prefix_scope, sequence.prompt, room_tokens)
        for place in dropped:
            self.runner.drop(place)
        if keeping is None:
            return
        try:
            self.runner.keep(sequence.slot, keeping.place, keeping.start, keeping.end)
        except Exception:
            log.exception("a prompt could not be kept", extra={"job_id": sequence.job_id})
            self._prefixes.forget(keeping.place)
            self.runner.drop(keeping.place)

    def _prefill(self, *, streams_run: bool) -> None:
        step_tokens = self._step_tokens or self._pace.step_tokens(streams_run=streams_run)
        chosen = self._scheduler.list_prefills(step_tokens)
        if not chosen:
            return
        started = time.monotonic()
        chunks = [Chunk(s.slot, s.prompt[s.prefilled : s.prefilled + count], s.prefilled) for s, count in chosen]
        computed = self._compute([sequence for sequence, _ in chosen], chunks)
        for (sequence, count), logits in zip(chosen, computed, strict=True):
            if logits is None:
                continue
            sequence.prefilled += count
            self._report.prefilled += count
            if sequence.is_prefilled:
                self._begin(sequence, logits)
        self._pace.learn(self._report.prefilled, time.monotonic() - started)

    def _begin(self, leader: Sequence, logits: NDArray[np.float32]) -> None:
        """Choose the first token of a request's choices."""
        self._keep(leader)
        sequences = [leader, *(fork for fork in leader.forks if not fork.ended)]
        try:
            for fork in sequences[1:]:
                self.runner.fork(leader.slot, fork.slot)
                fork.prefilled, fork.cached = leader.prefilled, leader.cached
        except Exception as error:
            log.exception("a prompt could not be shared", extra={"job_id": leader.job_id})
            self._fail(leader, error)
            return
        self._take(sequences, np.tile(logits, (len(sequences), 1)))

    def _decode(self, sequences: list[Sequence]) -> None:
        guesses = self._guess(sequences)
        if not sequences or (any(guesses) and self._decode_ahead(sequences, guesses)):
            return
        chunks = [Chunk(s.slot, s.tokens[-1:], s.position) for s in sequences]
        if self.runner.picks and all(s.is_plain for s in sequences) and self._decode_there(sequences, chunks):
            return
        computed = self._compute(sequences, chunks)
        going = [(s, row) for s, row in zip(sequences, computed, strict=True) if row is not None]
        if len(going) == len(sequences) and self._whole is not None:
            self._take(sequences, self._whole)
        elif going:
            self._take([s for s, _ in going], np.stack([row for _, row in going]))

    def _decode_there(self, sequences: list[Sequence], chunks: list[Chunk]) -> bool:
        """Decode greedily where the logits are: token ids alone leave the accelerator. False when it cannot be done so."""
        try:
            tokens, peaks = self.runner.pick(chunks)
        except Exception:
            log.exception("tokens could not be picked", extra={"job_id": sequences[0].job_id})
            return False
        for sequence, token_id, peak in zip(sequences, tokens.tolist(), peaks, strict=True):
            error = None if np.isfinite(peak) else NOT_FINITE
            self._try_go_on(sequence, Chosen(token_id, error=error))
        return True

    def _guess(self, sequences: list[Sequence]) -> list[list[int]]:
        """Guess how each goes on; nothing, unless all of them may be guessed at: they share the call."""
        if len(sequences) > MOST_STREAMS or not all(may_guess(self._speculates, s.params) for s in sequences):
            return []
        guesses = []
        for sequence in sequences:
            if sequence.guesser is None:
                sequence.guesser = Guesser([*sequence.prompt, *sequence.tokens])
            left = sequence.params.max_tokens - len(sequence.tokens)
            room = self.runner.context_tokens - sequence.position - 1
            guesses.append(sequence.guesser.guess(min(left, room) - 1))
        return guesses

    def _decode_ahead(self, sequences: list[Sequence], guesses: list[list[int]]) -> bool:
        """Decode with guesses: as many tokens of each as are what would be chosen anyway. False when it cannot be computed so."""
        chunks = [
            Chunk(s.slot, [s.tokens[-1], *guess], s.position) for s, guess in zip(sequences, guesses, strict=True)
        ]
        try:
            logits = self.runner.compute(chunks, every=True)
        except Exception:
            log.exception("guesses could not be computed", extra={"job_id": sequences[0].job_id})
            return False
        at = 0
        for sequence, guess in zip(sequences, guesses, strict=True):
            rows, right = logits[at : at + len(guess) + 1], 0
            at += len(rows)
            for row, guessed in zip(rows, [*guess, None], strict=True):
                self._take([sequence], row[None])
                if sequence.ended or sequence.tokens[-1] != guessed:
                    break
                right += 1
            self._report.guessed += len(guess)
            self._report.guessed_right += right
            if sequence.guesser is not None and guess:
                sequence.guesser.learn(len(guess), right)
        return True

    def _compute(self, sequences: list[Sequence], chunks: list[Chunk]) -> list[NDArray[np.float32] | None]:
        """Return each chunk's logits, or None for a sequence that failed and has ended."""
        self._whole = None
        try:
            self._whole = self.runner.compute(chunks)
            return list(self._whole)
        except Exception as error:
            log.exception("a call of %d sequences failed", len(chunks), extra={"job_id": sequences[0].job_id})
            if len(chunks) == 1:
                self._fail(sequences[0], error)
                return [None]
        # one of them is to blame: each for itself
        computed: list[NDArray[np.float32] | None] = []
        for sequence, chunk in zip(sequences, chunks, strict=True):
            try:
                computed.append(self.runner.compute([chunk])[0].copy())
            except Exception as error:
                log.exception("a sequence cannot be computed", extra={"job_id": sequence.job_id})
                self._fail(sequence, error)
                computed.append(None)
        return computed

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence that cannot be computed; and its forks, when they have not begun."""
        together = [sequence] if sequence.tokens else [sequence, *sequence.forks]
        for each in together:
            self._end(each, "error", error=f"the model could not compute this request ({type(error).__name__})")

    def _take(self, sequences: list[Sequence], logits: NDArray[np.float32]) -> None:
        """Choose a token for each, and tell what came of it."""
        for sequence, chosen in zip(sequences, choose(logits, sequences), strict=True):
            self._try_go_on(sequence, chosen)

    def _try_go_on(self, sequence: Sequence, chosen: Chosen) -> None:
        try:
            self._go_on(sequence, chosen)
        except Exception as error:
            log.exception("a token could not be taken", extra={"job_id": sequence.job_id})
            self._end(sequence, "error", error=f"the model could not go on ({type(error).__name__})")

    def _go_on(self, sequence: Sequence, chosen: Chosen) -> None:
        """Take one token: the sequence ends, or goes on with perhaps some text to tell."""
        if chosen.error is not None:
            self._end(sequence, "error", error=chosen.error)
            return
        params, detokenizer, token_id = sequence.params, sequence.detokenizer, chosen.token_id
        self._time(sequence)
        sequence.append(token_id)
        if token_id in self._eos:
            self._end(sequence, "stop")
            return
        if sequence.matcher is not None and not sequence.matcher.take(token_id):
            self._end(sequence, "error", error="the grammar could not follow the answer")
            return
        if chosen.logprob is not None:
            sequence.unshown.append((detokenizer.chars, chosen.logprob))
        text = detokenizer.add(token_id)
        if detokenizer.stopped:
            self._end(sequence, "stop", text=text)
        elif len(sequence.tokens) >= params.max_tokens or sequence.position + 1 >= self.runner.context_tokens:
            self._end(sequence, "length", text=text)
        elif text:
            self._tell(sequence, text)

    def _time(self, sequence: Sequence) -> None:
        now_s = time.monotonic()
        if sequence.tokens:
            self._report.gaps_s.append(now_s - sequence.told_s)
        else:
            self._report.first_tokens_s.append(now_s - sequence.arrived_s)
        sequence.told_s = now_s

    def _end(self, sequence: Sequence, reason: EndReason, text: str = "", error: str | None = None) -> None:
        if sequence.ended:
            return
        sequence.ended = True
        with self._lock:
            left = [other for other in self._known.get(sequence.job_id, ()) if other is not sequence]
            if left:
                self._known[sequence.job_id] = left
            else:
                self._known.pop(sequence.job_id, None)
        slot = self._scheduler.remove(sequence)
        if slot >= 0:
            self.runner.release(slot)
        text += sequence.detokenizer.flush()
        self._tell(sequence, text, reason, error)

    def _tell(self, sequence: Sequence, text: str, end: EndReason | None = None, error: str | None = None) -> None:
        output = Output(
            text=text,
            prompt_tokens=sequence.prefilled,
            completion_tokens=len(sequence.tokens),
            cached_tokens=sequence.cached,
            logprobs=_take_shown(sequence, whole=end is not None and not sequence.detokenizer.stopped),
            end=end,
            error=error,
        )
        try:
            sequence.on_output(output)
        except Exception:
            log.exception("an output could not be handed on", extra={"job_id": sequence.job_id})


def _take_shown(sequence: Sequence, *, whole: bool) -> tuple[Logprob, ...]:
    """Take the logprobs of tokens whose text is shown by now, or all of them."""
    shown_chars = sequence.detokenizer.shown_chars
    count = sum(whole or start < shown_chars for start, _ in sequence.unshown)
    taken = tuple(logprob for _, logprob in sequence.unshown[:count])
    del sequence.unshown[:count]
    return taken
