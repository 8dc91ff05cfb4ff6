"""Join waiting encoder jobs into batches, on a thread of its own. Embeddings and classifiers alike."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from workers.engine.batching import Pending

log = logging.getLogger(__name__)

MAX_BATCH = 32
MAX_BATCH_TOKENS = 1024
"""Rows times the longest: more than this no longer fits the cores' caches, and is slower a text."""
MAX_WAIT_S = 0.002
_LIVELY_S = 0.02
"""Who heard from several jobs within this time expects more."""


class Encoder(Protocol):
    """Turn a batch of token ids into rows of numbers; see `workers.engine.encoder.OnnxEncoder`."""

    def check(self, text: list[int]) -> str | None:
        """Say what is wrong with a text that cannot be encoded."""
        ...

    def encode(self, batch: list[list[int]]) -> NDArray[np.float32]:
        """Return float32 ``[texts, width]``, in the batch's order, in one run."""
        ...

    def close(self) -> None: ...


@dataclass(kw_only=True, eq=False)
class EncodeTask:
    """Hold one job: ``on_done(rows, None)`` or ``on_done(None, why there are none)`` is called once."""

    job_id: str
    texts: list[list[int]]
    on_done: Callable[[NDArray[np.float32] | None, str | None], None]
    deadline_s: float
    """Wall clock, epoch seconds."""
    rows: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    abort_reason: str | None = None
    arrived_at: float = 0.0
    ended: bool = False


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """State one batch, for metrics: its time, what was in it, and how many jobs wait."""

    seconds: float
    texts: int
    jobs: int
    tokens: int
    waiting: int


class EncoderThread:
    """Encode until stopped. `submit` and `abort` may be called from any thread.

    A job that finds the thread idle is computed at once. One that arrives while several jobs come and go may wait up to ``max_wait_s``
    for others to share its batch.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        max_batch: int = MAX_BATCH,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        max_wait_s: float = MAX_WAIT_S,
        on_batch: Callable[[BatchReport], None] | None = None,
    ) -> None:
        """``on_batch`` is called after each batch, on this thread. Raises: ValueError for a bound below 1."""
        self._encoder = encoder
        self._pending: Pending[EncodeTask] = Pending(max_batch, max_batch_tokens)
        self._max_wait_s = max_wait_s
        self._on_batch = on_batch
        self._known: dict[str, EncodeTask] = {}
        self._changed = threading.Condition()
        self._lively_until = 0.0
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self, name: str = "encoder") -> None:
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def counts(self) -> tuple[int, int]:
        return 0, len(self._known)

    def submit(self, task: EncodeTask) -> None:
        """Raises: RuntimeError once the thread was stopped; ValueError for a text that the model cannot take."""
        for index, text in enumerate(task.texts):
            if (problem := self._encoder.check(text)) is not None:
                raise ValueError(f"text {index} {problem}")
        with self._changed:
            if self._stopping:
                raise RuntimeError("the encoder has stopped")
            task.arrived_at = time.monotonic()
            self._known[task.job_id] = task
            self._pending.add(task, [len(text) for text in task.texts])
            self._changed.notify()

    def abort(self, job_id: str, reason: str) -> bool:
        with self._changed:
            task = self._known.get(job_id)
            if task is None:
                return False
            task.abort_reason = reason
            self._changed.notify()
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._known and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    left, self._known = list(self._known.values()), {}
                    break
                ended = self._drop_ended()
                batch = [] if self._should_wait() else self._pending.take()
            for task in ended:
                self._finish(task, task.abort_reason)
            if batch:
                self._encode(batch)
        for task in left:
            task.on_done(None, "the worker stopped")

    def _should_wait(self) -> bool:
        """Wait for company, a moment at most, when there was some a moment ago. Called with the lock held, which waiting gives up."""
        now = time.monotonic()
        if now >= self._lively_until or self._pending.is_full() or not len(self._pending):
            return False
        oldest = min(task.arrived_at for task in self._known.values())
        left_s = oldest + self._max_wait_s - now
        if left_s <= 0:
            return False
        self._changed.wait(left_s)
        return True

    def _drop_ended(self) -> list[EncodeTask]:
        """Take out the jobs that were aborted or came to their deadline, or have no texts."""
        now = time.time()
        ended = []
        for task in list(self._known.values()):
            if task.abort_reason is None and task.deadline_s <= now:
                task.abort_reason = "deadline: the request's time limit passed"
            if task.abort_reason is not None or not task.texts:
                self._pending.discard(task)
                ended.append(task)
        return ended

    def _encode(self, batch: list[tuple[EncodeTask, int]]) -> None:
        started = time.monotonic()
        tasks = list(dict.fromkeys(task for task, _ in batch))
        texts = [task.texts[index] for task, index in batch]
        try:
            rows = self._encoder.encode(texts)
            for row, (task, index) in zip(rows, batch, strict=True):
                task.rows[index] = row
        except Exception:
            log.exception("a batch of %d texts failed; its jobs are tried one by one", len(batch))
            self._encode_apart(batch)
        for task in tasks:
            if not task.ended and len(task.rows) == len(task.texts):
                self._finish(task, task.abort_reason)
        now = time.monotonic()
        if len(tasks) > 1 or len(self._known) > 1:
            self._lively_until = now + _LIVELY_S
        if self._on_batch is not None:
            tokens = sum(map(len, texts))
            self._on_batch(
                BatchReport(
                    seconds=now - started, texts=len(texts), jobs=len(tasks), tokens=tokens, waiting=len(self._known)
                )
            )

    def _encode_apart(self, batch: list[tuple[EncodeTask, int]]) -> None:
        """Try the texts of a failed batch one by one: whose text fails, fails alone."""
        for task, index in batch:
            if task.ended:
                continue
            try:
                task.rows[index] = self._encoder.encode([task.texts[index]])[0]
            except Exception as error:
                log.exception("encoding failed", extra={"job_id": task.job_id})
                self._finish(task, f"the model could not encode this request ({type(error).__name__})")

    def _finish(self, task: EncodeTask, error: str | None) -> None:
        with self._changed:
            self._known.pop(task.job_id, None)
            self._pending.discard(task)
        task.ended = True
        try:
            rows = np.stack([task.rows[index] for index in range(len(task.texts))]) if error is None else None
            task.on_done(rows, error)
        except Exception:
            log.exception("rows could not be handed on", extra={"job_id": task.job_id})
