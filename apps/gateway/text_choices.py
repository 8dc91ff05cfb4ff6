"""Put what comes of a run into the choices of ``/v1/completions``: with legacy logprobs, and the best of several."""

import codecs
import math
from dataclasses import dataclass, field
from typing import Any

from aiscale.wire.events import Delta, TokenLogprob


def name_token(data: bytes) -> str:
    """Write a token as OpenAI's legacy logprobs do: its text, or ``bytes:`` and escapes for what is no whole character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Offsets:
    """Count the characters before each token of one choice."""

    def __init__(self) -> None:
        self._next = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def describe(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        """Return the ``logprobs`` of the next piece of the choice."""
        offsets = []
        for told in logprobs:
            offsets.append(self._next)
            self._next += len(self._decoder.decode(told.data))
        return {
            "tokens": [name_token(told.data) for told in logprobs],
            "token_logprobs": [told.logprob for told in logprobs],
            # the token that was chosen is always told of, also when it is none of the likeliest
            "top_logprobs": [
                {name_token(data): logprob for data, logprob in (*told.top, (told.data, told.logprob))}
                for told in logprobs
            ],
            "text_offset": offsets,
        }


@dataclass
class TextChoice:
    """Gather one whole choice."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""

    def take(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.end or self.finish_reason

    @property
    def mean_logprob(self) -> float:
        """How likely the model finds the choice, for each token: long ones are not worse for being long."""
        return math.fsum(told.logprob for told in self.logprobs) / len(self.logprobs) if self.logprobs else -math.inf


def choose_best(choices: list[TextChoice], count: int) -> list[TextChoice]:
    """Return the likeliest ``count`` choices, the best first; all of them as they came when none is left out."""
    if count == len(choices):
        return choices
    return sorted(choices, key=lambda choice: -choice.mean_logprob)[:count]
