"""Read calls of tools in what a model says, as it comes, in the model's own way.

A call is told piece by piece, once it names a tool and an object begins as its arguments. One that is written otherwise is told when
it is whole, since only then it is known to be one. What turns out to be no call is told as the text that it is.
"""

import json
import re
from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from aiscale.wire.events import RELAY, Delta, Event, Finished, Started, ToolCallPart
from apps.inference.tools import Style, Tools, make_call_id, name_call

_OPEN, _CLOSE = Style.HERMES.value
BEGINNING = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([a-zA-Z0-9_-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_BLANK_END = re.compile(r"\s*\Z")


class CallReader(Protocol):
    """Tell calls from text in one choice of an answer."""

    count: int
    """How many calls were read."""

    def take(self, text: str) -> tuple[str, tuple[ToolCallPart, ...]]:
        """Return the text that is none of a call, and what is new of calls."""
        ...

    def end(self) -> tuple[str, tuple[ToolCallPart, ...]]:
        """Return what was held back: nothing more comes."""
        ...


def make_reader(style: Style, tools: Tools) -> CallReader:
    """Return what reads one choice of an answer."""
    from apps.inference.json_calls import LlamaReader, MistralReader  # they build on this module

    if style is Style.LLAMA:
        return LlamaReader(tools)
    return HermesReader(tools) if style is Style.HERMES else MistralReader(tools)


async def read_calls(events: AsyncIterator[Event], tools: Tools, style: Style, count: int) -> AsyncIterator[Event]:
    """Turn the calls in the text of ``count`` choices into ``tool_calls``, and leave the rest as it is: all that an upstream says."""
    readers = [make_reader(style, tools) for _ in range(count)]
    last: Delta | None = None
    is_relayed = False
    async for event in events:
        is_relayed = event.worker_id.startswith(RELAY) if isinstance(event, Started) else is_relayed
        if is_relayed:
            yield event
            continue
        if isinstance(event, Delta):
            last = event
            text, calls = readers[event.index].take(event.text)
            if event.end is not None:
                rest, more = readers[event.index].end()
                text, calls = text + rest, calls + more
            calls = _leave_wanted(calls, tools, event)
            if text or calls or event.tool_calls or event.logprobs or event.end is not None:
                yield msgspec.structs.replace(event, text=text, tool_calls=event.tool_calls + calls)
            continue
        if isinstance(event, Finished) and last is not None and count == 1:
            text, calls = readers[0].end()
            calls = _leave_wanted(calls, tools, last)
            if text or calls:
                yield msgspec.structs.replace(last, text=text, tool_calls=calls, logprobs=())
        yield event


def _leave_wanted(calls: tuple[ToolCallPart, ...], tools: Tools, said: Delta) -> tuple[ToolCallPart, ...]:
    """Leave the first call alone, where the caller takes one at a time; each has the name that its job gives it."""
    return tuple(
        msgspec.structs.replace(call, id=name_call(said.job_id, said.index, call.index)) if call.id else call
        for call in calls
        if tools.parallel or call.index == 0
    )


class ObjectEnd:
    """Find where a JSON object ends that comes in pieces, from its first brace on."""

    def __init__(self, stop: str = "") -> None:
        """What is no JSON ends before the first ``stop`` outside a string: there the model closes its call all the same."""
        self._stop = stop
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int | None:
        """Return how much of the next piece belongs to it; None when all does, and it goes on."""
        for index, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = char == "\\", char != '"'
            elif char == '"':
                self._in_string = True
            elif char == self._stop:
                return index
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return index + 1
        return None


class HermesReader:
    """Implement `CallReader` for calls between two marks."""

    def __init__(self, tools: Tools) -> None:
        self._names = {tool.name for tool in tools.tools}
        self._held = ""
        self._inside = False
        self._arguments: ObjectEnd | None = None
        """Set while the arguments of a call are told."""
        self._is_told = False
        """Whether the call that we are inside of has been told."""
        self.count = 0

    def take(self, text: str) -> tuple[str, tuple[ToolCallPart, ...]]:
        self._held += text
        said: list[str] = []
        parts: list[ToolCallPart] = []
        while self._take_arguments(parts) or self._take_mark(said, parts):
            pass
        if not self._inside:
            keep = self._count_undecided()
            self._say(self._held[: len(self._held) - keep], said)
            self._held = self._held[len(self._held) - keep :]
        return "".join(said), join_parts(parts)

    def end(self) -> tuple[str, tuple[ToolCallPart, ...]]:
        said: list[str] = []
        parts: list[ToolCallPart] = []
        if self._arguments is not None:
            self.count += 1
        elif self._inside and not self._is_told:
            self._close(self._held, f"{_OPEN}{self._held}", said, parts)
        elif not self._inside:
            self._say(self._held, said)
        self._held, self._inside, self._arguments, self._is_told = "", False, None, False
        return "".join(said), tuple(parts)

    def _take_arguments(self, parts: list[ToolCallPart]) -> bool:
        """Tell what is there of a call's arguments, or begin to. True when more can be read now."""
        if self._arguments is None:
            begun = BEGINNING.match(self._held) if self._inside and not self._is_told else None
            if begun is None or begun.group(1) not in self._names:
                return False
            parts.append(ToolCallPart(index=self.count, id=make_call_id(), name=begun.group(1)))
            self._held, self._arguments = self._held[begun.end() :], ObjectEnd("<")
        size = self._arguments.find(self._held)
        arguments = self._held[:size]
        if arguments:
            parts.append(ToolCallPart(index=self.count, arguments=arguments))
        self._held = self._held[len(arguments) :]
        if size is None:
            return False
        self._arguments, self._is_told = None, True
        self.count += 1
        return True

    def _take_mark(self, said: list[str], parts: list[ToolCallPart]) -> bool:
        """Read up to where a call begins or ends. False when that is not there yet."""
        before, mark, after = self._held.partition(_CLOSE if self._inside else _OPEN)
        if not mark:
            return False
        self._held = after
        if not self._inside:
            self._say(before.rstrip(), said)
        elif not self._is_told:
            self._close(before, f"{_OPEN}{before}{_CLOSE}", said, parts)
        self._inside, self._is_told = not self._inside, False
        return True

    def _say(self, text: str, said: list[str]) -> None:
        # white space between calls is none of the answer
        if text and not (self.count and text.isspace()):
            said.append(text)

    def _close(self, body: str, whole: str, said: list[str], calls: list[ToolCallPart]) -> None:
        call = read_call(body, self._names, self.count)
        if call is None:
            said.append(whole)
            return
        calls.append(call)
        self.count += 1

    def _count_undecided(self) -> int:
        """Return how many characters at the end may be the beginning of a call, white space before it included."""
        held = self._held
        part = next((size for size in range(len(_OPEN) - 1, 0, -1) if held.endswith(_OPEN[:size])), 0)
        found = _BLANK_END.search(held[: len(held) - part])
        return part + (len(found.group()) if found else 0)


def read_call(body: str, names: set[str], index: int) -> ToolCallPart | None:
    """Return a whole call; None for what is none."""
    try:
        value = json.loads(body)
        name = value["name"]
        arguments = value.get("arguments", value.get("parameters", {}))
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    return ToolCallPart(index=index, id=make_call_id(), name=name, arguments=text)


def join_parts(parts: list[ToolCallPart]) -> tuple[ToolCallPart, ...]:
    """Make one of neighbours that belong to the same call."""
    joined: list[ToolCallPart] = []
    for part in parts:
        if joined and joined[-1].index == part.index:
            before = joined.pop()
            part = msgspec.structs.replace(before, arguments=before.arguments + part.arguments)
        joined.append(part)
    return tuple(joined)
