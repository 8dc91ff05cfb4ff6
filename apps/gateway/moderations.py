"""Answer ``POST /v1/moderations``."""

from typing import Annotated, Any

import msgspec

from aiscale.errors import AiscaleError, Code
from apps.accounts.callers import Caller
from apps.gateway import parameters
from apps.gateway.exchange import Exchange
from apps.inference import moderation
from apps.inference.moderation import ModerationRequest, Verdict

_PART: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
INPUT_SCHEMA = {
    "oneOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": _PART, "minItems": 1},
    ]
}


class ModerationBody(msgspec.Struct, kw_only=True):
    """The parameters that are honoured."""

    input: Annotated[Any, msgspec.Meta(extra_json_schema=INPUT_SCHEMA)]
    model: str | None = None


async def answer_moderations(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Judge all texts of one request. Raises: AiscaleError."""
    wanted = parameters.convert(parameters.read_object(body), ModerationBody, harmless=frozenset(), defaults_only={})
    request = ModerationRequest(
        request_id=exchange.request_id, source="api", model=wanted.model, texts=read_texts(wanted.input)
    )
    result = await moderation.moderate(request, caller)
    value = {
        "id": f"modr-{exchange.request_id.removeprefix('req_')}",
        "model": result.model,
        "results": [write_verdict(verdict) for verdict in result.verdicts],
    }
    await exchange.send_json(200, value, result.headers)


def read_texts(value: Any) -> list[str]:
    """Take a text, texts, or parts of one message. Raises: AiscaleError (INVALID_REQUEST)."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        # parts belong together: one message, one result
        return ["\n".join(_read_part(part, index) for index, part in enumerate(value))]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _bad("input must be a string, an array of strings, or an array of text parts")
    if not 1 <= len(texts) <= moderation.MAX_INPUTS:
        raise _bad(f"input holds {len(texts)} entries; send 1 to {moderation.MAX_INPUTS} at a time")
    for index, text in enumerate(texts):
        if not text:
            raise _bad(f"input[{index}] is empty")
    return texts


def write_verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "flagged": verdict.flagged,
        "categories": verdict.categories,
        "category_scores": verdict.scores,
        "category_applied_input_types": {name: ["text"] for name in verdict.categories},
    }


def _read_part(part: Any, index: int) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise _bad(f"input[{index}] is of type {str(kind)[:40]!r}; only text is judged here")
    text = part.get("text")
    if not isinstance(text, str) or not text:
        raise _bad(f"input[{index}].text must be a string that is not empty")
    parameters.check_names(part, _PART["properties"], f"input[{index}]")
    return text


def _bad(what: str) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, f"{what}.", param="input")
