"""Whatever comes and goes, each running sequence has a slot of its own, and nobody waits for ever."""

import time

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from workers.engine.detokenizer import Detokenizer
from workers.engine.scheduler import AGING_S, Scheduler
from workers.engine.sequence import Params, Sequence

SLOTS = 3
TOKENIZER = Tokenizer(WordLevel({"x": 0}, unk_token="x"))


def make(job_id: str, priority: int, arrived_s: float, deadline_s: float = 1e12) -> Sequence:
    return Sequence(
        job_id=job_id,
        prompt=[0],
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
