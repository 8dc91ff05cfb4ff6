"""Read what this worker is to serve, and reach Redis."""

import os
import secrets
import socket
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError
from redis.retry import Retry

from aiscale import env as environment
from aiscale.embedded_urls import embedded_redis_url
from aiscale.wire.manifest import Manifest, list_manifests
from aiscale.wire.scripts import digest_script, read_script

ENV = environment.load()
REDIS_URL = ENV.redis_url or embedded_redis_url(ENV.data_dir)
WORKER_ID = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


@cache
def get_redis() -> Redis:
    """Return this process's client. I/O: none until it is used."""
    return Redis.from_url(
        REDIS_URL,
        retry=Retry(ExponentialBackoff(cap=0.2, base=0.02), 2),
        retry_on_error=[RedisConnectionError],
        socket_connect_timeout=2,
        health_check_interval=15,
    )


def run_script(name: str, keys: Sequence[str], values: Sequence[str | int | bytes]) -> Any:
    """Run a script of the wire. I/O: one Redis trip, two when the server has just started. Raises: RedisError, OSError."""
    client: Any = get_redis()
    try:
        return client.evalsha(digest_script(name), len(keys), *keys, *values)
    except NoScriptError:
        return client.eval(read_script(name), len(keys), *keys, *values)


@cache
def list_served() -> list[tuple[Path, Manifest]]:
    """List the newest version of each model that this worker serves, with its directory. I/O: small files."""
    newest: dict[str, tuple[Path, Manifest]] = {}
    for directory, manifest in list_manifests(ENV.models_dir):
        if not ENV.worker_models or manifest.name in ENV.worker_models:
            newest.setdefault(manifest.name, (directory, manifest))
    missing = [name for name in ENV.worker_models if name not in newest]
    if missing:
        raise environment.BadSetting(
            "AISCALE_WORKER_MODELS", f"names {', '.join(missing)}, not found in {ENV.models_dir}"
        )
    return list(newest.values())
