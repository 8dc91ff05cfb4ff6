"""Two settlements at once, over the same jobs in opposite orders, with corrections in between (M8): nothing deadlocks, nothing is lost."""

import random
import threading
import time
from collections.abc import Callable

import pytest
from django.db import connection
from redis import Redis

from aiscale.wire import keys
from aiscale.wire.codec import encode_event
from aiscale.wire.events import Finished
from apps.accounts.models import Organization
from apps.spend import corrections, ledger, settlement, stream
from apps.spend.models import LedgerEntry, SpendTotal, UsageRecord
from apps.spend.settlement import Settler
from tests.apps.spend.cast import ADA, make_finished, make_organization, read_spend, scope_of, send, warm

pytestmark = pytest.mark.django_db(transaction=True)
PRICE = 65
ROUNDS, JOBS = 12, 40


def run_together(*works: Callable[[], None]) -> list[BaseException]:
    """Do all at once, each with a connection of its own. Returns what they raised."""
    failures: list[BaseException] = []
    gate = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        try:
            gate.wait(20)
            work()
        except BaseException as error:  # noqa: BLE001 - each failure is told
            failures.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return failures


def make_jobs(organizations: list[Organization]) -> list[Finished]:
    return [
        make_finished(
            organizations[number % len(organizations)].public_id, f"job_{number:04}", user_id=f"usr_{number % 7}"
        )
        for number in range(ROUNDS * JOBS)
    ]


def test_m8_settlers_in_opposite_orders_charge_each_job_once(client: Redis) -> None:
    organizations = [warm(make_organization(name=name)) for name in ("Ada's", "Bob's", "Cleo's")]
    events = make_jobs(organizations)

    def settle(order: int) -> None:
        settler = Settler(client)
        mixed = random.Random(order).sample(events, len(events))[::order]
        for first in range(0, len(mixed), JOBS):
            entries = [stream.Entry("", encode_event(event)) for event in mixed[first : first + JOBS]]
            settler.settle_entries(entries)

    def correct() -> None:
        for number in range(10):
            for organization in organizations[:: 1 if number % 2 else -1]:
                why = {"reason": "A present", "by": ADA, "reference": f"{organization.public_id}-{number}"}
                corrections.give_credit(organization.public_id, 5, source="goodwill", **why)  # type: ignore[arg-type]

    assert run_together(lambda: settle(1), lambda: settle(-1), correct) == []
    assert UsageRecord.objects.count() == len(events)
    for organization in organizations:
        expected = PRICE * len(events) // 3 - 50
        assert ledger.sum_this_month(organization.public_id) == expected
        assert read_spend(scope_of(organization))["monthly_spent_nanousd"] == str(expected)
        assert SpendTotal.objects.get(scope=scope_of(organization), period="monthly").spent_nanousd == expected
    assert sum(LedgerEntry.objects.values_list("amount_nanousd", flat=True)) == 0


def test_m8_two_settlement_processes_share_a_stream_and_one_of_them_is_gone(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    organization = warm(make_organization())
    monkeypatch.setattr(settlement, "CLAIM_IDLE_MS", 200)
    stream.ensure_groups(client)
    events = make_jobs([organization])
    send([*events, *events[:50]])
    # it read, and died before it charged anything
    assert len(stream.read(client, "gone", ">", count=100)) == 100
    stop = threading.Event()

    def watch() -> None:
        ends_at = time.monotonic() + 30
        while time.monotonic() < ends_at and not is_all_settled(client, len(events)):
            time.sleep(0.05)
        stop.set()

    assert run_together(lambda: settlement.run(stop), lambda: settlement.run(stop), watch) == []
    assert is_all_settled(client, len(events))
    assert ledger.sum_this_month(organization.public_id) == PRICE * len(events)
    assert read_spend(scope_of(organization))["monthly_spent_nanousd"] == str(PRICE * len(events))


def is_all_settled(client: Redis, count: int) -> bool:
    pending = client.xpending(keys.FINISHED, keys.GROUP_SETTLEMENT)["pending"]
    return UsageRecord.objects.count() == count and pending == 0
