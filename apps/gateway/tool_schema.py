"""Read what a body of ``/v1/chat/completions`` says of tools: which there are, whether one must be called, and calls that were made."""

import json
from typing import Any, Literal

import msgspec

from aiscale.errors import AiscaleError, Code
from apps.gateway import parameters
from apps.inference.prompts import ChatMessage
from apps.inference.tools import NAME, Tool, ToolCall, Tools, read_arguments

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 << 10
MAX_ID_CHARS = 256


class Function(msgspec.Struct, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(msgspec.Struct, kw_only=True):
    function: dict[str, Any]
    type: Literal["function"]


class CalledFunction(msgspec.Struct, kw_only=True):
    name: str
    arguments: str


class FunctionCall(msgspec.Struct, kw_only=True):
    id: str
    function: dict[str, Any]
    type: Literal["function"] = "function"
    index: int | None = None


def read_tools(values: list[dict[str, Any]], choice: Any, parallel: bool | None) -> Tools | None:
    """Return the tools that may be called; None for none. Raises: AiscaleError, with ``param`` tools or tool_choice."""
    if not values:
        if choice not in (None, "none", "auto"):
            raise refuse("tool_choice is only allowed when there are tools", "tool_choice")
        return None
    functions = []
    for index, value in enumerate(values):
        if value.get("type") != "function":
            kind = str(value.get("type"))[:40]
            raise AiscaleError(
                Code.UNSUPPORTED_PARAMETER,
                f"Tools of the type {kind!r} are not supported: tools[{index}] must be a function.",
                param=f"tools[{index}].type",
            )
        with parameters.within(f"tools[{index}]"):
            tool = parameters.convert(value, FunctionTool, harmless=frozenset(), defaults_only={})
        with parameters.within(f"tools[{index}].function"):
            functions.append(parameters.convert(tool.function, Function, harmless=frozenset(), defaults_only={}))
    return make_tools(functions, choice, parallel)


def make_tools(functions: list[Function], choice: Any, parallel: bool | None) -> Tools | None:
    """Check functions and the choice among them. Raises: AiscaleError."""
    if len(functions) > MAX_TOOLS:
        raise refuse(f"tools holds {len(functions)} entries; send at most {MAX_TOOLS}", "tools")
    names: set[str] = set()
    for index, function in enumerate(functions):
        if not NAME.fullmatch(function.name):
            raise refuse("A tool's name must be 1 to 64 letters, digits, _ and -", f"tools[{index}].name")
        if function.name in names:
            raise refuse(f"Two tools are named {function.name!r}", f"tools[{index}].name")
        names.add(function.name)
        if function.parameters and function.parameters.get("type", "object") != "object":
            raise refuse("A tool's parameters must be a schema of an object", f"tools[{index}].parameters")
    tools = tuple(
        Tool(
            name=function.name,
            description=function.description or "",
            parameters=function.parameters,
            strict=bool(function.strict),
        )
        for function in functions
    )
    if len(json.dumps([tool.describe() for tool in tools])) > MAX_TOOLS_BYTES:
        raise refuse(f"The tools are larger than {MAX_TOOLS_BYTES >> 10} KiB", "tools")
    many = parallel is not False
    if choice in (None, "auto"):
        return Tools(tools=tools, parallel=many)
    if choice == "none":
        return None
    if choice == "required":
        return Tools(tools=tools, must_call=True, parallel=many)
    chosen = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = chosen.get("name") if isinstance(chosen, dict) else None
    if not isinstance(name, str):
        what = 'tool_choice must be "none", "auto", "required", or name a function of tools'
        raise refuse(what, "tool_choice")
    if name not in names:
        raise refuse(f"tool_choice names {name[:64]!r}, which is none of the tools", "tool_choice")
    return Tools(tools=tools, must_call=True, only=name, parallel=many)


def read_calls(values: list[dict[str, Any]], path: str) -> tuple[ToolCall, ...]:
    """Read the calls of an assistant's message. Raises: AiscaleError."""
    calls = []
    for index, value in enumerate(values):
        place = f"{path}[{index}]"
        with parameters.within(place):
            call = parameters.convert(value, FunctionCall, harmless=frozenset(), defaults_only={})
        with parameters.within(f"{place}.function"):
            function = parameters.convert(call.function, CalledFunction, harmless=frozenset(), defaults_only={})
        calls.append(make_call(call.id, function.name, function.arguments, place))
    return tuple(calls)


def make_call(call_id: str, name: str, arguments: str, path: str) -> ToolCall:
    """Check one call that was made. Raises: AiscaleError (INVALID_REQUEST)."""
    if not 1 <= len(call_id) <= MAX_ID_CHARS:
        raise refuse(f"{path}.id must have 1 to {MAX_ID_CHARS} characters", f"{path}.id")
    if not NAME.fullmatch(name):
        raise refuse(f"{path} names no function: 1 to 64 letters, digits, _ and -", f"{path}.name")
    if read_arguments(arguments) is None:
        raise refuse(f"The arguments of {path} are no JSON object", f"{path}.arguments")
    return ToolCall(id=call_id, name=name, arguments=arguments or "{}")


def check_results(messages: list[ChatMessage], param: str = "") -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for the result of a call that nobody made. ``param`` names all of the messages."""
    called: set[str] = set()
    for index, message in enumerate(messages):
        called |= {call.id for call in message.tool_calls}
        if message.role == "tool" and message.tool_call_id not in called:
            what = f"A result is that of {message.tool_call_id[:64]!r}, which nothing before it calls"
            raise refuse(what, param or f"messages[{index}].tool_call_id")


def refuse(what: str, param: str) -> AiscaleError:
    """Make the refusal of something in the body."""
    return AiscaleError(Code.INVALID_REQUEST, f"{what}.", param=param)
