"""Let models call the caller's functions: what tools and calls are, and the ways in which models are told of them and call them.

Models are told of tools by their own chat template, which also shows how they call one. `apps.inference.call_readers` reads calls in what
a model says, `apps.inference.tool_grammars` has it make one. Models of other services are asked in OpenAI's words instead
(`apps.inference.relays`).
"""

import hashlib
import json
import re
import secrets
from enum import Enum
from typing import Any

import msgspec

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class Style(Enum):
    """Name a way of calling tools; its value is the marks of it, which are control tokens of most models that have them."""

    HERMES = ("<tool_call>", "</tool_call>")
    """Each call is JSON between the marks: Hermes, Qwen and their kin."""
    LLAMA = ("<|python_tag|>",)
    """An answer that is JSON with a name and ``parameters`` is a call, perhaps after the mark: Llama 3.1 and later."""
    MISTRAL = ("[TOOL_CALLS]",)
    """A list of calls as JSON follows the mark: Mistral until 2024."""
    MISTRAL_NAMED = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    """The mark, a name, another mark and the arguments, for each call: Mistral since."""


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
    strict: bool = False
    """Whether arguments must follow the schema though the model may choose to call; of a call that must be made they always do."""

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

    @property
    def are_bound(self) -> bool:
        """Whether a grammar keeps our own models to calls as it writes them (`apps.inference.tool_grammars`)."""
        return self.must_call or any(tool.strict for tool in self.tools)

    def list_allowed(self) -> list[Tool]:
        return [tool for tool in self.tools if not self.only or tool.name == self.only]


def find_style(template: str) -> Style | None:
    """Say in which of the ways that are understood here a chat template tells a model of tools, if in one."""
    if "tools" not in template:
        return None
    if Style.HERMES.value[0] in template:
        return Style.HERMES
    if Style.MISTRAL.value[0] in template:
        return Style.MISTRAL_NAMED if "[ARGS]" in template else Style.MISTRAL
    return Style.LLAMA if '"parameters"' in template and "ipython" in template else None


def read_arguments(text: str) -> dict[str, Any] | None:
    """Return a call's arguments; None for what is no whole object, such as those of a call that was cut."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def make_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def name_call(job_id: str, choice: int, index: int) -> str:
    """Return the id of a call that a job's answer makes: always alike, whoever reads the answer again."""
    return f"call_{hashlib.sha256(f'{job_id}:{choice}:{index}'.encode()).hexdigest()[:24]}"
