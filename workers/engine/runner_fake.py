"""Stand in for a model where the model does not matter: each next token is the last one plus one, at a set pace."""

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.engine.runner import Chunk


class FakeRunner:
    """Implement `workers.engine.runner.Runner`. Token ids count up from ``first``, wrapping before ``vocab_size``."""

    def __init__(
        self, *, slots: int, context_tokens: int, vocab_size: int, step_s: float = 0.0, first: int = 1000
    ) -> None:
        self.slots, self.context_tokens, self.vocab_size = slots, context_tokens, vocab_size
        self.kept_places = 2 * slots
        self._step_s, self._first = step_s, min(first, vocab_size - 1)
        self.fail_on: int | None = None
        """A token id whose computation raises, for tests of failure."""
        self.held: dict[int, list[int]] = {}
        """Slot -> the tokens in it: what a real runner's KV cache holds."""
        self.kept: dict[int, list[int]] = {}
        self._room = np.zeros((0, vocab_size), np.float32)
        """Memory for logits: for hundreds of rows it takes longer to get than to clear."""

    def compute(self, chunks: Sequence[Chunk], *, every: bool = False) -> NDArray[np.float32]:
        if self._step_s and any(len(chunk.token_ids) == 1 for chunk in chunks):
            time.sleep(self._step_s)
        logits = self._logits([t for c in chunks for t in (c.token_ids if every else c.token_ids[-1:])])
        for chunk in chunks:
            held = self.held.setdefault(chunk.slot, [])
            if chunk.start > len(held) or chunk.start + len(chunk.token_ids) > self.context_tokens:
                raise ValueError(f"slot {chunk.slot} holds {len(held)} tokens; none can be written at {chunk.start}")
            held[chunk.start :] = chunk.token_ids
        return logits

    picks = False

    def pick(self, chunks: Sequence[Chunk]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        logits = self.compute(chunks)
        return logits.argmax(axis=1), logits.max(axis=1)

    def fork(self, source: int, target: int) -> None:
        self.held[target] = list(self.held[source])

    def keep(self, slot: int, place: int, start: int, end: int) -> None:
        kept = self.kept.setdefault(place, [])
        if len(kept) < start:
            raise ValueError(f"place {place} holds {len(kept)} tokens")
        kept[start:] = self.held[slot][start:end]

    def restore(self, place: int, slot: int, tokens: int) -> None:
        self.held[slot] = self.kept[place][:tokens]

    def drop(self, place: int) -> None:
        self.kept.pop(place, None)

    def release(self, slot: int) -> None:
        self.held.pop(slot, None)

    def close(self) -> None:
        self.held.clear()
        self.kept.clear()

    def _logits(self, last: list[int]) -> NDArray[np.float32]:
        if len(self._room) < len(last):
            self._room = np.empty((len(last), self.vocab_size), np.float32)
        logits = self._room[: len(last)]
        logits.fill(0.0)
        for row, token_id in enumerate(last):
            if token_id == self.fail_on:
                raise RuntimeError("the fake runner was told to fail")
            following = token_id + 1 if token_id >= self._first else self._first
            logits[row, following if following < self.vocab_size else self._first] = 10.0
        return logits


class FakeEncoder:
    """Stand in for an encoder: equal texts get equal vectors of length 1."""

    def __init__(self, dimensions: int) -> None:
        self._dimensions = dimensions

    def check(self, text: list[int]) -> str | None:
        return None if text else "is empty"

    def encode(self, batch: list[list[int]]) -> NDArray[np.float32]:
        vectors = np.stack([np.random.default_rng(text).standard_normal(self._dimensions) for text in batch])
        made: NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        return made

    def close(self) -> None:
        """Hold nothing, give nothing back."""


class FakeClassifier:
    """Stand in for a classifier: a label holds when its name is in the text; a text with ``poison`` cannot be classified."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        self._labels = labels

    def check(self, text: list[int]) -> str | None:
        return None if text else "is empty"

    def encode(self, batch: list[list[int]]) -> NDArray[np.float32]:
        texts = ["".join(map(chr, text)) for text in batch]
        if any("poison" in text for text in texts):
            raise RuntimeError("the fake classifier was told to fail")
        return np.array([[0.97 if name in text else 0.02 for name in self._labels] for text in texts], np.float32)

    def close(self) -> None:
        """Hold nothing, give nothing back."""
