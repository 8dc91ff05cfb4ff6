"""Lay chunks of several sequences out as the graph takes them: tokens end to end, and where each stands in a padded batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.engine.runner import Chunk


@dataclass(frozen=True)
class Batch:
    """Hold one call's inputs; see `workers.artifacts.decoder` for their shapes."""

    input_ids: NDArray[np.int64]
    places: NDArray[np.int64]
    flat_places: NDArray[np.int64]
    wanted: NDArray[np.int64]
    query_seqlens: NDArray[np.int32]
    seqlens_k: NDArray[np.int32]

    def inputs(self) -> dict[str, NDArray[np.int64] | NDArray[np.int32]]:
        longest = np.array([int(self.seqlens_k.max()) + 1], np.int32)
        return {**self.__dict__, "total_sequence_length": longest}


def lay_out(chunks: Sequence[Chunk], rows: Sequence[int], count: int, *, every: bool) -> Batch:
    """Put ``chunks[i]`` into row ``rows[i]`` of ``count``. The other rows are idle; their ``seqlens_k`` is for the caller to set."""
    lengths = [len(chunk.token_ids) for chunk in chunks]
    longest = max(lengths)
    batch = Batch(
        input_ids=np.fromiter((t for chunk in chunks for t in chunk.token_ids), np.int64, sum(lengths)),
        places=np.zeros((count, longest), np.int64),
        flat_places=np.empty(sum(lengths), np.int64),
        wanted=np.arange(sum(lengths)) if every else np.cumsum(lengths) - 1,
        query_seqlens=np.zeros(count, np.int32),
        seqlens_k=np.zeros(count, np.int32),
    )
    at = 0
    for chunk, row, length in zip(chunks, rows, lengths, strict=True):
        own = np.arange(at, at + length)
        batch.places[row, :length] = own
        batch.flat_places[own] = row * longest + np.arange(length)
        batch.query_seqlens[row] = length
        batch.seqlens_k[row] = chunk.start + length - 1
        at += length
    return batch
