"""See which workers are there, and what they serve."""

import asyncio
import logging
import time
from typing import Any

import msgspec

from aiscale import redis as redis_clients
from aiscale.wire import keys

log = logging.getLogger(__name__)

FRESH_S = 1.0

_served: dict[str, list[set[str]]] = {}
_fresh_until = 0.0


class WorkerPresence(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself each second. ``models`` maps names to the version that most requests are for."""

    worker_id: str
    models: dict[str, str]
    versions: dict[str, list[str]] = {}
    """All versions that it serves, by model."""
    providers: list[str]
    running: int
    waiting: int
    started_at_ms: int


async def map_served() -> dict[str, list[set[str]]]:
    """Map each model to the sets of versions that its workers serve, one for each; at most a second old.

    I/O: two Redis trips a second. Raises: redis.exceptions.RedisError, OSError.
    """
    global _served, _fresh_until
    if time.monotonic() >= _fresh_until:
        _served = await asyncio.to_thread(read_served)
        _fresh_until = time.monotonic() + FRESH_S
    return _served


def read_served() -> dict[str, list[set[str]]]:
    """Do `map_served` anew. I/O and Raises: as `list_workers`."""
    served: dict[str, list[set[str]]] = {}
    for worker in list_workers():
        for slug, version in worker.models.items():
            served.setdefault(slug, []).append({version, *worker.versions.get(slug, ())})
    return served


def forget() -> None:
    """Look anew at the next request."""
    global _fresh_until
    _fresh_until = 0.0


def list_workers() -> list[WorkerPresence]:
    """List the workers that were heard of within five seconds. I/O: two Redis trips. Raises: redis.exceptions.RedisError, OSError."""
    client: Any = redis_clients.get_sync()
    names = list(client.scan_iter(match=keys.WORKER_PRESENCE_PATTERN, count=1000))
    found = []
    for data in client.mget(names) if names else ():
        try:
            if data is not None:
                found.append(msgspec.json.decode(data, type=WorkerPresence))
        except msgspec.MsgspecError as error:
            log.warning("a worker's presence cannot be read: %s", error)
    return sorted(found, key=lambda worker: worker.worker_id)


async def is_served(model: str, version: str) -> bool:
    """Say whether a worker serves this version of a model; yes, when nobody can tell. I/O: as `map_served`."""
    try:
        served = await map_served()
    except redis_clients.UNAVAILABLE:
        return True
    return any(version in versions for versions in served.get(model, ()))
