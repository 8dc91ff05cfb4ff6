"""Remember the beginnings of prompts whose keys and values are kept aside, and which of them a new prompt begins with.

Pure bookkeeping: the engine copies. Only what prefill computed is kept: decoding rounds differently in the last bit, and an answer
must not depend on what was in the cache. Beginnings are shared within one scope alone.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_TOKENS = 16
"""Shorter beginnings cost less to compute than to look after."""


@dataclass
class Entry:
    """Hold the tokens of one kept beginning."""

    scope: str
    tokens: NDArray[np.int64]


@dataclass(frozen=True)
class Hit:
    """Say where a prompt's first ``tokens`` lie."""

    place: int
    tokens: int


@dataclass(frozen=True)
class Keeping:
    """Say what to copy aside: positions ``start`` to ``end`` into ``place``."""

    place: int
    start: int
    end: int


class PrefixCache:
    """Hold at most ``places`` beginnings, the least recently used of which make room. The engine's thread alone uses it."""

    def __init__(self, places: int) -> None:
        self._free = list(range(places))
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self.tokens = 0
        """How many tokens are kept in all."""
        self.hit_tokens = 0
        self.asked_tokens = 0

    def find(self, scope: str, prompt: Sequence[int]) -> Hit | None:
        """Return the longest kept beginning of ``prompt``, without its last two tokens: their logits must be computed, and a
        chunk of one token would be rounded as decoding does."""
        if not scope:
            return None
        self.asked_tokens += len(prompt)
        place, tokens = self._longest(scope, np.asarray(prompt, np.int64))
        tokens = min(tokens, len(prompt) - 2)
        if tokens < MIN_TOKENS:
            return None
        self._entries.move_to_end(place)
        self.hit_tokens += tokens
        return Hit(place, tokens)

    def plan(self, scope: str, prompt: Sequence[int], room_tokens: int) -> tuple[Keeping | None, list[int]]:
        """Choose where to keep a prompt that was computed. Returns what to copy and which places to drop before.

        ``room_tokens`` is what may be kept in all. A kept beginning of the prompt grows by the rest.
        """
        size = len(prompt)
        if not scope or size < MIN_TOKENS or size > room_tokens:
            return None, []
        tokens = np.asarray(prompt, np.int64)
        place, common = self._longest(scope, tokens)
        if size - common < MIN_TOKENS:
            return None, []
        start = 0
        if common and common == len(self._entries[place].tokens):
            start = common
            self._entries.move_to_end(place)
        dropped = self.shrink(room_tokens - (size - start), spare=place if start else None)
        if not start:
            if not self._free:
                dropped.append(self._drop_oldest(None))
            if not self._free:
                return None, dropped
            place = self._free.pop()
        self.tokens += size - start
        self._entries[place] = Entry(scope, tokens)
        return Keeping(place, start, size), dropped

    def shrink(self, room_tokens: int, spare: int | None = None) -> list[int]:
        """Drop the least recently used until no more than ``room_tokens`` are kept. Returns their places."""
        dropped = []
        while self.tokens > room_tokens and any(place != spare for place in self._entries):
            dropped.append(self._drop_oldest(spare))
        return dropped

    def forget(self, place: int) -> None:
        """Forget a place whose content is not what it should be."""
        entry = self._entries.pop(place, None)
        if entry is not None:
            self.tokens -= len(entry.tokens)
            self._free.append(place)

    def _drop_oldest(self, spare: int | None) -> int:
        place = next(place for place in self._entries if place != spare)
        self.forget(place)
        return place

    def _longest(self, scope: str, prompt: NDArray[np.int64]) -> tuple[int, int]:
        best = (-1, 0)
        for place, entry in self._entries.items():
            if entry.scope == scope:
                size = min(len(entry.tokens), len(prompt))
                differ = np.flatnonzero(entry.tokens[:size] != prompt[:size])
                common = int(differ[0]) if len(differ) else size
                if common > best[1]:
                    best = (place, common)
        return best
