"""JSON schemas with odd corners are followed to the letter, or refused by name before anything is queued: never followed in part."""

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer

from aiscale.errors import AiscaleError, Code
from aiscale.wire.manifest import read_manifest
from apps.inference.grammars import check, make_json_grammar
from apps.inference.tool_grammars import make_grammar
from apps.inference.tools import Style, Tool, Tools
from workers.engine.grammar import Grammars

NODE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer", "minimum": 0, "maximum": 9},
        "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
    },
    "required": ["value"],
    "additionalProperties": False,
}
ENDLESS = {"type": "object", "properties": {"next": {"$ref": "#/$defs/endless"}}, "required": ["next"]}


def name_kind(kind: str, **properties: Any) -> dict[str, Any]:
    """Be an object of a kind, as programs write unions that are told apart by a name."""
    known = {"kind": {"const": kind}} | properties
    return {"type": "object", "properties": known, "required": list(known), "additionalProperties": False}


FOLLOWED: dict[str, dict[str, Any]] = {
    "recursion": {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    "pattern": {"type": "string", "pattern": r"^[a-f]{2,4}-\d+$", "maxLength": 12},
    "values of all kinds": {"enum": ["a", 1, None, True, {"x": [1]}, 'é"\\']},
    "one value": {"const": {"a": [1, 2]}},
    "one of two": {"anyOf": [{"type": "integer", "minimum": 5, "maximum": 7}, {"type": "string", "maxLength": 3}]},
    "both": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 5}}, "required": ["a"]},
            {
                "type": "object",
                "properties": {"a": {}, "b": {"type": "boolean"}},
                "required": ["b"],
                "additionalProperties": False,
            },
        ]
    },
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 50},
    "a date": {"type": "string", "format": "date"},
    "names by pattern": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "several types": {"type": ["string", "null"], "maxLength": 2},
    "a tuple": {"type": "array", "prefixItems": [{"const": 1}, {"type": "boolean"}], "items": False, "minItems": 2},
    "open bounds": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "exactly one, by a name behind references": {
        "type": "object",
        "properties": {"shape": {"oneOf": [{"$ref": "#/$defs/circle"}, {"$ref": "#/$defs/line"}, {"type": "null"}]}},
        "required": ["shape"],
        "additionalProperties": False,
        "$defs": {
            "circle": name_kind("circle", radius={"type": "integer", "minimum": 1, "maximum": 9}),
            "line": name_kind("line", turns={"type": "boolean"}),
        },
    },
    "exactly one, by bounds": {
        "oneOf": [
            {"type": "integer", "minimum": 0, "maximum": 3},
            {"type": "integer", "exclusiveMinimum": 3, "maximum": 5},
        ]
    },
    "exactly one, by length": {
        "oneOf": [{"type": "string", "maxLength": 1}, {"type": "string", "minLength": 2, "maxLength": 3}]
    },
    "exactly one, and any of several": {
        "anyOf": [{"const": 1}, {"const": "a"}, {"const": "bb"}],
        "oneOf": [{"type": "string", "minLength": 2}, {"type": "integer"}],
    },
    "what has no end may be left out": {
        "type": "object",
        "properties": {
            "a": {"$ref": "#/$defs/endless"},
            "b": {"anyOf": [{"$ref": "#/$defs/endless"}, {"type": "boolean"}]},
            "c": {"type": "array", "items": {"$ref": "#/$defs/endless"}},
        },
        "required": ["b"],
        "additionalProperties": False,
        "$defs": {"endless": ENDLESS},
    },
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "not": ({"not": {"type": "string"}}, "not"),
    "if": ({"type": "object", "if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}}, "if"),
    "unique items": ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
    "names": ({"type": "object", "propertyNames": {"pattern": "^x"}}, "propertyNames"),
    "contains": ({"type": "array", "contains": {"const": 1}}, "contains"),
    "exactly one": (
        {"oneOf": [{"type": "integer"}, {"type": "number", "maximum": 3}]},
        "options of a oneOf must exclude",
    ),
    "exactly one of what may be both": (
        {
            "oneOf": [
                {"type": "object", "properties": {"k": {"const": 1}}},
                {"type": "object", "properties": {"k": {"const": 2}}},
            ]
        },
        "write anyOf",
    ),
    "a format nobody knows": ({"type": "string", "format": "nonsense"}, "nonsense"),
    "a type nobody knows": ({"type": "strin"}, "strin"),
    "nothing at all": ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "unsatisfiable"),
    "itself alone": ({"$ref": "#"}, "without end"),
    "itself within itself": ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "without end"),
    "a list of lists": ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "without end"),
    "two that need each other": (
        {
            "$ref": "#/$defs/a",
            "$defs": {
                "a": {"type": "object", "additionalProperties": {"$ref": "#/$defs/b"}, "required": ["x"]},
                "b": {"type": "array", "prefixItems": [{"anyOf": [{"$ref": "#/$defs/a"}, False]}], "minItems": 1},
            },
        },
        "without end",
    ),
    "a reference to nowhere": ({"$ref": "#/$defs/x"}, "does not exist"),
    "a reference to elsewhere": ({"$ref": "http://127.0.0.1:9/z"}, "not present"),
    "looking ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "looking back": ({"type": "string", "pattern": r"(a)\1"}, "backreferences"),
}


@pytest.fixture(scope="module")
def vocabulary(served_models_dir: Path) -> tuple[Tokenizer, Grammars, tuple[int, ...]]:
    [directory] = (served_models_dir / "smollm2-135m-instruct").iterdir()
    manifest, tokenizer = read_manifest(directory), Tokenizer.from_file(str(directory / "tokenizer.json"))
    return tokenizer, Grammars(tokenizer, manifest.vocab_size, manifest.eos_token_ids), manifest.eos_token_ids


@pytest.mark.parametrize("name", FOLLOWED)
async def test_it_is_followed_to_the_letter(name: str, vocabulary: tuple[Tokenizer, Grammars, tuple[int, ...]]) -> None:
    """Tokens drawn by chance come out as JSON that the reference validator accepts."""
    (tokenizer, grammars, ends), schema = vocabulary, FOLLOWED[name]
    grammar = make_json_grammar(schema)
    await check(grammar)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    ended = 0
    for seed in range(8):
        matcher, draw, ids = grammars.make_matcher(grammar.kind, grammar.source), random.Random(seed), list[int]()
        while len(ids) < 200:
            allowed = np.flatnonzero(~matcher.list_forbidden()).tolist()
            if not allowed or not set(ends).isdisjoint(allowed):
                validator.validate(json.loads(tokenizer.decode(ids, skip_special_tokens=False)))
                ended += 1
                break
            ids.append(draw.choice(allowed))
            assert matcher.take(ids[-1])
    assert ended >= 4


@pytest.mark.parametrize("name", REFUSED)
async def test_it_is_refused_by_name(name: str) -> None:
    schema, reason = REFUSED[name]
    with pytest.raises(AiscaleError) as refused:
        await check(make_json_grammar(schema))
    assert (refused.value.code, refused.value.param) == (Code.INVALID_REQUEST, "response_format")
    assert reason in refused.value.message, refused.value.message


async def test_a_tool_whose_arguments_have_no_end_is_refused_by_its_name() -> None:
    endless = {"properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    tools = Tools(tools=(Tool(name="good"), Tool(name="turn", parameters=endless)), must_call=True)
    grammar = make_grammar(tools, Style.HERMES, lambda mark: None)
    assert grammar is not None
    with pytest.raises(AiscaleError, match=r"tool 'turn' .* without end") as refused:
        await check(grammar, tools)
    assert refused.value.param == "tools"
