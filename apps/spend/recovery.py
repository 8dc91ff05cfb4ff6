"""Open the gate again after Redis was emptied, once nobody can overspend any more.

Redis knows what is held and what ended and is not settled yet. When it is emptied, all of that is gone: the gate, which finds no epoch
(`keys.EPOCH`), refuses everything. Settlement notices within half a second, and then

- waits until web processes have said again what they delivered lately (`apps.inference.replies`) and workers what they ended for
  those who come back (`workers.recent_ends`), each within one or two of their beats;
- settles that, as it always does, so that the totals in Postgres are whole;
- writes the kill switches and the list of budgets, and then a new epoch: the gate opens.

Jobs that were running are gone, and end uncharged: without their record nobody can end them. One that was admitted before and is queued
after is refused, since its hold is gone (wire/lua/enqueue.lua). So nothing is charged that is not held. A new Redis is the same case.

A server that restarts may lack its last moments. What it held then is no danger: it lacks those jobs' records too. But ends may be missing:
another name of the server's process makes another epoch at once, so that they are said again.
"""

import logging
import secrets
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from aiscale.wire import keys
from apps.spend import balance, killswitch, periods

log = logging.getLogger(__name__)

RECOVERY_MS = int(max(2 * keys.HEARTBEAT_MS, 1000 * keys.READER_BEAT_S + 1500))
"""Two heartbeats of a worker; or one of a reader, which may be blocked on its stream for a second before, and a margin."""
NOTICED_FOR_MS = 60_000


def is_open(client: Redis) -> bool:
    """Tell whether Redis has an epoch. I/O: one Redis trip."""
    return bool(client.exists(keys.EPOCH))


def try_open(client: Redis) -> bool:
    """Make an epoch when it is time. For a settlement process that has nothing left in hand. I/O: two Redis trips, and what `begin` takes.

    Raises: RedisError, OSError, django.db.Error.
    """
    if not (has_waited(client) and _is_settled(client)):
        return False
    begin(client)
    return True


def has_waited(client: Redis) -> bool:
    """Tell whether everybody had the time to say again what they know; begins to wait when nobody has yet. I/O: one Redis trip."""
    now_ms = periods.now_ms()
    pipeline = client.pipeline(transaction=True)
    pipeline.set(keys.RECOVERING, now_ms, nx=True, px=NOTICED_FOR_MS)
    pipeline.get(keys.RECOVERING)
    first, noticed = pipeline.execute()
    if first:
        log.warning(
            "Redis has no epoch: the gate is shut until what ended is settled", extra={"event": "recovery.begin"}
        )
    return now_ms - int(noticed or now_ms) >= RECOVERY_MS


def begin(client: Redis) -> None:
    """Write what the gate must know and a new epoch, if there is none. I/O: SQL, a few Redis trips. Idempotent."""
    killswitch.restore()
    balance.restore()
    if client.set(keys.EPOCH, _make_epoch(client), nx=True):
        client.delete(keys.RECOVERING)
        log.warning("the gate is open", extra={"event": "recovery.end"})


def renew_after_restart(client: Redis) -> bool:
    """Write another epoch when the server was restarted, so that everybody says again what it may have lost. I/O: one Redis trip, two then.
    True when it was."""
    pipeline = client.pipeline(transaction=False)
    pipeline.get(keys.EPOCH)
    pipeline.info("server")
    epoch, server = pipeline.execute()
    if epoch is None or epoch.decode().startswith(server["run_id"]):
        return False
    log.warning("Redis was restarted: what ended lately is said again", extra={"event": "recovery.restart"})
    return bool(client.set(keys.EPOCH, _make_epoch(client), xx=True))


def _make_epoch(client: Redis) -> str:
    server: Any = client.info("server")
    return f"{server['run_id']}:{secrets.token_hex(8)}"


def _is_settled(client: Redis) -> bool:
    """Tell whether no settlement process has anything left to read or to acknowledge."""
    try:
        groups: Any = client.xinfo_groups(keys.FINISHED)
    except ResponseError:
        return False
    return any(
        group["name"] == keys.GROUP_SETTLEMENT.encode() and not group["pending"] and not group["lag"]
        for group in groups
    )
