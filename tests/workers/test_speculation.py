"""Tokens are guessed where that pays and nobody can tell; what comes out is what would have come anyway."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.workers.test_engine import VOCABULARY, Asked, FlatRunner, WatchedRunner, submit
from workers.engine.engine import Engine
from workers.engine.sequence import Params
from workers.engine.speculation import MOST_GUESSES, Guesser, Speculates, may_guess
from workers.engine.step_report import StepReport


class CountingRunner(WatchedRunner):
    """Count calls, and how many rows asked for all their logits."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.ahead: list[list[int]] = []
        self.calls = 0

    def compute(self, chunks: Any, *, every: bool = False) -> Any:
        self.calls += 1
        if every:
            self.ahead.append([len(chunk.token_ids) for chunk in chunks])
        return super().compute(chunks, every=every)


class Steps:
    """Run engines, and hold what their steps reported."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.engines: list[Engine] = []

    def run(self, runner: CountingRunner, speculates: Speculates, *asked: Asked) -> None:
        engine = Engine(runner, (), self.reports.append, speculates=speculates)
        self.engines.append(engine)
        submit(engine, *asked)
        while not all(each.sequence.ended for each in asked):
            assert engine.step()
        assert engine.counts() == (0, 0) and not runner.held


@pytest.fixture
def steps() -> Iterator[Steps]:
    yield Steps()


def again(job_id: str, **params: Any) -> Asked:
    """Ask for what goes on as the prompt did: the fake runner counts up from each token."""
    return Asked(job_id, [*range(20, 50), *range(20, 24)], **{"max_tokens": 20} | params)


def test_right_guesses_save_steps_and_change_nothing(steps: Steps) -> None:
    plain, ahead = again("plain"), again("ahead")
    slow, quick = CountingRunner(), CountingRunner()
    steps.run(slow, "never", plain)
    assert slow.ahead == []
    steps.run(quick, "always", ahead)
    assert ahead.text == plain.text and ahead.sequence.tokens == plain.sequence.tokens
    assert quick.calls * 3 < slow.calls
    assert (ahead.outputs[-1].end, ahead.outputs[-1].completion_tokens) == ("length", 20), "never past max_tokens"
    assert max(max(rows) for rows in quick.ahead) == 1 + MOST_GUESSES
    assert sum(report.guessed for report in steps.reports) == sum(report.guessed_right for report in steps.reports) > 10


def test_what_is_promised_to_be_the_same_is_not_guessed(steps: Steps) -> None:
    """Greedy and seeded answers keep the kernels that they have in any company, and whoever shares a call with them does too."""
    for params in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3}):
        runner = CountingRunner()
        steps.run(runner, "by chance", again("exact", **params))
        assert runner.ahead == []
        steps.run(runner, "by chance", again("exact", **params), again("chance", temperature=0.01))
        assert all(len(rows) == 1 for rows in runner.ahead), "alone, before or after"
    chance = again("chance", temperature=0.01)
    runner = CountingRunner()
    steps.run(runner, "by chance", chance)
    assert runner.ahead and chance.sequence.tokens == list(range(24, 44))
    assert not may_guess("never", Params(max_tokens=1))


def test_many_streams_are_not_guessed_at(steps: Steps) -> None:
    runner = CountingRunner()
    steps.run(runner, "always", *(again(f"j{number}", max_tokens=8 + 6 * (number == 0)) for number in range(4)))
    assert runner.ahead and all(len(rows) <= 2 for rows in runner.ahead), "only the one that was left"


def test_it_is_switched_off_where_it_does_not_pay(steps: Steps) -> None:
    """Every token is as likely as any other: what stood there before says nothing."""

    class FlatCountingRunner(CountingRunner, FlatRunner):
        """Find every token equally likely."""

    runner = FlatCountingRunner(context_tokens=900)
    asked = Asked(
        "j", [10, 11, 12] * 60, max_tokens=400, temperature=1.0, bias=(np.arange(10, 14), np.full(4, 20, np.float32))
    )
    steps.run(runner, "by chance", asked)
    guesser = asked.sequence.guesser
    assert guesser is not None and not guesser.pays
    assert sum(report.guessed for report in steps.reports) < 100
    assert len(asked.sequence.tokens) == 400 and max(asked.sequence.tokens) < VOCABULARY


def test_ends_within_a_guess_end_there(steps: Steps) -> None:
    """An end token, a stop string or the context's end among right guesses: nothing that was computed behind it is told."""
    stopped, plain = again("stopped", stop=("<30>",)), again("plain", stop=("<30>",))
    steps.run(CountingRunner(), "always", stopped)
    steps.run(CountingRunner(), "never", plain)
    assert stopped.text == plain.text and stopped.outputs[-1].end == "stop"
    assert stopped.sequence.tokens == plain.sequence.tokens
    runner = CountingRunner(context_tokens=45)
    full = again("full", max_tokens=100)
    steps.run(runner, "always", full)
    assert full.outputs[-1].end == "length" and len(full.sequence.tokens) == 11
    engine = Engine(CountingRunner(), (31,), speculates="always")
    ended = again("ended")
    submit(engine, ended)
    while not ended.sequence.ended:
        engine.step()
    assert ended.sequence.tokens == list(range(24, 32)) and ended.outputs[-1].end == "stop"


def test_a_call_that_fails_with_guesses_is_done_without(steps: Steps) -> None:
    class Refusing(CountingRunner):
        def compute(self, chunks: Any, *, every: bool = False) -> Any:
            if every:
                raise RuntimeError("no")
            return super().compute(chunks)

    asked = again("j")
    steps.run(Refusing(), "always", asked)
    assert asked.sequence.tokens == list(range(24, 44))


def test_guesses_are_what_stood_there_last() -> None:
    guesser = Guesser([1, 2, 3, 4, 5, 1, 2, 3])
    assert guesser.guess(9) == [4, 5, 1, 2] and guesser.guess(2) == [4, 5] and guesser.guess(0) == []
    for token in (9, 1, 2, 3):
        guesser.add(token)
    assert guesser.guess(1) == [9], "the last time counts"
    guesser.add(77)
    assert guesser.guess(4) == []
    for _ in range(5):
        guesser.learn(4, 1)
    assert not guesser.pays and guesser.guess(4) == []
    assert Guesser([1, 2]).guess(4) == []
