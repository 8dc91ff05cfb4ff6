"""Two hundred clients at once, and a budget that pays for thirty-seven of them (M1)."""

import asyncio

import pytest
from redis import Redis

from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from apps.accounts.callers import on_thread
from apps.spend import settlement
from apps.spend.admission import Admitted, admit
from apps.spend.models import LedgerEntry, UsageRecord
from tests.apps.spend.cast import make_ask, make_caller, make_finished, read_spend, scope_of, stage

pytestmark = pytest.mark.django_db(transaction=True)
PRICE = 65
"""What `make_finished` costs, in nano-USD."""


async def try_all(count: int, caller: object, worst_nanousd: int) -> list[str]:
    """Ask ``count`` times at once; return the job ids that were let in."""
    asks = [make_ask(caller, worst_nanousd=worst_nanousd) for _ in range(count)]  # type: ignore[arg-type]
    answers = await asyncio.gather(*(admit(ask) for ask in asks), return_exceptions=True)
    for answer in answers:
        assert isinstance(answer, Admitted) or (
            isinstance(answer, AiscaleError) and answer.code is Code.BUDGET_EXHAUSTED
        )
    return [ask.job_id for ask, answer in zip(asks, answers, strict=True) if isinstance(answer, Admitted)]


async def test_no_more_are_served_than_the_budget_pays_for(client: Redis) -> None:
    organization = await stage(monthly_limit_nanousd=37 * PRICE)
    caller = make_caller(organization)
    admitted = await try_all(200, caller, PRICE)
    assert len(admitted) == 37
    finished = [make_finished(organization.public_id, job_id, hold_nanousd=PRICE) for job_id in admitted]
    await on_thread(lambda: [settlement.settle(event) for event in finished])
    assert await try_all(50, caller, PRICE) == []
    spend = read_spend(scope_of(organization))
    assert (spend["monthly_spent_nanousd"], spend["held_nanousd"]) == (str(37 * PRICE), "0")
    assert client.zcard(keys.holds(scope_of(organization))) == 0
    records = await on_thread(lambda: list(UsageRecord.objects.values_list("job_id", "cost_nanousd")))
    assert sorted(job_id for job_id, _ in records) == sorted(admitted)
    assert sum(cost for _, cost in records) == 37 * PRICE
    amounts = await on_thread(lambda: list(LedgerEntry.objects.values_list("amount_nanousd", flat=True)))
    assert sum(amounts) == 0 and max(amounts) == PRICE


async def test_what_was_not_used_is_there_for_others(client: Redis) -> None:
    organization = await stage(monthly_limit_nanousd=37 * PRICE)
    caller = make_caller(organization)
    # each may cost ten times what it does cost
    served = 0
    for _ in range(60):
        admitted = await try_all(20, caller, 10 * PRICE)
        assert len(admitted) <= 3
        events = [make_finished(organization.public_id, job_id, hold_nanousd=10 * PRICE) for job_id in admitted]
        await on_thread(lambda events=events: [settlement.settle(event) for event in events])
        served += len(admitted)
        if not admitted:
            break
    assert 37 - 9 <= served <= 37
    assert int(read_spend(scope_of(organization))["monthly_spent_nanousd"]) == served * PRICE
