"""Sum up for the admin's first page what is worked on, by whom, and how much of it was known."""

from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from aiscale import redis as redis_clients
from aiscale.wire import keys, metrics
from apps.inference import presence
from apps.inference.models import Model
from apps.inference.presence import WorkerPresence

LEVELS = ("l1", "l2", "l3", "semantic", "miss")


class ModelLoad(msgspec.Struct, frozen=True, kw_only=True):
    """State one model: how many requests wait for it, and how many workers serve it."""

    pk: int
    name: str
    waiting: int
    workers: int
    is_local: bool


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """State what is going on. ``lookups``: how often answers were found, by level, since the processes that live now began."""

    models: list[ModelLoad]
    workers: list[WorkerPresence]
    lookups: list[tuple[str, int]]

    @property
    def running(self) -> int:
        return sum(worker.running for worker in self.workers)

    @property
    def hit_percent(self) -> int | None:
        """Return how many of a hundred answers were known; None before the first one."""
        total = sum(count for _, count in self.lookups)
        return 100 * sum(count for level, count in self.lookups if level != "miss") // total if total else None


def look() -> Load | None:
    """Return the load; None when Redis does not answer. I/O: five Redis trips, one SQL statement."""
    catalog = list(Model.objects.filter(is_enabled=True).select_related("upstream").order_by("name"))
    client: Any = redis_clients.get_sync()
    try:
        workers = presence.list_workers()
        pipeline = client.pipeline(transaction=False)
        for model in catalog:
            pipeline.zcard(keys.queue_depth(model.slug))
        waiting = pipeline.execute()
        lookups = _count_lookups(metrics.collect(client).decode())
    except redis_clients.UNAVAILABLE:
        return None
    models = [
        ModelLoad(
            pk=model.pk,
            name=model.name,
            waiting=depth,
            workers=sum(model.slug in worker.models for worker in workers),
            is_local=model.upstream_id is None,
        )
        for model, depth in zip(catalog, waiting, strict=True)
    ]
    return Load(models=models, workers=workers, lookups=lookups)


def _count_lookups(text: str) -> list[tuple[str, int]]:
    counts = dict.fromkeys(LEVELS, 0)
    # the text tells of everything: only these lines are read
    lines = [line for line in text.splitlines() if line.startswith("aiscale_cache_lookups_total{")]
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            level = sample.labels["level"]
            counts[level] = counts.get(level, 0) + int(sample.value)
    return list(counts.items())
