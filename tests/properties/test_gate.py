"""The gate's scripts do what a plain model of them does, whatever is asked, ends, expires, is told late, twice or in another order."""

import asyncio
import os
from dataclasses import replace
from typing import Any

import redis.asyncio as aioredis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from aiscale.wire import keys
from apps.accounts.callers import Caller
from apps.spend import holds, refusals
from apps.spend.admission import Ask, Mode, run_gate
from apps.spend.holds import End
from apps.spend.scripts import get_script
from apps.spend.totals import Total
from tests.apps.spend.cast import dump
from tests.properties.gate_model import Asked, Plan
from tests.properties.gate_stage import KEYS, SCOPES, STOPPABLE, WHO, GateStage
from tests.servers import empty_redis

amounts = st.sampled_from([0, 1, 10, 40, 100])
slugs = st.sampled_from(["free", "pro"])
asks = st.tuples(
    st.sampled_from(WHO),
    st.sampled_from(["m1", "m1", "m1", "m2", "m3"]),
    amounts,
    st.sampled_from([0, 1, 50, 150, 500]),
    st.sampled_from([1_000, 30_000]),
    slugs,
    st.sampled_from([0, 0, 1, 700, 9_999, 31_000]),
)


class GateMachine(GateStage):
    """Ask the real scripts and the model the same. What Postgres knows is in the model; it reaches Redis late, twice and in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.async_client = aioredis.Redis.from_url(os.environ["REDIS_URL"])
        self.count = 0
        self.running: list[tuple[Asked, tuple[str, ...], int]] = []
        self.ended: list[Asked] = []
        self.untold: list[tuple[list[End], list[Total]]] = []
        self.told: list[tuple[list[End], list[Total]]] = []
        self.is_exact = True
        """False once Redis may know less of what was spent than the holds cover."""

    @initialize()
    def begin(self) -> None:
        self.set_up()

    # --- what administrators do, and what Redis suffers

    @rule(
        data=st.data(),
        what=st.sampled_from(["plan", "plan", "limits", "key", "budget", "budget", "no budget", "kill", "revive"]),
    )
    def administer(self, data: st.DataObject, what: str) -> None:
        draw = data.draw
        match what:
            case "plan":
                self.move(draw(st.sampled_from("ab")), draw(slugs))
            case "limits":
                window_s = draw(st.sampled_from([60, 600, 3600]))
                self.change_limits(draw(slugs), 10 * draw(amounts), draw(st.integers(1, 9)), window_s)
            case "key":
                state = draw(st.sampled_from(["active", "active", "revoked"]))
                self.set_key(replace(KEYS[draw(st.sampled_from(sorted(KEYS)))], state=state))
            case "budget":
                limit = draw(st.sampled_from(["", "5", "50", "200", "500"]))
                period, raised_ms = (
                    draw(st.sampled_from(["daily", "monthly"])),
                    draw(st.sampled_from([0, 1000, 4_000_000])),
                )
                self.set_budget(draw(st.sampled_from(SCOPES)), period, limit, draw(st.sampled_from([0, 50])), raised_ms)
            case "no budget":
                self.delete_budgets(draw(st.sampled_from(SCOPES)))
            case "kill":
                self.kill(draw(st.sampled_from(STOPPABLE)), draw(st.sampled_from([None, 500, 5_000, 61_000])))
            case "revive":
                self.revive_all()

    @rule(what=st.sampled_from(["copy", "epoch", "suspended"]), scope=st.sampled_from(SCOPES), who=st.sampled_from(WHO))
    def suffer(self, what: str, scope: str, who: Any) -> None:
        match what:
            case "copy":
                self.lose_a_copy(scope)
            case "epoch":
                self.lose_the_epoch_for_a_while(who)
            case "suspended":
                self.suspend(who)

    def suspend(self, who: Any) -> None:
        organization = who[0]
        self.gate.suspended.add(organization)
        self.client.hset(keys.organization(organization), "state", "suspended")
        self.ask_once(who)
        self.gate.suspended.discard(organization)
        self.client.hset(keys.organization(organization), "state", "active")

    def lose_the_epoch_for_a_while(self, who: Any) -> None:
        self.gate.has_epoch = False
        self.client.delete(keys.EPOCH)
        self.ask_once(who)
        self.gate.has_epoch = True
        self.client.set(keys.EPOCH, "e")

    @rule(passed_ms=st.sampled_from([1, 400, 1_000, 9_999, 61_000, 600_000, 90_000_000]))
    def wait(self, passed_ms: int) -> None:
        self.gate.now_ms += passed_ms

    # --- what callers do

    @rule(asks=st.lists(asks, min_size=1, max_size=6))
    def ask(self, asks: list[Any]) -> None:
        for (organization, user, key), model, worst, tokens, deadline_ms, believed, passed_ms in asks:
            self.gate.now_ms += passed_ms
            self.count += 1
            expires = self.gate.now_ms + deadline_ms
            asked = Asked(f"job_{self.count}", organization, user, key, model, worst, tokens, expires)
            scopes = self.gate.list_scopes(asked)
            if self._ask(asked, believed):
                self.running.append((asked, scopes, self.gate.now_ms))
                self._check_truth(scopes, self.gate.plans[self.gate.plan_of[organization]])

    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        """A client that lost the answer asks again, now or hours later; a hold that expired meanwhile is none."""
        if not self.running:
            return
        number = data.draw(st.integers(0, len(self.running) - 1))
        asked, scopes, _ = self.running[number]
        if self.gate.list_scopes(asked) != scopes:
            return
        before = self.gate.holds[f"organization:{asked.organization}"].get(asked.job)
        if self._ask(asked, "free") and (before is None or before[1] <= self.gate.now_ms):
            self.running[number] = (asked, scopes, self.gate.now_ms)

    def ask_once(self, who: Any) -> None:
        """Ask for what costs nothing."""
        organization, user, key = who
        assert not self._ask(Asked("job_none", organization, user, key, "m1", 0, 0, self.gate.now_ms + 1000), "free")

    def _ask(self, asked: Asked, believed: str) -> bool:
        """Ask both; they must say the same, and a refusal leaves every key as it was."""
        if self.gate.has_epoch:
            # the copies are refilled first, so that only the answer itself can change something
            self._run(replace(asked, job="job_0"), believed, mode="explain")
        before = dump(self.client)
        is_new = asked.job not in self.gate.holds[f"organization:{asked.organization}"]
        if is_new and self.gate.has_epoch:
            checks = refusals.read_checks(self._run(asked, believed, mode="explain"), asked.model, "free", 0)
            refusing = [check.code.value for check in checks if not check.passes]
            assert refusing == [refusal[0] for refusal in self.gate.find_refusals(asked)], "explained as it is decided"
        if self.gate.has_epoch:
            checked = self._run(asked, believed, mode="check")
            assert dump(self.client) == before, "a check changed something"
        expected = self.gate.admit(asked)
        answer = self._run(asked, believed)
        if self.gate.has_epoch:
            assert checked[:2] == answer[:2] if answer[0] == "refused" else checked[0] == "admitted"
        if expected[0] == "admitted":
            assert answer == expected
            return True
        assert answer[:2] == expected[:2]
        assert list_numbers(refusals.read(answer, asked.model, "free", 0)) == expected[2:]
        assert dump(self.client) == before, "a refusal changed something"
        return False

    def _run(self, asked: Asked, plan: str, *, mode: Mode = "admit") -> list[Any]:
        who = {
            "organization_id": asked.organization,
            "user_id": asked.user,
            "key_id": asked.key,
            "key_digest": asked.key,
        }
        caller = Caller(**who, plan=plan)
        ask = Ask(
            caller=caller,
            model=asked.model,
            job_id=asked.job,
            worst_nanousd=asked.worst,
            worst_tokens=asked.tokens,
            deadline_at_ms=asked.deadline_ms,
        )
        for _ in range(4):
            call = run_gate(self.async_client, ask, plan=plan, now_ms=self.gate.now_ms, mode=mode)
            answer = self.runner.run(call)
            if answer[0] == "plan":
                plan = answer[1]
                assert plan == self.gate.plan_of[asked.organization]
            elif answer[0] == "load":
                assert set(answer[1:]) == {s for s in self.gate.list_scopes(asked) if self.gate.is_outdated(s)}
                for scope in answer[1:]:
                    self._refill(scope)
            else:
                assert answer[0] == "refused" or not any(map(self.gate.is_outdated, self.gate.list_scopes(asked)))
                return answer
        raise AssertionError(answer)

    def _refill(self, scope: str) -> None:
        """Write a copy as `balance.publish` does."""
        copy = self.gate.refill(scope)
        args: list[str | int] = [copy.definition]
        for period, part in copy.parts.items():
            total = copy.spent[period]
            args += [period, *total.span, total.spent_nanousd, total.revision]
            args += [part.limit, part.raise_nanousd, part.raise_until_ms]
        get_script("rebuild").run(self.client, [keys.spend(scope), keys.holds(scope)], args)

    def _check_truth(self, scopes: tuple[str, ...], plan: Plan) -> None:
        """M1, M12: whoever is let in, what was spent and what may still be spent together fit into every budget."""
        for scope in scopes if self.is_exact else ():
            for period in self.gate.list_parts(scope):
                most = self.gate.find_most(scope, period, plan)
                may_come = sum(
                    asked.worst for asked, counted, _ in self.running if scope in counted and self._is_held(asked)
                )
                spent = self.gate.read_total(scope, period).spent_nanousd
                assert most is None or spent + may_come <= most, (scope, period)

    def _is_held(self, asked: Asked) -> bool:
        held = self.gate.holds[f"organization:{asked.organization}"].get(asked.job)
        return held is not None and held[1] > self.gate.now_ms

    # --- what settlement does

    @rule(data=st.data(), share=st.sampled_from([0, 1, 2]), at_once=st.booleans())
    def end(self, data: st.DataObject, share: int, at_once: bool) -> None:
        """A job's cost is committed; Redis is told in the same moment, or any time later."""
        if not self.running:
            return
        asked, scopes, admitted_at = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.is_exact = self.is_exact and self._is_held(asked)
        cost, used = asked.worst * share // 2, asked.tokens * share // 2
        totals = self.gate.charge(scopes, cost)
        self.untold.append(([End(asked.job, asked.worst, scopes, asked.tokens - used, admitted_at)], totals))
        if at_once:
            self._tell(self.untold.pop())
        elif self.gate.now_ms >= asked.deadline_ms:
            # its hold may expire before Redis is told
            self.is_exact = False

    @rule(organization=st.sampled_from("ab"), amount=st.sampled_from([-100, -20, 20]))
    def correct(self, organization: str, amount: int) -> None:
        self.is_exact = self.is_exact and amount < 0
        self.untold.append(([], self.gate.charge((f"organization:{organization}",), amount)))

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """A job that could not be sent leaves nothing behind but its request."""
        if not self.running:
            return
        asked, scopes, admitted_at = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self._tell(([End(asked.job, asked.worst, scopes, asked.tokens, admitted_at)], []))

    @rule(data=st.data())
    def tell(self, data: st.DataObject) -> None:
        if not self.untold:
            return
        self._tell(self.untold.pop(data.draw(st.integers(0, len(self.untold) - 1))))

    @rule(data=st.data())
    def tell_again(self, data: st.DataObject) -> None:
        """M7: a replay, also of something old, changes nothing."""
        if not self.told:
            return
        before = dump(self.client)
        ends, totals = data.draw(st.sampled_from(self.told))
        assert holds.settle(self.client, ends, totals) == 0
        assert dump(self.client) == before

    def _tell(self, what: tuple[list[End], list[Total]]) -> None:
        holds.settle(self.client, *what)
        self.gate.settle(*what)
        self.told = [*self.told[-5:], what]

    # --- always

    @invariant()
    def redis_says_what_the_model_says(self) -> None:
        pipeline = self.client.pipeline(transaction=False)
        for scope in SCOPES:
            pipeline.hgetall(keys.spend(scope))
            pipeline.zrange(keys.holds(scope), 0, -1, withscores=True)
        answers = pipeline.execute()
        for number, scope in enumerate(SCOPES):
            copy, held = answers[2 * number : 2 * number + 2]
            expected = {(keys.hold(job, worst), until) for job, (worst, until) in self.gate.holds[scope].items()}
            assert {(name.decode(), int(until)) for name, until in held} == expected
            known = self.gate.copies.get(scope)
            assert bool(copy) == (known is not None)
            if known is not None:
                assert int(copy[b"held_nanousd"]) == sum(worst for worst, _ in self.gate.holds[scope].values())
                for period, total in known.spent.items():
                    stored = (int(copy[f"{period}_{name}".encode()]) for name in ("spent_nanousd", "revision"))
                    assert tuple(stored) == (total.spent_nanousd, total.revision)

    def teardown(self) -> None:
        self.runner.run(self.async_client.aclose())
        self.runner.close()
        empty_redis(self.client)
        self.client.close()


def list_numbers(refusal: refusals.Refusal) -> list[Any]:
    """Return a refusal's facts as the model tells them."""
    facts = refusal.facts

    def number(name: str) -> int | None:
        return int(facts[name]) if facts[name] else None

    match refusal.code.value:
        case "killed":
            return [facts["scope"]]
        case "model_not_allowed":
            return [facts["whose"]]
        case "rate_limit_exceeded":
            return [facts["whose"], facts["what"], *map(number, ("limit", "used", "asked", "retry_ms"))]
        case "too_many_in_flight":
            return [number("in_flight"), number("limit")]
        case "insufficient_quota":
            names = ("spent_nanousd", "held_nanousd", "worst_nanousd", "limit_nanousd")
            return [facts["scope"], facts["period"], *map(number, names)]
    return []


TestGate = GateMachine.TestCase
TestGate.settings = settings(max_examples=30, stateful_step_count=50, deadline=None)


def test_what_was_counted_in_seconds_counts_on_in_the_longer_units_of_another_plan() -> None:
    machine = GateMachine()
    try:
        machine.begin()
        for slug, passed_ms in (("pro", 0), ("pro", 1500), ("free", 1500), ("pro", 20_000), ("free", 61_000)):
            machine.move("a", slug)
            machine.ask([(("a", "u1", None), "m1", 1, 1, 1000, slug, passed_ms)])
        assert len(machine.running) == 4, "the free plan has four requests in ten minutes, and they were used"
    finally:
        machine.teardown()
