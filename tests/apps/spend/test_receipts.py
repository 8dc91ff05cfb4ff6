"""What reached nobody is not charged; what did, is, however late settlement comes."""

import time

import pytest
from redis import Redis

from aiscale.wire import keys
from aiscale.wire.codec import encode_event
from apps.spend import periods, receipts, stream
from apps.spend.models import UsageRecord
from apps.spend.settlement import Settler
from tests.apps.spend.cast import make_finished, make_organization, warm

pytestmark = pytest.mark.django_db(transaction=True)


def add(client: Redis, organization_id: str, job_id: str, process: str, reply: str) -> None:
    event = make_finished(organization_id, job_id, finished_at_ms=periods.now_ms())
    client.xadd(keys.FINISHED, {"0": encode_event(event), "p": process, "r": reply})


@pytest.mark.parametrize(
    ("progress", "alive", "expected"),
    [
        ("5-0", True, "delivered"),
        ("5-0", False, "delivered"),
        ("6-1", False, "delivered"),
        ("4-9", True, "undecided"),
        ("4-9", False, "lost"),
        (None, True, "undecided"),
        (None, False, "lost"),
    ],
)
def test_each_entry_is_judged(client: Redis, progress: str | None, alive: bool, expected: str) -> None:
    if progress:
        client.set(keys.web_progress("w"), progress)
    if alive:
        client.set(keys.reader_presence("w"), 1)
    client.set(keys.EPOCH, "e")
    judged = receipts.judge(client, [stream.Entry("1-0", b"", "w", "5-0"), stream.Entry("2-0", b"")])
    places = {name: [entry.entry_id for entry in getattr(judged, name)] for name in judged._fields}
    assert places.pop("delivered") == (["2-0", "1-0"] if expected == "delivered" else ["2-0"])
    assert [name for name, found in places.items() if found] == ([] if expected == "delivered" else [expected])


def test_an_answer_that_reached_nobody_is_free_and_its_hold_is_gone(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receipts, "PATIENCE_S", 0.0)
    organization = warm(make_organization())
    settler = Settler(client)
    settler.turn(1)
    add(client, organization.public_id, "job_lost", "dead", "5-0")
    ends_at = time.monotonic() + 20
    while not UsageRecord.objects.exists() and time.monotonic() < ends_at:
        settler.turn(20)
    record = UsageRecord.objects.get(job_id="job_lost")
    assert (record.cost_nanousd, record.finish_reason, record.error_code) == (0, "error", "web_lost")
    assert client.xpending(keys.FINISHED, keys.GROUP_SETTLEMENT)["pending"] == 0


def test_a_process_that_has_only_just_begun_to_read_is_not_taken_for_gone(client: Redis) -> None:
    young = stream.Entry(f"{periods.now_ms()}-0", b"", "w", "5-0")
    client.set(keys.EPOCH, "e")
    assert receipts.judge(client, [young]).undecided == [young]


def test_an_answer_is_charged_once_it_is_known_to_be_taken(client: Redis) -> None:
    """It waits for that, also over a crash of settlement."""
    organization = warm(make_organization())
    client.set(keys.reader_presence("slow"), 1)
    add(client, organization.public_id, "job_slow", "slow", "5-0")
    first = Settler(client)
    for _ in range(3):
        first.turn(1)
    assert not UsageRecord.objects.exists()
    client.set(keys.web_progress("slow"), "5-0")
    client.delete(keys.reader_presence("slow"))
    first.turn(1)
    assert UsageRecord.objects.get(job_id="job_slow").cost_nanousd > 0


def test_a_crash_while_it_is_undecided_loses_nothing(client: Redis) -> None:
    organization = warm(make_organization())
    client.set(keys.reader_presence("slow"), 1)
    add(client, organization.public_id, "job_slow", "slow", "5-0")
    died = Settler(client)
    died.turn(1)
    client.set(keys.web_progress("slow"), "5-0")
    entries = stream.claim(client, "another", idle_ms=0, count=10)
    assert [entry.process for entry in entries] == ["slow"]
    follower = Settler(client)
    follower.settle_entries(receipts.judge(client, entries).delivered)
    assert UsageRecord.objects.get(job_id="job_slow").cost_nanousd > 0
