"""A ticket that our scripts push is the message that Celery and kombu would have sent."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from aiscale.celery import app
from aiscale.wire.broker import TASKS, TIERS, broker_list, make_ticket
from aiscale.wire.keys import celery_queue
from aiscale.wire.scripts import read_script

MODEL = "a-model-of-contracts"
OWN = {"id", "root_id", "origin", "argsrepr", "correlation_id", "reply_to", "delivery_tag"}
"""What differs from message to message, or from sender to sender."""


@pytest.fixture
def client(redis_url: str) -> Iterator[Redis]:
    client = Redis.from_url(redis_url)
    client.delete(broker_list(MODEL))
    yield client
    client.delete(broker_list(MODEL))
    client.close()


def without_own(fields: dict[str, Any]) -> dict[str, Any]:
    assert all(fields[name] is not None for name in OWN & fields.keys())
    return {name: (type(value), None if name in OWN else value) for name, value in fields.items()}


@pytest.mark.parametrize("kind", TASKS)
def test_it_is_what_kombu_writes(client: Redis, kind: str) -> None:
    app.send_task(TASKS[kind], args=[MODEL], queue=celery_queue(MODEL), priority=0, ignore_result=True)
    [written] = client.lrange(broker_list(MODEL), 0, -1)  # type: ignore[misc]
    theirs, ours = json.loads(written), json.loads(make_ticket(kind, MODEL))
    assert without_own(ours["headers"]) == without_own(theirs["headers"])
    assert without_own(ours["properties"]) == without_own(theirs["properties"])
    assert json.loads(base64.b64decode(ours["body"])) == json.loads(base64.b64decode(theirs["body"]))
    rest = {"content-type", "content-encoding"}
    assert {name: ours[name] for name in rest} == {name: theirs[name] for name in rest}
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize("kind", TASKS)
def test_kombu_reads_it(client: Redis, kind: str) -> None:
    client.lpush(broker_list(MODEL), make_ticket(kind, MODEL))
    with app.connection_for_read() as connection, connection.SimpleQueue(celery_queue(MODEL)) as queue:
        message = queue.get(timeout=10)
        assert message.headers["task"] == TASKS[kind] and message.headers["id"] == message.properties["correlation_id"]
        assert message.payload[0] == [MODEL]
        message.ack()
    assert client.hlen("aiscale:celery:unacked") == 0


def test_tickets_are_told_apart() -> None:
    first, second = (json.loads(make_ticket("encode", MODEL)) for _ in range(2))
    for part, name in (("headers", "id"), ("properties", "delivery_tag")):
        assert first[part][name] != second[part][name]


def test_both_sides_know_the_same_tiers() -> None:
    assert f"local TIERS = {{{', '.join(map(str, TIERS))}}}" in read_script("claim")
