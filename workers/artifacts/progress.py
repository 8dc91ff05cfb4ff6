"""Tell a person at the terminal how far a download is; tell a log file only that it began and ended."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

_WIDTH = 28
_MEGABYTE = 1_000_000


class Bar:
    """Draw one line on ``stream`` (standard error) while it is a terminal; else write a plain line at begin and end."""

    def __init__(self, label: str, total_bytes: int, stream: TextIO | None = None) -> None:
        self._label = label
        self._total_bytes = max(total_bytes, 1)
        self._stream = stream if stream is not None else sys.stderr
        self._live = self._stream.isatty()
        self._began_s = time.monotonic()

    def __enter__(self) -> Self:
        if not self._live:
            print(f"{self._label} ({self._total_bytes / _MEGABYTE:.0f} MB)", file=self._stream, flush=True)
        return self

    def show(self, done_bytes: int) -> None:
        """Redraw with ``done_bytes`` of the total; more than the total counts as all."""
        if not self._live:
            return
        share = min(done_bytes / self._total_bytes, 1.0)
        bar = "█" * int(share * _WIDTH)
        done = min(done_bytes, self._total_bytes) / _MEGABYTE
        line = f"\r{self._label} {bar:·<{_WIDTH}} {done:5.0f} of {self._total_bytes / _MEGABYTE:.0f} MB"
        print(line, end="", file=self._stream, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            if kind is None:
                self.show(self._total_bytes)
            print(file=self._stream)
        elif kind is None:
            print(f"{self._label}: {time.monotonic() - self._began_s:.0f} s", file=self._stream, flush=True)
