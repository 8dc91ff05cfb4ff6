"""See which workers are there, and what they serve."""

import logging
from typing import Any

import msgspec

from aiscale import redis as redis_clients
from aiscale.wire import keys

log = logging.getLogger(__name__)


class WorkerPresence(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself each second. ``models`` maps names to versions."""

    worker_id: str
    models: dict[str, str]
    providers: list[str]
    running: int
    waiting: int
    started_at_ms: int


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
