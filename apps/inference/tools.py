"""Let models call the caller's functions: tell them of the tools, have them call one, and read the calls in what they say.

Models are told of tools by their own chat template. What is understood here is the way of Hermes, Qwen and their kin: each call is JSON
between ``<tool_call>`` and ``</tool_call>``. Models of other services are asked in OpenAI's words instead (`apps.inference.relays`).
"""

import json
import re
import secrets
from typing import Any

import msgspec

from aiscale.wire.events import ToolCallPart
from aiscale.wire.jobs import Grammar

OPEN, CLOSE = "<tool_call>", "</tool_call>"
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_BEGINNING = re.compile(r'\s*\{\s*"name"\s*:\s*"([a-zA-Z0-9_-]{1,64})"\s*,\s*"arguments"\s*:\s*(?=\{)')
_BLANK_END = re.compile(r"\s*\Z")


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """Hold a call that a model made. ``arguments`` is JSON, an object."""

    id: str
    name: str
    arguments: str


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """Describe one function. ``parameters`` is a JSON schema of its arguments; None: it takes none."""

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """Return it in OpenAI's words, which templates read too."""
        value: dict[str, Any] = {"name": self.name}
        if self.description:
            value["description"] = self.description
        if self.parameters is not None:
            value["parameters"] = self.parameters
        return {"type": "function", "function": value}


class Tools(msgspec.Struct, frozen=True, kw_only=True):
    """Say which tools there are, and whether one must be called: any (``must_call``), or ``only`` the named one."""

    tools: tuple[Tool, ...]
    must_call: bool = False
    only: str = ""
    parallel: bool = True

    def list_allowed(self) -> list[Tool]:
        return [tool for tool in self.tools if not self.only or tool.name == self.only]


def understands(template: str) -> bool:
    """Say whether a chat template tells a model of tools in the way that is understood here."""
    return OPEN in template and "tools" in template


def make_grammar(tools: Tools, specials: tuple[str, ...]) -> Grammar | None:
    """Return the grammar of an answer that must be a call, None where the model may choose.

    ``specials`` are the model's control tokens: a grammar names those otherwise than plain text.
    """
    if not tools.must_call:
        return None
    first, last = (mark if mark in specials else json.dumps(mark) for mark in (OPEN, CLOSE))
    allowed = tools.list_allowed()
    more = ' ("\\n" call){0,15}' if tools.parallel and not tools.only else ""
    lines = [
        f"start: call{more}",
        f'call: {first} "\\n" ( {" | ".join(f"call_{index}" for index in range(len(allowed)))} ) "\\n" {last}',
    ]
    for index, tool in enumerate(allowed):
        head = json.dumps(f'{{"name": "{tool.name}", "arguments": ')
        schema = {"type": "object"} | (tool.parameters or {"properties": {}, "additionalProperties": False})
        lines.append(f'call_{index}: {head} arguments_{index} "}}"')
        lines.append(f"arguments_{index}: %json {json.dumps(schema | {'x-guidance': _COMPACT})}")
    return Grammar(kind="lark", source="\n".join(lines))


class ObjectEnd:
    """Find where a JSON object ends that comes in pieces, from its first brace on."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int | None:
        """Return how much of the next piece belongs to it; None when all does, and it goes on.

        What is no JSON ends before the first ``<`` outside a string: there the model closes its call all the same.
        """
        for index, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = char == "\\", char != '"'
            elif char == '"':
                self._in_string = True
            elif char == "<":
                return index
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return index + 1
        return None


class CallReader:
    """Tell calls from text in one choice of an answer, as it comes.

    A call is told piece by piece, once it names a tool and an object begins as its arguments. One that is written otherwise is told when
    it is whole, since only then it is known to be one.
    """

    def __init__(self, tools: Tools) -> None:
        self._names = {tool.name for tool in tools.tools}
        self._held = ""
        self._inside = False
        self._arguments: ObjectEnd | None = None
        """Set while the arguments of a call are told."""
        self._is_told = False
        """Whether the call that we are inside of has been told."""
        self.count = 0
        """How many calls were read."""

    def take(self, text: str) -> tuple[str, tuple[ToolCallPart, ...]]:
        """Return the text that is none of a call, and what is new of calls."""
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
        """Return what was held back: nothing more comes."""
        said: list[str] = []
        parts: list[ToolCallPart] = []
        if self._arguments is not None:
            self.count += 1
        elif self._inside and not self._is_told:
            self._close(self._held, f"{OPEN}{self._held}", said, parts)
        elif not self._inside:
            self._say(self._held, said)
        self._held, self._inside, self._arguments, self._is_told = "", False, None, False
        return "".join(said), tuple(parts)

    def _take_arguments(self, parts: list[ToolCallPart]) -> bool:
        """Tell what is there of a call's arguments, or begin to. True when more can be read now."""
        if self._arguments is None:
            begun = _BEGINNING.match(self._held) if self._inside and not self._is_told else None
            if begun is None or begun.group(1) not in self._names:
                return False
            parts.append(ToolCallPart(index=self.count, id=make_call_id(), name=begun.group(1)))
            self._held, self._arguments = self._held[begun.end() :], ObjectEnd()
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
        before, mark, after = self._held.partition(CLOSE if self._inside else OPEN)
        if not mark:
            return False
        self._held = after
        if not self._inside:
            self._say(before.rstrip(), said)
        elif not self._is_told:
            self._close(before, f"{OPEN}{before}{CLOSE}", said, parts)
        self._inside, self._is_told = not self._inside, False
        return True

    def _say(self, text: str, said: list[str]) -> None:
        # white space between calls is none of the answer
        if text and not (self.count and text.isspace()):
            said.append(text)

    def _close(self, body: str, whole: str, said: list[str], calls: list[ToolCallPart]) -> None:
        call = self._read(body)
        if call is None:
            said.append(whole)
            return
        calls.append(call)
        self.count += 1

    def _read(self, body: str) -> ToolCallPart | None:
        """Return a call; None for what is none: it is told as the text that it is."""
        try:
            value = json.loads(body)
            name, arguments = value["name"], value.get("arguments", {})
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        text = json.dumps(arguments, ensure_ascii=False)
        return ToolCallPart(index=self.count, id=make_call_id(), name=name, arguments=text)

    def _count_undecided(self) -> int:
        """Return how many characters at the end may be the beginning of a call, white space before it included."""
        held = self._held
        part = next((size for size in range(len(OPEN) - 1, 0, -1) if held.endswith(OPEN[:size])), 0)
        found = _BLANK_END.search(held[: len(held) - part])
        return part + (len(found.group()) if found else 0)


def join_parts(parts: list[ToolCallPart]) -> tuple[ToolCallPart, ...]:
    """Make one of neighbours that belong to the same call."""
    joined: list[ToolCallPart] = []
    for part in parts:
        if joined and joined[-1].index == part.index:
            before = joined.pop()
            part = msgspec.structs.replace(before, arguments=before.arguments + part.arguments)
        joined.append(part)
    return tuple(joined)


def make_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
