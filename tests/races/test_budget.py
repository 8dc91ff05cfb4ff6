"""Two hundred clients at once, and a budget that pays for thirty-seven of them (M1)."""

import asyncio

import pytest
from redis import Redis

from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from aiscale.wire.codec import encode_event
from aiscale.wire.events import Finished
from apps.accounts.callers import on_thread
from apps.spend import balance, budgets, settlement, stream
from apps.spend.admission import Admitted, admit
from apps.spend.models import LedgerEntry, UsageRecord
from apps.spend.settlement import Settler
from tests.apps.spend.cast import (
    MODEL,
    make_ask,
    make_caller,
    make_finished,
    publish_key,
    read_spend,
    scope_of,
    set_budget,
    stage,
)

pytestmark = pytest.mark.django_db(transaction=True)
PRICE = 65
"""What `make_finished` costs, in nano-USD."""
DIGEST = "ab" * 32


async def try_all(count: int, caller: object, worst_nanousd: int, code: Code = Code.BUDGET_EXHAUSTED) -> list[str]:
    """Ask ``count`` times at once; return the job ids that were let in."""
    asks = [make_ask(caller, worst_nanousd=worst_nanousd) for _ in range(count)]  # type: ignore[arg-type]
    answers = await asyncio.gather(*(admit(ask) for ask in asks), return_exceptions=True)
    for answer in answers:
        assert isinstance(answer, Admitted) or (
            isinstance(answer, AiscaleError) and answer.code in (Code.BUDGET_EXHAUSTED, code)
        )
    return [ask.job_id for ask, answer in zip(asks, answers, strict=True) if isinstance(answer, Admitted)]


@pytest.mark.parametrize("kind", budgets.KINDS)
async def test_m1_no_more_are_served_than_a_budget_of_any_scope_pays_for(kind: str, client: Redis) -> None:
    """M1, and M11: a user's budget is one of them."""
    organization = await stage()
    publish_key(DIGEST, organization.public_id)
    caller = make_caller(organization, key_digest=DIGEST)
    scopes = budgets.list_scopes(
        organization_id=organization.public_id, plan="free", model=MODEL, user_id=caller.user_id, key_id=caller.key_id
    )
    [scope] = [scope for scope in scopes if scope.partition(":")[0] == kind]
    await set_budget(scope, 37 * PRICE)
    await on_thread(balance.restore)
    # a site budget that is used up stops the service
    code = Code.KILLED if kind == "site" else Code.BUDGET_EXHAUSTED
    admitted = await try_all(200, caller, PRICE, code)
    assert len(admitted) == 37
    tag = {"key_id": caller.key_id, "hold_nanousd": PRICE}
    finished = [make_finished(organization.public_id, job_id, **tag) for job_id in admitted]
    await on_thread(lambda: Settler(client).settle_entries(enter(finished)))
    assert await try_all(50, caller, PRICE, code) == []
    spend = read_spend(scope)
    assert (spend["monthly_spent_nanousd"], spend["held_nanousd"]) == (str(37 * PRICE), "0")
    assert [client.zcard(keys.holds(scope)) for scope in scopes] == [0] * 6
    records = await on_thread(lambda: list(UsageRecord.objects.values_list("job_id", "cost_nanousd")))
    assert sorted(job_id for job_id, _ in records) == sorted(admitted)
    assert sum(cost for _, cost in records) == 37 * PRICE
    amounts = await on_thread(lambda: list(LedgerEntry.objects.values_list("amount_nanousd", flat=True)))
    assert sum(amounts) == 0 and max(amounts) == PRICE


def enter(events: list[Finished]) -> list[stream.Entry]:
    """Make the stream's entries of events."""
    return [stream.Entry("", encode_event(event)) for event in events]


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
