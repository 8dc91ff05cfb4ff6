"""Check what an answer is to look like, before anything is held or queued."""

import asyncio
import json
from functools import cache, lru_cache
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from aiscale.errors import AiscaleError, Code
from aiscale.wire.jobs import Grammar
from apps.inference import schemas
from apps.inference.tool_grammars import list_schemas, mask_tokens
from apps.inference.tools import Tools

MAX_SCHEMA_BYTES = 64 << 10
CHECK_TIMEOUT_S = 5.0
MAX_PROBLEM = 300

_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write white space: small models wander off into it where they may."""

_ENDLESS = (
    "no answer could ever be finished: what it requires is unsatisfiable, or asks for itself within itself without end"
)
_OVERLAP = (
    "the options of a oneOf must exclude each other by their type, values, bounds, or a property that they require; "
    "where an answer may be several of them, write anyOf"
)


def make_json_grammar(schema: dict[str, Any]) -> Grammar:
    """Say that an answer is JSON of a schema. Raises: AiscaleError (INVALID_REQUEST) for one that is too large or too deep."""
    if schemas.measure_depth(schema) > schemas.MOST_DEPTH:
        raise _refuse(f"it is nested more than {schemas.MOST_DEPTH} deep")
    if len(json.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise _refuse(f"it is larger than {MAX_SCHEMA_BYTES >> 10} KiB")
    source = json.dumps(schemas.simplify(schema) | {"x-guidance": _COMPACT})
    return Grammar(kind="json_schema", source=source)


def describe(grammar: Grammar) -> dict[str, Any]:
    """Return the ``response_format`` that says the same to another server. Raises: ValueError for a grammar that is no JSON schema."""
    if grammar.kind != "json_schema":
        raise ValueError(f"there is no response_format for a grammar of kind {grammar.kind}")
    schema = json.loads(grammar.source)
    schema.pop("x-guidance")
    if schema == {"type": "object"}:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


async def check(grammar: Grammar, tools: Tools | None = None) -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for a schema that cannot be followed, ``tools`` being what a grammar of calls was made of.

    I/O: none; a thread.
    """
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            name, problem = await asyncio.to_thread(_find_first_problem, grammar, tools)
    except TimeoutError:
        raise _refuse("it takes too long to read", grammar.kind) from None
    if problem:
        raise _refuse(problem, grammar.kind, name)


def _find_first_problem(grammar: Grammar, tools: Tools | None) -> tuple[str, str]:
    """Return a tool's name, where it is of one, and the problem. A call that cannot be made shows only when it is begun: each is tried."""
    for name, schema in [] if tools is None else list_schemas(tools):
        if problem := _find_problem(schema.kind, schema.source):
            return name, problem
    return "", _find_problem(grammar.kind, grammar.source)


@lru_cache(maxsize=256)
def _find_problem(kind: str, source: str) -> str:
    if kind == "json_schema" and not schemas.can_end(json.loads(source)):
        return _ENDLESS
    make = LLMatcher.grammar_from_json_schema if kind == "json_schema" else LLMatcher.grammar_from_lark
    try:
        grammar = make(source if kind == "json_schema" else mask_tokens(source))
        if problem := str(LLMatcher.validate_grammar(grammar)):
            return _OVERLAP if problem.startswith("oneOf ") else problem[:MAX_PROBLEM]
        matcher = LLMatcher(_bytes(), grammar, log_level=0)
        matcher.compute_bitmask()
    except ValueError as error:
        return str(error)[:MAX_PROBLEM]
    # a schema that refers to itself alone is read without complaint, and begins with nothing
    return "no answer could begin as it asks" if matcher.is_error() else ""


@cache
def _bytes() -> LLTokenizer:
    """Return the smallest tokenizer: whether an answer can begin does not hang on the words it is made of."""
    return LLTokenizer("byte")


def _refuse(problem: str, kind: str = "json_schema", tool: str = "") -> AiscaleError:
    whose = "response_format" if kind == "json_schema" else "tools"
    what = "The schema of response_format" if kind == "json_schema" else "The parameters of the tools"
    what = f"The parameters of the tool {tool!r}" if tool else what
    return AiscaleError(
        Code.INVALID_REQUEST, f"{what} cannot be followed: {' '.join(problem.split()).rstrip('.')}.", param=whose
    )
