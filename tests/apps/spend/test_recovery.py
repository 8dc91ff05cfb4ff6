"""A Redis that was emptied lets nobody spend twice, and keeps nobody out for longer than a few seconds."""

import asyncio
import time
from typing import Any

import pytest
from redis import Redis

from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys
from aiscale.wire.codec import encode_event
from apps.inference import replies
from apps.spend import recovery
from apps.spend.admission import admit
from apps.spend.models import UsageRecord
from apps.spend.settlement import Settler
from tests.apps.spend.cast import make_ask, make_caller, make_finished, on_thread, stage

pytestmark = pytest.mark.django_db(transaction=True)


async def test_the_gate_stays_shut_until_what_had_ended_is_charged(client: Redis, monkeypatch: Any) -> None:
    monkeypatch.setattr(recovery, "RECOVERY_MS", 400)
    organization = await stage()
    settler = Settler(client)
    await on_thread(lambda: settler.turn(1))
    client.flushall()
    await on_thread(lambda: settler.turn(1))
    with pytest.raises(AiscaleError) as refused:
        await admit(make_ask(make_caller(organization)))
    assert refused.value.code is Code.BACKEND_UNAVAILABLE and refused.value.retry_after_s
    ends_at = time.monotonic() + 20
    while recovery.is_under_way(client) and time.monotonic() < ends_at:
        time.sleep(0.05)
    assert (await admit(make_ask(make_caller(organization)))).job_id


async def test_what_was_delivered_is_written_down_again_and_charged_once(client: Redis) -> None:
    organization = await stage()
    settler = Settler(client)
    await on_thread(lambda: settler.turn(1))
    reader = replies.Reader()
    await reader._tell_progress("0-0")
    event = make_finished(organization.public_id, "job_1")
    reader._queues["job_1"] = asyncio.Queue()
    reader._hand_out({b"0": encode_event(event)})
    client.flushall()
    await on_thread(lambda: settler.turn(1))
    for _ in range(2):
        # the second time it knows the epoch
        await reader._tell_progress("0-0")
    assert client.xlen(keys.FINISHED) == 1
    await on_thread(lambda: [settler.turn(1) for _ in range(3)])
    records = await on_thread(lambda: list(UsageRecord.objects.values_list("job_id", "cost_nanousd")))
    assert records == [("job_1", 65)]
