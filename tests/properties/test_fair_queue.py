"""The queue's order is that of a small model of it: fair within a tier, strict between tiers until somebody has waited too long."""

import os
from bisect import insort
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from redis import Redis

from aiscale.wire import keys
from aiscale.wire.broker import TIERS, broker_list, make_ticket
from aiscale.wire.events import Finished
from aiscale.wire.jobs import BillingTag
from aiscale.wire.scripts import FROM_QUEUE, claim_arguments, finish_arguments, read_script
from tests.apps.inference.claims import put

AGING_MS = 10_000
START_MS = 1_700_000_000_000
MODEL = "a-model-of-properties"


@dataclass(order=True)
class Job:
    seq: int
    job_id: str = field(compare=False)
    tier: int = field(compare=False)
    organization: str = field(compare=False)
    tokens: int = field(compare=False)
    weight: int = field(compare=False)
    queued_at_ms: int = field(compare=False)

    @property
    def length(self) -> float:
        return self.tokens / self.weight


class Tier:
    """Model one tier: virtual time, each organization's lane, and when its last job ends."""

    def __init__(self) -> None:
        self.time = 0.0
        self.lanes: dict[str, list[Job]] = {}
        self.starts: dict[str, float] = {}
        self.ends: dict[str, float] = {}

    def join(self, job: Job) -> None:
        lane = self.lanes.setdefault(job.organization, [])
        if not lane:
            self.starts[job.organization] = max(self.time, self.ends.get(job.organization, 0))
        insort(lane, job)

    def leave(self, job: Job) -> None:
        self.lanes[job.organization].remove(job)
        if not self.lanes[job.organization]:
            del self.lanes[job.organization], self.starts[job.organization]
        if not self.lanes:
            self.time = max([self.time, *self.ends.values()])
            self.ends.clear()

    def serve(self) -> Job:
        organization = min(self.starts, key=lambda name: (self.starts[name], name))
        job, start = self.lanes[organization][0], self.starts[organization]
        self.time = max(self.time, start)
        self.ends[organization] = self.starts[organization] = start + job.length
        self.ends = {name: end for name, end in self.ends.items() if end > self.time}
        self.leave(job)
        return job

    def give_back(self, job: Job, length: float) -> None:
        if length <= 0 or job.organization not in self.ends:
            return
        end = self.ends.pop(job.organization) - length
        if job.organization in self.starts:
            self.starts[job.organization] = max(end, self.time)
        if end > self.time:
            self.ends[job.organization] = end


class Scripts:
    """Run the scripts with a clock of our own."""

    def __init__(self) -> None:
        self.client: Any = Redis.from_url(os.environ["REDIS_URL"])
        self.now_ms = START_MS
        self.forget()

    def forget(self) -> None:
        names = [
            *self.client.scan_iter(f"{keys.queue_state(MODEL)}*"),
            *self.client.scan_iter(f"{keys.PREFIX}job:prop*"),
        ]
        self.client.delete(keys.queue_depth(MODEL), broker_list(MODEL), keys.LEASES, keys.FINISHED, keys.QUEUES, *names)

    def run(self, name: str, names: list[str], values: list[Any]) -> Any:
        return self.client.eval(read_script(name), len(names), *names, *values)

    def enqueue(self, job: Job) -> None:
        place: dict[str, Any] = {"tier": job.tier, "organization": job.organization, "tokens": job.tokens}
        for known in (False, True):
            answer = put(self.client, job.job_id, model=MODEL, weight=job.weight, now_ms=self.now_ms, **place)
            assert answer == (not known)

    def claim(self, most_jobs: int = 1, most_tokens: int = 0) -> list[str]:
        names, values = claim_arguments(
            "generate", MODEL, "w1", now_ms=self.now_ms, most_jobs=most_jobs, most_tokens=most_tokens, lease_ms=10**9
        )
        _, *jobs = self.run("claim", names, values)
        return [job_id.decode() for job_id, _, _ in jobs]

    def cancel(self, job: Job) -> None:
        values = [job.job_id, "left", self.now_ms, "nobody", b"", keys.queue_state(""), keys.queue_depth("")]
        assert self.run("cancel", [keys.job_record(job.job_id), keys.LEASES], values) == 1

    def finish(self, job: Job, made: int, by: str = "w1") -> int:
        event = make_end(job, made, self.now_ms)
        names, values = finish_arguments(event, reply_to="nobody", keep_log=False, by=by)
        return int(self.run("finish", names, values))

    def requeue(self, job: Job, *, pass_lease: bool) -> list[bytes]:
        if pass_lease:
            self.client.zadd(keys.LEASES, {job.job_id: 1}, xx=True)
        names = [
            keys.job_record(job.job_id),
            keys.LEASES,
            keys.queue_state(MODEL),
            keys.queue_depth(MODEL),
            broker_list(MODEL),
        ]
        answer: list[bytes] = self.run(
            "requeue", names, [job.job_id, self.now_ms, 10**6, 0, make_ticket("generate", MODEL)]
        )
        return answer


def make_end(job: Job, made: int, now_ms: int) -> Finished:
    billing = BillingTag(
        organization_id=job.organization,
        plan="free",
        request_id="req_1",
        source="api",
        prompt_nanousd_per_token=0,
        completion_nanousd_per_token=0,
        hold_nanousd=0,
        admitted_at_ms=now_ms,
    )
    return Finished(
        job_id=job.job_id,
        seq=0,
        kind="generate",
        model=MODEL,
        model_version="1",
        finish_reason="stop",
        prompt_tokens=made,
        completion_tokens=0,
        billing=billing,
        finished_at_ms=now_ms,
    )


class QueueMachine(RuleBasedStateMachine):
    """Compare the scripts with the model, whatever comes, goes, ends early or is tried again."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts = Scripts()
        self.tiers = {tier: Tier() for tier in TIERS}
        self.running: list[Job] = []
        self.count = 0

    @property
    def waiting(self) -> list[Job]:
        return [job for tier in self.tiers.values() for lane in tier.lanes.values() for job in lane]

    def expect(self) -> Job | None:
        oldest = {
            tier: min(j.queued_at_ms for j in self.waiting if j.tier == tier) for tier in {j.tier for j in self.waiting}
        }
        if not oldest:
            return None
        tier = min(oldest, key=lambda tier: (tier * AGING_MS + oldest[tier], tier))
        return self.tiers[tier].serve()

    @rule(
        tier=st.sampled_from(TIERS),
        organization=st.sampled_from("abc"),
        tokens=st.integers(1, 5000),
        weight=st.sampled_from([1, 2, 5]),
        passed_ms=st.sampled_from([0, 1, 40, 9_000, 40_000]),
    )
    def enqueue(self, tier: int, organization: str, tokens: int, weight: int, passed_ms: int) -> None:
        self.scripts.now_ms += passed_ms
        self.count += 1
        job = Job(self.count, f"prop{self.count}", tier, organization, tokens, weight, self.scripts.now_ms)
        self.scripts.enqueue(job)
        self.tiers[tier].join(job)

    @rule()
    def claim(self) -> None:
        expected = self.expect()
        assert self.scripts.claim() == ([expected.job_id] if expected else [])
        self.running += [expected] if expected else []

    @rule(most_jobs=st.integers(1, 6), most_tokens=st.integers(0, 9000))
    def claim_several(self, most_jobs: int, most_tokens: int) -> None:
        got = self.scripts.claim(most_jobs, most_tokens)
        # the same jobs, one by one
        jobs = [self.expect() for _ in got]
        assert got == [job.job_id for job in jobs if job]
        assert len(got) == 1 or sum(job.tokens for job in jobs if job) <= most_tokens or got == []
        assert got or not self.waiting, "work conserving"
        assert len(got) <= most_jobs
        self.running += [job for job in jobs if job]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), killed=st.booleans())
    def end_what_waits(self, data: st.DataObject, killed: bool) -> None:
        job = data.draw(st.sampled_from(self.waiting))
        if killed:
            assert self.scripts.finish(job, 0, FROM_QUEUE) == 1
        else:
            self.scripts.cancel(job)
        self.tiers[job.tier].leave(job)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        job = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        made = data.draw(st.integers(0, job.tokens))
        assert self.scripts.finish(job, made, FROM_QUEUE) == 0 == self.scripts.finish(job, made, "w2")
        assert self.scripts.finish(job, made) == 1
        assert self.scripts.finish(job, made) == 0
        self.tiers[job.tier].give_back(job, (job.tokens - made) / job.weight)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def lose_a_worker(self, data: st.DataObject) -> None:
        job = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        assert self.scripts.requeue(job, pass_lease=False) == [b"no"]
        assert self.scripts.requeue(job, pass_lease=True)[0] == b"resting"
        self.tiers[job.tier].give_back(job, job.length)
        assert self.scripts.requeue(job, pass_lease=True) == [b"queued"]
        self.tiers[job.tier].join(job)

    @invariant()
    def numbers_agree(self) -> None:
        client, state = self.scripts.client, keys.queue_state(MODEL)
        waiting = self.waiting
        assert client.zcard(keys.queue_depth(MODEL)) == len(waiting)
        fields = {name.decode(): value.decode() for name, value in client.hgetall(state).items()}
        tokens = {name: int(value) for name, value in fields.items() if name.startswith("tokens:")}
        expected: dict[str, int] = {}
        for job in waiting:
            for name in (f"tokens:{job.tier}", f"tokens:{job.tier}:{job.organization}"):
                expected[name] = expected.get(name, 0) + job.tokens
        assert tokens == expected
        assert ("backlog_at_ms" in fields) == bool(waiting)
        # whoever waits has a ticket on its way
        assert not waiting or "call_after_ms" in fields
        if not waiting:
            assert list(client.scan_iter(f"{state}:*:*")) == []
        assert {name.decode() for name in client.zrange(f"{state}:running", 0, -1)} == {
            job.job_id for job in self.running
        }

    def teardown(self) -> None:
        self.scripts.forget()
        self.scripts.client.close()


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def make_jobs(organization: str, lengths: list[int], weight: int, first: int) -> list[Job]:
    return [
        Job(first + n, f"prop{organization}{n}", 9, organization, tokens, weight, START_MS)
        for n, tokens in enumerate(lengths)
    ]


@settings(max_examples=25, deadline=None)
@given(
    mine=st.lists(st.integers(1, 3000), min_size=2, max_size=40),
    others=st.lists(st.integers(1, 3000), min_size=2, max_size=40),
    weight=st.integers(1, 4),
)
def test_who_waits_all_the_time_gets_the_share_of_its_weight(mine: list[int], others: list[int], weight: int) -> None:
    """Goyal's bound for start-time fair queueing: in virtual time nobody is ever more than one job of each ahead."""
    scripts = Scripts()
    try:
        ours, theirs = make_jobs("a", mine, weight, 1), make_jobs("b", others, 1, 1000)
        by_id = {job.job_id: job for job in [*theirs, *ours]}
        for job in by_id.values():
            scripts.enqueue(job)
        served = {"a": 0.0, "b": 0.0}
        left = {"a": len(ours), "b": len(theirs)}
        most = max(job.length for job in ours) + max(job.length for job in theirs)
        while left["a"] > 1 and left["b"] > 1:
            [job_id] = scripts.claim()
            job = by_id[job_id]
            served[job.organization] += job.length
            left[job.organization] -= 1
            assert abs(served["a"] - served["b"]) <= most + 1e-6
    finally:
        scripts.forget()


def test_five_hundred_waiting_jobs_do_not_keep_the_one_of_somebody_else_waiting() -> None:
    scripts = Scripts()
    try:
        for job in make_jobs("heavy", [800] * 500, 1, 1):
            scripts.enqueue(job)
        assert scripts.claim() == ["propheavy0"]
        [light] = make_jobs("light", [800], 1, 1000)
        scripts.enqueue(light)
        assert scripts.claim() == ["proplight0"]
        assert scripts.claim() == ["propheavy1"]
    finally:
        scripts.forget()


def test_a_lower_tier_comes_first_once_it_has_waited_so_much_longer() -> None:
    scripts = Scripts()
    try:
        scripts.enqueue(Job(1, "propold", 9, "a", 10, 1, START_MS))
        scripts.now_ms += 9 * AGING_MS - 1
        scripts.enqueue(Job(2, "propsoon", 0, "b", 10, 1, 0))
        assert scripts.claim() == ["propsoon"]
        scripts.now_ms += 2
        scripts.enqueue(Job(3, "proplate", 0, "b", 10, 1, 0))
        assert scripts.claim() == ["propold"]
        assert scripts.claim() == ["proplate"]
    finally:
        scripts.forget()


def test_what_a_job_did_not_use_is_not_held_against_its_organization() -> None:
    scripts = Scripts()
    try:
        asked, [last] = make_jobs("a", [4000, 4000, 4000], 1, 1), make_jobs("z", [100], 1, 1000)
        others = make_jobs("b", [1000] * 9, 1, 100)
        for job in [*asked, *others, last]:
            scripts.enqueue(job)
        assert scripts.claim() == ["propa0"]
        # it asked for four thousand tokens and made ten
        assert scripts.finish(asked[0], 10) == 1
        assert [scripts.claim()[0] for _ in range(3)] == ["propb0", "propz0", "propa1"]
    finally:
        scripts.forget()
