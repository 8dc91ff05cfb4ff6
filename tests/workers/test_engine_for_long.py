"""Ten thousand requests of random shape come, go, fail and are aborted; afterwards the engine holds what it held at the beginning."""

import gc
import logging
import random
import sys
from collections.abc import Iterator

import pytest

from tests.workers.test_engine import EOS, VOCABULARY, Asked
from workers.engine.engine import Engine
from workers.engine.runner_fake import FakeRunner

SLOTS, AT_ONCE, WARMING, REQUESTS = 16, 48, 1_000, 10_000
POISON = 7
MOST_BLOCKS = 4_000
"""Of Python's allocator: less than half a block a request. What one request leaves behind would be dozens."""


class Crowd:
    """Keep ``AT_ONCE`` requests going until so many have come and gone."""

    def __init__(self, seed: int) -> None:
        self.runner = FakeRunner(slots=SLOTS, context_tokens=96, vocab_size=VOCABULARY, first=10)
        self.runner.fail_on = POISON
        self.engine = Engine(self.runner, (EOS,), kv_tokens=SLOTS * 80, step_tokens=64)
        self.random = random.Random(seed)
        self.count = 0
        self.ends: dict[str, int] = {}

    def run(self, requests: int) -> None:
        here: list[list[Asked]] = []
        last = self.count + requests
        while here or self.count < last:
            while len(here) < AT_ONCE and self.count < last:
                here.append(self.send())
            if here and self.random.random() < 0.3:
                [victim, *_] = self.random.choice(here)
                self.engine.abort(victim.sequence.job_id, self.random.choice(["cancelled", "killed", "deadline"]))  # type: ignore[arg-type]
            self.engine.step()
            for choices in here:
                if all(choice.done.is_set() for choice in choices):
                    for choice in choices:
                        ends = [output.end for output in choice.outputs if output.end is not None]
                        assert len(ends) == 1 and choice.outputs[-1].end == ends[0], (
                            "exactly one end, and nothing after it"
                        )
                        self.ends[ends[0]] = self.ends.get(ends[0], 0) + 1
            here = [choices for choices in here if not all(choice.done.is_set() for choice in choices)]

    def send(self) -> list[Asked]:
        draw = self.random
        self.count += 1
        prompt = [draw.randrange(8, VOCABULARY - 1) for _ in range(draw.choice([1, 2, 5, 20, 60]))]
        if draw.random() < 0.3:
            prompt = [*range(20, 60), *prompt[:20]]
        if draw.random() < 0.02:
            prompt[-1] = POISON
        late_s = -1.0 if draw.random() < 0.02 else 1e6
        params = {
            "max_tokens": draw.choice([1, 2, 3, 8]),
            "temperature": draw.choice([0.0, 0.0, 1.0]),
            "seed": draw.choice([None, 3]),
        }
        stop = draw.choice([(), (), ("<40>",)])
        choices = [
            Asked(f"j{self.count}", prompt, deadline_s=late_s, stop=stop, choice=choice, **params)
            for choice in range(draw.choice([1, 1, 1, 1, 1, 3]))
        ]
        leader = choices[0].sequence
        leader.prefix_scope = draw.choice(["", "a", "b"])
        leader.add_forks([choice.sequence for choice in choices[1:]])
        self.engine.submit(leader)
        return choices

    def held(self) -> tuple[object, ...]:
        scheduler = self.engine._scheduler
        return (
            len(scheduler._slots),
            scheduler.reserved_tokens,
            scheduler.running,
            scheduler.waiting,
            self.engine._known,
            self.runner.held,
        )


def count_blocks() -> int:
    gc.collect()
    return sys.getallocatedblocks()


@pytest.fixture
def quiet() -> Iterator[None]:
    """Hundreds of requests fail on purpose: their tracebacks, kept by pytest, would be what grows."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_ten_thousand_requests_leave_nothing_behind(quiet: None) -> None:
    crowd = Crowd(seed=1)
    assert crowd.held() == (SLOTS, 0, [], 0, {}, {})
    crowd.run(WARMING)
    before = count_blocks()
    crowd.run(REQUESTS)
    assert crowd.held() == (SLOTS, 0, [], 0, {}, {}), crowd.ends
    assert sum(map(len, crowd.runner.kept.values())) == crowd.engine._prefixes.tokens
    assert len(crowd.runner.kept) <= crowd.runner.kept_places and crowd.engine._prefixes.tokens <= SLOTS * 80
    assert count_blocks() - before < MOST_BLOCKS
    assert set(crowd.ends) == {"stop", "length", "error", "cancelled", "killed", "deadline"}, crowd.ends
    assert sum(crowd.ends.values()) > REQUESTS
