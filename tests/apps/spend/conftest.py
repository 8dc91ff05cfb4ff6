"""Give each test of money an empty Redis."""

from collections.abc import Iterator

import pytest
from redis import Redis

from aiscale import redis as redis_clients
from apps.accounts.callers import Caller
from apps.spend import admission
from tests.apps.spend.cast import USD, make_caller, publish_key, stage
from tests.servers import empty_redis


@pytest.fixture(autouse=True)
def client(redis_url: str) -> Iterator[Redis]:
    """Empty the test server's Redis and return the process's own client."""
    client = redis_clients.get_sync()
    empty_redis(client)
    admission._exhausted.clear()
    yield client


KEY_DIGEST = "ef" * 32


@pytest.fixture
async def caller(client: Redis, transactional_db: None) -> Caller:
    """A caller with a key: in all six scopes. The plan's limit is a dollar a month."""
    organization = await stage(monthly_limit_nanousd=USD)
    publish_key(KEY_DIGEST, organization.public_id)
    return make_caller(organization, key_digest=KEY_DIGEST)
