"""Put what comes of a run into OpenAI's choices: whole messages, or the deltas of a stream."""

from dataclasses import dataclass, field
from typing import Any

from aiscale.wire.events import Delta, Finished, TokenLogprob


def describe_logprobs(logprobs: list[TokenLogprob]) -> dict[str, Any]:
    """Return the ``logprobs`` of a choice, or of a piece of it."""
    content = [
        _describe_token(told.data, told.logprob)
        | {"top_logprobs": [_describe_token(data, logprob) for data, logprob in told.top]}
        for told in logprobs
    ]
    return {"content": content, "refusal": None}


def _describe_token(data: bytes, logprob: float) -> dict[str, Any]:
    # a token may be half a character: its text is then written with escapes, and its bytes tell the truth
    return {"token": data.decode("utf-8", "backslashreplace"), "logprob": logprob, "bytes": list(data)}


@dataclass
class Choice:
    """Gather one whole choice."""

    index: int
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""

    def take(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.end or self.finish_reason

    def describe(self, *, with_logprobs: bool) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(self.text),
            "refusal": None,
            "annotations": [],
        }
        return {
            "index": self.index,
            "message": message,
            "logprobs": describe_logprobs(self.logprobs) if with_logprobs else None,
            "finish_reason": self.finish_reason,
        }


class Choices:
    """Gather all choices of a run."""

    def __init__(self, count: int) -> None:
        self._choices = [Choice(index) for index in range(count)]

    def take(self, delta: Delta) -> None:
        self._choices[delta.index].take(delta)

    def describe(self, end: Finished, *, with_logprobs: bool) -> list[dict[str, Any]]:
        for choice in self._choices:
            choice.finish_reason = choice.finish_reason or end.finish_reason
        return [choice.describe(with_logprobs=with_logprobs) for choice in self._choices]


def describe_piece(index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None) -> Any:
    """Return the one entry of ``choices`` in a chunk of a stream."""
    return {"choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]}
