"""Turn tokens into text as they come: never half a character, never a piece of a stop string."""

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Hold the text of one sequence that cannot be shown yet."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), keep_control_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=not keep_control_tokens)
        self._stop = stop
        self._held = ""
        self.shown_chars = 0
        self.stopped = False
        """A stop string was found; nothing more comes."""
        self.stopped_by: str | None = None
        """The stop string that was found first."""

    @property
    def chars(self) -> int:
        """How long the text is so far, what is held back included."""
        return self.shown_chars + len(self._held)

    def add(self, token_id: int) -> str:
        """Take one token and return the text that is safe to show, perhaps none."""
        if self.stopped:
            return ""
        self._held += self._stream.step(self._tokenizer, token_id) or ""
        places = [(place, stop) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            place, self.stopped_by = min(places)
            return self._show(place)
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        return self._show(len(self._held) - keep)

    def flush(self) -> str:
        """Return what was held back for a stop string that did not come."""
        return "" if self.stopped else self._show(len(self._held))

    def _show(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        if self.stopped:
            self._held = ""
        self.shown_chars += len(shown)
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
