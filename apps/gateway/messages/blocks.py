"""Read the content blocks and tools of ``/v1/messages``, and turn them into turns as all dialects share them."""

import json
from typing import Any, Literal, TypeVar

import msgspec

from aiscale.errors import AiscaleError, Code
from apps.gateway import parameters
from apps.gateway.tool_schema import Function, make_call, make_tools, refuse
from apps.inference.prompts import ChatMessage
from apps.inference.tools import ToolCall, Tools

T = TypeVar("T", bound=msgspec.Struct)

_HARMLESS = frozenset({"cache_control"})
_DEFAULTS_ONLY: dict[str, tuple[Any, ...]] = {"citations": ([],)}
_TOOL_HARMLESS = frozenset({"cache_control", "eager_input_streaming", "input_examples"})
_TOOL_DEFAULTS_ONLY: dict[str, tuple[Any, ...]] = {"allowed_callers": (["direct"],), "defer_loading": (False,)}


class TextBlock(msgspec.Struct, kw_only=True):
    text: str
    type: Literal["text"]


class ToolUseBlock(msgspec.Struct, kw_only=True):
    id: str
    name: str
    input: dict[str, Any]
    type: Literal["tool_use"]


class ToolResultBlock(msgspec.Struct, kw_only=True):
    tool_use_id: str
    content: str | list[dict[str, Any]] = ""
    is_error: bool = False
    type: Literal["tool_result"]


class CustomTool(msgspec.Struct, kw_only=True):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    type: Literal["custom"] | None = None


class ToolChoice(msgspec.Struct, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


def read_turns(role: str, content: str | list[dict[str, Any]], path: str) -> list[ChatMessage]:
    """Return the turns that one message is: the results of calls are turns of their own, before the rest. Raises: AiscaleError."""
    if isinstance(content, str):
        return [ChatMessage(role=role, content=content)]
    texts: list[str] = []
    calls: list[ToolCall] = []
    results: list[ChatMessage] = []
    for index, value in enumerate(content):
        place, kind = f"{path}[{index}]", value.get("type")
        if kind == "tool_use" and role == "assistant":
            block = _convert(value, ToolUseBlock, place)
            calls.append(make_call(block.id, block.name, json.dumps(block.input, ensure_ascii=False), place))
        elif kind == "tool_result" and role == "user":
            results.append(_read_result(value, place))
        else:
            texts.append(_read_text(value, place))
    if not texts and not calls and results:
        return results
    return [*results, ChatMessage(role=role, content="".join(texts), tool_calls=tuple(calls))]


def read_text(content: str | list[dict[str, Any]], path: str) -> str:
    """Join text blocks. Raises: AiscaleError for any other."""
    if isinstance(content, str):
        return content
    return "".join(_read_text(value, f"{path}[{index}]") for index, value in enumerate(content))


def read_tools(values: list[dict[str, Any]], choice: dict[str, Any] | None) -> Tools | None:
    """Return the tools that may be called; None for none. Raises: AiscaleError."""
    chosen = None
    if choice is not None:
        with parameters.within("tool_choice"):
            chosen = parameters.convert(choice, ToolChoice, harmless=frozenset(), defaults_only={})
    if not values:
        if chosen is not None and chosen.type in ("any", "tool"):
            raise refuse("tool_choice is only allowed when there are tools", "tool_choice")
        return None
    functions = []
    for index, value in enumerate(values):
        kind = value.get("type")
        if kind not in (None, "custom"):
            raise AiscaleError(
                Code.UNSUPPORTED_PARAMETER,
                f"Tools of the type {str(kind)[:40]!r} are not supported: tools[{index}] must be your own.",
                param=f"tools[{index}].type",
            )
        with parameters.within(f"tools[{index}]"):
            tool = parameters.convert(value, CustomTool, harmless=_TOOL_HARMLESS, defaults_only=_TOOL_DEFAULTS_ONLY)
        functions.append(
            Function(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict)
        )
    return make_tools(functions, _word_choice(chosen), chosen is None or not chosen.disable_parallel_tool_use)


def _word_choice(chosen: ToolChoice | None) -> Any:
    if chosen is None:
        return "auto"
    if chosen.type == "tool":
        return {"type": "function", "function": {"name": chosen.name}}
    return {"any": "required"}.get(chosen.type, chosen.type)


def _read_result(value: dict[str, Any], place: str) -> ChatMessage:
    block = _convert(value, ToolResultBlock, place)
    text = read_text(block.content, f"{place}.content")
    # templates know of no failed calls: the model is told in words
    return ChatMessage(
        role="tool", content=f"Error: {text}" if block.is_error else text, tool_call_id=block.tool_use_id
    )


def _read_text(value: dict[str, Any], place: str) -> str:
    if value.get("type") != "text":
        raise AiscaleError(
            Code.UNSUPPORTED_PARAMETER,
            f"Content blocks of the type {str(value.get('type'))[:40]!r} are not supported here: {place} must be text.",
            param=f"{place}.type",
        )
    return _convert(value, TextBlock, place).text


def _convert(value: dict[str, Any], kind: type[T], place: str) -> T:
    with parameters.within(place):
        return parameters.convert(value, kind, harmless=_HARMLESS, defaults_only=_DEFAULTS_ONLY)
