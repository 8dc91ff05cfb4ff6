"""Batches hold like lengths, keep their bounds, and let every job have its turn."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from workers.engine.batching import LENGTHS, Pending, bucket_of
from workers.engine.encoding import BatchReport, EncoderThread, EncodeTask

LENGTH = st.integers(1, 300)


@given(st.lists(st.lists(LENGTH, max_size=40), max_size=12), st.integers(1, 40), st.integers(1, 2000))
def test_every_text_comes_once_and_bounds_hold(jobs: list[list[int]], max_batch: int, max_tokens: int) -> None:
    pending: Pending[int] = Pending(max_batch, max_tokens)
    for number, lengths in enumerate(jobs):
        pending.add(number, lengths)
    seen: list[tuple[int, int]] = []
    while batch := pending.take():
        lengths = [jobs[number][index] for number, index in batch]
        assert len(batch) <= max_batch
        assert len(batch) == 1 or len(batch) * max(lengths) <= max_tokens
        assert len({bucket_of(length) for length in lengths}) == 1
        seen += batch
    assert sorted(seen) == [(number, index) for number, job in enumerate(jobs) for index in range(len(job))]
    assert len(pending) == 0


@given(st.lists(st.integers(1, 64), min_size=2, max_size=20))
def test_nobody_waits_longer_than_one_turn_of_all(sizes: list[int]) -> None:
    """Each job has a text in one of the first batches, one for each job, however many texts the others have."""
    pending: Pending[int] = Pending(4, 10_000)
    for number, size in enumerate(sizes):
        pending.add(number, [LENGTHS[number % len(LENGTHS)]] * size)
    served = {number for _ in sizes for number, _ in pending.take()}
    assert served == set(range(len(sizes)))


def test_a_discarded_job_leaves_no_text() -> None:
    pending: Pending[str] = Pending(8, 1000)
    pending.add("a", [5, 90])
    pending.add("b", [6])
    pending.discard("a")
    assert pending.take() == [("b", 0)] and pending.take() == []


def test_impossible_bounds_are_refused() -> None:
    for bounds in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="needs a text and a token"):
            Pending(*bounds)


class SlowEncoder:
    def check(self, text: list[int]) -> str | None:
        return "is empty" if not text else None

    def encode(self, batch: list[list[int]]) -> NDArray[np.float32]:
        time.sleep(0.005)
        return np.array([[len(text)] for text in batch], np.float32)

    def close(self) -> None:
        """Hold nothing."""


def make_task(number: int, done: threading.Semaphore) -> EncodeTask:
    return EncodeTask(
        job_id=f"j{number}",
        texts=[[1] * 5],
        on_done=lambda rows, error: done.release(),
        deadline_s=time.time() + 60,
    )


def test_the_idle_encoder_does_not_wait_and_the_busy_one_fills_its_batches() -> None:
    reports: list[BatchReport] = []
    thread = EncoderThread(SlowEncoder(), max_wait_s=5.0, on_batch=reports.append)
    thread.start()
    done = threading.Semaphore(0)
    try:
        for number in range(3):
            thread.submit(make_task(number, done))
            assert done.acquire(timeout=4), "a lonely job waited for company"
        for number in range(64):
            thread.submit(make_task(100 + number, done))
        for _ in range(64):
            assert done.acquire(timeout=20)
    finally:
        thread.stop()
    assert [report.texts for report in reports[:3]] == [1, 1, 1]
    assert max(report.texts for report in reports) == 32
    assert len(reports) <= 3 + 8


def test_a_text_that_the_model_cannot_take_is_refused_by_its_number() -> None:
    thread = EncoderThread(SlowEncoder())
    task = EncodeTask(job_id="j", texts=[[1], []], on_done=lambda rows, error: None, deadline_s=time.time() + 60)
    with pytest.raises(ValueError, match="text 1 is empty"):
        thread.submit(task)
    assert thread.counts() == (0, 0)
