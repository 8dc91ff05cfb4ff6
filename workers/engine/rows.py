"""Keep track of which row of the KV buffers each slot lies in, and plan the moves that make a batch's rows neighbours.

Pure bookkeeping: the plan is carried out by the caller, in order.
"""

from collections.abc import Sequence

Move = tuple[int, int, int]
"""(source row, target row, tokens to copy)."""


class Rows:
    """Map slots to rows ``0 .. count - 1``; row ``count`` is spare, for exchanges."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._row_of: dict[int, int] = {}
        self._slot_of: dict[int, int] = {}
        self._lengths: dict[int, int] = {}

    def take(self, slot: int) -> int:
        """Return the slot's row; a new slot gets the lowest free one."""
        if slot not in self._row_of:
            row = next(row for row in range(self._count) if row not in self._slot_of)
            self._row_of[slot], self._slot_of[row], self._lengths[slot] = row, slot, 0
        return self._row_of[slot]

    def drop(self, slot: int) -> int | None:
        """Free the slot's row and return it; None when it had none."""
        row = self._row_of.pop(slot, None)
        if row is not None:
            del self._slot_of[row], self._lengths[slot]
        return row

    def row(self, slot: int) -> int:
        return self._row_of[slot]

    def length(self, slot: int) -> int:
        """Return how many tokens the slot holds; 0 when it has no row."""
        return self._lengths.get(slot, 0)

    def length_of_row(self, row: int) -> int:
        """Return how many tokens lie in a row; 0 when it is free."""
        slot = self._slot_of.get(row)
        return 0 if slot is None else self._lengths[slot]

    def window(self, slots: Sequence[int]) -> range:
        """Return the shortest run of rows that holds those of ``slots``."""
        rows = [self._row_of[slot] for slot in slots]
        return range(min(rows), max(rows) + 1)

    def set_length(self, slot: int, tokens: int) -> None:
        self._lengths[slot] = tokens

    def gather(self, slots: Sequence[int]) -> tuple[int, list[Move]]:
        """Make the rows of ``slots`` one run, in any order; return its first row and the moves that this takes.

        The bookkeeping is changed as if the moves were done. Slots must have rows.
        """
        rows = {self._row_of[slot] for slot in slots}
        if max(rows) - min(rows) + 1 == len(rows):
            return min(rows), []
        first = min(range(self._count - len(rows) + 1), key=lambda start: self._cost(rows, start))
        window = range(first, first + len(rows))
        outside = [row for row in sorted(rows) if row not in window]
        holes = [row for row in window if row not in rows]
        moves: list[Move] = []
        for source, target in zip(outside, holes, strict=True):
            moves.extend(self._exchange(source, target))
        return first, moves

    def _cost(self, rows: set[int], start: int) -> int:
        """Count the tokens to copy when the run starts at ``start``."""
        window = range(start, start + len(rows))
        comers = sum(self.length_of_row(row) for row in rows if row not in window)
        goers = sum(self.length_of_row(row) for row in window if row not in rows)
        return comers + 2 * goers

    def _exchange(self, source: int, target: int) -> list[Move]:
        come, go = self._slot_of[source], self._slot_of.get(target)
        spare = self._count
        if go is None:
            moves = [(source, target, self.length_of_row(source))]
            del self._slot_of[source]
        else:
            moves = [
                (target, spare, self._lengths[go]),
                (source, target, self._lengths[come]),
                (spare, source, self._lengths[go]),
            ]
            self._row_of[go], self._slot_of[source] = source, go
        self._row_of[come], self._slot_of[target] = target, come
        return moves
