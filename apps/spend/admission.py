"""Admit or refuse a request, and hold the most that it can cost: the one gate (``lua/admit.lua``)."""

import asyncio
import logging
import time

import msgspec
import redis.asyncio as aioredis
from django.conf import settings

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.observability import ADMISSION_SECONDS, ADMISSIONS, REFUSALS
from aiscale.wire import keys
from aiscale.wire.jobs import LOCAL_PROVIDER
from apps.accounts import mirror
from apps.accounts.callers import Caller
from apps.spend import balance, killswitch, periods
from apps.spend.refusals import make_refusal, rate_headers
from apps.spend.scripts import get_script

log = logging.getLogger(__name__)

HOLD_GRACE_MS = 60_000
"""A hold outlives its job's deadline by this: time for the last event to be settled. Then it expires by itself (M2)."""
MAX_ATTEMPTS = 4
"""One try, and one more after each of three refills."""
GATE_TIMEOUT_S = 3.0
"""A Redis that accepts connections and never answers is as good as none (M3)."""

_releases: set[asyncio.Task[None]] = set()


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """Ask to run one job. ``worst_nanousd`` is `pricing.cost_nanousd` of the prompt and of max_tokens."""

    caller: Caller
    model: str
    job_id: str
    worst_nanousd: int
    deadline_at_ms: int
    provider: str = LOCAL_PROVIDER


class Admitted(msgspec.Struct, frozen=True, kw_only=True):
    """Say yes. ``headers`` are the rate limit's state, for every answer that the job gets."""

    job_id: str
    headers: dict[str, str]


async def admit(ask: Ask) -> Admitted:
    """Check everything, count the request and place the hold, or refuse and leave every counter as it was.

    Of a hundred requests at once only as many pass as fit together (M1); a request passes only with its whole worst case (M12).
    Asking again with the same job id counts once.

    I/O: one Redis trip; SQL only to refill what Redis has lost. Raises: AiscaleError with the rate limit's state in ``headers``
    where it is known; BACKEND_UNAVAILABLE when Redis does not answer (M3).
    """
    started = time.perf_counter()
    try:
        answer, plan, now_ms = await _decide(ask)
        if answer[0] == "refused":
            raise make_refusal(answer[1:], model=ask.model, plan=plan, worst_nanousd=ask.worst_nanousd, now_ms=now_ms)
    except AiscaleError as refusal:
        REFUSALS.labels(refusal.code.value).inc()
        raise
    finally:
        ADMISSION_SECONDS.observe(time.perf_counter() - started)
    ADMISSIONS.labels(ask.model, plan).inc()
    return Admitted(job_id=ask.job_id, headers=rate_headers(answer[1:4]))


async def release(organization_id: str, job_id: str) -> None:
    """Give back the hold of a job that could not be sent. Its request stays counted. Idempotent.

    I/O: one Redis trip. A failure is logged and not raised: the hold then expires by itself.
    """
    try:
        async with asyncio.timeout(GATE_TIMEOUT_S):
            await get_script("settle").run_async(
                redis_clients.get_async(),
                balance.settle_keys(organization_id),
                [keys.GROUP_SETTLEMENT, "drop", "", "", job_id, 0, ""],
            )
    except (*redis_clients.UNAVAILABLE, TimeoutError):
        log.warning("could not give a hold back; it expires by itself", extra={"job_id": job_id}, exc_info=True)


async def run_gate(client: aioredis.Redis, ask: Ask, *, plan: str, now_ms: int) -> list[str]:
    """Run admit.lua once and return its answer (see its header).

    I/O: one Redis trip. Raises: redis.exceptions.RedisError, OSError.
    """
    organization_id = ask.caller.organization_id
    digest = ask.caller.key_digest
    answer = await get_script("admit").run_async(
        client,
        [
            keys.api_key(digest) if digest else "",
            keys.organization(organization_id),
            keys.plan(plan),
            keys.KILLED,
            keys.spend(organization_id),
            keys.holds(organization_id),
            keys.hold_amounts(organization_id),
            keys.rate(organization_id),
            keys.queue_depth(ask.model),
        ],
        [
            ask.job_id,
            organization_id,
            plan,
            ask.model,
            ask.worst_nanousd,
            now_ms,
            ask.deadline_at_ms + HOLD_GRACE_MS,
            periods.month_of(now_ms),
            settings.ENV.queue_limit,
            ask.provider,
        ],
    )
    return [part.decode() for part in answer]


async def _decide(ask: Ask) -> tuple[list[str], str, int]:
    """Ask the gate, refilling what Redis has lost, until it says yes or no. Returns its answer, the plan and the moment."""
    if ask.worst_nanousd < 0:
        raise AiscaleError(
            Code.BACKEND_UNAVAILABLE,
            "This request's price cannot be negative. Tell the administrator of this service.",
        )
    plan = ask.caller.plan
    for _ in range(MAX_ATTEMPTS):
        now_ms = periods.now_ms()
        answer = await _ask_once(ask, plan, now_ms)
        if answer[0] == "plan":
            plan = answer[1]
        elif answer[0] == "load":
            await _refill(ask, answer[1])
        else:
            return answer, plan, now_ms
    log.error("the gate's copies in Redis cannot be refilled: %s", answer, extra={"job_id": ask.job_id})
    raise redis_clients.unavailable()


async def _ask_once(ask: Ask, plan: str, now_ms: int) -> list[str]:
    try:
        async with asyncio.timeout(GATE_TIMEOUT_S):
            return await run_gate(redis_clients.get_async(), ask, plan=plan, now_ms=now_ms)
    except (*redis_clients.UNAVAILABLE, TimeoutError) as error:
        log.error("the gate refuses: Redis does not answer: %s", error, extra={"job_id": ask.job_id})
        raise redis_clients.unavailable() from error
    except asyncio.CancelledError:
        # the caller left while the script may have run: nobody would use that hold
        task = asyncio.create_task(release(ask.caller.organization_id, ask.job_id))
        _releases.add(task)
        task.add_done_callback(_releases.discard)
        raise


async def _refill(ask: Ask, what: str) -> None:
    """Bring back a copy that Redis lost. I/O: SQL and a few Redis trips. Raises: AiscaleError."""
    log.info("refilling the gate's copy of %s", what, extra={"organization_id": ask.caller.organization_id})
    try:
        if what == "identity":
            await mirror.load(ask.caller)
        elif what == "killed":
            await killswitch.restore_async()
        else:
            await balance.load(ask.caller.organization_id)
    except redis_clients.UNAVAILABLE as error:
        raise redis_clients.unavailable() from error
