"""Make the web side's Redis clients, and load Lua.

One asynchronous client per event loop, one synchronous client per process. Both speak bytes. Workers make their own.
"""

import asyncio
import weakref
from functools import cache

import redis.asyncio as aioredis
from django.conf import settings
from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from aiscale.errors import AiscaleError, Code
from aiscale.wire.scripts import read_script

UNAVAILABLE = (RedisError, OSError)
"""What a Redis that is down or starting raises."""

_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, aioredis.Redis] = weakref.WeakKeyDictionary()


def get_async() -> aioredis.Redis:
    """Return the running loop's client. I/O: none until it is used."""
    loop = asyncio.get_running_loop()
    client = _clients.get(loop)
    if client is None:
        from redis.asyncio.retry import Retry as AsyncRetry

        client = aioredis.Redis.from_url(
            settings.REDIS_URL,
            retry=AsyncRetry(ExponentialBackoff(cap=0.2, base=0.02), 2),
            retry_on_error=[RedisConnectionError],
            socket_connect_timeout=2,
            health_check_interval=15,
        )
        _clients[loop] = client
    return client


@cache
def get_sync() -> Redis:
    """Return this process's client. I/O: none until it is used."""
    return Redis.from_url(
        settings.REDIS_URL,
        retry=Retry(ExponentialBackoff(cap=0.2, base=0.02), 2),
        retry_on_error=[RedisConnectionError, RedisTimeoutError],
        socket_connect_timeout=2,
        health_check_interval=15,
    )


def unavailable() -> AiscaleError:
    """Say that Redis does not answer: the gate fails closed (DESIGN rule 5)."""
    return AiscaleError(
        Code.BACKEND_UNAVAILABLE,
        "The service cannot check limits right now. Try again in a few seconds.",
        retry_after_s=2,
    )


__all__ = ["UNAVAILABLE", "get_async", "get_sync", "read_script", "unavailable"]
