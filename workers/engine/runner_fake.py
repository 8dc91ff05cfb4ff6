"""Stand in for a model where the model does not matter: each next token is the last one plus one, at a set pace."""

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class FakeRunner:
    """Implement `workers.engine.runner.Runner`. Token ids count up from ``first``, wrapping before ``vocab_size``."""

    def __init__(
        self, *, slots: int, context_tokens: int, vocab_size: int, step_s: float = 0.0, first: int = 1000
    ) -> None:
        self.slots, self.context_tokens, self.vocab_size = slots, context_tokens, vocab_size
        self._step_s, self._first = step_s, min(first, vocab_size - 1)
        self.fail_on: int | None = None
        """A token id whose computation raises, for tests of failure."""

    def prefill(self, slot: int, token_ids: NDArray[np.int64], start: int) -> NDArray[np.float32]:
        row: NDArray[np.float32] = self._logits([int(token_ids[-1])], [start + len(token_ids)])[0]
        return row

    def decode(
        self, slots: Sequence[int], token_ids: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        time.sleep(self._step_s)
        return self._logits([int(token_id) for token_id in token_ids], [int(p) + 1 for p in positions])

    def fork(self, source: int, target: int) -> None:
        """Hold nothing, copy nothing."""

    def release(self, slot: int) -> None:
        """Hold nothing, give nothing back."""

    def close(self) -> None:
        """Hold nothing, give nothing back."""

    def _logits(self, last: list[int], lengths: list[int]) -> NDArray[np.float32]:
        logits = np.zeros((len(last), self.vocab_size), np.float32)
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
