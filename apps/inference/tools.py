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


class CallReader:
    """Tell calls from text in one choice of an answer, as it comes. A call is told when it is whole."""

    def __init__(self, tools: Tools) -> None:
        self._names = {tool.name for tool in tools.tools}
        self._held = ""
        self._inside = False
        self.count = 0
        """How many calls were read."""

    def take(self, text: str) -> tuple[str, tuple[ToolCallPart, ...]]:
        """Return the text that is none of a call, and the calls that became whole."""
        self._held += text
        said: list[str] = []
        calls: list[ToolCallPart] = []
        while True:
            before, mark, after = self._held.partition(CLOSE if self._inside else OPEN)
            if not mark:
                break
            self._held = after
            if self._inside:
                self._close(before, f"{OPEN}{before}{CLOSE}", said, calls)
            else:
                self._say(before.rstrip(), said)
            self._inside = not self._inside
        if not self._inside:
            keep = self._count_undecided()
            self._say(self._held[: len(self._held) - keep], said)
            self._held = self._held[len(self._held) - keep :]
        return "".join(said), tuple(calls)

    def end(self) -> tuple[str, tuple[ToolCallPart, ...]]:
        """Return what was held back: nothing more comes."""
        said: list[str] = []
        calls: list[ToolCallPart] = []
        if self._inside:
            self._close(self._held, f"{OPEN}{self._held}", said, calls)
        else:
            self._say(self._held, said)
        self._held, self._inside = "", False
        return "".join(said), tuple(calls)

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


def make_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
