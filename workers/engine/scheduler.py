"""Decide who runs: waiting sequences by priority, then by arrival; and whose prompt is computed next."""

import heapq
import itertools
import time

from workers.engine.kv_cache import Slots
from workers.engine.sequence import Sequence

AGING_S = 10.0
"""A sequence gains one step of priority for each such time it has waited, so that nobody starves."""


class Scheduler:
    """Hold the waiting and the running. The engine's thread alone uses it."""

    def __init__(self, slots: int) -> None:
        self._slots = Slots(slots)
        self._waiting: list[tuple[float, int, Sequence]] = []
        self._order = itertools.count()
        self.running: list[Sequence] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        # urgency grows with the time of arrival at the same rate for all: the order among the waiting never changes
        urgency = sequence.priority * AGING_S + sequence.arrived_s
        heapq.heappush(self._waiting, (urgency, next(self._order), sequence))

    def admit(self) -> None:
        """Move waiting sequences into free slots, each together with its forks."""
        while self._waiting and len(self._slots) > len(self._waiting[0][2].forks):
            leader = heapq.heappop(self._waiting)[2]
            for sequence in (leader, *leader.forks):
                sequence.slot = self._slots.take()
                self.running.append(sequence)

    def next_prefill(self) -> Sequence | None:
        """Return the running sequence whose prompt is to be computed next, the longest there first."""
        return next((s for s in self.running if not s.is_prefilled and not s.is_fork), None)

    def list_decoding(self) -> list[Sequence]:
        return sorted((s for s in self.running if s.is_prefilled and s.tokens), key=lambda s: s.slot)

    def remove(self, sequence: Sequence) -> int:
        """Take a sequence out and return the slot it held, or -1. The forks of one that waits go with it."""
        if sequence.slot >= 0:
            self.running.remove(sequence)
            slot, sequence.slot = sequence.slot, -1
            self._slots.give_back(slot)
            return slot
        self._waiting = [item for item in self._waiting if item[2] is not sequence]
        heapq.heapify(self._waiting)
        return -1

    def list_due(self, now_s: float | None = None) -> list[Sequence]:
        """List all that must end now: aborted, or past their deadline."""
        now_s = time.time() if now_s is None else now_s
        everyone = [*self.running, *(item[2] for item in self._waiting)]
        return [s for s in everyone if s.abort_reason is not None or s.deadline_s <= now_s]

    def list_all(self) -> list[Sequence]:
        return [*self.running, *(item[2] for item in self._waiting)]
