"""Decide who runs: waiting requests by priority, then by arrival; and how much of whose prompt is computed in a step."""

import heapq
import itertools
import time

from workers.engine.kv_cache import Slots
from workers.engine.sequence import Sequence

AGING_S = 10.0
"""A sequence gains one step of priority for each such time it has waited, so that nobody starves."""
STALL_S = 0.1
"""How long the prompts of a step may keep running streams waiting, unless the engine is told otherwise."""
MIN_STEP_TOKENS, FIRST_STEP_TOKENS, MAX_STEP_TOKENS = 2, 32, 1024
"""The bounds of a step's prompt tokens while streams run, and what is tried first; with none running it is the upper bound."""
_TELLING_TOKENS = 32
"""So many tell how long a token takes. Of fewer the fixed cost of a call is a large part, unless no more were allowed anyway."""


class Pace:
    """Learn how long a prompt token takes, and say how many a step may compute."""

    def __init__(self, stall_s: float = STALL_S) -> None:
        self._stall_s = stall_s
        self._token_s = 0.0

    def learn(self, tokens: int, seconds: float) -> None:
        if tokens >= min(_TELLING_TOKENS, self.step_tokens(streams_run=True)):
            measured = seconds / tokens
            self._token_s = measured if not self._token_s else 0.7 * self._token_s + 0.3 * measured

    def step_tokens(self, *, streams_run: bool) -> int:
        """Return how many prompt tokens the next step may compute: as many as take the set time."""
        if not streams_run:
            return MAX_STEP_TOKENS
        if not self._token_s:
            return FIRST_STEP_TOKENS
        # rounded: who computes two tokens at a time may find that three take hardly longer
        return max(MIN_STEP_TOKENS, min(MAX_STEP_TOKENS, round(self._stall_s / self._token_s)))


class Scheduler:
    """Hold the waiting and the running. The engine's thread alone uses it.

    ``kv_tokens`` is the most that all who run may come to hold, counted by the longest that each can become: who was admitted never
    has to make way.
    """

    def __init__(self, slots: int, kv_tokens: int, context_tokens: int) -> None:
        self._slots = Slots(slots)
        self._context_tokens = context_tokens
        self._waiting: list[tuple[float, int, Sequence]] = []
        self._order = itertools.count()
        self.kv_tokens = kv_tokens
        self.reserved_tokens = 0
        self.running: list[Sequence] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def longest_of(self, sequence: Sequence) -> int:
        """Return the most tokens that a request can come to hold, its forks included."""
        one = min(len(sequence.prompt) + sequence.params.max_tokens, self._context_tokens)
        return one * (1 + len(sequence.forks))

    def add(self, sequence: Sequence) -> None:
        # urgency grows with the time of arrival at the same rate for all: the order among the waiting never changes
        urgency = sequence.priority * AGING_S + sequence.arrived_s
        heapq.heappush(self._waiting, (urgency, next(self._order), sequence))

    def admit(self) -> list[Sequence]:
        """Move waiting sequences into free slots, each together with its forks; return those whose prompt is to be computed.

        Nobody overtakes: a request that needs more room than there is waits for it, and all others behind it.
        """
        admitted = []
        while self._waiting:
            leader = self._waiting[0][2]
            need_tokens = self.longest_of(leader)
            if len(self._slots) <= len(leader.forks) or self.reserved_tokens + need_tokens > self.kv_tokens:
                break
            heapq.heappop(self._waiting)
            for sequence in (leader, *leader.forks):
                sequence.slot = self._slots.take()
                sequence.reserved_tokens = need_tokens // (1 + len(leader.forks))
                self.running.append(sequence)
            self.reserved_tokens += need_tokens
            admitted.append(leader)
        return admitted

    def list_prefills(self, step_tokens: int) -> list[tuple[Sequence, int]]:
        """List whose prompt is computed next, and how many tokens of each: the longest there first, ``step_tokens`` in all.

        No chunk leaves a single token behind: that one would be rounded as decoding does (see `prefix_cache`). A prompt of three
        tokens is therefore one chunk where two are allowed: one token more than ``step_tokens`` is the most.
        """
        chosen: list[tuple[Sequence, int]] = []
        for sequence in self.running:
            left = len(sequence.prompt) - sequence.prefilled
            if left and not sequence.is_fork:
                count = min(left, max(step_tokens, 2))
                if left - count == 1:
                    count = left if left <= 3 else count - 1
                chosen.append((sequence, count))
                step_tokens -= count
                if step_tokens < 2:
                    break
        return chosen

    def list_decoding(self) -> list[Sequence]:
        return sorted((s for s in self.running if s.is_prefilled and s.tokens), key=lambda s: s.slot)

    def remove(self, sequence: Sequence) -> int:
        """Take a sequence out and return the slot it held, or -1. The forks of one that waits go with it."""
        if sequence.slot >= 0:
            self.running.remove(sequence)
            slot, sequence.slot = sequence.slot, -1
            self._slots.give_back(slot)
            self.reserved_tokens -= sequence.reserved_tokens
            return slot
        self._waiting = [item for item in self._waiting if item[2] is not sequence]
        heapq.heapify(self._waiting)
        return -1

    def list_due(self, now_s: float | None = None) -> list[Sequence]:
        """List all that must end now: aborted, or past their deadline."""
        now_s = time.time() if now_s is None else now_s
        return [s for s in self.list_all() if s.abort_reason is not None or s.deadline_s <= now_s]

    def list_all(self) -> list[Sequence]:
        return [*self.running, *(item[2] for item in self._waiting)]
