"""Read what an answer is to look like: free text, any JSON object, or JSON of a schema."""

from typing import Any

from aiscale.errors import AiscaleError, Code
from aiscale.wire.jobs import Grammar
from apps.gateway import parameters
from apps.inference import grammars

_DESCRIBED = frozenset({"name", "description", "schema", "strict"})
"""A schema is followed to the letter, whether ``strict`` or not; its name and description change nothing."""


def read_format(value: dict[str, Any] | None, described_in: str | None = "json_schema") -> Grammar | None:
    """Return the grammar of a ``response_format``; None for free text. ``described_in``: what holds the schema (None: itself).

    Raises: AiscaleError (INVALID_REQUEST, with ``param`` response_format).
    """
    if value is None:
        return None
    kind = value.get("type")
    if kind in ("text", "json_object"):
        parameters.check_names(value, ("type",), "response_format")
        return grammars.make_json_grammar({"type": "object"}) if kind == "json_object" else None
    if kind != "json_schema":
        raise _refuse("type must be text, json_object or json_schema")
    described, place, known = value, "response_format", _DESCRIBED | {"type"}
    if described_in is not None:
        parameters.check_names(value, ("type", described_in), "response_format")
        described, place, known = value.get(described_in, {}), f"response_format.{described_in}", _DESCRIBED
    if not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
        where = f"{described_in}.schema" if described_in else "schema"
        raise _refuse(f"{where} must be a JSON schema, an object")
    parameters.check_names(described, known, place)
    schema: dict[str, Any] = described["schema"]
    return grammars.make_json_grammar(schema)


def _refuse(reason: str) -> AiscaleError:
    return AiscaleError(Code.INVALID_REQUEST, f"Invalid response_format: {reason}.", param="response_format")
