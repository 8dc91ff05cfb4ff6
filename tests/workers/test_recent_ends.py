"""A worker says again what it ended lately when Redis forgot it, and only then."""

from collections.abc import Iterator

import pytest
from redis import Redis
from redis.exceptions import RedisError

from aiscale.wire import keys
from workers.recent_ends import RecentEnds


@pytest.fixture
def client(redis_url: str) -> Iterator[Redis]:
    client = Redis.from_url(redis_url)
    client.flushall()
    yield client
    client.close()


def said(client: Redis) -> list[bytes]:
    return [fields[b"0"] for _, fields in client.xrange(keys.FINISHED)]


def test_nothing_is_said_as_long_as_it_is_the_same_redis(client: Redis) -> None:
    ends = RecentEnds()
    assert ends.look(client, b"a") == 0
    ends.add(b"one")
    assert ends.look(client, b"a") == 0 and said(client) == []


def test_all_is_said_to_each_other_one(client: Redis) -> None:
    """Also to the new epoch: Redis may have been emptied once more before it began."""
    ends = RecentEnds()
    ends.look(client, b"a")
    ends.add(b"one")
    ends.add(b"two")
    assert [ends.look(client, epoch) for epoch in (None, None, b"b", b"b")] == [2, 0, 2, 0]
    assert said(client) == [b"one", b"two"] * 2


def test_what_is_older_is_forgotten(client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = RecentEnds()
    ends.look(client, b"a")
    ends.add(b"old")
    monkeypatch.setattr(keys, "REMEMBER_ENDS_S", 0.0)
    assert ends.look(client, None) == 0


def test_a_redis_that_fails_hears_it_at_the_next_look(client: Redis) -> None:
    ends = RecentEnds()
    ends.look(client, b"a")
    ends.add(b"one")
    client.set(keys.FINISHED, "not a stream")
    with pytest.raises(RedisError):
        ends.look(client, None)
    client.delete(keys.FINISHED)
    assert ends.look(client, None) == 1
