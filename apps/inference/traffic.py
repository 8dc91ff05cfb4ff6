"""Send a model's requests to its versions: most to the main one, some to a canary, which is rolled back when it fails too often.

What a version's requests came to is read from the usage records, which settlement writes for every job, whatever became of it.
"""

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import msgspec
from django.db import transaction
from django.utils import timezone

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.observability import CANARIES_ROLLED_BACK
from aiscale.wire import keys
from apps.accounts import audit
from apps.accounts.audit import Actor
from apps.inference import presence, prompts, rollback_alerts
from apps.inference.catalog import CatalogModel
from apps.inference.models import Model, ModelVersion
from apps.spend.models import UsageRecord

log = logging.getLogger(__name__)

LEAST_REQUESTS = 20
"""Fewer say nothing."""
LOOKED_AT = 500
"""How many of the latest requests count: a canary that went well for a day may begin to fail."""
MOST_ERRORS_PERCENT = 5
MOST_WEIGHT = 99


@dataclass(frozen=True)
class Health:
    """Count a version's latest requests, and those that failed by our own fault."""

    requests: int
    errors: int

    @property
    def is_bad(self) -> bool:
        return self.requests >= LEAST_REQUESTS and self.errors * 100 > self.requests * MOST_ERRORS_PERCENT

    def __str__(self) -> str:
        return f"{self.errors} of {self.requests} requests failed"


# --- a request's way ---------------------------------------------------------------------------------------------------------------


async def choose_version(model: CatalogModel, job_id: str, *, holds_ids: bool = False) -> CatalogModel:
    """Return the model in the version that a job is for. The same job always gets the same, unless the weights change.

    A canary gets requests once every worker of the model has loaded it, and its files are here. What holds token ids (``holds_ids``: in its
    prompt or its logit_bias), which are the main version's, goes to a canary whose tokenizer is the same file.

    I/O: none without a canary; with one, as `presence.map_served`.
    """
    if not model.canaries:
        return model
    try:
        workers = (await presence.map_served()).get(model.slug, [])
    except redis_clients.UNAVAILABLE:
        return model
    share = int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:4], "big") % 100
    for canary in model.canaries:
        if share < canary.weight:
            ready = bool(workers) and all(canary.version in versions for versions in workers)
            changed = msgspec.structs.replace(model, version=canary.version, context_tokens=canary.context_tokens)
            return changed if ready and _can_read(changed, model if holds_ids else None) else model
        share -= canary.weight
    return model


def _can_read(model: CatalogModel, alike: CatalogModel | None) -> bool:
    """Say whether this server can read the version's texts, and (with ``alike``) in that version's own token ids.

    A canary never costs anybody their answer. I/O: the files of both, at first.
    """
    try:
        reader = prompts.get_reader(model)
        return alike is None or prompts.get_reader(alike).has_words_of(reader)
    except AiscaleError as error:
        log.warning("the canary %s gets no requests: %s", model.version, error.message, extra={"model": model.slug})
        return False


def publish() -> None:
    """Tell workers which versions to load. Idempotent. I/O: two SQL statements, one Redis trip. Raises: RedisError, OSError."""
    wanted = {}
    canaries: dict[int, list[str]] = {}
    for row in ModelVersion.objects.filter(weight__gt=0).order_by("-weight"):
        canaries.setdefault(row.model_id, []).append(row.version)
    for model in Model.objects.filter(is_enabled=True, upstream=None):
        versions = [model.version, *canaries.get(model.pk, [])]
        wanted[model.slug] = msgspec.json.encode(list(dict.fromkeys(versions)))
    pipeline: Any = redis_clients.get_sync().pipeline(transaction=True)
    pipeline.delete(keys.TRAFFIC)
    if wanted:
        pipeline.hset(keys.TRAFFIC, mapping=wanted)
    pipeline.execute()


# --- what people and the watch decide ----------------------------------------------------------------------------------------------


def set_weight(slug: str, version: str, weight: int, *, by: Actor, reason: str = "") -> ModelVersion:
    """Send ``weight`` of a hundred requests to a version beside the main one; 0 ends it. Audited.

    I/O: SQL, one Redis trip. Raises: AiscaleError (NOT_FOUND, INVALID_REQUEST).
    """
    with transaction.atomic():
        model = _lock(slug)
        row = _get_version(model, version)
        check_weight(model, row, weight)
        row.weight = weight
        if weight and (row.canary_since is None or row.rolled_back_at is not None):
            row.canary_since = timezone.now()
        row.canary_since = row.canary_since if weight else None
        row.rolled_back_at, row.rolled_back_because = None, ""
        row.save()
        audit.record(
            "model.canary", target=f"model:{slug}", by=by, reason=reason, details={"version": version, "weight": weight}
        )
    _publish_soon()
    return row


def check_weight(model: Model, row: ModelVersion, weight: int) -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for a weight that a version cannot have. I/O: one SQL statement."""
    room = MOST_WEIGHT - sum(model.versions.exclude(pk=row.pk).values_list("weight", flat=True))
    if model.kind != Model.Kind.GENERATE:
        raise _refuse(f"What two versions of {model.slug} say must not be mixed. Promote the version as a whole.")
    if row.version == model.version:
        raise _refuse(f"{row.version} is the main version of {model.slug}: it gets what the others leave.")
    if not 0 <= weight <= room:
        raise _refuse(f"The weight is 0 to {room}; the rest is for the main version.")


def promote(slug: str, version: str, *, by: Actor, reason: str = "") -> Model:
    """Make a version the main one. Audited. I/O: SQL, one Redis trip. Raises: AiscaleError (NOT_FOUND, INVALID_REQUEST)."""
    with transaction.atomic():
        model = _lock(slug)
        row = _get_version(model, version)
        if version == model.version:
            raise _refuse(f"{version} is the main version of {slug} already.")
        _switch(model, row)
        audit.record(
            "model.promote",
            target=f"model:{slug}",
            by=by,
            reason=reason,
            details={"version": version, "before": model.previous_version},
        )
    _publish_soon()
    return model


def roll_back(slug: str, *, by: Actor, reason: str) -> str:
    """End a model's canaries, or return to the version before when there is none; say what was done. Audited.

    I/O: SQL, one Redis trip. Raises: AiscaleError (NOT_FOUND, INVALID_REQUEST when there is nothing to go back to).
    """
    with transaction.atomic():
        model = _lock(slug)
        canaries = list(model.versions.select_for_update().filter(weight__gt=0))
        for row in canaries:
            _end_canary(row, reason)
        details: dict[str, Any]
        if canaries:
            ended = [row.version for row in canaries]
            done, details = f"{', '.join(ended)} gets no more requests; {model.version} gets all", {"ended": ended}
        elif model.previous_version:
            row = _get_version(model, model.previous_version)
            details = {"version": row.version, "before": model.version}
            _switch(model, row)
            done = f"{row.version} is the main version again"
        else:
            raise _refuse(f"{slug} has no canary and no version before {model.version}.")
        audit.record("model.rollback", target=f"model:{slug}", by=by, reason=reason, details=details)
    _publish_soon()
    return done


def watch() -> int:
    """Roll canaries back that fail too often, and tell the staff. Returns how many. Several at once do no harm. I/O: SQL, mail, HTTP."""
    count = 0
    for row in ModelVersion.objects.filter(weight__gt=0).select_related("model"):
        health = measure(row)
        if not health.is_bad:
            continue
        reason = f"{health} since it became a canary; more than {MOST_ERRORS_PERCENT} of 100 are too many"
        with transaction.atomic():
            fresh = ModelVersion.objects.select_for_update().get(pk=row.pk)
            if not fresh.weight or fresh.canary_since != row.canary_since:
                continue
            _end_canary(fresh, reason)
            rollback_alerts.owe(fresh)
            fresh.save()
            details = {
                "version": row.version,
                "weight": row.weight,
                "requests": health.requests,
                "errors": health.errors,
            }
            audit.record(
                "model.rollback",
                target=f"model:{row.model.slug}",
                by=audit.by_system("canary watch"),
                reason=reason,
                details=details,
            )
        log.error("the canary %s was rolled back: %s", row, reason, extra={"model": row.model.slug})
        CANARIES_ROLLED_BACK.labels(row.model.slug).inc()
        count += 1
    if count:
        _publish_soon()
    rollback_alerts.deliver_due()
    return count


def measure(row: ModelVersion) -> Health:
    """Count what became of a canary's latest requests. I/O: one SQL statement."""
    if row.canary_since is None:
        return Health(0, 0)
    records = UsageRecord.objects.filter(
        model=row.model.slug, occurred_at__gte=row.canary_since, model_version=row.version
    )
    ends = list(records.order_by("-occurred_at").values_list("finish_reason", flat=True)[:LOOKED_AT])
    return Health(len(ends), ends.count("error"))


def _lock(slug: str) -> Model:
    model = Model.objects.select_for_update().filter(slug=slug, upstream=None).first()
    if model is None:
        raise AiscaleError(Code.NOT_FOUND, f"There is no model {slug[:100]!r} of our own workers.")
    return model


def _get_version(model: Model, version: str) -> ModelVersion:
    row = model.versions.select_for_update().filter(version=version).first()
    if row is None:
        known = ", ".join(model.versions.values_list("version", flat=True))
        raise AiscaleError(Code.NOT_FOUND, f"{model.slug} has no version {version[:100]!r}; it has {known or 'none'}.")
    return row


def _switch(model: Model, row: ModelVersion) -> None:
    model.previous_version, model.version = model.version, row.version
    model.context_tokens, model.dimensions = row.context_tokens, row.dimensions
    model.save(update_fields=["previous_version", "version", "context_tokens", "dimensions", "updated_at"])
    row.weight, row.canary_since, row.rolled_back_at, row.rolled_back_because = 0, None, None, ""
    row.save()


def _end_canary(row: ModelVersion, reason: str) -> None:
    row.weight, row.rolled_back_at, row.rolled_back_because = 0, timezone.now(), reason[:300]
    row.save()


def _publish_soon() -> None:
    """Tell workers now; should Redis not answer, the periodic task does it."""
    try:
        publish()
    except redis_clients.UNAVAILABLE as error:
        log.warning("workers cannot be told of the traffic yet: %s", error)


def _refuse(message: str) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, message)
