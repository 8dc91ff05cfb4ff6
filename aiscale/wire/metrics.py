"""Bring the metrics of all processes to one place: each says its own in Redis, and whoever is asked puts them together.

So one address, `/metrics` of any web process, tells of workers, settlement and tasks too, on whatever machine they run. Each sample has the
label ``process``. A process that is gone is told of no more after `STALE_S`.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import REGISTRY, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry
from redis.exceptions import RedisError

from aiscale.wire import keys

log = logging.getLogger(__name__)

EVERY_S = 5.0
STALE_S = 20.0
_STAMP_BYTES = 8


def start_reporting(kind: str, get_client: Callable[[], Any]) -> None:
    """Say this process's metrics each `EVERY_S`, on a thread of its own, for as long as it lives. I/O: one Redis trip each time."""
    process = f"{kind}-{socket.gethostname()}-{os.getpid()}"
    threading.Thread(target=_report_on, args=(process, get_client), name="metrics", daemon=True).start()


def _report_on(process: str, get_client: Callable[[], Any]) -> None:
    while True:
        try:
            report(process, get_client())
        except (RedisError, OSError) as error:
            log.debug("metrics wait for Redis: %s", error)
        except Exception:
            log.exception("metrics cannot be told")
        time.sleep(EVERY_S)


def report(process: str, client: Any) -> None:
    """Say this process's metrics once. I/O: one Redis trip. Raises: RedisError, OSError."""
    client.hset(keys.METRICS, process, time.time_ns().to_bytes(_STAMP_BYTES, "big") + generate_latest(REGISTRY))


def collect(client: Any) -> bytes:
    """Return the metrics of all processes, as Prometheus reads them.

    I/O: one Redis trip, two when some are gone. Raises: RedisError, OSError.
    """
    now_ns, fresh, stale = time.time_ns(), {}, []
    for process, value in client.hgetall(keys.METRICS).items():
        age_s = (now_ns - int.from_bytes(value[:_STAMP_BYTES], "big")) / 1e9
        if age_s < STALE_S:
            fresh[process.decode()] = value[_STAMP_BYTES:].decode()
        else:
            stale.append(process)
    if stale:
        client.hdel(keys.METRICS, *stale)
    return merge(fresh)


def merge(texts: Mapping[str, str]) -> bytes:
    """Put the processes' texts together, each family once, each sample with its process."""
    families: dict[str, Metric] = {}
    for process, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text):
            kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                labels = {**sample.labels, "process": process}
                kept.add_sample(sample.name, labels, sample.value)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families.values()))
    return generate_latest(registry)


class _Families(Collector):
    """Give families as they are."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
