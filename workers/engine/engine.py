"""Run one model's sequences in continuous batches, on a thread of its own."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from workers.engine.runner import Runner
from workers.engine.sampler import Chosen, choose
from workers.engine.scheduler import Scheduler
from workers.engine.sequence import EndReason, Logprob, Output, Sequence

log = logging.getLogger(__name__)

PREFILL_CHUNK_TOKENS = 256
"""The most prompt tokens computed between two decode steps: a long prompt stalls running streams for about 0.2 s on two cores."""


class Engine:
    """Serve sequences until stopped. `submit` and `abort` may be called from any thread."""

    def __init__(
        self,
        runner: Runner,
        eos_token_ids: tuple[int, ...],
        on_step: Callable[[float, int, int, int, int], None] | None = None,
        chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    ) -> None:
        """``on_step(seconds, running, waiting, prefilled, decoded)`` is called after each step, on the engine's thread."""
        self.runner = runner
        self._eos = frozenset(eos_token_ids)
        self._on_step = on_step
        self._chunk_tokens = chunk_tokens
        self._scheduler = Scheduler(runner.slots)
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
        if len(sequence.forks) >= self.runner.slots:
            raise ValueError(
                f"at most {self.runner.slots} choices are made at once; {len(sequence.forks) + 1} were asked"
            )
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
        """Do one step: ends that are due, one prefill chunk, one decode of all. False when there was nothing to do."""
        started = time.monotonic()
        while self._arrived:
            self._scheduler.add(self._arrived.popleft())
        for sequence in self._scheduler.list_due():
            for each in (sequence, *sequence.forks):
                if each.abort_reason is not None:
                    self._end(each, each.abort_reason, error=each.abort_message)
                else:
                    self._end(each, "deadline", error="the request's deadline passed")
        self._scheduler.admit()
        decoding = self._scheduler.list_decoding()
        prefilled = self._prefill()
        self._decode([sequence for sequence in decoding if not sequence.ended])
        worked = bool(decoding) or prefilled > 0
        if worked and self._on_step is not None:
            self._on_step(time.monotonic() - started, *self.counts(), prefilled, len(decoding))
        return worked

    def _prefill(self) -> int:
        sequence = self._scheduler.next_prefill()
        if sequence is None:
            return 0
        chunk = sequence.prompt[sequence.prefilled : sequence.prefilled + self._chunk_tokens]
        try:
            logits = self.runner.prefill(sequence.slot, np.array(chunk, np.int64), sequence.prefilled)
            sequence.prefilled += len(chunk)
            if sequence.is_prefilled:
                self._begin(sequence, logits)
        except Exception as error:
            log.exception("prefill failed", extra={"job_id": sequence.job_id})
            for each in (sequence, *sequence.forks):
                self._end(each, "error", error=f"the model could not compute this request ({type(error).__name__})")
        return len(chunk)

    def _begin(self, leader: Sequence, logits: NDArray[np.float32]) -> None:
        """Choose the first token of a request's choices."""
        sequences = [leader, *(fork for fork in leader.forks if not fork.ended)]
        for fork in sequences[1:]:
            self.runner.fork(leader.slot, fork.slot)
            fork.prefilled, fork.cached = leader.prefilled, leader.cached
        self._take(sequences, np.tile(logits, (len(sequences), 1)))

    def _decode(self, sequences: list[Sequence]) -> None:
        if not sequences:
            return
        try:
            logits = self.runner.decode(
                [s.slot for s in sequences],
                np.array([s.tokens[-1] for s in sequences], np.int64),
                np.array([s.position for s in sequences], np.int64),
            )
        except Exception as error:
            if len(sequences) > 1:
                # one of them is to blame: each for itself
                log.exception("a decode of %d sequences failed; they are tried one by one", len(sequences))
                for sequence in sequences:
                    self._decode([sequence])
                return
            log.exception("decode failed", extra={"job_id": sequences[0].job_id})
            self._end(sequences[0], "error", error=f"the model could not go on ({type(error).__name__})")
            return
        self._take(sequences, logits)

    def _take(self, sequences: list[Sequence], logits: NDArray[np.float32]) -> None:
        """Choose a token for each, and tell what came of it."""
        for sequence, chosen in zip(sequences, choose(logits, sequences), strict=True):
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
