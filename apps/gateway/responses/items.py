"""Turn the items of the Responses API into turns as all dialects share them, and back."""

from typing import Any, Literal

import msgspec

from aiscale.errors import AiscaleError, Code
from apps.gateway import parameters
from apps.gateway.chat_schema import TEXT_PART
from apps.gateway.tool_schema import Function, make_call, make_tools, refuse
from apps.inference.prompts import ChatMessage
from apps.inference.tools import ToolCall, Tools, read_arguments

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_DEFAULTS_ONLY: dict[str, tuple[Any, ...]] = {"phase": (), "namespace": (), "caller": ()}
_HARMLESS = frozenset({"id", "status"})
_TEXT_PART = TEXT_PART | {"annotations", "logprobs"}
"""The last two are in an answer's text, which may be sent back as it came."""
_TEXT_PARTS = ("input_text", "output_text", "text")


class Item(msgspec.Struct, kw_only=True):
    """One message of the input."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    type: Literal["message"] = "message"


class CallItem(msgspec.Struct, kw_only=True):
    call_id: str
    name: str
    arguments: str
    type: Literal["function_call"]


class OutputItem(msgspec.Struct, kw_only=True):
    """What a call gave."""

    call_id: str
    output: str | list[dict[str, Any]]
    type: Literal["function_call_output"]


class FunctionTool(msgspec.Struct, kw_only=True):
    name: str
    type: Literal["function"]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def read_item(value: dict[str, Any], path: str) -> ChatMessage:
    """Turn one item of the input into a turn. Raises: AiscaleError."""
    kind = value.get("type", "message")
    if kind not in ("message", "function_call", "function_call_output"):
        raise AiscaleError(
            Code.UNSUPPORTED_PARAMETER,
            f"Items of the type {str(kind)[:40]!r} are not supported: {path} must be a message, a function_call or a function_call_output.",
            param=f"{path}.type",
        )
    with parameters.within(path):
        if kind == "function_call":
            call = parameters.convert(value, CallItem, harmless=_HARMLESS, defaults_only=_DEFAULTS_ONLY)
        elif kind == "function_call_output":
            result = parameters.convert(value, OutputItem, harmless=_HARMLESS, defaults_only=_DEFAULTS_ONLY)
        else:
            item = parameters.convert(value, Item, harmless=_HARMLESS, defaults_only=_DEFAULTS_ONLY)
    if kind == "function_call":
        made = make_call(call.call_id, call.name, call.arguments, path)
        return ChatMessage(role="assistant", content="", tool_calls=(made,))
    if kind == "function_call_output":
        content = _read_content(result.output, f"{path}.output")
        return ChatMessage(role="tool", content=content, tool_call_id=result.call_id)
    return ChatMessage(role=_ROLES[item.role], content=_read_content(item.content, f"{path}.content"))


def join_calls(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Put calls into the turn of the assistant that they follow, as templates expect them."""
    joined: list[ChatMessage] = []
    for message in messages:
        if message.tool_calls and joined and joined[-1].role == "assistant":
            before = joined[-1]
            content = before.content + message.content
            joined[-1] = ChatMessage(
                role="assistant", content=content, tool_calls=before.tool_calls + message.tool_calls
            )
        else:
            joined.append(message)
    return joined


def read_tools(values: list[dict[str, Any]], choice: Any, parallel: bool | None) -> Tools | None:
    """Return the tools that may be called; None for none. Raises: AiscaleError."""
    if not values:
        if choice not in (None, "none", "auto"):
            raise refuse("tool_choice is only allowed when there are tools", "tool_choice")
        return None
    functions = []
    for index, value in enumerate(values):
        if value.get("type") != "function":
            raise AiscaleError(
                Code.UNSUPPORTED_PARAMETER,
                f"Tools of the type {str(value.get('type'))[:40]!r} are not supported: tools[{index}] must be a function.",
                param=f"tools[{index}].type",
            )
        with parameters.within(f"tools[{index}]"):
            tool = parameters.convert(value, FunctionTool, harmless=frozenset(), defaults_only={})
        functions.append(
            Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
        )
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    return make_tools(functions, choice, parallel)


def recall_tools(response: dict[str, Any]) -> Tools | None:
    """Return the tools that a response was made with."""
    return read_tools(response["tools"], response["tool_choice"], response["parallel_tool_calls"])


def keep(message: ChatMessage) -> dict[str, Any]:
    """Return a turn as it is stored."""
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        value["tool_calls"] = msgspec.to_builtins(message.tool_calls)
    return value | ({"tool_call_id": message.tool_call_id} if message.tool_call_id else {})


def recall(value: dict[str, Any]) -> ChatMessage:
    """Return a turn that was stored."""
    return msgspec.convert(value, ChatMessage)


def recall_output(items: list[dict[str, Any]]) -> list[ChatMessage]:
    """Return the turn that a response's output was. A call that was cut is none: nobody could run it, or tell what came of it."""
    texts: list[str] = []
    calls: list[ToolCall] = []
    for item in items:
        if item["type"] == "function_call":
            if read_arguments(item["arguments"]) is not None:
                calls.append(ToolCall(id=item["call_id"], name=item["name"], arguments=item["arguments"] or "{}"))
        else:
            texts += [part["text"] for part in item["content"]]
    return [ChatMessage(role="assistant", content="".join(texts), tool_calls=tuple(calls))] if items else []


def describe(item: dict[str, Any], number: str) -> list[dict[str, Any]]:
    """Say what was said, as items again."""
    head = {"id": f"msg_{number}", "type": "message", "status": "completed", "role": item["role"]}
    if item["role"] == "tool":
        return [
            {
                "id": f"fco_{number}",
                "type": "function_call_output",
                "status": "completed",
                "call_id": item["tool_call_id"],
                "output": item["content"],
            }
        ]
    part = {"type": "input_text", "text": item["content"]}
    if item["role"] == "assistant":
        part = {"type": "output_text", "text": item["content"], "annotations": []}
    calls = [
        {
            "id": f"fc_{number}_{index}",
            "type": "function_call",
            "status": "completed",
            "call_id": call["id"],
            "name": call["name"],
            "arguments": call["arguments"],
        }
        for index, call in enumerate(item.get("tool_calls", ()))
    ]
    return [*([head | {"content": [part]}] if item["content"] or not calls else []), *calls]


def _read_content(content: str | list[dict[str, Any]], path: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        text = part.get("text")
        if part.get("type") not in _TEXT_PARTS or not isinstance(text, str):
            raise AiscaleError(
                Code.INVALID_REQUEST,
                f'{path}[{index}] is not supported: the parts must be {{"type": "input_text", "text": "..."}}.',
                param=f"{path}[{index}]",
            )
        parameters.check_names(part, _TEXT_PART, f"{path}[{index}]")
        texts.append(text)
    return "".join(texts)
