"""Say what a body of ``POST /v1/responses`` may hold."""

from typing import Any, Literal

import msgspec

from aiscale.errors import AiscaleError, Code
from apps.gateway import parameters
from apps.gateway.cache_wishes import CacheOption
from apps.gateway.chat_schema import MAX_MESSAGES, SERVICE_TIERS
from apps.gateway.responses.items import join_calls, read_item
from apps.inference.prompts import ChatMessage

MAX_METADATA, MAX_METADATA_NAME, MAX_METADATA_VALUE = 16, 64, 512

HARMLESS = frozenset({"prompt_cache_retention"})
"""It changes nothing in an answer: a hint."""

DEFAULTS_ONLY: dict[str, tuple[Any, ...]] = {
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}),
    "service_tier": SERVICE_TIERS,
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
INPUT_DEFAULTS_ONLY = {name: DEFAULTS_ONLY[name] for name in ("conversation", "reasoning", "truncation")}

INCLUDABLE = frozenset(
    {
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "reasoning.encrypted_content",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
"""Extras of kinds of output that are not made here: whoever asks for them gets all that there are."""


class ResponseStreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_obfuscation: bool = False


class TextSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the text is to look like. ``verbosity`` medium is the only one there is."""

    format: dict[str, Any] = msgspec.field(default_factory=lambda: {"type": "text"})
    verbosity: Literal["medium"] = "medium"


class InputBody(msgspec.Struct, kw_only=True):
    """What the model reads, and what it is told of tools: all that has tokens before the answer."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings = msgspec.field(default_factory=TextSettings)


class ResponseBody(InputBody, kw_only=True):
    """The parameters that are honoured. The last three are labels, which are told again."""

    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    metadata: dict[str, str] = {}
    store: bool = True
    background: bool = False
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    include: list[str] = []
    cache: CacheOption | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


def read_response(body: bytes) -> tuple[ResponseBody, list[ChatMessage]]:
    """Type and check a body; return it with the messages of its input. Raises: AiscaleError with ``param``."""
    wanted = parameters.convert(
        parameters.read_object(body), ResponseBody, harmless=HARMLESS, defaults_only=DEFAULTS_ONLY
    )
    parameters.check_range("temperature", wanted.temperature, 0, 2)
    parameters.check_range("top_p", wanted.top_p, 0, 1, open_low=True)
    if wanted.max_output_tokens is not None and wanted.max_output_tokens < 1:
        message = f"max_output_tokens is {wanted.max_output_tokens}; it must be at least 1."
        raise AiscaleError(Code.INVALID_REQUEST, message, param="max_output_tokens")
    if wanted.stream_options is not None and not wanted.stream:
        raise AiscaleError(
            Code.INVALID_REQUEST, "stream_options is only allowed when stream is true.", param="stream_options"
        )
    if wanted.background and not wanted.store:
        message = "background needs store: the answer is fetched later. Leave store out."
        raise AiscaleError(Code.INVALID_REQUEST, message, param="store")
    for index, extra in enumerate(wanted.include):
        if extra not in INCLUDABLE:
            message = f"{extra[:60]!r} cannot be included here. Leave it out."
            raise AiscaleError(Code.UNSUPPORTED_PARAMETER, message, param=f"include[{index}]")
    check_metadata(wanted.metadata)
    return wanted, read_items(wanted.input)


def read_input(body: bytes) -> tuple[InputBody, list[ChatMessage]]:
    """Type a body of which tokens are counted; return it with the messages of its input. Raises: AiscaleError with ``param``."""
    values = parameters.read_object(body)
    wanted = parameters.convert(values, InputBody, harmless=frozenset(), defaults_only=INPUT_DEFAULTS_ONLY)
    return wanted, read_items(wanted.input)


def check_metadata(metadata: dict[str, str]) -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for more than OpenAI's clients may send."""
    fits = len(metadata) <= MAX_METADATA and all(
        len(name) <= MAX_METADATA_NAME and len(value) <= MAX_METADATA_VALUE for name, value in metadata.items()
    )
    if not fits:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"metadata may hold {MAX_METADATA} entries, with names of up to {MAX_METADATA_NAME} and values of up to "
            f"{MAX_METADATA_VALUE} characters.",
            param="metadata",
        )


def read_items(value: str | list[dict[str, Any]]) -> list[ChatMessage]:
    """Turn the input into messages. Raises: AiscaleError."""
    if isinstance(value, str):
        return [ChatMessage(role="user", content=value)]
    if not 1 <= len(value) <= MAX_MESSAGES:
        raise AiscaleError(
            Code.INVALID_REQUEST, f"input holds {len(value)} items; send 1 to {MAX_MESSAGES}.", param="input"
        )
    return join_calls([read_item(item, f"input[{index}]") for index, item in enumerate(value)])
