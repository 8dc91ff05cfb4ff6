"""Credits, refunds and adjustments: posted once, explained, never more than was charged, and at the gate at once."""

import threading
from datetime import UTC, datetime

import pytest
from django.db import Error, IntegrityError, connection, transaction
from django.utils import timezone

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from apps.accounts import audit
from apps.accounts.models import AuditEvent
from apps.spend import balance, carryover, corrections, holds, ledger, periods, settlement
from apps.spend.admission import admit
from apps.spend.models import Correction, LedgerEntry, LedgerTransaction, UsageRecord
from tests.apps.spend.cast import (
    make_ask,
    make_caller,
    make_finished,
    make_organization,
    on_thread,
    scope_of,
    spent,
    stage,
    warm,
)

pytestmark = pytest.mark.django_db(transaction=True)
BY = audit.by_system("test")
PRICE = 65
MONTH = f"{timezone.now():%Y-%m}"


@pytest.fixture
def organization(client):
    return warm(make_organization())


def credit(organization, amount=1000, *, reference="corr_1", source="prepaid", reason="Paid by bank"):
    return corrections.give_credit(
        organization.public_id, amount, source=source, reason=reason, by=BY, reference=reference
    )


def adjust(organization, amount, *, reference="corr_2"):
    return corrections.adjust(organization.public_id, amount, reason="A mistake", by=BY, reference=reference)


def refund(record, amount, *, reference="corr_3"):
    return corrections.refund(record, amount, reason="It was useless", by=BY, reference=reference)


def charge(organization, **changes) -> UsageRecord:
    event = make_finished(organization.public_id, **changes)
    settlement.settle(event)
    return UsageRecord.objects.get(job_id=event.job_id)


def test_a_credit_raises_what_may_be_spent(organization):
    posted = credit(organization, 1000)
    assert spent(organization) == -1000 == ledger.sum_charges(organization.public_id, MONTH)
    entries = dict(posted.entries.values_list("account", "amount_nanousd"))
    assert entries == {f"organization:{organization.public_id}": -1000, "cash:prepaid": 1000}
    assert (posted.kind, posted.memo) == ("credit", "Paid by bank")
    charge(organization)
    assert spent(organization) == PRICE - 1000 == ledger.sum_charges(organization.public_id, MONTH)


async def test_the_gate_counts_a_credit_within_its_limit(client):
    organization = await stage(monthly_limit_nanousd=100)
    caller = make_caller(organization)
    with pytest.raises(AiscaleError) as refused:
        await admit(make_ask(caller, worst_nanousd=150))
    assert refused.value.code is Code.BUDGET_EXHAUSTED
    await on_thread(lambda: credit(organization, 60))
    await admit(make_ask(caller, worst_nanousd=150))
    with pytest.raises(AiscaleError):
        await admit(make_ask(caller, worst_nanousd=11))
    await admit(make_ask(caller, worst_nanousd=10))


def test_what_a_credit_is_paid_from(organization):
    credit(organization, 5, source="goodwill", reference="corr_a")
    credit(organization, 7, source="prepaid", reference="corr_b")
    others = LedgerEntry.objects.exclude(account__startswith="organization:")
    assert dict(others.values_list("account", "amount_nanousd")) == {"expense:goodwill": 5, "cash:prepaid": 7}


def test_each_is_audited_with_who_and_why(organization):
    posted = credit(organization, 1000)
    event = AuditEvent.objects.get(action="ledger.credit")
    assert (event.target, event.reason, event.actor) == (f"transaction:{posted.public_id}", "Paid by bank", "test")
    assert event.organization_id == organization.public_id
    assert event.details["amount_nanousd"] == -1000


def test_adjustments_go_either_way(organization):
    adjust(organization, 40, reference="corr_up")
    assert spent(organization) == 40
    adjust(organization, -15, reference="corr_down")
    assert spent(organization) == 25
    assert LedgerEntry.objects.filter(account="revenue:usage").count() == 2


def test_a_refund_is_never_more_than_was_charged_in_sum(organization):
    record = charge(organization)
    refund(record, 20, reference="corr_a")
    refund(record, 45, reference="corr_b")
    assert (corrections.count_left(record), spent(organization)) == (0, 0)
    for amount in (1, 66):
        with pytest.raises(AiscaleError, match=r"\$0.00 is left"):
            refund(record, amount, reference=f"corr_{amount}")
    assert Correction.objects.count() == 2
    assert LedgerTransaction.objects.filter(kind="refund").count() == 2


def test_m7_a_failed_answer_has_nothing_to_give_back(organization):
    record = charge(organization, finish_reason="error", error_code="engine_failed")
    with pytest.raises(AiscaleError, match=r"\$0.00 is left"):
        refund(record, 1)


def test_the_database_itself_refuses_to_give_back_too_much(organization):
    record = charge(organization)
    with pytest.raises(IntegrityError, match="more than was charged"), transaction.atomic():
        [posted] = ledger.post(
            [
                ledger.Posting(
                    kind="refund",
                    reference="r",
                    occurred_at=timezone.now(),
                    entries=((ledger.organization_account(organization.public_id), -66), (ledger.REVENUE_ACCOUNT, 66)),
                )
            ]
        )
        Correction.objects.create(usage=record, transaction=posted, amount_nanousd=-66)
    assert Correction.objects.count() == 0


def test_corrections_are_append_only(organization):
    record = charge(organization)
    refund(record, 5)
    row = Correction.objects.get()
    with pytest.raises(Error, match="append-only"):
        row.save()
    with pytest.raises(Error, match="append-only"):
        Correction.objects.all()._raw_delete("default")
    with connection.cursor() as cursor, pytest.raises(Error, match="append-only"):
        cursor.execute("TRUNCATE spend_correction")


@pytest.mark.parametrize(
    "again",
    [
        lambda organization, record: credit(organization, 10),
        lambda organization, record: adjust(organization, 10),
        lambda organization, record: refund(record, 10),
    ],
)
def test_each_is_posted_exactly_once(organization, again):
    record = charge(organization)
    first = again(organization, record)
    after = spent(organization)
    assert again(organization, record) == first
    assert spent(organization) == after == ledger.sum_charges(organization.public_id, MONTH)
    assert LedgerTransaction.objects.exclude(kind="usage").count() == 1
    assert AuditEvent.objects.filter(action__startswith="ledger.").count() == 1


def test_a_reference_is_not_used_for_something_else(organization):
    other = warm(make_organization("pro", name="Bob's"))
    credit(organization, 10)
    for payer, amount in ((organization, 11), (other, 10)):
        with pytest.raises(AiscaleError, match="another amount or for another organization"):
            credit(payer, amount)


def test_m8_rivals_refund_a_request_once(organization):
    """Eight at once, each of which alone would be right: together they give back what was charged and no more."""
    record = charge(organization)
    start, outcomes = threading.Barrier(8), []

    def work(number: int) -> None:
        try:
            start.wait()
            refund(record, 20, reference=f"corr_{number}")
            outcomes.append("refunded")
        except AiscaleError as error:
            outcomes.append(error.param)
        finally:
            connection.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) == ["amount"] * 5 + ["refunded"] * 3
    assert (corrections.count_left(record), spent(organization)) == (5, 5)


@pytest.mark.parametrize(
    ("call", "param"),
    [
        (lambda o: credit(o, 0), "amount"),
        (lambda o: credit(o, -5), "amount"),
        (lambda o: credit(o, 9_000_001 * 10**9), "amount"),
        (lambda o: adjust(o, 0), "amount"),
        (lambda o: credit(o, 5, reason=" "), "reason"),
        (lambda o: credit(o, 5, reason="x" * 301), "reason"),
        (lambda o: credit(o, 5, reason="a\0b"), "reason"),
        (lambda o: credit(o, 5, source="stolen"), "source"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_posted(organization, call, param):
    with pytest.raises(AiscaleError) as refused:
        call(organization)
    assert (refused.value.code, refused.value.param) == (Code.INVALID_REQUEST, param)
    assert LedgerTransaction.objects.count() == AuditEvent.objects.count() == 0


def test_who_does_not_exist_gets_nothing(client):
    with pytest.raises(AiscaleError) as refused:
        corrections.give_credit("org_none", 5, source="goodwill", reason="x", by=BY, reference="corr_1")
    assert refused.value.code is Code.NOT_FOUND


def test_more_than_can_be_counted_exactly_is_refused(organization):
    credit(organization, 5_000_000 * 10**9, reference="corr_a")
    with pytest.raises(AiscaleError, match="9 million"):
        credit(organization, 5_000_000 * 10**9, reference="corr_b")
    assert LedgerTransaction.objects.count() == 1


def test_a_correction_reaches_the_gate_though_redis_was_down(organization, client, monkeypatch):
    def nobody(*args, **kwargs):
        raise redis_clients.RedisConnectionError("nobody is there")

    with monkeypatch.context() as broken:
        broken.setattr(holds, "get_script", nobody)
        credit(organization, 100)
    assert (spent(organization), ledger.sum_charges(organization.public_id, MONTH)) == (0, -100)
    settlement.Settler(client).turn(1)
    assert spent(organization) == -100


# --- credit goes along into the next month ------------------------------------------------------------------------------------


def post(organization, amount, moment, reference, kind="credit"):
    account = ledger.organization_account(organization.public_id)
    ledger.post(
        [
            ledger.Posting(
                kind=kind, reference=reference, occurred_at=moment, entries=((account, amount), ("x", -amount))
            )
        ]
    )


def day(month: str, number: int = 15) -> datetime:
    return datetime(int(month[:4]), int(month[5:]), number, 12, tzinfo=UTC)


def test_unused_credit_is_carried_once_and_again_less_when_a_late_charge_comes(organization):
    name, last = organization.public_id, periods.month_before(MONTH)
    post(organization, -100, day(last), "c1")
    post(organization, 30, day(last), "u1", "usage")
    assert [carryover.carry(name, last), carryover.carry(name, last)] == [70, 0]
    assert [ledger.sum_charges(name, month) for month in (last, MONTH)] == [0, -70]
    post(organization, 25, day(last), "u2", "usage")
    assert [carryover.carry(name, last), carryover.carry(name, last)] == [-25, 0]
    assert [ledger.sum_charges(name, month) for month in (last, MONTH)] == [0, -45]
    post(organization, 50, day(last), "u3", "usage")
    assert carryover.carry(name, last) == -45
    assert [ledger.sum_charges(name, month) for month in (last, MONTH)] == [5, 0]
    bridge = LedgerEntry.objects.filter(account=f"carried:{name}").values_list("amount_nanousd", flat=True)
    assert sum(bridge) == 0


def test_a_month_without_credit_carries_nothing(organization):
    last = periods.month_before(MONTH)
    post(organization, 30, day(last), "u1", "usage")
    post(organization, -10, day(last), "c1")
    assert carryover.carry(organization.public_id, last) == 0
    assert carryover.carry_all() == 0
    with pytest.raises(ValueError, match="not over"):
        carryover.carry(organization.public_id, MONTH)


def test_credit_goes_through_months_in_which_nothing_ran(organization):
    name = organization.public_id
    months = [MONTH]
    for _ in range(4):
        months.insert(0, periods.month_before(months[0]))
    with connection.cursor() as cursor:
        post(organization, -100, day(months[0]), "c1")
        # written when it happened
        cursor.execute("SET session_replication_role = replica")
        cursor.execute("UPDATE spend_ledgertransaction SET created_at = occurred_at")
        cursor.execute("SET session_replication_role = DEFAULT")
    post(organization, 20, day(months[1]), "u1", "usage")
    assert carryover.carry_all() == 4
    assert carryover.carry_all() == 0
    assert [ledger.sum_charges(name, month) for month in months] == [0, 0, 0, 0, -80]


async def test_the_first_request_of_a_month_has_the_credit_of_the_last(client, monkeypatch):
    organization = await stage(monthly_limit_nanousd=0)
    await on_thread(lambda: credit(organization, 100))
    caller = make_caller(organization)
    end_ms = periods.span_of("monthly", "UTC", periods.now_ms()).end_ms
    monkeypatch.setattr(periods, "now_ms", lambda: end_ms)
    await admit(make_ask(caller, worst_nanousd=100, deadline_at_ms=end_ms + 60_000))
    assert spent(organization) == -100


def test_publishing_carries_first(organization):
    name, last = organization.public_id, periods.month_before(MONTH)
    post(organization, -100, day(last), "c1")
    balance.publish(scope_of(organization))
    assert spent(organization) == -100 == ledger.sum_charges(name, MONTH)
