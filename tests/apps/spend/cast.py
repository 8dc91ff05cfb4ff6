"""Set the stage for tests of money: organizations as the gate sees them, asks, finished jobs, and what Redis holds."""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest
from django.db import connection
from redis import Redis

from aiscale import redis as redis_clients
from aiscale.db import make_public_id
from aiscale.errors import AiscaleError
from aiscale.wire import keys
from aiscale.wire.codec import encode_event
from aiscale.wire.events import Finished
from aiscale.wire.jobs import BillingTag
from apps.accounts import audit, mirror
from apps.accounts.callers import Caller
from apps.accounts.models import Organization, Plan
from apps.spend import balance, budgets, killswitch, settlement
from apps.spend.admission import Ask, admit
from apps.spend.models import Budget

T = TypeVar("T")
USD = 1_000_000_000
MODEL = "smollm2-135m-instruct"
ADA, BOB = audit.by_system("ada"), audit.by_system("bob")
"""Who trips and releases."""


def make_plan(slug: str = "free", **changes: Any) -> Plan:
    """Make or change a plan, in Postgres and in the gate's mirror."""
    values: dict[str, Any] = {
        "name": slug.capitalize(),
        "requests_per_window": 1000,
        "window_s": 3600,
        "max_in_flight": 1000,
        "monthly_limit_nanousd": USD,
        "max_output_tokens": 1024,
        "allowed_models": [],
        "priority": 9,
    } | changes
    plan, _ = Plan.objects.update_or_create(slug=slug, defaults=values)
    mirror.publish_plan(plan)
    return plan


def make_organization(slug: str = "free", *, name: str = "Ada's", **plan_changes: Any) -> Organization:
    """Make an organization on a plan of its own making, in Postgres and in the gate's mirror."""
    organization = Organization.objects.create(name=name, plan=make_plan(slug, **plan_changes))
    mirror.publish_organization(organization)
    return organization


def warm(organization: Organization) -> Organization:
    """Have all of the gate's copies there, so that a refusal's dump is not changed by their loading."""
    killswitch.restore()
    balance.restore()
    balance.publish(budgets.organization_scope(organization.public_id))
    return organization


async def on_thread(work: Callable[[], T]) -> T:
    """Do ``work`` with the database from within an asynchronous test."""

    def run() -> T:
        try:
            return work()
        finally:
            connection.close()

    return await asyncio.to_thread(run)


async def stage(slug: str = "free", **plan_changes: Any) -> Organization:
    """Make an organization with all of the gate's copies in place."""
    return await on_thread(lambda: warm(make_organization(slug, **plan_changes)))


def make_caller(organization: Organization, *, key_digest: str | None = None, key_id: str = "key_1") -> Caller:
    return Caller(
        organization_id=organization.public_id,
        user_id="usr_1",
        key_id=key_id if key_digest else None,
        key_digest=key_digest,
        plan=organization.plan.slug,
    )


def make_ask(caller: Caller, **changes: Any) -> Ask:
    values: dict[str, Any] = {
        "caller": caller,
        "model": MODEL,
        "job_id": make_public_id("job"),
        "worst_nanousd": 1000,
        "worst_tokens": 15,
        "deadline_at_ms": time.time_ns() // 1_000_000 + 60_000,
    } | changes
    return Ask(**values)


def publish_key(digest: str, payer: str, **changes: Any) -> None:
    """Write a key's mirror as accounts does."""
    values = {
        "key_id": "key_1",
        "organization_id": payer,
        "user_id": "usr_1",
        "state": "active",
        "expires_at_ms": "",
        "requests_per_window": "",
        "window_s": "",
        "tokens_per_minute": "",
        "max_in_flight": "",
        "models": "*",
    } | changes
    redis_clients.get_sync().hset(keys.api_key(digest), mapping=values)


def make_finished(organization_id: str, job_id: str | None = None, **changes: Any) -> Finished:
    """Make a job's last event: 10 prompt tokens at 3, 5 completion tokens at 7 nano-USD, that is 65."""
    now_ms = time.time_ns() // 1_000_000
    tag: dict[str, Any] = {
        "organization_id": organization_id,
        "user_id": "usr_1",
        "key_id": None,
        "plan": "free",
        "request_id": "req_1",
        "source": "api",
        "prompt_nanousd_per_token": 3,
        "completion_nanousd_per_token": 7,
        "hold_nanousd": 1000,
        "hold_tokens": 15,
        "admitted_at_ms": now_ms - 1500,
    }
    tag.update({name: changes.pop(name) for name in list(changes) if name in BillingTag.__struct_fields__})
    values: dict[str, Any] = {
        "job_id": job_id or make_public_id("job"),
        "seq": 6,
        "kind": "generate",
        "model": MODEL,
        "model_version": "1",
        "finish_reason": "stop",
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "billing": BillingTag(**tag),
        "worker_id": "w1",
        "queued_ms": 3,
        "first_token_ms": 90,
        "duration_ms": 1400,
        "finished_at_ms": now_ms,
    } | changes
    return Finished(**values)


def send(events: Iterable[Finished | bytes]) -> None:
    """Put events into the stream, as finish.lua does."""
    for event in events:
        data = event if isinstance(event, bytes) else encode_event(event)
        redis_clients.get_sync().xadd(keys.FINISHED, {"0": data})


def scope_of(organization: Organization) -> str:
    return budgets.organization_scope(organization.public_id)


def read_spend(scope: str) -> dict[str, str]:
    rows = redis_clients.get_sync().hgetall(keys.spend(scope))
    return {name.decode(): value.decode() for name, value in rows.items()}


def spent(organization: Organization) -> int:
    """What the gate takes the organization to have spent this month."""
    return int(read_spend(scope_of(organization))["monthly_spent_nanousd"])


def held(organization: Organization) -> int:
    return int(read_spend(scope_of(organization))["held_nanousd"])


def dump(client: Redis) -> dict[bytes, bytes]:
    """Return everything that Redis holds below our prefix, with each key's life, to compare before and after."""
    kept = {}
    for key in sorted(client.scan_iter(match=f"{keys.PREFIX}*", count=1000)):
        kept[key] = (client.dump(key) or b"") + (b" lives" if client.pttl(key) > 0 else b" stays")
    return kept


async def set_budget(scope: str, limit: int | None = None, **changes: Any) -> Budget:
    """Make or change a budget: monthly unless ``period`` says otherwise."""

    def save() -> Budget:
        period = changes.pop("period", "monthly")
        budget, _ = Budget.objects.update_or_create(
            scope=scope, period=period, defaults={"limit_nanousd": limit, **changes}
        )
        return budget

    return await on_thread(save)


async def refused(ask: Ask) -> AiscaleError:
    """Ask, and expect a refusal that leaves every key as it was."""
    before = dump(redis_clients.get_sync())
    with pytest.raises(AiscaleError) as refusal:
        await admit(ask)
    assert dump(redis_clients.get_sync()) == before, "a refusal changed something"
    return refusal.value


async def finish(caller: Caller, job_id: str | None = None, **changes: Any) -> None:
    """Settle a job of the caller's, which cost 65."""
    values: dict[str, Any] = {"key_id": caller.key_id, "hold_nanousd": 65, **changes}
    event = make_finished(caller.organization_id, job_id, **values)
    await on_thread(lambda: settlement.settle(event))
