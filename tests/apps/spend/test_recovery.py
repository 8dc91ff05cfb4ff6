"""Redis is emptied in mid-traffic: nobody overspends, what ended is charged once, and the gate opens again within seconds."""

import asyncio
import threading
import time

import pytest
from redis import Redis

from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from aiscale.wire.codec import encode_event
from apps.inference import replies
from apps.spend import killswitch, receipts, recovery, settlement
from apps.spend.admission import admit
from apps.spend.models import UsageRecord
from tests.apps.spend.cast import (
    ADA,
    dump,
    finish,
    make_ask,
    make_finished,
    on_thread,
    publish_key,
    read_spend,
    refused,
    send,
    set_budget,
)
from workers.recent_ends import RecentEnds

pytestmark = pytest.mark.django_db(transaction=True)
PRICE = 65


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Wait for a moment only: nobody has a heart that beats here."""
    monkeypatch.setattr(recovery, "RECOVERY_MS", 300)


@pytest.fixture
def settler(client):
    return settlement.Settler(client)


async def turn_until_open(caller, client: Redis, settler: settlement.Settler) -> int:
    """Let settlement work until the gate is open. Returns the rounds that it took."""
    for rounds in range(1, 100):
        await on_thread(lambda: settler.turn(50))
        if client.exists(keys.EPOCH):
            # this key has no row to be read again from
            publish_key(caller.key_digest, caller.organization_id)
            return rounds
    raise AssertionError("the gate stays shut")


async def test_m3_while_redis_has_forgotten_the_gate_refuses_and_says_for_how_long(caller, client):
    client.flushall()
    refusal = await refused(make_ask(caller))
    assert (refusal.code, refusal.retry_after_s) == (Code.BACKEND_UNAVAILABLE, 2.0)
    assert "lost its memory. Try again in a few seconds." in refusal.message
    assert dump(client) == {}, "nothing is loaded before what ended is settled"


async def test_it_opens_by_itself_and_not_too_early(caller, client, settler):
    await set_budget("site", 1000)
    await on_thread(lambda: killswitch.trip("model:old", reason="Retired", by=ADA))
    client.flushall()
    started = time.monotonic()
    assert await turn_until_open(caller, client, settler) > 1
    assert time.monotonic() - started >= 0.3
    assert client.hget(keys.KILLED, "model:old") == b"|Retired"
    await admit(make_ask(caller, worst_nanousd=1000))
    assert read_spend("site")["held_nanousd"] == "1000"
    with pytest.raises(AiscaleError):
        await admit(make_ask(caller, worst_nanousd=1))


async def test_m1_what_ended_before_is_settled_before_anybody_may_spend_again(caller, client, settler, monkeypatch):
    """Two answers were given, and their ends were in the stream that is gone. The worker says them again."""
    await set_budget("site", 3 * PRICE)
    ends = RecentEnds()
    for _ in range(2):
        ask = make_ask(caller, worst_nanousd=PRICE)
        await admit(ask)
        event = make_finished(caller.organization_id, ask.job_id, key_id="key_1", hold_nanousd=PRICE)
        ends.add(encode_event(event))
        send([event])
    assert ends.look(client, client.get(keys.EPOCH)) == 0
    client.flushall()
    await on_thread(lambda: settler.turn(10))
    assert ends.look(client, client.get(keys.EPOCH)) == 2
    await turn_until_open(caller, client, settler)
    assert await on_thread(UsageRecord.objects.count) == 2
    await admit(make_ask(caller, worst_nanousd=PRICE))
    with pytest.raises(AiscaleError) as refusal:
        await admit(make_ask(caller, worst_nanousd=1))
    assert refusal.value.code is Code.BUDGET_EXHAUSTED
    # said once more to the new epoch, they are charged once
    assert ends.look(client, client.get(keys.EPOCH)) == 2
    await on_thread(lambda: settler.turn(10))
    assert (await on_thread(UsageRecord.objects.count), read_spend("site")["monthly_spent_nanousd"]) == (
        2,
        str(2 * PRICE),
    )
    assert ends.look(client, client.get(keys.EPOCH)) == 0


async def test_it_does_not_open_while_something_waits_to_be_settled(caller, client, settler):
    client.flushall()
    await on_thread(lambda: settler.turn(10))
    other = settlement.Settler(client)
    send([make_finished(caller.organization_id)])
    # another settlement process has read it and is not through yet
    assert len(client.xreadgroup(keys.GROUP_SETTLEMENT, "slow", {keys.FINISHED: ">"})[0][1]) == 1
    time.sleep(0.35)
    for _ in range(3):
        await on_thread(lambda: other.turn(10))
    assert not client.exists(keys.EPOCH)
    [(entry_id, _)] = client.xrange(keys.FINISHED)
    client.xack(keys.FINISHED, keys.GROUP_SETTLEMENT, entry_id)
    await on_thread(lambda: other.turn(10))
    assert client.exists(keys.EPOCH)


async def test_an_answer_whose_process_has_not_said_yet_what_it_took_is_not_taken_for_lost(caller, client, settler):
    client.flushall()
    data = encode_event(make_finished(caller.organization_id))
    client.xadd(keys.FINISHED, {"0": data, "p": "web_1", "r": "1-0"})
    await on_thread(lambda: settler.turn(10))
    assert await on_thread(UsageRecord.objects.count) == 0
    client.mset({keys.web_progress("web_1"): "1-0", keys.reader_presence("web_1"): 1})
    await turn_until_open(caller, client, settler)
    assert await on_thread(lambda: UsageRecord.objects.get().cost_nanousd) == PRICE


async def test_an_answer_whose_process_is_gone_too_costs_nothing(caller, client, settler, monkeypatch):
    monkeypatch.setattr(receipts, "PATIENCE_S", 0.0)
    client.flushall()
    data = encode_event(make_finished(caller.organization_id))
    client.xadd(keys.FINISHED, {"0": data, "p": "web_1", "r": "1-0"})
    await turn_until_open(caller, client, settler)
    assert await on_thread(lambda: UsageRecord.objects.get().cost_nanousd) == 0


async def test_two_settlements_make_one_epoch(caller, client):
    client.flushall()
    stop, seen = threading.Event(), set()
    threads = [threading.Thread(target=settlement.run, args=(stop,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        ends_at = time.monotonic() + 20
        while not client.exists(keys.EPOCH) and time.monotonic() < ends_at:
            time.sleep(0.02)
        for _ in range(20):
            seen.add(client.get(keys.EPOCH))
            time.sleep(0.05)
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert len(seen) == 1 and None not in seen


async def test_a_flush_in_mid_recovery_begins_it_anew(caller, client, settler):
    client.flushall()
    await on_thread(lambda: settler.turn(10))
    time.sleep(0.35)
    client.flushall()
    await on_thread(lambda: settler.turn(10))
    assert not client.exists(keys.EPOCH)
    await turn_until_open(caller, client, settler)
    await finish(caller)


async def test_what_a_web_process_delivered_is_said_again_and_charged_once(caller, client, settler):
    reader = replies.Reader()
    await reader._tell_progress("0-0")
    event = make_finished(caller.organization_id, "job_1")
    reader._inboxes["job_1"] = replies.Inbox(asyncio.get_running_loop())
    reader._hand_out({b"0": encode_event(event)})
    client.flushall()
    for _ in range(2):
        # the second time it knows that Redis forgot
        await reader._tell_progress("0-0")
    assert client.xlen(keys.FINISHED) == 1
    await turn_until_open(caller, client, settler)
    await reader._tell_progress("0-0")
    await on_thread(lambda: settler.turn(10))
    records = await on_thread(lambda: list(UsageRecord.objects.values_list("job_id", "cost_nanousd")))
    assert records == [("job_1", PRICE)]


def test_a_restarted_server_gets_another_epoch_and_the_gate_stays_open(client):
    recovery.begin(client)
    client.set(keys.EPOCH, "another server:1")
    assert [recovery.renew_after_restart(client) for _ in range(3)] == [True, False, False]
    client.delete(keys.EPOCH)
    assert not recovery.renew_after_restart(client) and not client.exists(keys.EPOCH)
