"""The engine with a runner that needs no model: sequences share steps, end when they should, and never harm each other."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse
from tokenizers.decoders import Sequence as Decoders
from tokenizers.models import WordLevel

from workers.engine.detokenizer import Detokenizer
from workers.engine.engine import Engine
from workers.engine.runner_fake import FakeRunner
from workers.engine.sampler import make_rng
from workers.engine.sequence import Output, Params, Sequence
from workers.engine.step_report import StepReport

VOCABULARY, FIRST, EOS = 120, 10, 119


def make_tokenizer() -> Tokenizer:
    """Token 10 is ``<10>``, and so on."""
    tokenizer = Tokenizer(WordLevel({f"<{n}>": n for n in range(VOCABULARY)}, unk_token="<0>"))
    tokenizer.decoder = Decoders([ByteFallback(), Fuse()])
    return tokenizer


TOKENIZER = make_tokenizer()


class WatchedRunner(FakeRunner):
    """Remember how many rows each decode had, how long prompts' chunks were, and which slots were given back."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"slots": 16, "context_tokens": 200, "vocab_size": VOCABULARY, "first": FIRST} | options)
        self.widths: list[int] = []
        self.released: list[int] = []
        self.prefills: list[int] = []

    def compute(self, chunks: Any, *, every: bool = False) -> NDArray[np.float32]:
        assert len({chunk.slot for chunk in chunks}) == len(chunks)
        if len(chunks[0].token_ids) == 1:
            self.widths.append(len(chunks))
        else:
            self.prefills += [len(chunk.token_ids) for chunk in chunks]
        return super().compute(chunks, every=every)

    def release(self, slot: int) -> None:
        self.released.append(slot)
        super().release(slot)


class FlatRunner(WatchedRunner):
    """Find every token equally likely."""

    def _logits(self, last: list[int]) -> NDArray[np.float32]:
        return np.zeros((len(last), VOCABULARY), np.float32)


class Asked:
    """Hold one sequence and what it was told."""

    def __init__(self, job_id: str, prompt: list[int] | None = None, deadline_s: float = 60.0, **params: Any) -> None:
        choice = params.pop("choice", 0)
        stop = params.pop("stop", ())
        self.outputs: list[Output] = []
        self.done = threading.Event()
        chosen = Params(**{"max_tokens": 5, "temperature": 0.0} | params)
        self.sequence = Sequence(
            job_id=job_id,
            prompt=prompt or [1, 2, 3],
            params=chosen,
            priority=0,
            deadline_s=time.time() + deadline_s,
            detokenizer=Detokenizer(TOKENIZER, stop),
            on_output=self._take,
            rng=make_rng(chosen.seed, choice),
        )

    def _take(self, output: Output) -> None:
        self.outputs.append(output)
        if output.end is not None:
            self.done.set()

    @property
    def text(self) -> str:
        return "".join(output.text for output in self.outputs)

    def wait(self) -> Output:
        assert self.done.wait(20), "it never ended"
        assert [output.end for output in self.outputs[:-1]] == [None] * (len(self.outputs) - 1)
        return self.outputs[-1]


@pytest.fixture
def runner() -> WatchedRunner:
    return WatchedRunner(step_s=0.002)


@pytest.fixture
def engine(runner: WatchedRunner) -> Iterator[Engine]:
    engine = Engine(runner, (EOS,))
    engine.start()
    yield engine
    engine.stop()
    assert engine.counts() == (0, 0)


def submit(engine: Engine, *asked: Asked) -> None:
    for each in asked:
        engine.submit(each.sequence)


def test_sequences_share_steps_and_all_end(engine: Engine, runner: WatchedRunner) -> None:
    asked = [Asked(f"j{n}", max_tokens=20 + n % 3) for n in range(40)]
    submit(engine, *asked)
    for n, each in enumerate(asked):
        assert (each.wait().end, each.wait().completion_tokens) == ("length", 20 + n % 3)
        assert each.text.startswith("<10><11><12>")
    assert max(runner.widths) == 16
    assert len(runner.released) == 40


def test_it_ends_at_the_end_token_and_at_a_stop_string(engine: Engine) -> None:
    ended = Asked("eos", prompt=[EOS - 3], max_tokens=50)
    stopped = Asked("stop", max_tokens=50, stop=("<13><14>", "never"))
    submit(engine, ended, stopped)
    assert (ended.wait().end, ended.text) == ("stop", "<117><118>")
    assert (stopped.wait().end, stopped.text) == ("stop", "<10><11><12>")


def test_a_held_back_piece_comes_out_when_the_stop_string_does_not(engine: Engine) -> None:
    asked = Asked("held", max_tokens=4, stop=("<13><99>",))
    submit(engine, asked)
    asked.wait()
    assert asked.text == "<10><11><12><13>"


@pytest.mark.parametrize("reason", ["cancelled", "killed"])
def test_running_and_waiting_sequences_can_be_aborted(engine: Engine, runner: WatchedRunner, reason: Any) -> None:
    running = [Asked(f"r{n}", max_tokens=100) for n in range(16)]
    waiting = Asked("waiting", max_tokens=100)
    submit(engine, *running, waiting)
    assert engine.abort("waiting", reason, "because")
    assert waiting.wait().end == reason
    while not running[0].outputs:
        time.sleep(0.001)
    assert engine.abort("r0", reason, "because")
    assert (running[0].wait().end, running[0].wait().error) == (reason, "because")
    assert 0 < running[0].wait().completion_tokens < 100
    assert not engine.abort("r0", reason)
    for each in running[1:]:
        assert each.wait().end == "length"
    assert len(runner.released) == 16


def test_deadlines_end_the_running_and_the_waiting(engine: Engine) -> None:
    late = Asked("late", deadline_s=-1)
    slow = Asked("slow", deadline_s=0.1, max_tokens=190)
    submit(engine, late, slow)
    assert (late.wait().end, late.wait().completion_tokens) == ("deadline", 0)
    assert slow.wait().end == "deadline"


def test_a_poisoned_sequence_fails_alone(engine: Engine, runner: WatchedRunner) -> None:
    runner.fail_on = 50
    poisoned = Asked("poisoned", prompt=[47], max_tokens=100)
    others = [Asked(f"j{n}", max_tokens=30) for n in range(8)]
    at_once = Asked("prefill", prompt=[50])
    submit(engine, poisoned, *others, at_once)
    assert poisoned.wait().end == "error" and "RuntimeError" in (poisoned.wait().error or "")
    assert at_once.wait().end == "error"
    assert {each.wait().end for each in others} == {"length"}
    assert sorted(runner.released) == sorted(set(range(10)) & set(runner.released)) and len(runner.released) == 10


@pytest.mark.parametrize("prompt", [[], list(range(10, 110)) * 2, [VOCABULARY], [-1]])
def test_impossible_prompts_are_refused(engine: Engine, prompt: list[int]) -> None:
    asked = Asked("bad")
    asked.sequence.prompt = prompt
    with pytest.raises(ValueError, match="token"):
        submit(engine, asked)


def test_the_context_ends_an_answer(engine: Engine) -> None:
    asked = Asked("long", prompt=[1] * 195, max_tokens=100)
    submit(engine, asked)
    assert asked.wait().end == "length" and asked.wait().completion_tokens <= 6


def test_stopping_ends_what_is_left(runner: WatchedRunner) -> None:
    engine = Engine(runner, (EOS,))
    engine.start()
    asked = [Asked(f"j{n}", max_tokens=190) for n in range(20)]
    submit(engine, *asked)
    engine.stop()
    assert {each.wait().end for each in asked} == {"error"}
    with pytest.raises(RuntimeError):
        submit(engine, Asked("after"))


def test_equal_seeds_give_equal_texts_in_any_company() -> None:
    engine = Engine(FlatRunner(), ())
    engine.start()
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 30}
    alone = Asked("alone", seed=7, **options)
    submit(engine, alone)
    alone.wait()
    crowd = [Asked(f"c{n}", seed=n, **options) for n in range(15)]
    again = Asked("again", seed=7, **options)
    submit(engine, *crowd, again)
    again.wait()
    assert again.text == alone.text == (crowd[7].wait() and crowd[7].text)
    assert len({each.wait() and each.text for each in crowd}) == 15
    engine.stop()


def ask_choices(job_id: str, count: int, **params: Any) -> list[Asked]:
    asked = [Asked(job_id, choice=choice, **params) for choice in range(count)]
    asked[0].sequence.add_forks(each.sequence for each in asked[1:])
    return asked


def test_choices_share_one_prefill_and_draw_apart() -> None:
    runner = FlatRunner()
    engine = Engine(runner, (), step_tokens=4)
    engine.start()
    options: dict[str, Any] = {"prompt": list(range(10, 20)), "temperature": 1.0, "seed": 3, "max_tokens": 9}
    lone = Asked("lone", **options)
    submit(engine, lone)
    lone.wait()
    before = len(runner.prefills)
    choices = ask_choices("many", 5, **options)
    submit(engine, choices[0])
    assert {each.wait().end for each in choices} == {"length"}
    assert len(runner.prefills) - before == 3, "ten tokens in chunks of four, once"
    assert choices[0].text == lone.text
    assert len({each.text for each in choices}) == 5
    assert sorted(runner.released) == sorted([0, *range(5)])
    engine.stop()


def test_a_long_prompt_keeps_running_streams_waiting_for_a_bounded_part_of_it(runner: WatchedRunner) -> None:
    """Between two tokens of a running stream: at most ``step_tokens`` of prompts, however many and long these are."""
    runner = WatchedRunner(context_tokens=2_000)
    reports: list[StepReport] = []
    engine = Engine(runner, (), reports.append, step_tokens=50)
    streams, long = [Asked(f"s{n}", max_tokens=300) for n in range(8)], [Asked(f"l{n}", [5] * 1_500) for n in range(3)]
    submit(engine, *streams)
    for _ in range(3):
        engine.step()
    submit(engine, *long)
    while not all(each.sequence.ended for each in long):
        before = [len(each.sequence.tokens) for each in streams]
        engine.step()
        assert [len(each.sequence.tokens) for each in streams] == [count + 1 for count in before], (
            "everybody, each step"
        )
    assert max(report.prefilled for report in reports[3:]) <= 51
    assert sum(report.prefilled for report in reports) == 8 * 3 + 3 * 1_500
    assert 90 <= len(reports) <= 100


def test_choices_end_together_when_their_job_is_aborted(engine: Engine, runner: WatchedRunner) -> None:
    running, waiting = ask_choices("running", 10, max_tokens=190), ask_choices("waiting", 10, max_tokens=190)
    submit(engine, running[0], waiting[0])
    while not all(each.outputs for each in running):
        time.sleep(0.001)
    for job_id in ("running", "waiting"):
        assert engine.abort(job_id, "cancelled")
    assert {each.wait().end for each in running + waiting} == {"cancelled"}
    assert len(runner.released) == 10


def test_more_choices_than_slots_are_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="no room for 17 choices"):
        submit(engine, ask_choices("many", 17)[0])


def test_logprobs_come_with_their_text_and_never_past_a_stop(engine: Engine) -> None:
    asked = Asked("told", max_tokens=50, stop=("<13><14>",), top_logprobs=1)
    submit(engine, asked)
    asked.wait()
    told = [logprob.token_id for output in asked.outputs for logprob in output.logprobs]
    assert (asked.text, told) == ("<10><11><12>", [10, 11, 12])
    for output in asked.outputs[:-1]:
        assert output.text == "".join(f"<{logprob.token_id}>" for logprob in output.logprobs)
    held = Asked("held", max_tokens=4, stop=("<13><99>",), top_logprobs=0)
    submit(engine, held)
    held.wait()
    assert [logprob.token_id for output in held.outputs for logprob in output.logprobs] == [10, 11, 12, 13]
