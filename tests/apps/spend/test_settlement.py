"""Show that each finished job is charged once, whatever breaks, and that nothing that is broken blocks the rest."""

import threading
import time

import msgspec
import pytest

from aiscale import redis as redis_clients
from aiscale.wire import keys
from aiscale.wire.events import Delta
from apps.spend import balance, holds, killswitch, ledger, periods, settlement, stream, totals, usage
from apps.spend.admission import admit
from apps.spend.models import LedgerEntry, LedgerTransaction, UsageRecord
from tests.apps.spend.cast import (
    make_ask,
    make_caller,
    make_finished,
    make_organization,
    on_thread,
    read_spend,
    scope_of,
    send,
    spent,
    stage,
    warm,
)

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def organization(client):
    return warm(make_organization())


@pytest.fixture
def settler(client):
    return settlement.Settler(client)


def pending(client) -> int:
    return client.xpending(keys.FINISHED, keys.GROUP_SETTLEMENT)["pending"]


async def test_m5_what_is_held_becomes_what_it_cost(client):
    organization = await stage()
    ask = make_ask(make_caller(organization), worst_nanousd=1000)
    await admit(ask)
    send([make_finished(organization.public_id, ask.job_id)])
    await on_thread(lambda: settlement.Settler(client).turn(0 + 1))
    after = read_spend(scope_of(organization))
    assert (after["monthly_spent_nanousd"], after["held_nanousd"]) == ("65", "0")
    assert client.zcard(keys.holds(scope_of(organization))) == client.zcard(keys.holds("site")) == 0


def test_the_record_says_all_and_the_ledger_balances(client, organization, settler):
    event = make_finished(organization.public_id, user_id="usr_9", key_id="key_9", first_token_ms=None)
    send([event])
    assert settler.turn(1) == 1
    record = UsageRecord.objects.get()
    assert (record.job_id, record.organization_id, record.user_id, record.key_id) == (
        event.job_id,
        organization.public_id,
        "usr_9",
        "key_9",
    )
    assert (record.prompt_tokens, record.completion_tokens, record.cost_nanousd) == (10, 5, 65)
    assert (record.first_token_ms, record.duration_ms, record.hold_nanousd) == (None, 1400, 1000)
    assert int(record.occurred_at.timestamp() * 1000) == event.finished_at_ms
    entries = {entry.account: entry.amount_nanousd for entry in LedgerEntry.objects.all()}
    assert entries == {f"organization:{organization.public_id}": 65, "revenue:usage": -65}
    assert LedgerTransaction.objects.get().reference == event.job_id
    assert pending(client) == 0


def test_an_error_is_recorded_and_not_charged(organization, settler):
    send([make_finished(organization.public_id, finish_reason="error", error_code="engine_failed")])
    settler.turn(1)
    record = UsageRecord.objects.get()
    assert (record.cost_nanousd, record.error_code, record.prompt_tokens) == (0, "engine_failed", 10)
    assert LedgerTransaction.objects.count() == 0
    assert spent(organization) == 0


def test_m7_a_replay_changes_nothing(client, organization, settler):
    event = make_finished(organization.public_id)
    for _ in range(3):
        send([event, event])
        settler.turn(1)
    assert (UsageRecord.objects.count(), LedgerEntry.objects.count(), spent(organization)) == (1, 2, 65)
    assert pending(client) == 0


def test_settle_charges_once_outside_the_stream(organization):
    event = make_finished(organization.public_id)
    assert [settlement.settle(event) for _ in range(3)] == [True, False, False]
    assert (UsageRecord.objects.count(), spent(organization)) == (1, 65)


def test_a_batch_of_several_payers_is_seven_statements(organization, settler, django_assert_num_queries):
    other = warm(make_organization("pro", name="Bob's"))
    send([make_finished(payer.public_id) for payer in (organization, other) for _ in range(50)])
    stream.ensure_groups(settler.client)
    entries = stream.read(settler.client, settler.consumer, ">", count=200)
    with django_assert_num_queries(9):  # seven, and the transaction's begin and commit
        settler.settle_entries(entries)
    assert (spent(organization), spent(other)) == (3250, 3250)
    assert UsageRecord.objects.count() == 100


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"\xc1 no message", "DecodeError"),
        (b"", "DecodeError"),
        (msgspec.msgpack.encode({"type": "unheard of"}), "ValidationError"),
        (msgspec.msgpack.encode(Delta(job_id="j", seq=0, text="x", completion_tokens=1)), "not a Finished"),
        ({"prompt_tokens": -5}, "negative"),
        ({"completion_nanousd_per_token": -7}, "negative"),
        ({"prompt_tokens": 1 << 62}, "beyond counting"),
        ({"model": "a\0b"}, "NUL"),
        ({"worker_id": "w" * 200}, "DataError"),
        ({"job_id": "j" * 65}, "DataError"),
        ({"queued_ms": 1 << 64 - 1}, "DataError"),
        ({"admitted_at_ms": -1}, "negative time"),
    ],
)
def test_m8_an_event_that_cannot_be_charged_is_set_aside_and_blocks_nobody(client, organization, settler, bad, reason):
    if isinstance(bad, dict):
        bad = make_finished(organization.public_id, **bad)
    good = [make_finished(organization.public_id) for _ in range(3)]
    send([good[0], bad, good[1], good[2]])
    settler.turn(1)
    assert UsageRecord.objects.count() == 3
    assert spent(organization) == 195
    [(_, dead)] = client.xrange(keys.FINISHED_DEAD)
    assert reason in dead[b"reason"].decode()
    assert pending(client) == 0


def test_what_a_dead_consumer_left_is_taken_over(client, organization, settler, monkeypatch):
    send([make_finished(organization.public_id) for _ in range(5)])
    stream.ensure_groups(client)
    assert len(stream.read(client, "died-before-it-settled", ">", count=10)) == 5
    monkeypatch.setattr(settlement, "CLAIM_IDLE_MS", 0)
    settler.turn(1)
    assert (UsageRecord.objects.count(), spent(organization), pending(client)) == (5, 325, 0)


def test_m8_died_between_the_ledger_and_redis(client, organization, settler, monkeypatch):
    """The worst moment: committed in Postgres, neither added nor acknowledged in Redis."""

    def die(*args):
        raise redis_clients.RedisConnectionError("the cable was pulled")

    send([make_finished(organization.public_id) for _ in range(4)])
    with monkeypatch.context() as broken:
        broken.setattr(holds, "settle", die)
        with pytest.raises(redis_clients.RedisConnectionError):
            settler.turn(1)
    assert (UsageRecord.objects.count(), spent(organization), pending(client)) == (4, 0, 4)
    settler.start_over()
    settler.turn(1)
    assert (UsageRecord.objects.count(), spent(organization), pending(client)) == (4, 260, 0)


def test_m8_redis_answered_and_the_answer_was_lost(client, organization, settler, monkeypatch):
    """The client runs the script again: what it counted once is not counted twice."""
    really_settle = holds.settle

    def settle_twice(*args):
        really_settle(*args)
        return really_settle(*args)

    monkeypatch.setattr(holds, "settle", settle_twice)
    send([make_finished(organization.public_id) for _ in range(4)])
    settler.turn(1)
    assert (spent(organization), pending(client)) == (260, 0)


def test_the_copy_is_rebuilt_between_commit_and_redis(client, organization, settler, monkeypatch):
    """A rebuild that has the cost already comes before settlement tells Redis."""
    really_settle = holds.settle

    def rebuild_first(*args):
        balance.publish(scope_of(organization))
        return really_settle(*args)

    monkeypatch.setattr(holds, "settle", rebuild_first)
    send([make_finished(organization.public_id)])
    settler.turn(1)
    assert (spent(organization), pending(client)) == (65, 0)


def test_a_cost_arrives_between_the_reading_and_the_writing_of_a_copy(client, organization, settler, monkeypatch):
    """A rebuild that lacks the cost does not wipe it out, whether the copy is there meanwhile or not."""
    really_open = totals.open_totals
    for missing in (False, True):
        settled = []

        def open_and_settle(*args, settled=settled, missing=missing):
            found = really_open(*args)
            if not settled:
                if missing:
                    client.delete(keys.spend(scope_of(organization)))
                settled.append(settler.turn(1))
            return found

        monkeypatch.setattr(totals, "open_totals", open_and_settle)
        send([make_finished(organization.public_id)])
        balance.publish(scope_of(organization))
        assert settled == [1]
        assert (spent(organization), pending(client)) == (130 if missing else 65, 0)


def test_an_older_total_that_arrives_late_does_not_undo_a_newer_one(client, organization, settler, monkeypatch):
    """Two settlements: the one that read first writes last."""
    really_settle, late = holds.settle, []
    monkeypatch.setattr(holds, "settle", lambda *args: late.append(args))
    send([make_finished(organization.public_id)])
    settler.turn(1)
    monkeypatch.setattr(holds, "settle", really_settle)
    settlement.settle(make_finished(organization.public_id))
    assert spent(organization) == 130
    really_settle(*late[0])
    assert (spent(organization), pending(client)) == (130, 0)


def test_a_copy_that_is_missing_is_left_missing_and_rebuilt_whole(client, organization, settler):
    client.delete(keys.spend(scope_of(organization)))
    send([make_finished(organization.public_id)])
    settler.turn(1)
    assert read_spend(scope_of(organization)) == {}
    balance.publish(scope_of(organization))
    assert spent(organization) == 65


def test_a_redis_that_forgot_its_last_second_is_told_again(client, organization, settler):
    before = client.dump(keys.spend(scope_of(organization)))
    settlement.settle(make_finished(organization.public_id))
    client.restore(keys.spend(scope_of(organization)), 0, before, replace=True)
    assert spent(organization) == 0
    settler.turn(1)
    assert spent(organization) == 65


def test_after_flushall_it_goes_on(client, organization, settler):
    send([make_finished(organization.public_id)])
    settler.turn(1)
    client.flushall()
    settler.turn(1)
    settler.turn(1)
    send([make_finished(organization.public_id)])
    settler.turn(1)
    balance.publish(scope_of(organization))
    assert (UsageRecord.objects.count(), spent(organization)) == (2, 130)


def test_what_ended_last_month_is_not_charged_to_this_one(client, organization, settler):
    start, _ = periods.bounds(periods.month_of(periods.now_ms()))
    last_month_ms = int(start.timestamp() * 1000) - 1
    send([make_finished(organization.public_id, finished_at_ms=last_month_ms, admitted_at_ms=last_month_ms - 1000)])
    settler.turn(1)
    assert (UsageRecord.objects.count(), spent(organization)) == (1, 0)
    balance.publish(scope_of(organization))
    assert spent(organization) == 0
    assert ledger.sum_charges(organization.public_id, periods.month_of(last_month_ms)) == 65


def test_a_worker_whose_clock_is_wrong_does_not_move_a_cost_to_another_month(organization):
    now_ms = periods.now_ms()
    event = make_finished(organization.public_id, admitted_at_ms=now_ms - 500)
    ends = [now_ms + 10_000_000_000, 0, now_ms - 100]
    bounded = [
        settlement.normalize(msgspec.structs.replace(event, finished_at_ms=end), now_ms).finished_at_ms for end in ends
    ]
    assert bounded == [now_ms, now_ms - 500, now_ms - 100]


def test_the_stream_is_cut_behind_both_groups_and_never_before(client, organization, settler):
    stream.ensure_groups(client)
    send([make_finished(organization.public_id) for _ in range(6)])
    settler.turn(1)
    assert stream.trim(client) == 0  # transcripts have read nothing
    read = client.xreadgroup(keys.GROUP_TRANSCRIPTS, "t", {keys.FINISHED: ">"}, count=4)
    ids = [entry_id for entry_id, _ in read[0][1]]
    client.xack(keys.FINISHED, keys.GROUP_TRANSCRIPTS, *ids[:2])
    assert stream.trim(client) == 2
    client.xack(keys.FINISHED, keys.GROUP_TRANSCRIPTS, *ids)
    assert stream.trim(client) == 2
    assert client.xlen(keys.FINISHED) == 2


def test_it_runs_and_stops(client, organization):
    stop = threading.Event()
    thread = threading.Thread(target=settlement.run, args=(stop,))
    thread.start()
    try:
        send([make_finished(organization.public_id) for _ in range(20)])
        deadline = time.monotonic() + 10
        while UsageRecord.objects.count() < 20 and time.monotonic() < deadline:
            time.sleep(0.02)
        while not client.exists(keys.SETTLEMENT_PRESENCE) and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        stop.set()
        thread.join(5)
    assert not thread.is_alive()
    assert (UsageRecord.objects.count(), spent(organization)) == (20, 1300)


def test_it_outlives_a_database_that_is_gone_for_a_while(client, organization, monkeypatch):
    from django.db import OperationalError

    really_record, failures = usage.record, iter([True, True, False])

    def record(events):
        if next(failures, False):
            raise OperationalError("the server closed the connection unexpectedly")
        return really_record(events)

    monkeypatch.setattr(usage, "record", record)
    stop = threading.Event()
    thread = threading.Thread(target=settlement.run, args=(stop,))
    thread.start()
    try:
        send([make_finished(organization.public_id)])
        deadline = time.monotonic() + 10
        while UsageRecord.objects.count() < 1 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        stop.set()
        thread.join(5)
    assert (UsageRecord.objects.count(), spent(organization), pending(client)) == (1, 65, 0)


def test_the_month_is_summed_up_with_and_without_redis(client, organization, settler, monkeypatch):
    send([make_finished(organization.public_id)])
    settler.turn(1)
    killswitch.restore()
    now_ms = periods.now_ms()
    client.zadd(keys.holds(scope_of(organization)), {"living:40": now_ms + 60_000, "expired:60": now_ms - 1})
    summary = usage.month_summary(organization.public_id)
    assert (summary.spent_nanousd, summary.held_nanousd, summary.limit_nanousd) == (65, 40, 1_000_000_000)
    client.delete(keys.spend(scope_of(organization)))
    assert usage.month_summary(organization.public_id).spent_nanousd == 65

    def nobody():
        raise redis_clients.RedisConnectionError("nobody is there")

    monkeypatch.setattr(redis_clients, "get_sync", nobody)
    summary = usage.month_summary(organization.public_id)
    assert (summary.spent_nanousd, summary.held_nanousd) == (65, 0)
