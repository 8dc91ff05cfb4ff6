"""Read the stream of finished jobs as a consumer group, and cut off what every group has read."""

import logging
import threading
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import ResponseError

from aiscale.wire import keys
from apps.spend import periods

log = logging.getLogger(__name__)

GROUPS = (keys.GROUP_SETTLEMENT, keys.GROUP_TRANSCRIPTS)
FORGET_CONSUMER_MS = 3_600_000
GATHER_S = 0.1


class Entry(NamedTuple):
    """Hold one entry: its id, which begins with its time in epoch ms, and the encoded event.

    ``process`` and ``reply``: the web process that must have taken this entry of its replies; '' when nobody must.
    """

    entry_id: str
    data: bytes
    process: str = ""
    reply: str = ""


def gather(stop: threading.Event, count: int, most: int) -> None:
    """Let entries gather after a round that found ``count`` of them, few of the ``most`` that one round can take.

    A round costs about as much for one entry as for fifty. The first entry after a quiet time is taken at once. Blocks up to `GATHER_S`.
    """
    if 0 < count < most // 2:
        stop.wait(GATHER_S)


def ensure_groups(client: Redis) -> None:
    """Make the stream and both groups, from its first entry on. I/O: two Redis trips. Idempotent."""
    for group in GROUPS:
        try:
            client.xgroup_create(keys.FINISHED, group, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise


def read(
    client: Redis,
    consumer: str,
    after: str,
    *,
    count: int,
    block_ms: int | None = None,
    group: str = keys.GROUP_SETTLEMENT,
) -> list[Entry]:
    """Read ``>`` (what nobody has) or this consumer's own pending entries (``0``). I/O: one Redis trip, blocking up to
    ``block_ms``. Raises: ResponseError that starts with NOGROUP after a FLUSHALL."""
    answer: Any = client.xreadgroup(group, consumer, {keys.FINISHED: after}, count=count, block=block_ms)
    return _entries(client, answer[0][1], group) if answer else []


def claim(client: Redis, consumer: str, *, idle_ms: int, count: int, group: str = keys.GROUP_SETTLEMENT) -> list[Entry]:
    """Take over entries whose consumer did not acknowledge them for ``idle_ms``. I/O: one Redis trip."""
    try:
        answer: Any = client.xautoclaim(keys.FINISHED, group, consumer, min_idle_time=idle_ms, count=count)
    except ResponseError as error:
        if not str(error).startswith("NOGROUP"):
            raise
        return []
    return _entries(client, answer[1], group)


def bury(client: Redis, entry: Entry, reason: str) -> None:
    """Set aside an entry that can never be charged, for a person to look at. I/O: one Redis trip. Atomic."""
    log.error("an event cannot be settled and was set aside: %s", reason, extra={"event": "settlement.dead"})
    pipeline = client.pipeline(transaction=True)
    pipeline.xadd(keys.FINISHED_DEAD, {"0": entry.data, "id": entry.entry_id, "reason": reason[:500]})
    pipeline.xack(keys.FINISHED, keys.GROUP_SETTLEMENT, entry.entry_id)
    pipeline.execute()


def trim(client: Redis) -> int:
    """Cut off the entries that every group has acknowledged; never one that a group still needs. Returns how many went.

    I/O: two to four Redis trips.
    """
    oldest: list[tuple[int, int]] = []
    for group in client.xinfo_groups(keys.FINISHED):
        if group["pending"]:
            first = client.xpending(keys.FINISHED, _text(group["name"]))["min"]
            if first is None:
                # acknowledged since: next time
                return 0
            oldest.append(parse_id(first))
        else:
            ms, sequence = parse_id(group["last-delivered-id"])
            oldest.append((ms, sequence + 1))
    if len(oldest) < len(GROUPS):
        return 0
    ms, sequence = min(oldest)
    return int(client.xtrim(keys.FINISHED, minid=f"{ms}-{sequence}", approximate=False))


def forget_consumers(client: Redis) -> None:
    """Remove consumers that have been gone for an hour and left nothing behind. I/O: a Redis trip a group, one more for each."""
    for group in GROUPS:
        for consumer in client.xinfo_consumers(keys.FINISHED, group):
            if not consumer["pending"] and consumer["idle"] > FORGET_CONSUMER_MS:
                client.xgroup_delconsumer(keys.FINISHED, group, _text(consumer["name"]))


def age_s(entry: Entry) -> float:
    """Return the seconds since the entry was written, by the two servers' clocks."""
    return max(periods.now_ms() - parse_id(entry.entry_id)[0], 0) / 1000


def _entries(client: Redis, rows: list[tuple[bytes, dict[bytes, bytes] | None]], group: str) -> list[Entry]:
    entries = []
    for raw_id, fields in rows:
        entry_id = _text(raw_id)
        if fields:
            entries.append(
                Entry(entry_id, fields.get(b"0", b""), _text(fields.get(b"p", b"")), _text(fields.get(b"r", b"")))
            )
        else:
            # deleted by hand while it was pending: nothing is left to read
            client.xack(keys.FINISHED, group, entry_id)
    return entries


def parse_id(entry_id: bytes | str) -> tuple[int, int]:
    ms, _, sequence = _text(entry_id).partition("-")
    return int(ms), int(sequence or 0)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
