"""Say what a body of ``POST /v1/completions`` may hold."""

from typing import Annotated, Any

import msgspec

from aiscale.errors import AiscaleError, Code
from apps.gateway import parameters
from apps.gateway.cache_wishes import CacheOption
from apps.gateway.chat_schema import MAX_CHOICES, MAX_TOP_LOGPROBS, StreamOptions, read_bias, read_stop

MAX_PROMPTS = 32
DEFAULT_MAX_TOKENS = 16
_INT64 = 1 << 63

HARMLESS = frozenset({"user"})

DEFAULTS_ONLY: dict[str, tuple[Any, ...]] = {"suffix": ("",)}


class TextBody(msgspec.Struct, kw_only=True):
    """The parameters that are honoured."""

    model: str
    prompt: Annotated[Any, msgspec.Meta(extra_json_schema=parameters.TEXTS_OR_TOKENS)]
    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = {}
    stop: str | list[str] = []
    seed: int | None = None
    echo: bool = False
    n: int = 1
    best_of: int | None = None
    logprobs: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache: CacheOption | None = None

    @property
    def made(self) -> int:
        """How many choices are made for each prompt, to answer with ``n`` of them."""
        return self.n if self.best_of is None else self.best_of


def read_text(body: bytes) -> tuple[TextBody, list[str | list[int]]]:
    """Type and check a body; return it with its prompts. Raises: AiscaleError with ``param``."""
    text = parameters.convert(parameters.read_object(body), TextBody, harmless=HARMLESS, defaults_only=DEFAULTS_ONLY)
    parameters.check_range("temperature", text.temperature, 0, 2)
    parameters.check_range("top_p", text.top_p, 0, 1, open_low=True)
    parameters.check_range("presence_penalty", text.presence_penalty, -2, 2)
    parameters.check_range("frequency_penalty", text.frequency_penalty, -2, 2)
    parameters.check_range("n", text.n, 1, MAX_CHOICES)
    parameters.check_range("best_of", text.best_of, 1, MAX_CHOICES)
    parameters.check_range("logprobs", text.logprobs, 0, MAX_TOP_LOGPROBS)
    parameters.check_range("seed", text.seed, -_INT64, _INT64 - 1)
    if text.max_tokens < 1:
        message = f"max_tokens is {text.max_tokens}; it must be at least 1."
        raise AiscaleError(Code.INVALID_REQUEST, message, param="max_tokens")
    if text.stream_options is not None and not text.stream:
        raise AiscaleError(
            Code.INVALID_REQUEST, "stream_options is only allowed when stream is true.", param="stream_options"
        )
    _check_choices(text)
    read_stop(text.stop)
    read_bias(text.logit_bias)
    return text, read_prompts(text.prompt)


def _check_choices(text: TextBody) -> None:
    """Raise: AiscaleError (INVALID_REQUEST, UNSUPPORTED_PARAMETER) for what does not go together."""
    if text.made < text.n:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            f"best_of is {text.best_of} and n is {text.n}; the best n are chosen of best_of, so it must not be less.",
            param="best_of",
        )
    if text.stream and text.made > text.n:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            "best_of cannot be streamed: the best is known at the end. Leave out stream, or best_of.",
            param="best_of",
        )
    if text.echo and text.logprobs is not None:
        raise AiscaleError(
            Code.UNSUPPORTED_PARAMETER,
            "logprobs of a prompt are not computed here. Leave out echo, or logprobs.",
            param="echo",
        )


def read_prompts(value: Any) -> list[str | list[int]]:
    """Take a text, texts, token ids, or lists of token ids. Raises: AiscaleError (INVALID_REQUEST)."""
    many: Any = value
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        many = [value]
    if not isinstance(many, list) or not many:
        raise _bad("prompt must be a string, an array of strings, an array of token ids, or an array of such arrays")
    if len(many) > MAX_PROMPTS:
        raise _bad(f"prompt holds {len(many)} entries; send at most {MAX_PROMPTS} at a time")
    kind: Any = str if isinstance(many[0], str) else list
    for index, entry in enumerate(many):
        if not isinstance(entry, kind) or not isinstance(entry, str | list):
            raise _bad(f"prompt[{index}] is of another type; all must be strings, or all arrays of token ids")
        if not entry:
            raise _bad(f"prompt[{index}] is empty; give the model something to go on from")
        if isinstance(entry, list) and not all(type(token_id) is int for token_id in entry):
            raise _bad(f"prompt[{index}] holds something that is no token id")
    return many


def _bad(what: str) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, f"{what}.", param="prompt")
