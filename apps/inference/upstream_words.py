"""Say a request in the words of OpenAI's API, which other servers understand, and read what they say of calls."""

import json
from typing import Any, Literal, NamedTuple

from aiscale.wire.events import ToolCallPart
from apps.inference import grammars
from apps.inference.catalog import UpstreamRoute
from apps.inference.completions import CompletionRequest
from apps.inference.prompts import ChatMessage
from apps.inference.tools import Tool, Tools
from apps.inference.upstream_client import failed

PER_MESSAGE_TOKENS = 16
"""The most that a chat template adds to a message."""
TEMPLATE_TOKENS = 256
"""What a server may say of its own before it, such as who the model is and what day it is."""
TOOLS_TOKENS = 1024
"""What a server may say of tools around what was said of them."""
MAX_CALLS = 1_000
"""In one answer."""


def bound_prompt_tokens(request: CompletionRequest) -> int:
    """Return the most tokens that a conversation can be for any tokenizer on bytes: what is held for it."""
    parts = len(request.messages) + sum(len(message.tool_calls) for message in request.messages)
    around = TEMPLATE_TOKENS + parts * PER_MESSAGE_TOKENS + (0 if request.tools is None else TOOLS_TOKENS)
    return len(write_prompt(request).encode()) + around


def write_prompt(request: CompletionRequest) -> str:
    """Return all that is said to a model, one after the other."""
    said = [message.content for message in request.messages]
    said += [call.id + call.name + call.arguments for message in request.messages for call in message.tool_calls]
    told = [] if request.tools is None else [json.dumps(describe_tools(request.tools), ensure_ascii=False)]
    return "".join([*said, *told])


def describe_tools(tools: Tools) -> dict[str, Any]:
    """Say in OpenAI's words what may be called."""
    choice: Any = "required" if tools.must_call else "auto"
    if tools.only:
        choice = {"type": "function", "function": {"name": tools.only}}
    value = {"tools": [_describe_tool(tool) for tool in tools.tools], "tool_choice": choice}
    return value | ({} if tools.parallel else {"parallel_tool_calls": False})


def _describe_tool(tool: Tool) -> dict[str, Any]:
    value = tool.describe()
    if tool.strict:
        value["function"]["strict"] = True
    return value


def describe_message(message: ChatMessage) -> dict[str, Any]:
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        value["content"] = message.content or None
        value["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return value | ({"tool_call_id": message.tool_call_id} if message.tool_call_id else {})


def make_body(request: CompletionRequest, route: UpstreamRoute, max_tokens: int) -> dict[str, Any]:
    """Say a request in OpenAI's words. What is at its default is left out: not every server knows it."""
    body: dict[str, Any] = {
        "model": route.model,
        "messages": [describe_message(message) for message in request.messages],
        "max_tokens": max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    optional: dict[str, tuple[Any, Any]] = {
        "n": (request.n, 1),
        "stop": (list(request.stop), []),
        "seed": (request.seed, None),
        "presence_penalty": (request.presence_penalty, 0.0),
        "frequency_penalty": (request.frequency_penalty, 0.0),
        "top_k": (request.top_k, 0),
        "min_p": (request.min_p, 0.0),
        "repetition_penalty": (request.repetition_penalty, 1.0),
        "response_format": (None if request.grammar is None else grammars.describe(request.grammar), None),
        "logit_bias": ({str(token): value for token, value in request.logit_bias.items()}, {}),
    }
    told = {} if request.tools is None else describe_tools(request.tools)
    return body | told | {name: value for name, (value, default) in optional.items() if value != default}


class Piece(NamedTuple):
    """Hold what a chunk says of one choice; ``end`` with its last one."""

    choice: int
    text: str
    calls: tuple[ToolCallPart, ...]
    end: Literal["stop", "length"] | None


def read_pieces(chunk: Any, count: int) -> list[Piece]:
    """Take what a chunk says of the ``count`` choices that were asked for. Raises: AiscaleError (UPSTREAM_FAILED) for what is none."""
    choices = chunk.get("choices") if isinstance(chunk, dict) else None
    if choices is None:
        return []
    if not isinstance(choices, list):
        raise failed("it sent what is no answer")
    return [_read_piece(choice, count) for choice in choices]


def _read_piece(choice: Any, count: int) -> Piece:
    if not isinstance(choice, dict):
        raise failed("it sent what is no answer")
    index, delta, reason = choice.get("index") or 0, choice.get("delta") or {}, choice.get("finish_reason")
    if type(index) is not int or not 0 <= index < count:
        raise failed("it sent an answer that nobody asked for")
    if not isinstance(delta, dict) or not isinstance(reason, str | None):
        raise failed("it sent what is no answer")
    end: Literal["stop", "length"] | None = None
    if reason is not None:
        end = "length" if reason == "length" else "stop"
    return Piece(index, _read_text(delta.get("content")), read_call_parts(delta.get("tool_calls")), end)


def _read_text(content: Any) -> str:
    """Return the text of a delta; some servers send it in parts, of which others are no text."""
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        return "".join(_read_text(part.get("text")) for part in parts)
    if not isinstance(content, str | None):
        raise failed("it sent what is no text")
    return content or ""


def read_usage(chunk: Any) -> dict[str, Any] | None:
    """Return the usage that a chunk tells; None when it tells none."""
    usage = chunk.get("usage") if isinstance(chunk, dict) else None
    return usage if isinstance(usage, dict) else None


def read_count(usage: Any, name: str) -> int | None:
    """Return a number of tokens as an upstream tells it; None for what is none."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and value >= 0 else None


def read_call_parts(value: Any) -> tuple[ToolCallPart, ...]:
    """Take what an upstream says of calls, and leave out what is of no known shape."""
    parts = []
    for call in value if isinstance(value, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            name, text = function.get("name") or "", function.get("arguments") or ""
            index = call.get("index") or 0
            if isinstance(name, str) and isinstance(text, str) and type(index) is int and 0 <= index < MAX_CALLS:
                parts.append(ToolCallPart(index=index, id=str(call.get("id") or ""), name=name, arguments=text))
    return tuple(parts)
