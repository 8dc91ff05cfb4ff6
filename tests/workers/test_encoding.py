"""Encoder jobs share rounds, and each gets the vectors of its own texts, whatever becomes of the others."""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from workers.engine.encoding import EncoderThread, EncodeTask

DIMENSIONS = 4


class LengthEncoder:
    """Give each text a vector that tells its ids, and call ``before`` at each batch."""

    def __init__(self) -> None:
        self.before: Callable[[list[list[int]]], None] = lambda batch: None
        self.batches: list[list[int]] = []

    def check(self, text: list[int]) -> str | None:
        return "is too long" if len(text) > 100 else None

    def encode(self, batch: list[list[int]]) -> NDArray[np.float32]:
        self.batches.append([len(text) for text in batch])
        self.before(batch)
        if any(-1 in text for text in batch):
            raise RuntimeError("poison")
        return np.array([[sum(text), len(text), 0, 0] for text in batch], np.float32).reshape(-1, DIMENSIONS)

    def close(self) -> None:
        """Hold nothing."""


class Job:
    """Hold one job and what became of it."""

    def __init__(self, job_id: str, texts: list[list[int]], deadline_s: float = 60.0) -> None:
        self.vectors: NDArray[np.float32] | None = None
        self.error: str | None = None
        self.done = threading.Event()
        self.ended_at = 0.0
        self.task = EncodeTask(job_id=job_id, texts=texts, on_done=self._take, deadline_s=time.time() + deadline_s)

    def _take(self, vectors: NDArray[np.float32] | None, error: str | None) -> None:
        assert not self.done.is_set(), "it ended twice"
        self.vectors, self.error, self.ended_at = vectors, error, time.monotonic()
        self.done.set()

    def check(self) -> None:
        assert self.done.wait(20) and self.error is None and self.vectors is not None
        assert self.vectors[:, 0].tolist() == [sum(text) for text in self.task.texts]


@pytest.fixture
def encoder() -> LengthEncoder:
    return LengthEncoder()


@pytest.fixture
def thread(encoder: LengthEncoder) -> Iterator[EncoderThread]:
    thread = EncoderThread(encoder)
    yield thread
    thread.stop()


def test_each_job_gets_its_own_vectors(thread: EncoderThread, encoder: LengthEncoder) -> None:
    jobs = [Job(f"j{n}", [[n, m] for m in range(n + 1)]) for n in range(20)]
    for job in jobs:
        thread.submit(job.task)
    thread.start()
    for job in jobs:
        job.check()
    assert len(encoder.batches[0]) > 15, "they did not share a batch"


def test_a_job_that_is_aborted_in_its_round_moves_nobodys_vectors(
    thread: EncoderThread, encoder: LengthEncoder
) -> None:
    jobs = [Job(f"j{n}", [[n], [n, 1], [n, 2]]) for n in range(5)]
    for job in jobs:
        thread.submit(job.task)
    encoder.before = lambda batch: thread.abort("j1", "cancelled: left") and None
    thread.start()
    assert jobs[1].done.wait(20) and jobs[1].error == "cancelled: left" and jobs[1].vectors is None
    for job in (jobs[0], *jobs[2:]):
        job.check()


def test_a_poisoned_text_fails_its_job_alone(thread: EncoderThread) -> None:
    jobs = [Job("a", [[1], [2]]), Job("b", [[3], [-1]]), Job("c", [[4]])]
    for job in jobs:
        thread.submit(job.task)
    thread.start()
    jobs[0].check()
    jobs[2].check()
    assert jobs[1].done.wait(20) and "RuntimeError" in (jobs[1].error or "")


def test_a_passed_deadline_is_a_reason(thread: EncoderThread) -> None:
    late, well = Job("late", [[1]], deadline_s=-1), Job("well", [[2]])
    thread.submit(late.task)
    thread.submit(well.task)
    thread.start()
    assert late.done.wait(20) and (late.error or "").startswith("deadline")
    well.check()


def test_a_small_job_passes_a_large_one(thread: EncoderThread) -> None:
    large, small = Job("large", [[n] for n in range(2000)]), Job("small", [[1], [2]])
    thread.submit(large.task)
    thread.submit(small.task)
    thread.start()
    large.check()
    small.check()
    assert small.ended_at < large.ended_at


def test_stopping_ends_what_is_left(thread: EncoderThread, encoder: LengthEncoder) -> None:
    gate = threading.Event()
    encoder.before = lambda batch: gate.wait(10) and None
    job = Job("j", [[n] for n in range(600)])
    thread.submit(job.task)
    thread.start()
    threading.Timer(0.1, gate.set).start()
    thread.stop()
    assert job.done.wait(20) and job.error == "the worker stopped"
    with pytest.raises(RuntimeError):
        thread.submit(Job("after", [[1]]).task)
