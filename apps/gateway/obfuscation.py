"""Hide how long the pieces of a stream are from who sees encrypted packets only: ``stream_options.include_obfuscation``."""

import secrets
from typing import Any, Protocol

import msgspec

SIZE_STEP = 64
"""Each event with a piece of the answer is so many bytes long, or a multiple of that."""
_FIELD_BYTES = len(b',"obfuscation":""')

_encode = msgspec.json.Encoder().encode


class Options(Protocol):
    include_obfuscation: bool


def is_wished(options: Options | None) -> bool:
    """Tell whether a request's ``stream_options`` ask for it."""
    return options is not None and options.include_obfuscation


def pad(value: dict[str, Any]) -> dict[str, Any]:
    """Return an event with random letters in it, when it carries a piece of the answer."""
    if not (value.get("choices") or "delta" in value):
        return value
    missing = -(len(_encode(value)) + _FIELD_BYTES) % SIZE_STEP
    return value | {"obfuscation": secrets.token_hex(SIZE_STEP // 2)[:missing]}
