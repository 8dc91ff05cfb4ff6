"""Give each test of money an empty Redis."""

from collections.abc import Iterator

import pytest
from redis import Redis

from aiscale import redis as redis_clients
from apps.spend import admission
from tests.servers import empty_redis


@pytest.fixture(autouse=True)
def client(redis_url: str) -> Iterator[Redis]:
    """Empty the test server's Redis and return the process's own client."""
    client = redis_clients.get_sync()
    empty_redis(client)
    admission._exhausted.clear()
    yield client
