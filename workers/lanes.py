"""Bound how many tickets of one model are worked on at once."""

import threading
from dataclasses import dataclass, field


@dataclass
class Lanes:
    """Count one model's lanes. May be used from any thread."""

    kind: str
    count: int
    free: int = field(init=False)
    _asked: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.free = self.count

    @property
    def is_last(self) -> bool:
        """Whether only one lane is taken."""
        return self.free == self.count - 1

    def enter(self) -> bool:
        """Take a lane. False when there is none; then whoever is in one looks once more before it leaves."""
        with self._lock:
            if self.free == 0:
                self._asked = True
                return False
            self.free -= 1
            return True

    def leave(self) -> bool:
        """Give the lane back. False, and it is kept, when somebody was turned away since: something may wait by now."""
        with self._lock:
            if self._asked:
                self._asked = False
                return False
            self.free += 1
            return True

    def give_up(self) -> None:
        with self._lock:
            self.free += 1
