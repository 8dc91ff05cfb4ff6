"""Say what a body of ``POST /v1/completions`` may hold."""

from typing import Annotated, Any

import msgspec

from aiscale.errors import AiscaleError, Code
from apps.gateway import parameters
from apps.gateway.chat_schema import StreamOptions, read_stop

MAX_PROMPTS = 32
DEFAULT_MAX_TOKENS = 16
_INT64 = 1 << 63

HARMLESS = frozenset({"user"})

DEFAULTS_ONLY: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (),
    "n": (1,),
    "presence_penalty": (0, 0.0),
    "suffix": ("",),
}


class TextBody(msgspec.Struct, kw_only=True):
    """The parameters that are honoured."""

    model: str
    prompt: Annotated[Any, msgspec.Meta(extra_json_schema=parameters.TEXTS_OR_TOKENS)]
    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    stop: str | list[str] = []
    seed: int | None = None
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None


def read_text(body: bytes) -> tuple[TextBody, list[str] | list[list[int]]]:
    """Type and check a body; return it with its prompts. Raises: AiscaleError with ``param``."""
    text = parameters.convert(parameters.read_object(body), TextBody, harmless=HARMLESS, defaults_only=DEFAULTS_ONLY)
    parameters.check_range("temperature", text.temperature, 0, 2)
    parameters.check_range("top_p", text.top_p, 0, 1, open_low=True)
    parameters.check_range("seed", text.seed, -_INT64, _INT64 - 1)
    if text.max_tokens < 1:
        message = f"max_tokens is {text.max_tokens}; it must be at least 1."
        raise AiscaleError(Code.INVALID_REQUEST, message, param="max_tokens")
    if text.stream_options is not None and not text.stream:
        raise AiscaleError(
            Code.INVALID_REQUEST, "stream_options is only allowed when stream is true.", param="stream_options"
        )
    read_stop(text.stop)
    return text, read_prompts(text.prompt)


def read_prompts(value: Any) -> list[str] | list[list[int]]:
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
