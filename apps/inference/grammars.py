"""Check what an answer is to look like, before anything is held or queued."""

import asyncio
import json
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher

from aiscale.errors import AiscaleError, Code
from aiscale.wire.jobs import Grammar

MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 32
CHECK_TIMEOUT_S = 5.0

_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write white space: small models wander off into it where they may."""


def make_json_grammar(schema: dict[str, Any]) -> Grammar:
    """Say that an answer is JSON of a schema. Raises: AiscaleError (INVALID_REQUEST) for one that is too large or too deep."""
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise _refuse(f"it is nested more than {MAX_SCHEMA_DEPTH} deep")
    source = json.dumps(schema | {"x-guidance": _COMPACT})
    if len(source) > MAX_SCHEMA_BYTES:
        raise _refuse(f"it is larger than {MAX_SCHEMA_BYTES >> 10} KiB")
    return Grammar(kind="json_schema", source=source)


async def check(grammar: Grammar) -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for a schema that cannot be followed. I/O: none; a thread, the first time."""
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            problem = await asyncio.to_thread(_find_problem, grammar.kind, grammar.source)
    except TimeoutError:
        raise _refuse("it takes too long to read") from None
    if problem:
        raise _refuse(problem)


@lru_cache(maxsize=256)
def _find_problem(kind: str, source: str) -> str:
    make = LLMatcher.grammar_from_json_schema if kind == "json_schema" else LLMatcher.grammar_from_lark
    try:
        return str(LLMatcher.validate_grammar(make(source)))[:300]
    except ValueError as error:
        return str(error)[:300]


def _depth(value: Any) -> int:
    """Count levels, without recursion: what is asked about may be hostile."""
    deepest, open_ = 0, [(value, 1)]
    while open_:
        inner, depth = open_.pop()
        deepest = max(deepest, depth)
        if depth <= MAX_SCHEMA_DEPTH:
            parts = inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ()
            open_ += [(part, depth + 1) for part in parts]
    return deepest


def _refuse(problem: str) -> AiscaleError:
    return AiscaleError(
        Code.INVALID_REQUEST,
        f"The schema of response_format cannot be followed: {problem.strip().rstrip('.')}.",
        param="response_format",
    )
