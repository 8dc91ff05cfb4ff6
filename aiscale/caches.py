"""Cache in Redis what may be lost, and go on in this process alone while Redis is away: a page opens, a limit still counts."""

import logging
import time
from typing import Any

from django.core.cache import caches
from django.core.cache.backends.base import DEFAULT_TIMEOUT
from django.core.cache.backends.redis import RedisCache

from aiscale.redis import UNAVAILABLE

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5.0
"""How long Redis is left alone after a failure, so that not each page waits for it."""


class ForgivingCache(RedisCache):
    """Be Django's cache in Redis; while Redis fails, be the cache ``OPTIONS["fallback"]`` of this process.

    django-ratelimit and allauth count here. So a limit holds for all processes together, and, without Redis, for each process alone:
    people can log in, and guessing stays slow. No exception of Redis leaves it.
    """

    _away_until_s = 0.0

    def __init__(self, server: str, params: dict[str, Any]) -> None:
        options = dict(params.get("OPTIONS", {}))
        self._fallback: str = options.pop("fallback")
        super().__init__(server, {**params, "OPTIONS": options})

    def add(self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        return bool(self._do("add", key, value, timeout=timeout, version=version))

    def get(self, key: str, default: Any = None, version: int | None = None) -> Any:
        return self._do("get", key, default, version=version)

    def set(self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> None:
        self._do("set", key, value, timeout=timeout, version=version)

    def delete(self, key: str, version: int | None = None) -> bool:
        return bool(self._do("delete", key, version=version))

    def has_key(self, key: str, version: int | None = None) -> bool:
        return bool(self._do("has_key", key, version=version))

    def incr(self, key: str, delta: int = 1, version: int | None = None) -> int:
        """Raise: ValueError for a key that is not there, as every cache of Django's does."""
        return int(self._do("incr", key, delta, version=version))

    def _do(self, name: str, *values: Any, **options: Any) -> Any:
        if time.monotonic() >= ForgivingCache._away_until_s:
            try:
                return getattr(RedisCache, name)(self, *values, **options)
            except UNAVAILABLE as error:
                ForgivingCache._away_until_s = time.monotonic() + RETRY_AFTER_S
                log.warning("the cache is this process's own for %d s: Redis does not answer: %s", RETRY_AFTER_S, error)
        return getattr(caches[self._fallback], name)(*values, **options)
