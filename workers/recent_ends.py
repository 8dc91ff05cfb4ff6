"""Remember the answers with a log that this worker ended lately, and say their ends again to a Redis that forgot them.

Somebody emptied Redis, or it came back from a copy that lacks the last moments: then answers that were given would not be charged, and
conversations would lack them. Web processes say again what they delivered (apps.inference.replies); what is kept for browsers that come
back, only its worker knows. Ends are settled once by their job's id, so saying one again does no harm. Settlement waits for it before it
lets the gate open (apps/spend/recovery.py).
"""

import logging
import threading
import time
from collections import deque
from typing import Any

from redis import Redis

from aiscale.wire import keys

log = logging.getLogger(__name__)


class RecentEnds:
    """Hold what was written into `keys.FINISHED` lately. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._ends: deque[tuple[float, bytes]] = deque(maxlen=keys.REMEMBER_ENDS)
        self._lock = threading.Lock()
        self._epoch: bytes | None = None
        self._has_looked = False

    def add(self, data: bytes) -> None:
        """Remember one encoded end."""
        now = time.monotonic()
        with self._lock:
            self._ends.append((now, data))
            while self._ends and self._ends[0][0] < now - keys.REMEMBER_ENDS_S:
                self._ends.popleft()

    def look(self, client: Redis, epoch: bytes | None) -> int:
        """Say all again when this is not the Redis of the last look. Returns how many were said.

        I/O: one Redis trip, if at all. Raises: RedisError, OSError; the next look then tries again.
        """
        if self._has_looked and epoch == self._epoch:
            return 0
        count = self._say_again(client) if self._has_looked else 0
        self._epoch, self._has_looked = epoch, True
        return count

    def _say_again(self, client: Redis) -> int:
        with self._lock:
            oldest = time.monotonic() - keys.REMEMBER_ENDS_S
            ends = [data for at, data in self._ends if at >= oldest]
        if ends:
            pipeline: Any = client.pipeline(transaction=True)
            for data in ends:
                pipeline.xadd(keys.FINISHED, {"0": data})
            pipeline.execute()
            log.warning("Redis is another one, or was emptied: %d ends are said again", len(ends))
        return len(ends)
