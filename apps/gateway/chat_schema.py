"""Say what a body of ``POST /v1/chat/completions`` may hold."""

from typing import Any

import msgspec

from aiscale.errors import AiscaleError, Code
from apps.gateway import parameters
from apps.gateway.cache_wishes import CacheOption
from apps.gateway.formats import read_format
from apps.gateway.tool_schema import check_results, read_calls, read_tools
from apps.inference.completions import CompletionRequest
from apps.inference.prompts import ChatMessage

MAX_MESSAGES = 4_096
MAX_STOP = 4
MAX_STOP_CHARS = 256
MAX_CHOICES = 8
MAX_TOP_LOGPROBS = 20
MAX_TOP_K = 1_000_000
MAX_BIAS = 1_024
_INT64 = 1 << 63

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}

SERVICE_TIERS = ("auto", "default")
"""The other ones change what a request costs or how soon it is answered, and there are none here."""

HARMLESS = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "user",
    }
)
"""They change nothing in an answer: labels for the caller's own use, and hints about things that are not used here."""

DEFAULTS_ONLY: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "service_tier": SERVICE_TIERS,
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

_MESSAGE_DEFAULTS_ONLY: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
}


TEXT_PART = frozenset({"type", "text", "cache_control", "prompt_cache_breakpoint"})
"""What a part of a message may hold. The last two are hints for caches of prompts, which is cached here whatever they say."""


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class Message(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] = []
    tool_call_id: str | None = None


class ChatBody(msgspec.Struct, kw_only=True):
    """The parameters that are honoured."""

    model: str
    messages: list[dict[str, Any]]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] = {}
    stop: str | list[str] = []
    seed: int | None = None
    n: int = 1
    logprobs: bool = False
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    cache: CacheOption | None = None


def read_chat(body: bytes, request_id: str) -> tuple[ChatBody, CompletionRequest]:
    """Type and check a body. Raises: AiscaleError with ``param``."""
    chat = parameters.convert(parameters.read_object(body), ChatBody, harmless=HARMLESS, defaults_only=DEFAULTS_ONLY)
    _check_ranges(chat)
    if chat.stream_options is not None and not chat.stream:
        raise AiscaleError(
            Code.INVALID_REQUEST, "stream_options is only allowed when stream is true.", param="stream_options"
        )
    tools = read_tools(chat.tools, chat.tool_choice, chat.parallel_tool_calls)
    grammar = read_format(chat.response_format)
    if tools is not None and grammar is not None:
        message = "An answer of a response_format cannot call tools. Leave out response_format, or tools."
        raise AiscaleError(Code.UNSUPPORTED_PARAMETER, message, param="response_format")
    return chat, CompletionRequest(
        request_id=request_id,
        source="api",
        model=chat.model,
        messages=_read_messages(chat.messages),
        max_tokens=_choose_max_tokens(chat),
        temperature=chat.temperature,
        top_p=chat.top_p,
        top_k=max(chat.top_k, 0),
        min_p=chat.min_p,
        presence_penalty=chat.presence_penalty,
        frequency_penalty=chat.frequency_penalty,
        repetition_penalty=chat.repetition_penalty,
        logit_bias=read_bias(chat.logit_bias),
        stop=read_stop(chat.stop),
        seed=chat.seed,
        n=chat.n,
        top_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        grammar=grammar,
        tools=tools,
    )


def _check_ranges(chat: ChatBody) -> None:
    parameters.check_range("temperature", chat.temperature, 0, 2)
    parameters.check_range("top_p", chat.top_p, 0, 1, open_low=True)
    parameters.check_range("top_k", chat.top_k, -1, MAX_TOP_K)
    parameters.check_range("min_p", chat.min_p, 0, 1)
    parameters.check_range("presence_penalty", chat.presence_penalty, -2, 2)
    parameters.check_range("frequency_penalty", chat.frequency_penalty, -2, 2)
    parameters.check_range("repetition_penalty", chat.repetition_penalty, 0.1, 10)
    parameters.check_range("seed", chat.seed, -_INT64, _INT64 - 1)
    parameters.check_range("n", chat.n, 1, MAX_CHOICES)
    parameters.check_range("top_logprobs", chat.top_logprobs, 0, MAX_TOP_LOGPROBS)
    if chat.top_logprobs is not None and not chat.logprobs:
        raise AiscaleError(
            Code.INVALID_REQUEST, "top_logprobs is only allowed when logprobs is true.", param="top_logprobs"
        )


def read_bias(bias: dict[str, float]) -> dict[int, float]:
    """Check what tokens are made likelier or rarer. Raises: AiscaleError (INVALID_REQUEST)."""
    if len(bias) > MAX_BIAS:
        raise AiscaleError(
            Code.INVALID_REQUEST, f"logit_bias names {len(bias)} tokens; the most is {MAX_BIAS}.", param="logit_bias"
        )
    for name, value in bias.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10) or not -100 <= value <= 100:
            raise AiscaleError(
                Code.INVALID_REQUEST,
                f"logit_bias[{name[:20]!r}] is {value:g}; it must map token ids to numbers from -100 to 100.",
                param="logit_bias",
            )
    return {int(name): value for name, value in bias.items()}


def _read_messages(values: list[dict[str, Any]]) -> list[ChatMessage]:
    if not 1 <= len(values) <= MAX_MESSAGES:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"messages holds {len(values)} entries; send 1 to {MAX_MESSAGES}.",
            param="messages",
        )
    messages = [_read_message(value, f"messages[{index}]") for index, value in enumerate(values)]
    check_results(messages)
    return messages


def _read_message(value: dict[str, Any], path: str) -> ChatMessage:
    try:
        message = parameters.convert(value, Message, harmless=frozenset(), defaults_only=_MESSAGE_DEFAULTS_ONLY)
    except AiscaleError as error:
        param = f"{path}.{error.param}" if error.param else path
        raise AiscaleError(error.code, f"{path}: {error.message}", param=param) from error
    if message.role not in _ROLES:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"The role {message.role[:40]!r} of {path} is not supported. Use system, developer, user, assistant or tool.",
            param=f"{path}.role",
        )
    _check_parts(message, path)
    return ChatMessage(
        role=_ROLES[message.role],
        content=_read_content(message.content or "", f"{path}.content"),
        tool_calls=read_calls(message.tool_calls, f"{path}.tool_calls"),
        tool_call_id=message.tool_call_id or "",
    )


def _check_parts(message: Message, path: str) -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for what does not belong to the role."""
    if message.content is None and not message.tool_calls:
        raise AiscaleError(
            Code.INVALID_REQUEST, f"{path}: You must provide the parameter content.", param=f"{path}.content"
        )
    if message.tool_calls and message.role != "assistant":
        raise AiscaleError(Code.INVALID_REQUEST, f"{path}: only an assistant calls tools.", param=f"{path}.tool_calls")
    if (message.role == "tool") != bool(message.tool_call_id):
        why = "a message of the role tool says the result of which call it is, and no other does"
        raise AiscaleError(Code.INVALID_REQUEST, f"{path}: {why}.", param=f"{path}.tool_call_id")


def _read_content(content: str | list[dict[str, Any]], path: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        kind, text = part.get("type"), part.get("text")
        if kind != "text" or not isinstance(text, str):
            raise AiscaleError(
                Code.INVALID_REQUEST,
                f'{path}[{index}] is not supported: the parts of a message must be {{"type": "text", "text": "..."}}.',
                param=f"{path}[{index}]",
            )
        parameters.check_names(part, TEXT_PART, f"{path}[{index}]")
        texts.append(text)
    return "".join(texts)


def _choose_max_tokens(chat: ChatBody) -> int | None:
    both = [n for n in (chat.max_completion_tokens, chat.max_tokens) if n is not None]
    if len(set(both)) > 1:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            "max_tokens and max_completion_tokens mean the same; send one of them.",
            param="max_tokens",
        )
    if both and both[0] < 1:
        name = "max_tokens" if chat.max_tokens is not None else "max_completion_tokens"
        raise AiscaleError(Code.INVALID_REQUEST, f"{name} is {both[0]}; it must be at least 1.", param=name)
    return both[0] if both else None


def read_stop(stop: str | list[str]) -> tuple[str, ...]:
    """Check what ends an answer. Raises: AiscaleError (INVALID_REQUEST)."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOP or any(not 1 <= len(text) <= MAX_STOP_CHARS for text in stops):
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"stop must be at most {MAX_STOP} strings of 1 to {MAX_STOP_CHARS} characters.",
            param="stop",
        )
    return stops
