"""Put what comes of a run into OpenAI's choices: whole messages, or the deltas of a stream."""

from dataclasses import dataclass, field
from typing import Any

from aiscale.wire.events import Delta, Finished, TokenLogprob, ToolCallPart


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


def word_end(finish_reason: str, *, called: bool) -> str:
    """Say why a choice ended."""
    return "tool_calls" if called and finish_reason == "stop" else finish_reason


def describe_part(part: ToolCallPart) -> dict[str, Any]:
    """Return a piece of a call as a stream tells it: who it is comes with its first piece."""
    function = {"name": part.name} if part.name else {}
    head = {"id": part.id, "type": "function"} if part.id else {}
    return {"index": part.index, **head, "function": {**function, "arguments": part.arguments}}


class Calls:
    """Gather the calls of one choice. False when there are none."""

    def __init__(self) -> None:
        self._calls: dict[int, ToolCallPart] = {}

    def __bool__(self) -> bool:
        return bool(self._calls)

    def take(self, parts: tuple[ToolCallPart, ...]) -> None:
        for part in parts:
            before = self._calls.get(part.index)
            if before is not None:
                part = ToolCallPart(
                    index=part.index,
                    id=before.id or part.id,
                    name=before.name or part.name,
                    arguments=before.arguments + part.arguments,
                )
            self._calls[part.index] = part

    def list_all(self) -> list[ToolCallPart]:
        return [self._calls[index] for index in sorted(self._calls)]

    def describe(self) -> list[dict[str, Any]]:
        return [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.list_all()
        ]


@dataclass
class Choice:
    """Gather one whole choice."""

    index: int
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""
    calls: Calls = field(default_factory=Calls)

    def take(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.calls.take(delta.tool_calls)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.end or self.finish_reason

    def describe(self, *, with_logprobs: bool) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(self.text) or (None if self.calls else ""),
            "refusal": None,
            "annotations": [],
        }
        if self.calls:
            message["tool_calls"] = self.calls.describe()
        return {
            "index": self.index,
            "message": message,
            "logprobs": describe_logprobs(self.logprobs) if with_logprobs else None,
            "finish_reason": word_end(self.finish_reason, called=bool(self.calls)),
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
