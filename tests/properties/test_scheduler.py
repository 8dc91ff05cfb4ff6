"""Whatever comes and goes, each running sequence has a slot of its own, and nobody waits for ever."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from workers.engine.detokenizer import Detokenizer
from workers.engine.scheduler import AGING_S, MAX_STEP_TOKENS, MIN_STEP_TOKENS, Pace, Scheduler
from workers.engine.sequence import Params, Sequence

SLOTS = 3
TOKENIZER = Tokenizer(WordLevel({"x": 0}, unk_token="x"))


def make(job_id: str, priority: int, arrived_s: float, deadline_s: float = 1e12, prompt_tokens: int = 1) -> Sequence:
    return Sequence(
        job_id=job_id,
        prompt=[0] * prompt_tokens,
        params=Params(max_tokens=1),
        priority=priority,
        deadline_s=deadline_s,
        detokenizer=Detokenizer(TOKENIZER),
        on_output=lambda output: None,
        arrived_s=arrived_s,
    )


class SchedulerMachine(RuleBasedStateMachine):
    """Compare the scheduler with a list."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(SLOTS, 1_000, 100)
        self.known: list[Sequence] = []
        self.count = 0

    @rule(priority=st.sampled_from([0, 3, 6, 9]), age_s=st.floats(0, 200))
    def add(self, priority: int, age_s: float) -> None:
        self.count += 1
        sequence = make(f"j{self.count}", priority, 1000.0 - age_s)
        self.scheduler.add(sequence)
        self.known.append(sequence)

    @rule()
    def admit(self) -> None:
        before = [s for s in self.known if s.slot < 0]
        room = SLOTS - sum(s.slot >= 0 for s in self.known)
        self.scheduler.admit()
        expected = sorted(before, key=lambda s: (s.priority * AGING_S + s.arrived_s, int(s.job_id[1:])))[:room]
        assert {s.job_id for s in before if s.slot >= 0} == {s.job_id for s in expected}

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.known:
            sequence = data.draw(st.sampled_from(self.known))
            held = sequence.slot
            assert self.scheduler.remove(sequence) == held
            self.known.remove(sequence)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.known:
            data.draw(st.sampled_from(self.known)).abort_reason = "cancelled"

    @invariant()
    def slots_are_their_own(self) -> None:
        held = [s.slot for s in self.known if s.slot >= 0]
        assert len(held) == len(set(held)) <= SLOTS and all(0 <= slot < SLOTS for slot in held)
        assert {s.job_id for s in self.scheduler.running} == {s.job_id for s in self.known if s.slot >= 0}
        assert self.scheduler.waiting == len(self.known) - len(held)
        assert set(map(id, self.scheduler.list_all())) == set(map(id, self.known))
        due = {s.job_id for s in self.scheduler.list_due(time.time())}
        assert due == {s.job_id for s in self.known if s.abort_reason}


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_who_waits_long_enough_comes_first() -> None:
    scheduler = Scheduler(1, 1_000, 100)
    patient, hurried = make("patient", 9, 0.0), make("hurried", 0, 9 * AGING_S + 1)
    scheduler.add(hurried)
    scheduler.add(patient)
    scheduler.admit()
    assert scheduler.running == [patient]


@given(
    prompts=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    step_tokens=st.integers(1, 64),
    cached=st.integers(0, 40),
)
def test_a_step_computes_no_more_prompt_than_it_may(prompts: list[int], step_tokens: int, cached: int) -> None:
    """Between two tokens of a running stream: ``step_tokens``, and one more at the most. Nobody's prompt stops for another's."""
    scheduler = Scheduler(len(prompts), 10_000, 1_000)
    for number, tokens in enumerate(prompts):
        scheduler.add(make(f"j{number}", 0, float(number), prompt_tokens=tokens))
    for sequence in scheduler.admit():
        sequence.prefilled = min(cached, max(len(sequence.prompt) - 2, 0))
    left, steps = sum(len(s.prompt) - s.prefilled for s in scheduler.running), 0
    most_steps = left  # each step computes something
    while chosen := scheduler.list_prefills(step_tokens):
        assert sum(count for _, count in chosen) <= max(step_tokens, 2) + 1
        assert [s for s, _ in chosen] == [s for s in scheduler.running if not s.is_prefilled][: len(chosen)]
        for sequence, count in chosen:
            alone = len(sequence.prompt) - sequence.prefilled
            assert 0 < count <= alone and (alone == 1 or (count > 1 and alone - count != 1))
            sequence.prefilled += count
        steps += 1
        assert steps <= most_steps
    assert all(s.is_prefilled for s in scheduler.running)


@pytest.mark.parametrize("fixed_s", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("token_s", [0.00005, 0.001, 0.01, 0.04])
@pytest.mark.parametrize("begins_alone", [True, False])
def test_the_pace_keeps_to_its_time(fixed_s: float, token_s: float, *, begins_alone: bool) -> None:
    """A call costs something by itself and something for each token: the set time is kept, and used, on fast and slow machines."""
    pace = Pace(0.1)
    if begins_alone:
        pace.learn(MAX_STEP_TOKENS, fixed_s + MAX_STEP_TOKENS * token_s)
    for _ in range(40):
        tokens = pace.step_tokens(streams_run=True)
        pace.learn(tokens, fixed_s + tokens * token_s)
        pace.learn(2, fixed_s + 2 * token_s)  # the end of a prompt says little
    took_s, one_more_s = fixed_s + tokens * token_s, token_s
    assert took_s <= 0.1 + one_more_s / 2 or tokens == MIN_STEP_TOKENS
    assert took_s >= 0.1 - fixed_s / 2 - one_more_s or tokens == MAX_STEP_TOKENS
    assert pace.step_tokens(streams_run=False) == MAX_STEP_TOKENS
