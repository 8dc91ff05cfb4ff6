"""Say a request in the words of OpenAI's API, which other servers understand, and read what they say of calls."""

import json
from typing import Any

from aiscale.wire.events import ToolCallPart
from apps.inference import grammars
from apps.inference.catalog import UpstreamRoute
from apps.inference.completions import CompletionRequest
from apps.inference.prompts import ChatMessage
from apps.inference.tools import Tool, Tools

PER_MESSAGE_TOKENS = 16
"""The most that a chat template adds to a message."""
TOOLS_TOKENS = 1024
"""What a server may say of tools around what was said of them."""


def bound_prompt_tokens(request: CompletionRequest) -> int:
    """Return the most tokens that a conversation can be for any tokenizer on bytes: what is held for it."""
    parts = len(request.messages) + sum(len(message.tool_calls) for message in request.messages)
    around = parts * PER_MESSAGE_TOKENS + (0 if request.tools is None else TOOLS_TOKENS)
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


def read_call_parts(value: Any) -> tuple[ToolCallPart, ...]:
    """Take what an upstream says of calls, and leave out what is of no known shape."""
    parts = []
    for call in value if isinstance(value, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            name, text = function.get("name") or "", function.get("arguments") or ""
            index = call.get("index") or 0
            if isinstance(name, str) and isinstance(text, str) and isinstance(index, int):
                parts.append(ToolCallPart(index=index, id=str(call.get("id") or ""), name=name, arguments=text))
    return tuple(parts)
