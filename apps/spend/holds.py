"""End holds in Redis, in the step in which their cost counts as spent (lua/settle.lua), and sweep out what expired (lua/sweep.lua).

They are placed by lua/admit.lua.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from django.db import transaction
from redis import Redis

from aiscale import redis as redis_clients
from aiscale.wire import keys
from apps.spend import periods
from apps.spend.scripts import get_script
from apps.spend.totals import Total

log = logging.getLogger(__name__)

TOKEN_WINDOW_UNIT_MS = 1000
"""A sixtieth of a minute."""


class End(NamedTuple):
    """Say that a job is over: whose hold ends, and how many of the tokens counted at admission were not used."""

    job_id: str
    hold_nanousd: int
    scopes: tuple[str, ...]
    unused_tokens: int
    admitted_at_ms: int


def settle(client: Redis, ends: Sequence[End], spent: Iterable[Total], entry_ids: Sequence[str] = ()) -> int:
    """End the jobs' holds, write what their scopes spent, acknowledge the events. Returns how many holds were there.

    ``spent`` was read after the costs were committed. I/O: one Redis trip. Atomic, idempotent.
    """
    names, document = _settle_arguments(ends, spent, entry_ids)
    return int(get_script("settle").run(client, names, [keys.GROUP_SETTLEMENT, document]))


async def give_back(end: End) -> None:
    """End one job's hold without a cost. I/O: one Redis trip. Atomic, idempotent. Raises: redis.exceptions.RedisError, OSError."""
    names, document = _settle_arguments([end], [], [])
    await get_script("settle").run_async(redis_clients.get_async(), names, [keys.GROUP_SETTLEMENT, document])


def sweep(client: Redis) -> int:
    """Take expired holds out of every scope; return how many there were.

    Nobody counts them, and the gate takes out those of the scopes that it looks at: left are those of keys and people who ask no more.

    I/O: a scan of Redis, a trip for each scope that holds something, two where something has expired. Atomic for each scope, idempotent.
    """
    script, now_ms, swept = get_script("sweep"), periods.now_ms(), 0
    pattern = f"{keys.holds('')}*"
    for name in list(client.scan_iter(match=pattern, count=1000)):
        scope = name.decode().removeprefix(keys.holds(""))
        names = [keys.spend(scope), keys.holds(scope), keys.in_flight(scope)]
        if client.zcount(names[1], "-inf", now_ms):
            swept += int(script.run(client, names, [now_ms]))
    return swept


def push(spent: Sequence[Total]) -> None:
    """Write totals into the copies that are there and older. I/O: one Redis trip. Idempotent."""
    if spent:
        settle(redis_clients.get_sync(), [], spent)


def push_on_commit(spent: Sequence[Total]) -> None:
    """Do `push` once the surrounding transaction commits. Should that fail, settlement does it seconds later (`totals.list_changed`)."""

    def try_push() -> None:
        try:
            push(spent)
        except redis_clients.UNAVAILABLE:
            log.exception("what is posted reaches the gate once Redis answers")

    transaction.on_commit(try_push)


def _settle_arguments(ends: Sequence[End], spent: Iterable[Total], entry_ids: Sequence[str]) -> tuple[list[str], str]:
    """Return KEYS of settle.lua and its JSON. Jobs of one scope stand together, so that each scope takes a few commands in all."""
    by_scope: dict[str, dict[str, End]] = defaultdict(dict)
    totals_of: dict[str, list[Total]] = defaultdict(list)
    for end in ends:
        for scope in end.scopes:
            by_scope[scope][keys.hold(end.job_id, end.hold_nanousd)] = end
    for total in spent:
        totals_of[total.scope].append(total)
    names = [keys.FINISHED]
    scopes = []
    for scope in sorted({*by_scope, *totals_of}):
        entry: dict[str, Any] = {"key": len(names) + 1, "holds": list(by_scope[scope]), "refunds": {}}
        names += [keys.spend(scope), keys.holds(scope)]
        entry["totals"] = [_describe(total) for total in totals_of[scope]]
        entry["in_flight"] = 0
        kind = scope.partition(":")[0]
        if kind in ("organization", "key") and by_scope[scope]:
            names.append(keys.in_flight(scope))
            entry |= {"in_flight": len(names), "jobs": [end.job_id for end in by_scope[scope].values()]}
        unused = {hold: end for hold, end in by_scope[scope].items() if end.unused_tokens > 0}
        if kind in ("organization", "key") and unused:
            names.append(keys.token_rate(scope))
            for hold, end in unused.items():
                second = end.admitted_at_ms // TOKEN_WINDOW_UNIT_MS
                entry["refunds"][hold] = [{"key": len(names), "second": str(second), "tokens": end.unused_tokens}]
        scopes.append(entry)
    return names, json.dumps({"entries": list(entry_ids), "scopes": scopes}, separators=(",", ":"))


def _describe(total: Total) -> dict[str, Any]:
    return {
        "period": total.period,
        "start_ms": str(total.span.start_ms),
        "end_ms": str(total.span.end_ms),
        "spent_nanousd": str(total.spent_nanousd),
        "revision": total.revision,
    }
