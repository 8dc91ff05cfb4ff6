"""Refusals are remembered off the hot path, and a flood of them fills nothing."""

import threading
import time
from datetime import timedelta

import pytest
from django.utils import timezone

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from apps.accounts.callers import Caller
from apps.spend import refusal_log, refusal_writer
from apps.spend.models import RefusalCount, RefusedRequest
from apps.spend.refusal_log import KEPT_A_FLUSH, KEPT_A_MINUTE, MOST_COUNTERS, Notes

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def notes(monkeypatch) -> Notes:
    """Notes that are sent when the test says so."""
    notes = Notes(sends_itself=False)
    monkeypatch.setattr(refusal_log, "NOTES", notes)
    return notes


def make_caller(organization_id: str = "org_1") -> Caller:
    return Caller(organization_id=organization_id, user_id="usr_1", key_id="key_1", key_digest="d", plan="free")


def refuse(request_id="req_1", organization_id="org_1", code=Code.RATE_LIMITED, **changes) -> None:
    error = AiscaleError(code, changes.pop("message", "Slow down."), facts={"limit": "20", "model": "m"}, **changes)
    refusal_log.note(request_id, error, source="api", caller=make_caller(organization_id))


def write_down(client) -> int:
    refusal_log.NOTES.flush()
    return refusal_writer.Writer(client).turn(1)


def test_a_refusal_is_written_down_with_its_numbers(client):
    refuse()
    assert write_down(client) == 1
    row = RefusedRequest.objects.get()
    assert (row.request_id, row.organization_id, row.user_id, row.key_id) == ("req_1", "org_1", "usr_1", "key_1")
    assert (row.code, row.message, row.model, row.plan) == ("rate_limit_exceeded", "Slow down.", "m", "free")
    assert row.facts == {"limit": "20"} and abs(row.occurred_at - timezone.now()) < timedelta(minutes=1)
    count = RefusalCount.objects.get()
    assert (count.organization_id, count.code, count.count) == ("org_1", "rate_limit_exceeded", 1)
    assert client.xlen(keys.REFUSED) == 0


def test_the_thread_sends_by_itself(client):
    Notes().add(_refused("req_1"))
    ends_at = time.monotonic() + 20
    while not client.exists(keys.REFUSED) and time.monotonic() < ends_at:
        time.sleep(0.05)
    assert client.xlen(keys.REFUSED) == 1


def test_a_flood_of_one_is_counted_and_a_sample_kept(client):
    for number in range(10_000):
        refuse(f"req_{number}")
    refuse("req_other", "org_2")
    batch = refusal_log.NOTES.take()
    kept = [each for each in batch.kept if each.organization_id == "org_1"]
    # two minutes may have been touched
    assert KEPT_A_MINUTE <= len(kept) <= KEPT_A_FLUSH
    assert "req_other" in [each.request_id for each in batch.kept]
    assert sum(count for organization_id, _, count in batch.counts if organization_id == "org_1") == 10_000


def test_a_flood_of_many_is_bounded_too():
    for number in range(MOST_COUNTERS + 500):
        refuse(f"req_{number}", f"org_{number}")
    batch = refusal_log.NOTES.take()
    assert len(batch.kept) == KEPT_A_FLUSH
    assert len(batch.counts) <= MOST_COUNTERS + 1
    assert sum(count for _, _, count in batch.counts) == MOST_COUNTERS + 500
    assert len(refusal_log.encode(batch)) < 500_000


def test_the_stream_is_capped(client, monkeypatch):
    monkeypatch.setattr(keys, "REFUSED_MAXLEN", 10)
    for number in range(1000):
        refuse(f"req_{number}")
        refusal_log.NOTES.flush()
    assert client.xlen(keys.REFUSED) < 200


def test_no_redis_means_no_note_and_no_error(monkeypatch):
    def nobody():
        raise redis_clients.RedisConnectionError("nobody is there")

    monkeypatch.setattr(redis_clients, "get_sync", nobody)
    refuse()
    refusal_log.NOTES.flush()
    assert refusal_log.NOTES.take() is None


def test_what_ended_after_admission_is_left_to_its_usage_record():
    for code in refusal_log.AFTER_ADMISSION:
        refuse(code=code)
    assert refusal_log.NOTES.take() is None


def test_texts_that_no_table_takes_are_made_to_fit(client):
    refuse("req_\0\udcff" + "x" * 300, message="a\0b" * 1000, param="p" * 200)
    assert write_down(client) == 1
    row = RefusedRequest.objects.get()
    assert len(row.message) == 1000 and "\0" not in row.message and len(row.request_id) == 128


def test_a_replay_doubles_no_single_refusal(client):
    refuse()
    batch = refusal_log.NOTES.take()
    refusal_writer.write([batch])
    refusal_writer.write([batch])
    assert RefusedRequest.objects.count() == 1


def test_counts_of_an_hour_add_up_over_processes(client):
    for notes in (Notes(sends_itself=False), Notes(sends_itself=False)):
        for number in range(3):
            notes.add(_refused(f"req_{id(notes)}_{number}"))
        notes.flush()
    refusal_writer.Writer(client).turn(1)
    assert RefusalCount.objects.get().count == 6 and RefusedRequest.objects.count() == 6


def _refused(request_id: str) -> refusal_log.Refused:
    return refusal_log.Refused(
        request_id=request_id,
        organization_id="org_1",
        user_id="",
        key_id="",
        plan="",
        source="api",
        model="",
        code="killed",
        message="",
        param="",
        facts={},
        occurred_at_ms=time.time_ns() // 1_000_000,
    )


def test_what_a_dead_writer_left_is_taken_over(client, monkeypatch):
    refuse()
    refusal_log.NOTES.flush()
    dead = refusal_writer.Writer(client)
    dead._make_group()
    assert len(dead._read(1)) == 1
    monkeypatch.setattr(refusal_writer, "CLAIM_IDLE_MS", 0)
    assert refusal_writer.Writer(client).turn(1) == 1
    assert RefusedRequest.objects.count() == 1


def test_an_entry_that_cannot_be_read_blocks_nobody(client):
    client.xadd(keys.REFUSED, {"0": b"\xc1 nothing"})
    refuse()
    assert write_down(client) == 2
    assert RefusedRequest.objects.count() == 1 and client.xlen(keys.REFUSED) == 0


def test_it_runs_goes_on_after_an_emptied_redis_and_stops(client):
    stop = threading.Event()
    thread = threading.Thread(target=refusal_writer.run, args=(stop,))
    thread.start()
    try:
        for name in ("req_1", "req_2"):
            ends_at = time.monotonic() + 30
            while not RefusedRequest.objects.filter(request_id=name).exists() and time.monotonic() < ends_at:
                refuse(name)
                refusal_log.NOTES.flush()
                time.sleep(0.2)
            client.flushall()
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()
    assert RefusedRequest.objects.count() == 2


def test_the_table_is_bounded_in_time_and_size(client, monkeypatch):
    now = timezone.now()
    rows = [(f"req_{number}", now - timedelta(days=number % 60)) for number in range(120)]
    RefusedRequest.objects.bulk_create(
        RefusedRequest(request_id=name, source="api", code="killed", message="", occurred_at=at) for name, at in rows
    )
    RefusalCount.objects.create(code="killed", hour=now - timedelta(days=500), count=1)
    monkeypatch.setattr(refusal_writer, "PRUNE_ROWS", 7)
    refusal_writer.prune()
    assert RefusalCount.objects.count() == 0
    kept = RefusedRequest.objects.count()
    assert 58 <= kept <= 62
    monkeypatch.setattr(refusal_writer, "MOST_ROWS", 10)
    refusal_writer.prune()
    assert RefusedRequest.objects.count() <= 10
