"""Choose which waiting texts go together: like lengths, a bounded batch, every job in its turn. Pure, for one thread."""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
"""The upper ends of the length buckets. Texts of one bucket share a batch, so that at most a third of it is padding."""

Owner = TypeVar("Owner")


def bucket_of(tokens: int) -> int:
    """Return the number of the bucket of a text of so many tokens."""
    return bisect_left(LENGTHS, tokens)


@dataclass(eq=False)
class _Share(Generic[Owner]):
    """Hold what one job still waits for: the indexes of its texts by bucket, each in order."""

    owner: Owner
    lengths: list[int]
    buckets: dict[int, deque[int]] = field(default_factory=dict)

    def take(self, bucket: int) -> int:
        waiting = self.buckets[bucket]
        index = waiting.popleft()
        if not waiting:
            del self.buckets[bucket]
        return index


class Pending(Generic[Owner]):
    """Keep the texts of many jobs until they are taken.

    Batches are led by each job in turn, and within a batch jobs add one text each, round after round: a job of thousands of texts and
    a job of one that arrive together both have their first text in the first batches.
    """

    def __init__(self, max_batch: int, max_batch_tokens: int) -> None:
        """``max_batch_tokens`` bounds a batch with its padding: rows times the longest. Raises: ValueError for a bound below 1."""
        if max_batch < 1 or max_batch_tokens < 1:
            raise ValueError(f"a batch needs a text and a token; the bounds are {max_batch} and {max_batch_tokens}")
        self.max_batch = max_batch
        self.max_batch_tokens = max_batch_tokens
        self._turns: deque[_Share[Owner]] = deque()

    def __len__(self) -> int:
        """Count the texts that wait."""
        return sum(len(waiting) for share in self._turns for waiting in share.buckets.values())

    def add(self, owner: Owner, lengths: list[int]) -> None:
        share = _Share(owner, lengths)
        for index, length in enumerate(lengths):
            share.buckets.setdefault(bucket_of(length), deque()).append(index)
        if share.buckets:
            self._turns.append(share)

    def discard(self, owner: Owner) -> None:
        """Forget what a job still waits for."""
        self._turns = deque(share for share in self._turns if share.owner is not owner)

    def take(self) -> list[tuple[Owner, int]]:
        """Return the next batch as (job, index of its text); empty when nothing waits. A text over the budget goes alone."""
        if not self._turns:
            return []
        bucket = next(iter(self._turns[0].buckets))
        batch: list[tuple[Owner, int]] = []
        longest = 0
        for share in self._rounds(bucket):
            length = share.lengths[share.buckets[bucket][0]]
            longest = max(longest, length)
            if batch and (len(batch) + 1) * longest > self.max_batch_tokens:
                break
            batch.append((share.owner, share.take(bucket)))
            if len(batch) == self.max_batch:
                break
        self._turns.rotate(-1)
        self._turns = deque(share for share in self._turns if share.buckets)
        return batch

    def is_full(self) -> bool:
        """Say whether the next batch would have no room for more: waiting brings nothing."""
        if not self._turns:
            return False
        bucket = next(iter(self._turns[0].buckets))
        lengths = [share.lengths[index] for share in self._turns for index in share.buckets.get(bucket, ())]
        return len(lengths) >= self.max_batch or len(lengths) * max(lengths) >= self.max_batch_tokens

    def _rounds(self, bucket: int) -> Iterator[_Share[Owner]]:
        """Yield jobs that have texts in a bucket, one after the other and again, for as long as they have some."""
        while True:
            having = [share for share in self._turns if bucket in share.buckets]
            if not having:
                return
            for share in having:
                if bucket in share.buckets:
                    yield share
