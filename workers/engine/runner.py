"""Say what the engine needs of a model."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Chunk(NamedTuple):
    """Append ``token_ids`` to what ``slot`` holds, from position ``start`` on."""

    slot: int
    token_ids: Sequence[int]
    start: int


class Runner(Protocol):
    """Compute logits for sequences in slots. One thread uses it."""

    slots: int
    context_tokens: int
    vocab_size: int
    kept_places: int
    """How many beginnings of sequences can be kept aside."""

    def compute(self, chunks: Sequence[Chunk], *, every: bool = False) -> NDArray[np.float32]:
        """Append each chunk to its slot, all in one call, however many tokens each has.

        Return ``[n, vocab]``, the logits of each chunk's last position, or with ``every`` those of all positions, in the order
        asked: a buffer of the runner's own that the caller may change, valid until the next call.
        """
        ...

    @property
    def picks(self) -> bool:
        """Say whether the logits lie apart from the CPU, so that `pick` saves the way there."""
        ...

    def pick(self, chunks: Sequence[Chunk]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Append each chunk as `compute` does. Return the likeliest next token of each, ``[n]``, and its logit."""
        ...

    def fork(self, source: int, target: int) -> None:
        """Give ``target``, which holds nothing, all that ``source`` holds."""
        ...

    def keep(self, slot: int, place: int, start: int, end: int) -> None:
        """Copy positions ``start`` to ``end`` of a slot aside, to the same positions of ``place``."""
        ...

    def restore(self, place: int, slot: int, tokens: int) -> None:
        """Give ``slot``, which holds nothing, the first ``tokens`` that were kept in ``place``."""
        ...

    def drop(self, place: int) -> None:
        """Forget what was kept."""
        ...

    def release(self, slot: int) -> None: ...

    def close(self) -> None: ...
