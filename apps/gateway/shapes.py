"""Give the shapes of answers. They serve the OpenAPI document; tests hold real answers against them."""

from typing import Any, Literal

import msgspec


class Shape(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Hold nothing that is not named."""


class ErrorDetail(Shape):
    message: str
    type: str
    param: str | None
    code: str


class Error(Shape):
    """What went wrong, and what to do next."""

    error: ErrorDetail


class AnthropicErrorDetail(Shape):
    type: str
    message: str
    code: str = ""
    param: str = ""


class AnthropicError(Shape):
    """What went wrong, in Anthropic's dialect."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str


class PromptDetails(Shape):
    cached_tokens: int
    audio_tokens: int


class CompletionDetails(Shape):
    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class ChatUsage(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class FunctionCall(Shape):
    name: str
    arguments: str


class ToolCall(Shape):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(Shape):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    annotations: list[Any] = []
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Shape):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Shape):
    """An answer to a conversation. With ``stream`` the answer is server-sent events of chunks instead."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: str
    choices: list[ChatChoice]
    usage: ChatUsage


class CachedDetails(Shape):
    cached_tokens: int


class TextUsage(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedDetails


class TextChoice(Shape):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(Shape):
    """What follows the prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: TextUsage


class Embedding(Shape):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Shape):
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedDetails


class EmbeddingList(Shape):
    """One vector for each input, as numbers or as base64 of little-endian float32."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModerationVerdict(Shape):
    """Judge one text. OpenAI's categories come first, then the model's own labels."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]


class Moderation(Shape):
    """One verdict for each text."""

    id: str
    model: str
    results: list[ModerationVerdict]


class Model(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    aiscale: dict[str, Any]
    """What it can be asked for: endpoints, context_tokens, version, precision, batch_invariant, dimensions."""


class ModelList(Shape):
    """The models that the caller's plan allows."""

    object: Literal["list"]
    data: list[Model]


class OutputText(Shape):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(Shape, tag_field="type", tag="message"):
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(Shape, tag_field="type", tag="function_call"):
    id: str
    status: Literal["in_progress", "completed"]
    call_id: str
    name: str
    arguments: str


class ResponseFailure(Shape):
    code: str
    message: str


class ResponseUsage(Shape):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class Response(Shape):
    """A response. With ``stream`` the answer is server-sent events instead, the last of which holds it."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: ResponseFailure | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[Any]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: None = None
    """Not there in responses that were stored by an earlier version."""


class InputMessage(Shape, tag_field="type", tag="message"):
    id: str
    status: Literal["completed"]
    role: str
    content: list[dict[str, Any]]


class InputCallOutput(Shape, tag_field="type", tag="function_call_output"):
    id: str
    status: Literal["completed"]
    call_id: str
    output: str


class InputItemList(Shape):
    object: Literal["list"]
    data: list[InputMessage | OutputCall | InputCallOutput]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(Shape):
    id: str
    object: str
    deleted: bool


class TextBlock(Shape, tag_field="type", tag="text"):
    text: str


class ToolUseBlock(Shape, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class MessageCacheCreation(Shape):
    ephemeral_5m_input_tokens: int
    ephemeral_1h_input_tokens: int


class MessageUsage(Shape):
    input_tokens: int
    cache_creation: MessageCacheCreation
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    server_tool_use: None
    service_tier: Literal["standard", "batch"]
    inference_geo: None


class Message(Shape):
    """An answer in Anthropic's dialect. With ``stream`` the answer is server-sent events instead."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ToolUseBlock]
    container: None
    diagnostics: None
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    stop_details: None
    usage: MessageUsage


class TokenCount(Shape):
    input_tokens: int


class InputTokenCount(TokenCount):
    object: Literal["response.input_tokens"]


class File(Shape):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class FileList(Shape):
    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool
