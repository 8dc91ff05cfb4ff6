"""Tell who is asking: the caller of a request, and the limits of their plan."""

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Literal, TypeVar

import msgspec
from django.db import connection

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys

T = TypeVar("T")
PLAN_CACHE_S = 1.0
CALLER_CACHE_S = 0.5
"""How long a process knows a key without asking: the gate, which looks for itself, refuses a revoked one all the same at once."""
CALLER_CACHE_MAX = 10_000
UNKNOWN_CACHE_S = 5.0
UNKNOWN_CACHE_MAX = 10_000

_plans: dict[str, tuple[float, "PlanLimits"]] = {}
_unknown: dict[str, float] = {}
_known: dict[str, tuple[float, str, "Caller"]] = {}
_reading: dict[tuple[int, str], asyncio.Task["PlanLimits"]] = {}
"""Plans that are being read, by event loop and slug: a thousand requests that need one wait for one statement."""


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Name who asks and who pays. All are public ids; ``plan`` is a slug. A browser session has no key."""

    organization_id: str
    user_id: str | None
    key_id: str | None
    key_digest: str | None
    plan: str
    models: tuple[str, ...] = ()
    """What the key is kept to; empty: all that the plan allows. The gate reads the key's own copy."""
    lane: Literal["interactive", "batch"] = "interactive"
    """Whether somebody waits for the answer, or it is one of a bulk job: cheaper, and after all others."""
    semantic_max_error_percent: float | None = None
    """How often the answer to an alike question may be wrong; None: the organization wants no such answers."""

    def allows(self, model: str) -> bool:
        """Tell whether the key may use it. The plan is asked apart."""
        return not self.models or model in self.models


class PlanLimits(msgspec.Struct, frozen=True, kw_only=True):
    """State a plan's limits. ``models`` is empty when all are allowed; None is no limit of the plan's own."""

    slug: str
    name: str
    max_output_tokens: int
    priority: int
    requests_per_window: int
    window_s: int
    max_in_flight: int
    monthly_limit_nanousd: int
    models: tuple[str, ...]
    tokens_per_minute: int | None = None
    context_tokens: int | None = None
    weight: int = 1
    max_queued: int | None = None
    max_wait_s: int | None = None
    cache_scope: str = "organization"
    moderation: str = "off"
    """What becomes of flagged messages: off, flag or block. Those that cannot be checked pass under flag, and not under block."""
    cached_price_percent: int = 100

    def allows(self, model: str) -> bool:
        return not self.models or model in self.models


def hash_key(raw: str) -> str:
    """Return the sha256 by which a key is known. Keys hold 256 random bits, so no salt or slow hash is needed."""
    return hashlib.sha256(raw.encode("utf-8", "surrogatepass")).hexdigest()


async def get_by_key(raw: str) -> Caller:
    """Find the caller of an API key.

    I/O: two Redis trips, at most twice a second for a key; SQL when Redis does not know it, at most once in five seconds for the same
    wrong one.
    Raises: AiscaleError (INVALID_API_KEY, KEY_REVOKED, KEY_EXPIRED, BACKEND_UNAVAILABLE).
    """
    return await get_by_digest(hash_key(raw))


async def get_by_digest(digest: str) -> Caller:
    """Find the caller of an API key by its sha256. I/O and Raises: as `get_by_key`."""
    if _unknown.get(digest, 0.0) > time.monotonic():
        raise _invalid()
    fresh_until, expires_at_ms, known = _known.get(digest, (0.0, "", None))
    if known is not None and fresh_until > time.monotonic():
        _check("active", expires_at_ms)
        return known
    caller = await _read_caller(digest)
    if caller is None:
        if not await on_thread(lambda: _load_key(digest)):
            _remember_unknown(digest)
            raise _invalid()
        caller = await _read_caller(digest)
    if caller is None:
        raise redis_clients.unavailable()
    return caller


async def get_by_user(user_id: str, organization_id: str | None = None) -> Caller:
    """Make the caller of a browser session: the user, and the organization that pays, by default the personal one. Both are public ids.

    I/O: two SQL statements. Raises: AiscaleError (ACCOUNT_INACTIVE, NOT_FOUND for an organization that the
    user is not in, PERMISSION_DENIED for a role that may not spend its money).
    """
    return await on_thread(lambda: _get_by_user(user_id, organization_id))


async def get_plan(slug: str) -> PlanLimits:
    """Return a plan's limits, at most a second old. I/O: one SQL statement a second. Raises: AiscaleError (NOT_FOUND)."""
    known = _plans.get(slug)
    if known is not None and known[0] > time.monotonic():
        return known[1]
    name = (id(asyncio.get_running_loop()), slug)
    task = _reading.get(name)
    if task is None:
        task = _reading[name] = asyncio.create_task(_refresh_plan(slug), name="plan")
        task.add_done_callback(lambda _: _reading.pop(name, None))
    # who leaves does not take it away from the others
    return await asyncio.shield(task)


async def _refresh_plan(slug: str) -> PlanLimits:
    read_at = time.monotonic()
    plan = await on_thread(lambda: _read_plan(slug))
    _plans[slug] = (read_at + PLAN_CACHE_S, plan)
    return plan


async def on_thread(work: Callable[[], T]) -> T:
    """Do blocking work with the database off the event loop, and give its connection back."""

    def run() -> T:
        try:
            return work()
        finally:
            connection.close()

    return await asyncio.to_thread(run)


async def _read_caller(digest: str) -> Caller | None:
    try:
        pairs: list[bytes] = await redis_clients.execute("HGETALL", keys.api_key(digest))
        fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
        plan, error_percent = (
            await redis_clients.execute(
                "HMGET", keys.organization(fields[b"organization_id"].decode()), "plan", "semantic_max_error_percent"
            )
            if fields
            else (None, None)
        )
    except redis_clients.UNAVAILABLE as error:
        raise redis_clients.unavailable() from error
    if not fields or plan is None:
        return None
    text = {name.decode(): value.decode() for name, value in fields.items()}
    _check(text["state"], text["expires_at_ms"])
    caller = Caller(
        organization_id=text["organization_id"],
        user_id=text["user_id"],
        key_id=text["key_id"],
        key_digest=digest,
        plan=plan.decode(),
        models=() if text.get("models", "*") == "*" else tuple(text["models"].split(",")),
        semantic_max_error_percent=float(error_percent) if error_percent else None,
    )
    if len(_known) >= CALLER_CACHE_MAX:
        _known.clear()
    _known[digest] = (time.monotonic() + CALLER_CACHE_S, text["expires_at_ms"], caller)
    return caller


def forget(digest: str | None = None) -> None:
    """Ask anew for a key, or for all of them, at its next request in this process."""
    if digest is None:
        _known.clear()
    else:
        _known.pop(digest, None)


def _check(state: str, expires_at_ms: str) -> None:
    if state == "revoked":
        raise AiscaleError(Code.KEY_REVOKED, "This API key was revoked. Make a new one on the API keys page.")
    if state == "expired" or (expires_at_ms and int(expires_at_ms) <= time.time_ns() // 1_000_000):
        raise AiscaleError(Code.KEY_EXPIRED, "This API key has expired. Make a new one on the API keys page.")


def _invalid() -> AiscaleError:
    return AiscaleError(
        Code.INVALID_API_KEY, "Incorrect API key provided. Check it, or make a new one on the API keys page."
    )


def _remember_unknown(digest: str) -> None:
    if len(_unknown) >= UNKNOWN_CACHE_MAX:
        _unknown.clear()
    _unknown[digest] = time.monotonic() + UNKNOWN_CACHE_S


def _load_key(digest: str) -> bool:
    from apps.accounts import mirror

    return mirror.load_key(digest)


def _get_by_user(user_id: str, organization_id: str | None) -> Caller:
    from apps.accounts import organizations, roles
    from apps.accounts.models import User

    user = User.objects.filter(public_id=user_id, is_active=True).first()
    if user is None:
        raise AiscaleError(Code.ACCOUNT_INACTIVE, "This account is not active. Ask the administrator of this service.")
    if organization_id is None:
        organization = organizations.ensure_personal_organization(user)
    else:
        place = organizations.get_membership(user, organization_id)
        roles.check(place.role, roles.Right.CHAT)
        organization = place.organization
    return Caller(
        organization_id=organization.public_id,
        user_id=user_id,
        key_id=None,
        key_digest=None,
        plan=organization.plan.slug,
    )


def _read_plan(slug: str) -> PlanLimits:
    from apps.accounts.models import Plan

    plan = Plan.objects.filter(slug=slug).first()
    if plan is None:
        raise AiscaleError(Code.NOT_FOUND, f"There is no plan {slug!r}.")
    return PlanLimits(
        slug=plan.slug,
        name=plan.name,
        max_output_tokens=plan.max_output_tokens,
        priority=plan.priority,
        weight=plan.weight,
        requests_per_window=plan.requests_per_window,
        window_s=plan.window_s,
        max_in_flight=plan.max_in_flight,
        monthly_limit_nanousd=plan.monthly_limit_nanousd,
        models=tuple(plan.allowed_models),
        tokens_per_minute=plan.tokens_per_minute,
        context_tokens=plan.context_tokens,
        max_queued=plan.max_queued,
        max_wait_s=plan.max_wait_s,
        cache_scope=plan.cache_scope,
        moderation=plan.moderation,
        cached_price_percent=plan.cached_price_percent,
    )
