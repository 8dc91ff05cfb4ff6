"""Say what the engine needs of a model."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Runner(Protocol):
    """Compute logits for sequences in slots. One thread uses it."""

    slots: int
    context_tokens: int
    vocab_size: int

    def prefill(self, slot: int, token_ids: NDArray[np.int64], start: int) -> NDArray[np.float32]:
        """Append ``token_ids`` at ``start``; return the last position's logits, ``[vocab]``, valid until the next call."""
        ...

    def decode(
        self, slots: Sequence[int], token_ids: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Append one token to each slot; return logits ``[n, vocab]``, valid until the next call."""
        ...

    def fork(self, source: int, target: int) -> None:
        """Give ``target``, which holds nothing, all that ``source`` holds."""
        ...

    def release(self, slot: int) -> None: ...

    def close(self) -> None: ...
