"""Say what a body of ``POST /v1/messages`` may hold."""

from typing import Any, Literal

import msgspec

from aiscale.errors import AiscaleError, Code
from aiscale.wire.jobs import Grammar
from apps.gateway import parameters
from apps.gateway.cache_wishes import CacheOption
from apps.gateway.chat_schema import MAX_MESSAGES, MAX_STOP_CHARS, MAX_TOP_K
from apps.gateway.exchange import Exchange
from apps.gateway.formats import read_format
from apps.gateway.messages import blocks
from apps.gateway.tool_schema import check_results
from apps.inference.prompts import ChatMessage
from apps.inference.tools import Tools

VERSIONS = ("2023-06-01", "2026-10-21")
MAX_STOP = 4
NAMES = {"response_format": "output_config.format"}
"""How this dialect names what all of them share."""

HARMLESS = frozenset({"cache_control", "metadata"})
"""They change nothing in an answer: labels, and hints about what is cached."""

DEFAULTS_ONLY: dict[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "output_format": (),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "thinking": ({"type": "disabled"},),
    "user_profile_id": (),
    "workspace_id": (),
}


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the answer is to look like. ``effort`` high, which is the same as none, is the only one there is."""

    effort: Literal["high"] | None = None
    format: dict[str, Any] | None = None


class Message(msgspec.Struct, kw_only=True):
    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class CountBody(msgspec.Struct, kw_only=True):
    """What is counted."""

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] = ""
    tools: list[dict[str, Any]] = []
    tool_choice: dict[str, Any] | None = None
    output_config: OutputConfig = msgspec.field(default_factory=OutputConfig)


class MessagesBody(CountBody, kw_only=True):
    """The parameters that are honoured."""

    max_tokens: int
    stop_sequences: list[str] = []
    stream: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cache: CacheOption | None = None


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """Hold the turns, the words with which the answer begins ('': none), and the JSON that it is held to."""

    messages: list[ChatMessage]
    prefill: str
    tools: Tools | None = None
    grammar: Grammar | None = None


def check_version(exchange: Exchange) -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for a version of the API that is not spoken; none at all is the newest."""
    version = exchange.find_header("anthropic-version")
    if version is not None and version not in VERSIONS:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"The anthropic-version {version[:40]!r} is not spoken here. Send {VERSIONS[-1]}.",
            param="anthropic-version",
        )


def read_messages(body: bytes) -> tuple[MessagesBody, Conversation]:
    """Type and check a body. Raises: AiscaleError with ``param``."""
    wanted = parameters.convert(
        parameters.read_object(body), MessagesBody, harmless=HARMLESS, defaults_only=DEFAULTS_ONLY
    )
    parameters.check_range("temperature", wanted.temperature, 0, 1)
    parameters.check_range("top_p", wanted.top_p, 0, 1, open_low=True)
    parameters.check_range("top_k", wanted.top_k, 0, MAX_TOP_K)
    if wanted.max_tokens < 1:
        message = f"max_tokens is {wanted.max_tokens}; it must be at least 1."
        raise AiscaleError(Code.INVALID_REQUEST, message, param="max_tokens")
    stops = wanted.stop_sequences
    if len(stops) > MAX_STOP or any(not stop.strip() or len(stop) > MAX_STOP_CHARS for stop in stops):
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"stop_sequences must be at most {MAX_STOP} strings of 1 to {MAX_STOP_CHARS} characters, not blank.",
            param="stop_sequences",
        )
    return wanted, read_conversation(wanted)


def read_count(body: bytes) -> tuple[CountBody, Conversation]:
    """Type and check a body of which tokens are counted. Raises: AiscaleError with ``param``."""
    wanted = parameters.convert(parameters.read_object(body), CountBody, harmless=HARMLESS, defaults_only=DEFAULTS_ONLY)
    return wanted, read_conversation(wanted)


def read_conversation(wanted: CountBody) -> Conversation:
    """Turn system and messages into turns. Raises: AiscaleError."""
    if not 1 <= len(wanted.messages) <= MAX_MESSAGES:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"messages holds {len(wanted.messages)} entries; send 1 to {MAX_MESSAGES}.",
            param="messages",
        )
    system = blocks.read_text(wanted.system, "system")
    turns = [ChatMessage(role="system", content=system)] if system else []
    for index, value in enumerate(wanted.messages):
        turns += _read_message(value, f"messages[{index}]")
    check_results(turns, "messages")
    tools = blocks.read_tools(wanted.tools, wanted.tool_choice)
    prefill = turns.pop().content if turns[-1].role == "assistant" and not turns[-1].tool_calls else ""
    if prefill and tools is not None:
        message = "An answer that goes on from your words cannot call tools. Leave out the last message, or tools."
        raise AiscaleError(Code.UNSUPPORTED_PARAMETER, message, param="messages")
    if prefill != prefill.rstrip():
        last = f"messages[{len(wanted.messages) - 1}].content"
        message = "The last message is the assistant's, and cannot end with white space: the answer goes on from it."
        raise AiscaleError(Code.INVALID_REQUEST, message, param=last)
    if not any(turn.role != "system" for turn in turns):
        message = "messages holds no message of the user. Send one."
        raise AiscaleError(Code.INVALID_REQUEST, message, param="messages")
    grammar = _read_format(wanted.output_config.format, prefill, tools)
    return Conversation(messages=_join_neighbours(turns), prefill=prefill, tools=tools, grammar=grammar)


def _read_format(value: dict[str, Any] | None, prefill: str, tools: Tools | None) -> Grammar | None:
    """Return the grammar of an answer that is to be JSON of a schema. Raises: AiscaleError."""
    if value is None:
        return None
    if value.get("type") != "json_schema":
        message = "output_config.format.type must be json_schema."
        raise AiscaleError(Code.INVALID_REQUEST, message, param="output_config.format.type")
    with parameters.renamed(NAMES):
        grammar = read_format(value, described_in=None)
    if tools is not None or prefill:
        what, leave = ("call tools", "tools") if tools is not None else ("go on from your words", "the last message")
        message = f"An answer of an output_config.format cannot {what}. Leave out output_config.format, or {leave}."
        raise AiscaleError(Code.UNSUPPORTED_PARAMETER, message, param="output_config.format")
    return grammar


def _join_neighbours(turns: list[ChatMessage]) -> list[ChatMessage]:
    """Make one turn of several of the same role, as Anthropic does."""
    joined: list[ChatMessage] = []
    for turn in turns:
        if joined and joined[-1].role == turn.role and turn.role != "tool":
            before = joined[-1]
            content = "\n\n".join(filter(None, (before.content, turn.content)))
            calls = before.tool_calls + turn.tool_calls
            joined[-1] = ChatMessage(role=turn.role, content=content, tool_calls=calls)
        else:
            joined.append(turn)
    return joined


def _read_message(value: dict[str, Any], path: str) -> list[ChatMessage]:
    with parameters.within(path):
        message = parameters.convert(value, Message, harmless=frozenset(), defaults_only={})
    return blocks.read_turns(message.role, message.content, f"{path}.content")
