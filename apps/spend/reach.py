"""Say in plain sentences whom a kill switch hits, before it is tripped or released."""

from datetime import datetime
from typing import Any, NamedTuple

import msgspec
from django.conf import settings
from django.db.models import QuerySet
from django.utils import timezone
from django.utils.module_loading import import_string
from django.utils.timesince import timeuntil

from aiscale import redis as redis_clients
from aiscale.wire import keys
from aiscale.wire.codec import decode_encode_job, decode_generate_job
from aiscale.wire.scopes import list_scopes
from apps.accounts.models import ApiKey, Organization, Plan
from apps.spend.models import KillSwitch, UsageRecord
from apps.spend.refusals import describe_kill, say_moment

BATCH = 500


class Reach(NamedTuple):
    """Count who lies in a scope now; ``running`` and ``waiting`` are None when Redis does not answer."""

    organizations: int
    keys: int
    running: int | None
    waiting: int | None


def measure(scope: str) -> Reach:
    """Count whom ``scope`` covers. I/O: two SQL statements; Redis trips, one for 500 living jobs."""
    organizations, api_keys = _find_payers(scope)
    try:
        running, waiting = _count_jobs(scope)
    except redis_clients.UNAVAILABLE:
        return Reach(organizations, api_keys, None, None)
    return Reach(organizations, api_keys, running, waiting)


def describe_trip(scope: str, reason: str, until_at: datetime | None) -> list[str]:
    """Say what tripping ``scope`` would do: whom it hits, what they read, until when. I/O: as `measure`, and one SQL statement."""
    reach = measure(scope)
    known = KillSwitch.objects.filter(scope=scope, released_at__isnull=True).first()
    is_known = known is not None and (known.until_at is None or known.until_at > timezone.now())
    sentences = [
        f"This stops {name_scope(scope)}: {_say_payers(reach)} refused from the moment you confirm, in the chat and the API.",
        _say_jobs(reach, "end within a second. What was made until then is charged."),
        f"They read: “{describe_kill(scope, reason, until_at)}”",
        f"It lasts {say_end(until_at)}.",
    ]
    if known is not None and is_known:
        sentences.append(
            f"It is stopped already, by {known.tripped_by}, {say_end(known.until_at)}. The first reason stays, and the later end counts."
        )
    sentences += _doubt_spelling(scope)
    return sentences


def describe_release(switch: KillSwitch) -> list[str]:
    """Say what releasing would do, and what stays stopped all the same. I/O: as `measure`, and one SQL statement."""
    reach = measure(switch.scope)
    sentences = [
        f"This lets {name_scope(switch.scope)} go on: {_say_payers(reach)} no longer refused from the moment you confirm.",
        f"It was stopped by {switch.tripped_by} on {say_moment(switch.tripped_at)}: “{switch.reason}”",
        "Answers that were ended stay ended; whoever wants them asks again.",
    ]
    others = KillSwitch.objects.filter(released_at__isnull=True).exclude(pk=switch.pk).count()
    if others:
        sentences.append(
            f"{_count(others, 'other kill switch stays', 'other kill switches stay')} in force, and may cover some of them."
        )
    return sentences


def name_scope(scope: str) -> str:
    """Name what a scope covers, for the middle of a sentence. I/O: up to one SQL statement."""
    kind, _, name = scope.partition(":")
    if kind == "site":
        return "every request of everybody"
    if kind == "organization":
        found = Organization.objects.filter(public_id=name).first()
        return f"every request of the organization {found.name if found else name}"
    if kind == "key":
        key = ApiKey.objects.select_related("organization").filter(public_id=name).first()
        return f"every request with the API key {f'“{key}” of {key.organization}' if key else name}"
    if kind == "plan":
        plan = Plan.objects.filter(slug=name).first()
        return f"every request of the {plan.name if plan else name} plan"
    return f"every request to the {kind} {name!r}"


def say_end(until_at: datetime | None) -> str:
    """Say until when, for the end of a sentence."""
    if until_at is None:
        return "until somebody releases it"
    return f"until {say_moment(until_at)} (in {timeuntil(until_at)}), and then ends by itself"


def _doubt_spelling(scope: str) -> list[str]:
    """Say when a name may be misspelt: a model for which no request was ever settled, or an unknown provider. I/O: one SQL statement."""
    kind, _, name = scope.partition(":")
    if kind == "model" and not UsageRecord.objects.filter(model=name).exists():
        return ["Nobody has used this model so far. Check the spelling."]
    # upstreams lie above spend, so settings name who knows them
    if kind == "provider" and name not in (known := import_string(settings.LIST_PROVIDERS)()):
        return [f"There is no provider {name!r}; there {_name_all(known)}. Check the spelling."]
    return []


def _name_all(names: list[str]) -> str:
    return f"is only {names[0]}" if len(names) == 1 else f"are {', '.join(names[:-1])} and {names[-1]}"


def _find_payers(scope: str) -> tuple[int, int]:
    kind, _, name = scope.partition(":")
    organizations: QuerySet[Organization] = Organization.objects.filter(is_active=True)
    api_keys = ApiKey.objects.filter(revoked_at=None, organization__is_active=True)
    if kind == "plan":
        organizations, api_keys = organizations.filter(plan__slug=name), api_keys.filter(organization__plan__slug=name)
    elif kind == "organization":
        organizations, api_keys = organizations.filter(public_id=name), api_keys.filter(organization__public_id=name)
    elif kind == "key":
        api_keys = api_keys.filter(public_id=name)
        organizations = organizations.filter(api_keys__in=api_keys)
    return organizations.count(), api_keys.count()


def _count_jobs(scope: str) -> tuple[int, int]:
    """Return (running, waiting) jobs of a scope. Raises: RedisError, OSError."""
    client: Any = redis_clients.get_sync()
    job_ids = [member.decode() for member in client.zrange(keys.LEASES, 0, -1)]
    running = waiting = 0
    for start in range(0, len(job_ids), BATCH):
        pipeline = client.pipeline(transaction=False)
        for job_id in job_ids[start : start + BATCH]:
            pipeline.hmget(keys.job_record(job_id), "state", "kind", "payload")
        for state, kind, payload in pipeline.execute():
            if payload is None or scope not in _scopes_of(kind, payload):
                continue
            running += state == b"running"
            waiting += state == b"queued"
    return running, waiting


def _scopes_of(kind: bytes, payload: bytes) -> list[str]:
    try:
        return list_scopes(decode_generate_job(payload) if kind == b"generate" else decode_encode_job(payload))
    except (msgspec.MsgspecError, ValueError):
        return []


def _say_payers(reach: Reach) -> str:
    verb = "is" if reach.organizations == 1 else "are"
    return f"{_count(reach.organizations, 'organization')} with {_count(reach.keys, 'API key')} {verb}"


def _say_jobs(reach: Reach, what: str) -> str:
    if reach.running is None or reach.waiting is None:
        return f"Redis does not answer, so nobody can say how many answers run now; they {what}"
    return f"{_count(reach.running, 'running answer')} and {_count(reach.waiting, 'waiting request')} {what}"


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
