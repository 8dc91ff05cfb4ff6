"""Give each running sequence a slot of the runner's KV cache."""


class Slots:
    """Hand out slots, lowest first, so that running rows lie close together."""

    def __init__(self, count: int) -> None:
        self._free = sorted(range(count), reverse=True)

    def __len__(self) -> int:
        """Count the free ones."""
        return len(self._free)

    def take(self) -> int:
        """Raises: IndexError when none is free."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)
        self._free.sort(reverse=True)
