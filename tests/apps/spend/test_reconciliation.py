"""`reconcile_budgets` finds every way in which money can disagree, mends what is a copy, and raises no false alarm on a live system."""

import asyncio
import threading
from io import StringIO

import pytest
from django.core.management import call_command
from django.db import connection
from django.utils import timezone

from aiscale.wire import keys
from apps.accounts import audit
from apps.spend import balance, copies, corrections, ledger, periods, reconciliation, settlement, stream
from apps.spend.admission import admit
from apps.spend.models import Budget, LedgerEntry, LedgerTransaction, SpendTotal, UsageRecord
from apps.spend.reconciliation import Kind
from tests.apps.spend.cast import (
    held,
    make_ask,
    make_caller,
    make_finished,
    make_organization,
    on_thread,
    scope_of,
    send,
    spent,
    stage,
    warm,
)
from tests.apps.spend.test_corrections import MONTH, day, post

pytestmark = pytest.mark.django_db(transaction=True)
BY = audit.by_system("test")


def reconcile(*arguments: str, patience: float = 0.3) -> tuple[int, str]:
    """Run the command; return its exit code and what it printed."""
    output = StringIO()
    try:
        call_command("reconcile_budgets", *arguments, patience=patience, stdout=output, stderr=output, no_color=True)
    except SystemExit as end:
        return int(end.code), output.getvalue()
    return 0, output.getvalue()


def break_in(statement: str, *values: object) -> None:
    """Change what the database protects, as somebody with its password could."""
    with connection.cursor() as cursor:
        cursor.execute("SET session_replication_role = replica")
        cursor.execute(statement, values)
        cursor.execute("SET session_replication_role = DEFAULT")


@pytest.fixture
def organization(client):
    """One that has used, was credited and refunded, with a budget of the site beside it."""
    organization = warm(make_organization(requests_per_window=1_000_000))
    Budget.objects.create(scope="site", period="daily", limit_nanousd=10**12)
    balance.publish("site")
    events = [make_finished(organization.public_id) for _ in range(5)]
    events.append(make_finished(organization.public_id, finish_reason="error"))
    for event in events:
        settlement.settle(event)
    corrections.give_credit(organization.public_id, 1000, source="goodwill", reason="x", by=BY, reference="corr_1")
    corrections.refund(UsageRecord.objects.filter(cost_nanousd=65).first(), 5, reason="x", by=BY, reference="corr_2")
    return organization


def test_all_agree(organization):
    code, text = reconcile("--check")
    assert (code, text.count("\n")) == (0, 1), text
    assert "6 usage records" in text and "7 transactions" in text and "All agree." in text
    assert reconcile("--check", "--all")[0] == reconcile("--check", "--since", "2026-01-01")[0] == 0


def first_usage() -> LedgerTransaction:
    return LedgerTransaction.objects.filter(kind="usage").earliest("pk")


BREAKS = {
    "an entry is changed": (
        lambda: break_in("UPDATE spend_ledgerentry SET amount_nanousd = 66 WHERE amount_nanousd = 65"),
        {Kind.UNBALANCED, Kind.CHARGED_WRONGLY, Kind.WRONG_SUM, Kind.TOTAL},
    ),
    "a transaction is gone": (
        lambda: (
            break_in("DELETE FROM spend_ledgerentry WHERE transaction_id = %s", first_usage().pk),
            break_in("DELETE FROM spend_ledgertransaction WHERE id = %s", first_usage().pk),
        ),
        {Kind.NOT_CHARGED, Kind.WRONG_SUM, Kind.TOTAL},
    ),
    "a record is gone": (
        lambda: break_in("DELETE FROM spend_usagerecord WHERE job_id = %s", first_usage().reference),
        {Kind.WITHOUT_RECORD, Kind.WRONG_SUM, Kind.TOTAL},
    ),
    "a record is changed": (
        lambda: break_in("UPDATE spend_usagerecord SET cost_nanousd = 70 WHERE job_id = %s", first_usage().reference),
        {Kind.CHARGED_WRONGLY, Kind.WRONG_SUM, Kind.TOTAL},
    ),
    "another organization is charged": (
        lambda: break_in(
            "UPDATE spend_ledgerentry SET account = 'organization:org_x' WHERE account LIKE 'organization:%%' AND "
            "transaction_id = %s",
            first_usage().pk,
        ),
        {Kind.CHARGED_WRONGLY, Kind.WRONG_SUM, Kind.TOTAL},
    ),
    "a job is charged twice": (
        lambda: ledger.post(
            [ledger.usage_posting(LedgerEntry.objects.first().account[13:], "job_x", 65, timezone.now())]
        ),
        {Kind.WITHOUT_RECORD, Kind.WRONG_SUM},
    ),
    "an entry is gone": (
        lambda: break_in("DELETE FROM spend_ledgerentry WHERE account = 'revenue:usage' AND amount_nanousd = 5"),
        {Kind.UNBALANCED},
    ),
    "a correction is changed": (
        lambda: break_in("UPDATE spend_correction SET amount_nanousd = -66"),
        {Kind.CORRECTIONS, Kind.GIVEN_BACK_TOO_MUCH, Kind.TOTAL},
    ),
    "a correction is gone": (
        lambda: break_in("DELETE FROM spend_correction"),
        {Kind.CORRECTIONS, Kind.TOTAL},
    ),
    "a total is wrong": (lambda: SpendTotal.objects.filter(scope="site").update(spent_nanousd=3), {Kind.TOTAL}),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_differs_in_the_ledger_is_found_and_left_to_a_person(organization, name):
    do, expected = BREAKS[name]
    do()
    report = reconciliation.check_ledger()
    assert {difference.kind for difference in report.differences} == expected
    kept = list(LedgerEntry.objects.order_by("pk").values())
    code, text = reconcile("--check")
    assert code == 1 and "differences" in text
    for kind in expected:
        assert kind.value in text
    code, text = reconcile()
    only_copies = expected <= reconciliation.MENDED
    assert code == (0 if only_copies else 1)
    assert only_copies or "needs a person" in text
    assert list(LedgerEntry.objects.order_by("pk").values()) == kept


COPY_BREAKS = {
    "the copy was changed": (
        lambda o, c: c.hset(keys.spend(scope_of(o)), "monthly_spent_nanousd", "7"),
        {Kind.COPY},
    ),
    "the copy is behind": (
        lambda o, c: c.hset(keys.spend(scope_of(o)), mapping={"monthly_spent_nanousd": "7", "monthly_revision": "1"}),
        {Kind.COPY},
    ),
    "the copy is of another database": (
        lambda o, c: c.hset(keys.spend(scope_of(o)), mapping={"monthly_spent_nanousd": "7", "monthly_revision": "999"}),
        {Kind.COPY},
    ),
    "the held amount is wrong": (lambda o, c: c.hset(keys.spend(scope_of(o)), "held_nanousd", "9"), {Kind.HELD}),
    "a total was changed": (
        lambda o, c: SpendTotal.objects.filter(scope=scope_of(o)).update(spent_nanousd=3),
        {Kind.TOTAL, Kind.COPY},
    ),
}


@pytest.mark.parametrize("name", COPY_BREAKS)
def test_what_differs_in_a_copy_is_found_and_made_anew(organization, client, name):
    right = spent(organization)
    do, expected = COPY_BREAKS[name]
    do(organization, client)
    code, text = reconcile("--check")
    assert code == 1
    for kind in Kind:
        assert (kind.value in text) == (kind in expected), text
    assert reconcile("--check")[0] == 1, "a check changes nothing"
    code, text = reconcile()
    assert code == 0 and "anew" in text
    assert reconcile("--check")[0] == 0
    assert (spent(organization), held(organization)) == (right, 0)


async def test_m2_a_hold_without_a_living_job_is_found_and_ended(client):
    organization = await stage()
    lost, queued, done = (make_ask(make_caller(organization), worst_nanousd=50) for _ in range(3))
    for ask in (lost, queued, done):
        await admit(ask)
    client.hset(keys.job_record(queued.job_id), "state", "queued")
    client.hset(keys.job_record(done.job_id), "state", "done")
    send([make_finished(organization.public_id, done.job_id, hold_nanousd=50)])
    code, text = await on_thread(lambda: reconcile("--check"))
    assert code == 1 and f"hold without a living job: {lost.job_id}" in text
    assert queued.job_id not in text and done.job_id not in text
    assert held(organization) == 150
    assert (await on_thread(reconcile))[0] == 0
    assert held(organization) == 100
    await on_thread(lambda: settlement.Settler(client).turn(1))
    assert held(organization) == 50
    assert (await on_thread(lambda: reconcile("--check")))[0] == 0


def test_what_could_not_be_settled_is_told(organization, client):
    stream.bury(client, stream.Entry("1700000000000-0", b"x"), "DecodeError: nothing in it")
    code, text = reconcile("--check")
    assert code == 1 and "finished job could not be settled: 1700000000000-0: DecodeError" in text


def test_credit_that_stayed_behind_is_told(organization):
    month = periods.month_before(periods.month_before(MONTH))
    post(organization, -100, day(month), "c9")
    break_in("UPDATE spend_ledgertransaction SET created_at = occurred_at")
    code, text = reconcile("--check")
    assert code == 1 and "credit was not carried over" in text and "$0.0000001 is left" in text


def test_no_redis_is_told_apart_from_a_difference(organization, monkeypatch):
    from aiscale import redis as redis_clients

    def nobody():
        raise redis_clients.RedisConnectionError("nobody is there")

    monkeypatch.setattr(redis_clients, "get_sync", nobody)
    assert reconcile("--check")[0] == 2


def test_no_false_alarm_while_money_moves(organization, client):
    """Four threads admit and settle as fast as they can; every look agrees."""
    stop, failures = threading.Event(), []

    def work() -> None:
        caller = make_caller(organization)
        try:
            settler = settlement.Settler(client)
            while not stop.is_set():
                asks = [make_ask(caller, worst_nanousd=100) for _ in range(3)]

                async def admit_all(asks=asks) -> None:
                    for ask in asks:
                        await admit(ask)
                        client.hset(keys.job_record(ask.job_id), "state", "running")

                asyncio.run(admit_all())
                send([make_finished(organization.public_id, ask.job_id, hold_nanousd=100) for ask in asks])
                for ask in asks:
                    client.hset(keys.job_record(ask.job_id), "state", "done")
                settler.turn(1)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            failures.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        reports = [reconcile("--check", patience=30) for _ in range(3)]
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert failures == []
    assert [code for code, _ in reports] == [0] * 3, reports
    settlement.Settler(client).turn(1)
    assert UsageRecord.objects.count() > 20
    assert reconcile("--check", patience=10)[0] == 0


def test_an_event_on_its_way_is_no_difference(organization, client):
    send([make_finished(organization.public_id) for _ in range(3)])
    stream.ensure_groups(client)
    assert len(stream.read(client, "slow", ">", count=2)) == 2
    assert reconcile("--check")[0] == 0
    assert len(copies._list_unsettled(client)) == 3
