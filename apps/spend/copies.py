"""Compare the gate's copies in Redis with Postgres, and its holds with the jobs that live; make anew what differs.

All of it moves while one looks. A copy may be a revision behind for as long as a settlement takes, and a hold exists a moment before its
job does and a moment longer than it runs. So what differs is looked at again and again, and counts when it differs each time.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from redis import Redis

from aiscale import redis as redis_clients
from aiscale.db import format_usd
from aiscale.wire import keys
from aiscale.wire.codec import decode_event
from aiscale.wire.events import Finished
from apps.spend import balance, holds, periods, totals
from apps.spend.reconciliation import MENDED, Difference, Kind, Report

PATIENCE_S = 10.0
LOOK_EACH_S = 0.5
MAX_UNSETTLED = 20_000
"""With more finished jobs waiting, settlement lags, and holds are not judged."""


def check_copies(*, patience_s: float = PATIENCE_S) -> Report:
    """Compare every copy and every hold. I/O: Redis and SQL, for up to ``patience_s`` seconds. Raises: RedisError, OSError."""
    client = redis_clients.get_sync()
    report = Report()
    scopes = _list_scopes(client, keys.spend(""))
    report.counts["copies"] = len(scopes)
    looks: list[Callable[[], list[Difference]]] = [
        lambda: _look_at_copies(client, scopes),
        lambda: _look_at_holds(client, report),
    ]
    for look in looks:
        report.differences += _insist(look, patience_s)
    report.differences += _list_buried(client)
    return report


def mend(differences: Iterable[Difference]) -> None:
    """Make the copies of all that differs anew from Postgres, and end holds that belong to no job. I/O: Redis and SQL."""
    client = redis_clients.get_sync()
    wrong = [difference for difference in differences if difference.kind in MENDED]
    ends = [
        holds.End(
            job_id=difference.subject,
            hold_nanousd=difference.nanousd,
            scopes=difference.scopes,
            unused_tokens=0,
            admitted_at_ms=0,
        )
        for difference in wrong
        if difference.kind is Kind.HOLD
    ]
    if ends:
        holds.settle(client, ends, [])
    balance.restore()
    for scope in sorted({scope for difference in wrong for scope in difference.scopes}):
        # a copy whose revision came from another database would win over the right one
        client.delete(keys.spend(scope))
        balance.publish(scope)


def _insist(look: Callable[[], list[Difference]], patience_s: float) -> list[Difference]:
    """Look until nothing differs any more, and return what differed in every look."""
    ends_at = time.monotonic() + patience_s
    found = {(each.kind, each.subject): each for each in look()}
    while found and time.monotonic() < ends_at:
        time.sleep(LOOK_EACH_S)
        again = {(each.kind, each.subject): each for each in look()}
        found = {name: again[name] for name in found if name in again}
    return list(found.values())


def _look_at_copies(client: Redis, scopes: list[str]) -> list[Difference]:
    now_ms = periods.now_ms()
    copies = {scope: _read(client, scope) for scope in scopes}
    # read after the copies: whatever reached a copy is committed
    rows = {(total.scope, total.period): total for total in totals.read(scopes, now_ms)}
    differences = []
    for scope, (copy, members) in copies.items():
        for period in ("daily", "monthly"):
            end_ms = copy.get(f"{period}_end_ms")
            total = rows.get((scope, period))
            if end_ms is None or total is None or int(end_ms) != total.span.end_ms:
                # the copy of a period that is over, or of one that has no row, is made anew by the gate
                continue
            kept = int(copy[f"{period}_revision"]), int(copy[f"{period}_spent_nanousd"])
            if kept != (total.revision, total.spent_nanousd):
                detail = (
                    f"{format_usd(kept[1])} at revision {kept[0]}, where the total says "
                    f"{format_usd(total.spent_nanousd)} at {total.revision}"
                )
                differences.append(
                    Difference(kind=Kind.COPY, subject=f"{scope} {period}", detail=detail, scopes=(scope,))
                )
        held, summed = int(copy.get("held_nanousd", 0)), sum(amount for _, amount in map(_parse_hold, members))
        if copy and held != summed:
            detail = f"{format_usd(held)} is held, {len(members)} holds sum to {format_usd(summed)}"
            differences.append(Difference(kind=Kind.HELD, subject=scope, detail=detail, scopes=(scope,)))
    return differences


def _look_at_holds(client: Redis, report: Report) -> list[Difference]:
    """Look for holds whose job is unknown, or ended and settled. Those that have expired count for nobody and are left alone."""
    scopes_of: dict[tuple[str, int], list[str]] = {}
    now_ms = periods.now_ms()
    for scope in _list_scopes(client, keys.holds("")):
        members: Any = client.zrangebyscore(keys.holds(scope), f"({now_ms}", "+inf")
        for member in members:
            scopes_of.setdefault(_parse_hold(member), []).append(scope)
    report.counts["holds"] = len(scopes_of)
    pipeline = client.pipeline(transaction=False)
    for job_id, _ in scopes_of:
        pipeline.hget(keys.job_record(job_id), "state")
    states = dict(zip(scopes_of, pipeline.execute(), strict=True))
    lifeless = {hold: state for hold, state in states.items() if state not in (b"queued", b"running")}
    unsettled = _list_unsettled(client) if lifeless else set()
    if unsettled is None:
        return []
    return [
        Difference(
            kind=Kind.HOLD,
            subject=job_id,
            detail=f"its job {'has ended' if state else 'is unknown'}; {format_usd(nanousd)} is held",
            nanousd=nanousd,
            scopes=tuple(scopes_of[job_id, nanousd]),
        )
        for (job_id, nanousd), state in lifeless.items()
        if job_id not in unsettled
    ]


def _parse_hold(member: bytes) -> tuple[str, int]:
    """Read a member of `keys.holds`: the job, and how much is held for it."""
    job_id, _, nanousd = member.decode().rpartition(":")
    return job_id, int(nanousd)


def _list_unsettled(client: Redis) -> set[str] | None:
    """Return the jobs whose end settlement has still to write; None when there are too many to tell."""
    groups = client.xinfo_groups(keys.FINISHED) if client.exists(keys.FINISHED) else []
    group = next((each for each in groups if each["name"] == keys.GROUP_SETTLEMENT.encode()), None)
    if group is None:
        start = "-"
    elif group["pending"]:
        start = (client.xpending(keys.FINISHED, keys.GROUP_SETTLEMENT)["min"] or b"-").decode()
    else:
        start = f"({group['last-delivered-id'].decode()}"
    entries: Any = client.xrange(keys.FINISHED, min=start, count=MAX_UNSETTLED + 1)
    if len(entries) > MAX_UNSETTLED:
        return None
    jobs = set()
    for _, fields in entries:
        try:
            event = decode_event(fields.get(b"0", b""))
        except ValueError:
            continue
        if isinstance(event, Finished):
            jobs.add(event.job_id)
    return jobs


def _list_buried(client: Redis) -> list[Difference]:
    entries: Any = client.xrange(keys.FINISHED_DEAD, count=100)
    return [
        Difference(
            kind=Kind.BURIED,
            subject=fields.get(b"id", entry_id).decode(),
            detail=fields.get(b"reason", b"").decode(errors="replace"),
        )
        for entry_id, fields in entries
    ]


def _read(client: Redis, scope: str) -> tuple[dict[str, str], list[bytes]]:
    """Read a scope's copy and its holds, both of one moment."""
    pipeline = client.pipeline(transaction=True)
    pipeline.hgetall(keys.spend(scope))
    pipeline.zrange(keys.holds(scope), 0, -1)
    copy, members = pipeline.execute()
    return {name.decode(): value.decode() for name, value in copy.items()}, members


def _list_scopes(client: Redis, prefix: str) -> list[str]:
    return sorted(key.decode().removeprefix(prefix) for key in client.scan_iter(match=f"{prefix}*", count=1000))
