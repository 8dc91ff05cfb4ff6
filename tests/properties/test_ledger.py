"""The ledger on a real Postgres does what a plain model of it does, whatever is charged, mended, replayed and told in another order."""

import itertools
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.db.models import Sum
from django.utils import timezone
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from redis import Redis

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError
from aiscale.wire import keys
from aiscale.wire.codec import encode_event
from aiscale.wire.events import Finished
from apps.spend import balance, corrections, ledger, prices, rerating, settlement, statements, stream, totals, usage
from apps.spend.models import Budget, Correction, LedgerEntry, Rerating, SpendTotal, UsageRecord
from apps.spend.rerating import Order
from tests.apps.spend.cast import ADA, make_finished, make_organization, read_spend
from tests.servers import empty_redis

TERMS = [
    prices.Terms(
        prompt_nanousd_per_token=p, cached_prompt_nanousd_per_token=c, completion_nanousd_per_token=o, request_nanousd=r
    )
    for p, c, o, r in [(3, 3, 7, 0), (30, 10, 70, 100), (0, 0, 1, 0)]
]
_numbers = itertools.count(int(time.time()) % 100_000 * 1000)


@dataclass
class Job:
    """Be one charged request, with what corrections changed of its cost."""

    event: Finished
    refunds: int = 0
    ratings: int = 0

    @property
    def cost(self) -> int:
        event, price = self.event, self.event.billing
        if event.finish_reason == "error":
            return 0
        return (
            event.prompt_tokens * price.prompt_nanousd_per_token
            + event.completion_tokens * price.completion_nanousd_per_token
        )

    @property
    def left(self) -> int:
        return self.cost + self.refunds + self.ratings

    @property
    def scopes(self) -> list[str]:
        tag = self.event.billing
        return [
            f"user:{tag.user_id}",
            f"organization:{tag.organization_id}",
            f"model:{self.event.model}",
            f"plan:{tag.plan}",
        ]


@dataclass
class Books:
    """Model the ledger: the jobs that were charged, and what else moved each organization's account, by its reference."""

    jobs: dict[str, Job] = field(default_factory=dict)
    others: dict[str, tuple[str, str, int]] = field(default_factory=dict)

    def sum_of(self, organization: str) -> int:
        jobs = sum(job.left for job in self.jobs.values() if job.event.billing.organization_id == organization)
        return jobs + sum(amount for _, payer, amount in self.others.values() if payer == organization)

    def count_in(self, scope: str) -> int:
        if scope.startswith("organization:"):
            return self.sum_of(scope.partition(":")[2])
        return sum(job.left for job in self.jobs.values() if scope in job.scopes)

    def rate(self, model: str, terms: prices.Terms) -> None:
        deltas: dict[str, list[tuple[Job, int]]] = {}
        for job in self.jobs.values():
            event = job.event
            if event.model == model and event.finish_reason != "error":
                should = terms.cost_nanousd(event.prompt_tokens, event.completion_tokens)
                change = max(should + job.refunds, 0) - job.left
                deltas.setdefault(event.billing.organization_id, []).append((job, change))
        for changes in deltas.values():
            # up here and down there, nothing in sum: nothing is posted
            if sum(change for _, change in changes):
                for job, change in changes:
                    job.ratings += change


class LedgerMachine(RuleBasedStateMachine):
    """Do the same to both. What was posted stays for ever, so each example has organizations, models and people of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.client: Redis = redis_clients.get_sync()
        empty_redis(self.client)
        # those of the examples before
        Rerating.objects.update(finished_at=timezone.now())
        self.number = next(_numbers)
        self.books = Books()
        self.settler = settlement.Settler(self.client)
        self.untold: list[Finished] = []
        self.references: list[str] = []
        self.rated: dict[str, prices.Terms] = {}
        self.count = 0

    @initialize()
    def begin(self) -> None:
        self.models = [f"model-{self.number}-{letter}" for letter in "ab"]
        self.organizations = []
        for plan in (f"plan-{self.number}-x", f"plan-{self.number}-y"):
            organization = make_organization(plan, name=plan)
            self.organizations.append((organization.public_id, plan, f"usr_{self.number}_{plan[-1]}"))
        self.scopes = [f"model:{model}" for model in self.models]
        for organization_id, plan, user in self.organizations:
            self.scopes += [f"organization:{organization_id}", f"plan:{plan}", f"user:{user}"]
        for scope in self.scopes:
            Budget.objects.create(scope=scope, period="monthly", limit_nanousd=None, thresholds=[])
        balance.restore()
        for scope in self.scopes:
            balance.publish(scope)
        stream.ensure_groups(self.client)

    def make_event(
        self, payer: int, model: int, prompt: int, completion: int, reason: str, job_id: str | None = None
    ) -> Finished:
        self.count += 1
        organization_id, plan, user = self.organizations[payer]
        return make_finished(
            organization_id,
            job_id or f"job_{self.number}_{self.count}",
            plan=plan,
            user_id=user,
            model=self.models[model],
            prompt_tokens=prompt,
            completion_tokens=completion,
            finish_reason=reason,
        )

    @rule(
        fresh=st.lists(
            st.tuples(
                st.integers(0, 1),
                st.integers(0, 1),
                st.integers(0, 40),
                st.integers(0, 9),
                st.sampled_from(["stop", "stop", "error"]),
            ),
            max_size=4,
        ),
        data=st.data(),
        way=st.sampled_from(["stream", "alone", "died before Redis knew"]),
    )
    def settle(self, fresh: list[Any], data: st.DataObject, way: str) -> None:
        """M5, M7: new ends, old ones again, and old ids with other numbers, in any order, twice in one batch too."""
        events = [self.make_event(*values) for values in fresh]
        known = sorted(self.books.jobs)
        if known:
            again = data.draw(st.lists(st.sampled_from(known), max_size=3))
            events += [self.books.jobs[job_id].event for job_id in again]
            events += [self.make_event(0, 0, 99, 99, "stop", job_id) for job_id in again[:1]]
        events = data.draw(st.permutations(events))
        if way == "stream":
            self.settler.settle_entries([stream.Entry("", encode_event(event)) for event in [*events, *events]])
        elif way == "alone":
            for event in events:
                settlement.settle(event)
        else:
            usage.record(events)
            self.untold += events
        for event in events:
            self.books.jobs.setdefault(event.job_id, Job(event))

    @rule()
    def settle_what_redis_does_not_know(self) -> None:
        entries = [stream.Entry("", encode_event(event)) for event in reversed(self.untold)]
        self.settler.settle_entries(entries)
        self.untold = []

    @rule(payer=st.integers(0, 1), amount=st.integers(1, 500), kind=st.sampled_from(["credit", "less", "more"]))
    def correct(self, payer: int, amount: int, kind: str) -> None:
        organization_id = self.organizations[payer][0]
        reference = f"corr_{self.number}_{len(self.books.others)}"
        for _ in range(2):
            self._post(kind, organization_id, amount, reference)
        with pytest.raises(AiscaleError):
            self._post(kind, organization_id, amount + 1, reference)
        self.books.others[reference] = (kind, organization_id, amount if kind == "more" else -amount)

    def _post(self, kind: str, organization_id: str, amount: int, reference: str) -> None:
        why: Any = {"reason": "Because", "by": ADA, "reference": reference}
        if kind == "credit":
            corrections.give_credit(organization_id, amount, source="goodwill", **why)
        else:
            corrections.adjust(organization_id, amount if kind == "more" else -amount, **why)

    @rule(data=st.data(), amount=st.integers(1, 300))
    def refund(self, data: st.DataObject, amount: int) -> None:
        if not self.books.jobs:
            return
        job = self.books.jobs[data.draw(st.sampled_from(sorted(self.books.jobs)))]
        self.count += 1
        record = UsageRecord.objects.get(job_id=job.event.job_id)
        why: Any = {"reason": "Because", "by": ADA, "reference": f"refund_{self.number}_{self.count}"}
        if amount > job.left:
            with pytest.raises(AiscaleError):
                corrections.refund(record, amount, **why)
            return
        first, again = (corrections.refund(record, amount, **why) for _ in range(2))
        assert first == again
        job.refunds -= amount

    @rule(model=st.integers(0, 1), terms=st.sampled_from(TERMS))
    def rate_again(self, model: int, terms: prices.Terms) -> None:
        """M9: at other prices, and later orders win over earlier ones however often all of them are carried out."""
        now = timezone.now()
        order = Order(self.models[model], now - timedelta(hours=1), now + timedelta(hours=1), terms)
        rerating.order(order, reason="Because", by=ADA)
        rerating.apply_open()
        self.rated[self.models[model]] = terms
        self._rate_in_model()

    @rule()
    def rate_what_is_open(self) -> None:
        rerating.apply_open()
        self._rate_in_model()
        assert rerating.apply_open() == 0

    def _rate_in_model(self) -> None:
        for model, terms in self.rated.items():
            self.books.rate(model, terms)

    @rule(data=st.data())
    def lose_a_copy(self, data: st.DataObject) -> None:
        scope = data.draw(st.sampled_from(self.scopes))
        self.client.delete(keys.spend(scope))
        balance.publish(scope)

    @invariant()
    def all_sums_are_zero_and_the_models(self) -> None:
        assert list_unbalanced() == []
        for organization_id, _, _ in self.organizations:
            expected = self.books.sum_of(organization_id)
            statement = statements.build(organization_id, statements.read_days(organization_id))
            jobs = [job for job in self.books.jobs.values() if job.event.billing.organization_id == organization_id]
            assert (
                statement.ledger_nanousd
                == statement.total_nanousd
                == ledger.sum_this_month(organization_id)
                == expected
            )
            assert statement.usage_nanousd == sum(job.cost for job in jobs)
            assert statement.requests == len(jobs)
        rows = {
            row.scope: row.spent_nanousd for row in SpendTotal.objects.filter(scope__in=self.scopes, period="monthly")
        }
        assert rows == {scope: self.books.count_in(scope) for scope in self.scopes}
        corrected = Correction.objects.filter(usage__job_id__in=list(self.books.jobs)).values_list("usage__job_id")
        changes = {name: job.refunds + job.ratings for name, job in self.books.jobs.items()}
        assert dict.fromkeys(changes, 0) | dict(corrected.annotate(Sum("amount_nanousd"))) == changes

    @invariant()
    def totals_are_what_is_recorded_and_the_gate_knows_them(self) -> None:
        for row in SpendTotal.objects.filter(scope__in=self.scopes):
            assert row.spent_nanousd == totals.sum_recorded(row.scope, row.start_at, row.end_at)
            if not self.untold:
                assert read_spend(row.scope)["monthly_spent_nanousd"] == str(row.spent_nanousd), row.scope


def list_unbalanced() -> list[Any]:
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT transaction_id FROM {LedgerEntry._meta.db_table} GROUP BY 1 HAVING sum(amount_nanousd) <> 0 OR count(*) < 2"
        )
        return list(cursor.fetchall())


@pytest.mark.django_db(transaction=True)
def test_the_ledger_is_what_its_model_says(redis_url: str) -> None:
    health = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        LedgerMachine,
        settings=settings(max_examples=10, stateful_step_count=15, deadline=None, suppress_health_check=health),
    )
