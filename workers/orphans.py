"""Notice web processes that are gone, so that nothing is computed that nobody can receive (S2)."""

import time

from workers.publish import JobInHand

GONE_AFTER_S = 5.0
"""How long a process must have been unheard of, at each look while Redis answered: a Redis that was away has forgotten all of them."""


class Orphans:
    """Remember since when processes are absent. The heartbeat's thread alone uses it."""

    def __init__(self) -> None:
        self._absent_since: dict[str, float] = {}

    @staticmethod
    def list_readers(jobs: list[JobInHand]) -> list[str]:
        """List the processes that wait for jobs; those with a log can be read by any other."""
        return sorted({in_hand.job.reply_to for in_hand in jobs if not in_hand.keep_log})

    def find_gone(self, readers: list[str], present: list[bool]) -> set[str]:
        """Return which processes are gone for good."""
        now = time.monotonic()
        absent = [reader for reader, there in zip(readers, present, strict=True) if not there]
        self._absent_since = {reader: self._absent_since.get(reader, now) for reader in absent}
        return {reader for reader, since in self._absent_since.items() if now - since >= GONE_AFTER_S}
