"""Join waiting encoder jobs into batches, on a thread of its own."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

MAX_TEXTS = 256
"""The most texts taken into one round, so that a large job does not keep small ones waiting for long."""


class Encoder(Protocol):
    """Turn token ids into vectors; see `workers.engine.encoder.OnnxEncoder`."""

    def encode(self, batch: list[list[int]]) -> NDArray[np.float32]: ...

    def close(self) -> None: ...


@dataclass(kw_only=True, eq=False)
class EncodeTask:
    """Hold one job: ``on_done(vectors, None)`` or ``on_done(None, why there are none)`` is called once."""

    job_id: str
    texts: list[list[int]]
    on_done: Callable[[NDArray[np.float32] | None, str | None], None]
    deadline_s: float
    """Wall clock, epoch seconds."""
    parts: list[NDArray[np.float32]] = field(default_factory=list)
    done: int = 0
    abort_reason: str | None = None


class EncoderThread:
    """Encode until stopped. `submit` and `abort` may be called from any thread."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._waiting: deque[EncodeTask] = deque()
        self._changed = threading.Condition()
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
        return 0, len(self._waiting)

    def submit(self, task: EncodeTask) -> None:
        with self._changed:
            if self._stopping:
                raise RuntimeError("the encoder has stopped")
            self._waiting.append(task)
            self._changed.notify()

    def abort(self, job_id: str, reason: str) -> bool:
        with self._changed:
            for task in self._waiting:
                if task.job_id == job_id:
                    task.abort_reason = reason
                    self._changed.notify()
                    return True
        return False

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    left, self._waiting = list(self._waiting), deque()
                    break
                round_ = self._choose()
            self._encode(round_)
        for task in left:
            task.on_done(None, "the worker stopped")

    def _choose(self) -> list[tuple[EncodeTask, list[list[int]]]]:
        """Take the next texts of each waiting job in turn, so that a small one passes a large one."""
        chosen: list[tuple[EncodeTask, list[list[int]]]] = []
        room = MAX_TEXTS
        share = max(MAX_TEXTS // len(self._waiting), 1)
        for task in list(self._waiting):
            if task.abort_reason is None and task.deadline_s <= time.time():
                task.abort_reason = "deadline: the request's time limit passed"
            if task.abort_reason is not None:
                chosen.append((task, []))
            elif room > 0:
                texts = task.texts[task.done : task.done + min(share, room)]
                room -= len(texts)
                chosen.append((task, texts))
        return chosen

    def _encode(self, chosen: list[tuple[EncodeTask, list[list[int]]]]) -> None:
        texts = [text for task, part in chosen for text in part]
        vectors: NDArray[np.float32] | None = None
        try:
            vectors = self._encoder.encode(texts) if texts else None
        except Exception:
            log.exception("a batch of %d texts failed; its jobs are tried one by one", len(texts))
        start = 0
        for task, part in chosen:
            # before anything else: each job gets the vectors of its own texts, whatever became of the one before it
            place = slice(start, start + len(part))
            start = place.stop
            if task.abort_reason is not None:
                self._finish(task, task.abort_reason)
                continue
            try:
                made = vectors[place] if vectors is not None else self._encoder.encode(part)
            except Exception as error:
                log.exception("encoding failed", extra={"job_id": task.job_id})
                self._finish(task, f"the model could not encode this request ({type(error).__name__})")
                continue
            task.parts.append(made)
            task.done += len(part)
            if task.done == len(task.texts):
                self._finish(task, None)

    def _finish(self, task: EncodeTask, error: str | None) -> None:
        with self._changed:
            self._waiting.remove(task)
        try:
            task.on_done(np.concatenate(task.parts) if error is None else None, error)
        except Exception:
            log.exception("vectors could not be handed on", extra={"job_id": task.job_id})
