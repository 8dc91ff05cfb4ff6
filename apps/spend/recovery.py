"""Notice that Redis was emptied, and keep the gate shut until what had just ended is charged.

All copies can be refilled from Postgres, but answers that had ended and were not settled were in Redis alone. Web processes remember for
`keys.REMEMBER_ENDS_S` what they delivered, and write it down again when `keys.EPOCH` has changed; settlement charges each job once. For
`RECOVERY_MS` the gate does not refill its budgets and refuses everybody: so nobody spends money that is spent.
"""

import logging
import secrets

from redis import Redis

from aiscale.wire import keys

log = logging.getLogger(__name__)

RECOVERY_MS = 3_500
"""Longer than two beats of the web processes, and their events' way into the ledger."""


def notice(client: Redis) -> bool:
    """Begin the recovery when the epoch is gone. True when it was. I/O: one Redis trip, two then. Several may do so at once."""
    if client.exists(keys.EPOCH):
        return False
    pipeline = client.pipeline(transaction=True)
    pipeline.set(keys.RECOVERING, 1, px=RECOVERY_MS)
    pipeline.set(keys.EPOCH, secrets.token_hex(8), nx=True)
    pipeline.execute()
    log.warning("Redis was emptied, or is new: the gate opens in %g s", RECOVERY_MS / 1000)
    return True


def is_under_way(client: Redis) -> bool:
    """I/O: one Redis trip."""
    return bool(client.exists(keys.RECOVERING))
