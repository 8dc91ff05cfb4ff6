"""Admit or refuse a request, and hold the most that it can cost: the one gate (``lua/admit.lua``)."""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import msgspec
import redis.asyncio as aioredis
from django.conf import settings
from django.db import DatabaseError, InterfaceError

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.observability import ADMISSION_SECONDS, ADMISSIONS, REFUSALS
from aiscale.wire import keys
from aiscale.wire.broker import PRIORITY_STEPS
from aiscale.wire.jobs import LOCAL_PROVIDER, BillingTag
from apps.accounts import mirror
from apps.accounts.callers import Caller, on_thread
from apps.spend import balance, budgets, holds, killswitch, periods, refusals, thresholds
from apps.spend.scripts import get_script

log = logging.getLogger(__name__)

HOLD_GRACE_MS = 60_000
"""A hold outlives its job's deadline by this: time for the last event to be settled. Then it expires by itself (M2)."""
MAX_ATTEMPTS = 6
"""One try, and one more after each refill: identity, plan and copies may be lost one after the other."""
GATE_TIMEOUT_S = 3.0
"""A Redis that accepts connections and never answers is as good as none (M3); for the gate itself `aiscale.redis.Batcher` sees to that."""

EXHAUSTED_MAX = 10_000

_background: set[asyncio.Task[None]] = set()
_exhausted: set[tuple[str, str, int, int]] = set()
"""Budgets, with their period, its end and their limit, of which this process knows that their refusals are written down."""
_loads: dict[tuple[int, str], asyncio.Task[None]] = {}
"""Refills that are going on, by event loop and what: a thousand requests that miss the same copy wait for one."""


Mode = Literal["admit", "check", "explain"]

NO_QUEUE = 1 << 40
"""What an upstream computes waits in no queue of ours."""


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """Ask to run one job. ``worst_nanousd`` is `pricing.cost_nanousd` of the prompt and of max_tokens, ``worst_tokens`` their sum."""

    caller: Caller
    model: str
    job_id: str
    worst_nanousd: int
    worst_tokens: int
    deadline_at_ms: int
    priority: int = PRIORITY_STEPS[-1]
    weight: int = 1
    """Its tier in the model's queue, and its organization's share there."""
    provider: str = LOCAL_PROVIDER
    makes_text: bool = True
    """Whether it makes an answer of a length that its caller may bound; false for vectors and labels."""
    queues: bool = True
    """Whether it would wait in the model's queue; false for what follows another job."""
    make_end: Callable[[str, int], bytes] | None = None
    """Where the answer is known already: makes the encoded `Finished` from the plan and the moment (epoch ms) of admission. It reaches
    settlement if, and only if, the request is admitted."""
    cache_generation: str = ""
    """The purges that the known answer goes by, as the process remembers them: the gate looks whether there was another one."""


class Purged(Exception):
    """The known answer is from before a purge of the cache: look for it anew. Nothing was counted."""


class Admitted(msgspec.Struct, frozen=True, kw_only=True):
    """Say yes. ``headers`` are the rate limits' state, for every answer that the job gets.

    ``plan`` is the one that counts: the caller's may have changed a moment ago. Job, plan, tokens and ``admitted_at_ms`` belong into the
    job's tag, from which settlement knows what to end.
    """

    job_id: str
    plan: str
    worst_tokens: int
    admitted_at_ms: int
    headers: dict[str, str]


async def admit(ask: Ask) -> Admitted:
    """Check everything, count the request and place the hold, or refuse and leave every counter as it was.

    Of a hundred requests at once only as many pass as fit together (M1); a request passes only with its whole worst case (M12).
    Asking again with the same job id counts once.

    I/O: one Redis trip; SQL only to refill what Redis has lost. Raises: AiscaleError with the rate limit's state in ``headers``
    where it is known; BACKEND_UNAVAILABLE when Redis does not answer (M3); Purged.
    """
    started = time.perf_counter()
    try:
        answer, plan, now_ms = await _decide(ask)
        if answer[0] == "refused":
            refusal = refusals.read(
                answer, ask.model, plan, now_ms, in_browser=ask.caller.key_digest is None, makes_text=ask.makes_text
            )
            _note_exhausted(refusal)
            raise refusals.make_error(refusal)
    except AiscaleError as error:
        REFUSALS.labels(error.code.value).inc()
        raise
    finally:
        ADMISSION_SECONDS.observe(time.perf_counter() - started)
    ADMISSIONS.labels(ask.model, plan).inc()
    return Admitted(
        job_id=ask.job_id,
        plan=plan,
        worst_tokens=ask.worst_tokens,
        admitted_at_ms=now_ms,
        headers=refusals.rate_headers(answer[1:7]),
    )


async def check(ask: Ask) -> None:
    """Refuse as `admit` would, and count and hold nothing: before something is done for a request that costs us.

    I/O and Raises: as `admit`.
    """
    answer, plan, now_ms = await _decide(ask, mode="check")
    if answer[0] == "refused":
        refusal = refusals.read(
            answer, ask.model, plan, now_ms, in_browser=ask.caller.key_digest is None, makes_text=ask.makes_text
        )
        _note_exhausted(refusal)
        REFUSALS.labels(refusal.code.value).inc()
        raise refusals.make_error(refusal)


async def explain(ask: Ask) -> list[refusals.Check]:
    """Say how each check of the gate would go for this request, and count and hold nothing. The first that refuses is what a caller reads.

    I/O: as `admit`. Raises: AiscaleError (BACKEND_UNAVAILABLE).
    """
    answer, plan, now_ms = await _decide(ask, mode="explain")
    return refusals.read_checks(answer, ask.model, plan, now_ms, makes_text=ask.makes_text)


async def release(tag: BillingTag, model: str, job_id: str) -> None:
    """Give back the hold of a job that could not be sent, and its tokens. Its request stays counted. Idempotent.

    I/O: one Redis trip. A failure is logged and not raised: the hold then expires by itself.
    """
    scopes = budgets.list_scopes_of(tag, model)
    await _give_back(holds.End(job_id, tag.hold_nanousd, scopes, tag.hold_tokens, tag.admitted_at_ms))


async def run_gate(
    client: aioredis.Redis | None, ask: Ask, *, plan: str, now_ms: int, mode: Mode = "admit"
) -> list[Any]:
    """Run admit.lua once and return its answer (see its header); without a client, together with other requests of this loop.

    I/O: one Redis trip. Raises: redis.exceptions.RedisError, OSError.
    """
    caller = ask.caller
    scopes = _list_scopes(ask, plan)
    first, last = _name_keys(caller.key_digest, caller.key_id, caller.organization_id, plan, ask.model, scopes)
    names = [
        *first,
        keys.FINISHED if ask.make_end else "",
        keys.CACHE_GENERATIONS if ask.cache_generation else "",
        *last,
    ]
    args: list[str | int | bytes] = [
        ask.job_id,
        caller.organization_id,
        plan,
        ask.model,
        ask.worst_nanousd,
        ask.worst_tokens,
        now_ms,
        ask.deadline_at_ms + HOLD_GRACE_MS,
        budgets.plans_definition(),
        "" if not ask.queues else settings.ENV.queue_limit if ask.provider == LOCAL_PROVIDER else NO_QUEUE,
        mode,
        ask.provider,
        ask.priority,
        ask.weight,
        settings.ENV.unserved_s * 1000,
        ask.make_end(plan, now_ms) if ask.make_end else "",
        ask.cache_generation,
        *scopes,
    ]
    script = get_script("admit")
    answer = await (script.run_together(names, args) if client is None else script.run_async(client, names, args))
    decided: list[Any] = _decode(answer)
    return decided


@lru_cache(maxsize=4_096)
def _name_keys(
    digest: str | None, key_id: str | None, organization_id: str, plan: str, model: str, scopes: tuple[str, ...]
) -> tuple[list[str], list[str]]:
    """Name KEYS 1 to 15 of admit.lua, and those of the scopes. Nobody may change the lists."""
    own = budgets.organization_scope(organization_id)
    of_key = f"key:{key_id}" if digest else ""
    first = [
        keys.api_key(digest) if digest else "",
        keys.organization(organization_id),
        keys.plan(plan),
        keys.KILLED,
        keys.BUDGETS,
        keys.queue_state(model),
        keys.rate(own),
        keys.token_rate(own),
        keys.rate(of_key) if of_key else "",
        keys.token_rate(of_key) if of_key else "",
        keys.in_flight(own),
        keys.in_flight(of_key) if of_key else "",
        keys.queue_depth(model),
        keys.model_served(model),
        keys.EPOCH,
    ]
    return first, [name for scope in scopes for name in (keys.spend(scope), keys.holds(scope))]


def _list_scopes(ask: Ask, plan: str) -> tuple[str, ...]:
    caller = ask.caller
    return budgets.list_scopes(
        organization_id=caller.organization_id,
        plan=plan,
        model=ask.model,
        user_id=caller.user_id,
        key_id=caller.key_id,
    )


def _decode(answer: Any) -> Any:
    return [_decode(part) for part in answer] if isinstance(answer, list) else answer.decode()


async def _decide(ask: Ask, *, mode: Mode = "admit") -> tuple[list[Any], str, int]:
    """Ask the gate, refilling what Redis has lost, until it says yes or no. Returns its answer, the plan and the moment."""
    if ask.worst_nanousd < 0 or ask.worst_tokens < 0:
        raise AiscaleError(
            Code.BACKEND_UNAVAILABLE,
            "This request's price cannot be negative. Tell the administrator of this service.",
        )
    plan = ask.caller.plan
    for _ in range(MAX_ATTEMPTS):
        now_ms = periods.now_ms()
        answer = await _ask_once(ask, plan, now_ms, mode)
        if answer[0] == "plan":
            plan = answer[1]
        elif answer[0] == "purged":
            raise Purged
        elif answer[0] == "load":
            await asyncio.gather(*(_refill(ask, what) for what in answer[1:]))
        else:
            return answer, plan, now_ms
    log.error("the gate's copies in Redis cannot be refilled: %s", answer, extra={"job_id": ask.job_id})
    raise redis_clients.unavailable()


async def _ask_once(ask: Ask, plan: str, now_ms: int, mode: Mode) -> list[Any]:
    try:
        return await run_gate(None, ask, plan=plan, now_ms=now_ms, mode=mode)
    except redis_clients.UNAVAILABLE as error:
        log.error("the gate refuses: Redis does not answer: %s", error, extra={"job_id": ask.job_id})
        raise redis_clients.unavailable() from error
    except asyncio.CancelledError:
        # the caller left while the script may have run: nobody would use that hold
        end = holds.End(ask.job_id, ask.worst_nanousd, _list_scopes(ask, plan), ask.worst_tokens, now_ms)
        task = asyncio.create_task(_give_back(end))
        _background.add(task)
        task.add_done_callback(_background.discard)
        raise


async def _give_back(end: holds.End) -> None:
    try:
        async with asyncio.timeout(GATE_TIMEOUT_S):
            await holds.give_back(end)
    except (*redis_clients.UNAVAILABLE, TimeoutError):
        log.warning("could not give a hold back; it expires by itself", extra={"job_id": end.job_id}, exc_info=True)


async def _refill(ask: Ask, what: str) -> None:
    """Bring back a copy that Redis lost. I/O: SQL and a few Redis trips, shared by all who wait for it. Raises: AiscaleError."""
    name = (id(asyncio.get_running_loop()), f"identity {ask.caller}" if what == "identity" else what)
    task = _loads.get(name)
    if task is None:
        log.info("refilling the gate's copy of %s", what, extra={"organization_id": ask.caller.organization_id})
        task = _loads[name] = asyncio.create_task(_load(ask.caller, what))
        task.add_done_callback(lambda _: _loads.pop(name, None))
    try:
        # who leaves does not take the refill away from the others
        await asyncio.shield(task)
    except (*redis_clients.UNAVAILABLE, DatabaseError, InterfaceError) as error:
        log.error("the gate refuses: its copy of %s cannot be refilled: %s", what, error)
        raise redis_clients.unavailable() from error


async def _load(caller: Caller, what: str) -> None:
    if what == "identity":
        await mirror.load(caller)
    elif what == "killed":
        await killswitch.restore_async()
    else:
        await balance.load(what)


def _note_exhausted(refusal: refusals.Refusal) -> None:
    """Have it written down, once a period, that a budget refuses requests for lack of money. Nobody waits for it."""
    if refusal.code is not Code.BUDGET_EXHAUSTED:
        return
    budget = refusals.read_exhausted(refusal)
    name = _name(budget)
    if name in _exhausted or not thresholds.is_exhausted(budget):
        return
    if len(_exhausted) >= EXHAUSTED_MAX:
        _exhausted.clear()
    _exhausted.add(name)
    task = asyncio.create_task(on_thread(lambda: _write_exhausted(budget)))
    _background.add(task)
    task.add_done_callback(_background.discard)


def _name(budget: refusals.Exhausted) -> tuple[str, str, int, int]:
    return budget.scope, budget.period, budget.ends_at_ms, budget.limit_nanousd


def _write_exhausted(budget: refusals.Exhausted) -> None:
    try:
        thresholds.note_refusal(budget)
    except (DatabaseError, *redis_clients.UNAVAILABLE):
        log.exception("could not write down that a budget is used up; the next refusal tries again")
        _exhausted.discard(_name(budget))
