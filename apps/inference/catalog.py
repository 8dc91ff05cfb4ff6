"""Look up models in this process's copy of the catalog, at most a second old."""

import asyncio
import contextlib
import logging
import time
from typing import Any

import msgspec
from django.db import Error as DatabaseError

from aiscale.errors import AiscaleError, Code
from aiscale.wire.jobs import LOCAL_PROVIDER
from apps.accounts.callers import PlanLimits, on_thread
from apps.inference.models import Model, ModelVersion, Upstream
from apps.spend import prices
from apps.spend.prices import Terms

log = logging.getLogger(__name__)

FRESH_S = 1.0
PATIENCE_S = 1.0
"""How long a request waits for another one that reads the catalog anew, where the copy is older than that."""

_models: dict[str, "CatalogModel"] = {}
_fresh_until = 0.0
_lock: asyncio.Lock | None = None
_lock_loop: asyncio.AbstractEventLoop | None = None


class UpstreamRoute(msgspec.Struct, frozen=True, kw_only=True):
    """Say where and how an upstream is asked. The key is sealed."""

    name: str
    base_url: str
    sealed_key: str
    model: str
    timeout_s: float
    retries: int


class Canary(msgspec.Struct, frozen=True, kw_only=True):
    """Name a version that gets ``weight`` of a hundred requests beside the main one."""

    version: str
    weight: int
    context_tokens: int


class CatalogModel(msgspec.Struct, frozen=True, kw_only=True):
    """Describe an enabled model with the price in force (``terms``, of the row ``price_id``); ``created_at_s`` is epoch seconds."""

    slug: str
    name: str
    kind: str
    version: str
    description: str
    terms: Terms
    price_id: str
    context_tokens: int
    dimensions: int
    created_at_s: int
    upstream: UpstreamRoute | None = None
    canaries: tuple[Canary, ...] = ()
    batch_invariant: bool = False
    """Whether an answer is the same whatever shares its batch."""
    precision: str = ""
    takes_chats: bool = True
    fallback: str | None = None
    """The slug of the model that answers when this one cannot."""


async def get_model(slug: str, kind: str | None = None) -> CatalogModel:
    """Return an enabled model, of ``kind`` when that is given.

    I/O: three SQL statements a second. Raises: AiscaleError (MODEL_NOT_FOUND, INVALID_REQUEST for another kind, BACKEND_UNAVAILABLE).
    """
    await _refresh()
    model = _models.get(slug)
    if model is None:
        known = ", ".join(sorted(_models)) or "none at present"
        raise AiscaleError(
            Code.MODEL_NOT_FOUND, f"The model {slug[:100]!r} does not exist. There are: {known}.", param="model"
        )
    if kind is not None and model.kind != kind:
        does = {"generate": "chat completions", "embed": "embeddings"}.get(model.kind, "moderations")
        raise AiscaleError(Code.INVALID_REQUEST, f"The model {slug!r} serves {does} only.", param="model")
    return model


async def find_fallback(model: CatalogModel) -> CatalogModel | None:
    """Return the model that may answer in another's place. I/O: as `get_model`."""
    await _refresh()
    found = _models.get(model.fallback or "")
    return found if found is not None and found.upstream is not None else None


async def list_local(kind: str) -> list[CatalogModel]:
    """List the models of a kind that our own workers serve. I/O: as `get_model`."""
    await _refresh()
    return [model for model in _models.values() if model.kind == kind and model.upstream is None]


async def list_models(plan: PlanLimits) -> list[CatalogModel]:
    """List the enabled models that a plan allows, by name. I/O: as `get_model`. Raises: AiscaleError (BACKEND_UNAVAILABLE)."""
    await _refresh()
    return [model for slug, model in sorted(_models.items()) if plan.allows(slug)]


def list_slugs() -> list[str]:
    """List the names of all enabled models. I/O: one SQL statement."""
    from apps.inference.models import Model

    return list(Model.objects.filter(is_enabled=True).order_by("slug").values_list("slug", flat=True))


def list_providers() -> list[str]:
    """List whom `provider:<name>` may name: our own workers first, then upstreams by name. I/O: one SQL statement."""
    return [LOCAL_PROVIDER, *Upstream.objects.order_by("name").values_list("name", flat=True)]


async def _refresh() -> None:
    global _models, _fresh_until
    if _fresh_until > time.monotonic():
        return
    lock = _get_lock()
    if _models and lock.locked():
        if time.monotonic() < _fresh_until + FRESH_S:
            # somebody is reading it again: the copy of a second ago is good enough
            return
        # after a quiet time the copy is as old as that was; but nobody waits for a database that hangs
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S), lock:
                pass
        return
    async with lock:
        if _fresh_until > time.monotonic():
            return
        try:
            _models = await on_thread(_read)
        except DatabaseError as error:
            if not _models:
                raise AiscaleError(
                    Code.BACKEND_UNAVAILABLE,
                    "The service cannot read its catalog right now. Try again in a few seconds.",
                    retry_after_s=2,
                ) from error
            log.warning("the catalog cannot be read; the last copy serves on: %s", error)
        _fresh_until = time.monotonic() + FRESH_S


def _get_lock() -> asyncio.Lock:
    """Return the running loop's lock (a lock belongs to one loop; processes have one, tests many)."""
    global _lock, _lock_loop
    loop = asyncio.get_running_loop()
    if _lock is None or _lock_loop is not loop:
        _lock, _lock_loop = asyncio.Lock(), loop
    return _lock


def forget() -> None:
    """Drop the copy, so that the next look-up reads the table."""
    global _models, _fresh_until
    _models, _fresh_until = {}, 0.0


def _read() -> dict[str, CatalogModel]:
    current = prices.map_current()
    versions: dict[int, list[ModelVersion]] = {}
    for version in ModelVersion.objects.order_by("-weight", "pk"):
        versions.setdefault(version.model_id, []).append(version)
    models = {}
    for row in Model.objects.filter(is_enabled=True).select_related("upstream", "fallback"):
        if row.upstream is not None and not row.upstream.is_enabled:
            continue
        price = current.get(row.slug)
        if price is None:
            # nobody may use what has no price (M10)
            log.error("the model %s has no price and is not served: give it one in the admin", row.slug)
            continue
        models[row.slug] = CatalogModel(
            slug=row.slug,
            name=row.name,
            kind=row.kind,
            version=row.version,
            description=row.description,
            terms=prices.terms_of(price),
            price_id=price.public_id,
            context_tokens=row.context_tokens,
            dimensions=row.dimensions,
            created_at_s=int(row.created_at.timestamp()),
            upstream=_make_route(row),
            fallback=row.fallback.slug if row.fallback is not None else None,
            **_describe_versions(row, versions.get(row.pk, [])),
        )
    return models


def _describe_versions(row: Model, versions: list[ModelVersion]) -> dict[str, Any]:
    """Return what a catalog's model says of its versions."""
    main = next((version for version in versions if version.version == row.version), None)
    canaries = tuple(
        Canary(version=version.version, weight=version.weight, context_tokens=version.context_tokens)
        for version in versions
        if version.weight and version.version != row.version
    )
    if main is None:
        return {"canaries": canaries}
    facts = {"batch_invariant": main.batch_invariant, "precision": main.precision, "takes_chats": main.takes_chats}
    return {"canaries": canaries, **facts}


def _make_route(row: Model) -> UpstreamRoute | None:
    if row.upstream is None:
        return None
    return UpstreamRoute(
        name=row.upstream.name,
        base_url=row.upstream.base_url,
        sealed_key=row.upstream.sealed_key,
        model=row.upstream_model,
        timeout_s=row.upstream.timeout_s,
        retries=row.upstream.retries,
    )
