"""Read what an answer is to look like: free text, any JSON object, or JSON of a schema."""

from typing import Any

from aiscale.errors import AiscaleError, Code
from aiscale.wire.jobs import Grammar
from apps.inference import grammars


def read_format(value: dict[str, Any] | None, described_in: str | None = "json_schema") -> Grammar | None:
    """Return the grammar of a ``response_format``; None for free text. ``described_in``: what holds the schema (None: itself).

    Raises: AiscaleError (INVALID_REQUEST, with ``param`` response_format).
    """
    kind = "text" if value is None else value.get("type")
    if value is None or kind == "text":
        return None
    if kind == "json_object":
        return grammars.make_json_grammar({"type": "object"})
    if kind != "json_schema":
        raise _refuse("type must be text, json_object or json_schema")
    described = value.get(described_in) if described_in else value
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        where = f"{described_in}.schema" if described_in else "schema"
        raise _refuse(f"{where} must be a JSON schema, an object")
    return grammars.make_json_grammar(schema)


def _refuse(reason: str) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, f"Invalid response_format: {reason}.", param="response_format")
