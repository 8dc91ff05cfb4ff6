"""Keep answers in this process: level 1, bounded by bytes and by age."""

import time
from collections import OrderedDict

ENTRY_OVERHEAD_BYTES = 250
"""What Python needs for an entry besides its key and value."""


class LocalCache:
    """Hold the most recently used values. Not thread-safe: one event loop uses it."""

    def __init__(self, max_bytes: int, ttl_s: float) -> None:
        self.max_bytes = max_bytes
        self.ttl_s = ttl_s
        self.size_bytes = 0
        self._entries: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: bytes, now_s: float | None = None) -> bytes | None:
        """Return the value if it is there and young enough. ``now_s`` is monotonic."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry[0] <= (time.monotonic() if now_s is None else now_s):
            self.drop(key)
            return None
        self._entries.move_to_end(key)
        return entry[1]

    def keep(self, key: bytes, value: bytes, now_s: float | None = None) -> None:
        """Put a value in, and others out, the least recently used first. One that is larger than a tenth of all room is not kept."""
        size_bytes = self._size(key, value)
        self.drop(key)
        if size_bytes * 10 > self.max_bytes:
            return
        self._entries[key] = ((time.monotonic() if now_s is None else now_s) + self.ttl_s, value)
        self.size_bytes += size_bytes
        while self.size_bytes > self.max_bytes:
            self.drop(next(iter(self._entries)))

    def drop(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.size_bytes -= self._size(key, entry[1])

    def clear(self) -> None:
        self._entries.clear()
        self.size_bytes = 0

    @staticmethod
    def _size(key: bytes, value: bytes) -> int:
        return len(key) + len(value) + ENTRY_OVERHEAD_BYTES
