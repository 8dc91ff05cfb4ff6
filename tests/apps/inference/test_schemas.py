"""Rewritten schemas mean what they meant: the reference validator takes the same values before and after."""

import random
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from apps.inference.exclusion import Exclusion
from apps.inference.schemas import can_end, simplify

VALUES: list[Any] = [None, True, False, 0, 1, 1.0, 2, 1.5, -3, 10**400, "", "a", "b", "ab", "abc"]
VALUES += [
    [],
    [1],
    ["a"],
    [1, "a"],
    [[]],
    [None, 2],
    {},
    {"a": 1},
    {"a": "a"},
    {"b": 1},
    {"a": 1, "b": 2},
    {"a": {"a": 1}},
]


def draw_schema(draw: random.Random, depth: int = 0, within: bool = False) -> Any:
    """Return a small schema of the words that the rewriting knows. References stand ``within`` values alone: the validator, asked for
    a schema that is itself, would not come back."""
    if depth > 2 or draw.random() < 0.1:
        plain: list[Any] = [True, False, {}, {"type": "integer"}, {"const": draw.choice(VALUES)}]
        return draw.choice(plain + [{"$ref": "#/$defs/x"}] * 3 * within)

    def inner() -> Any:
        return draw_schema(draw, depth + 1, within=True)

    def part() -> Any:
        return draw_schema(draw, depth + 1, within)

    def names() -> list[str]:
        return draw.sample(["a", "b", "c"], draw.randint(1, 2))

    known: dict[str, Callable[[], Any]] = {
        "type": lambda: draw.choice(
            ["object", "array", "string", "integer", "number", ["object", "null"], ["boolean"]]
        ),
        "enum": lambda: draw.sample(VALUES, 3),
        "const": lambda: draw.choice(VALUES),
        "required": names,
        "properties": lambda: {name: inner() for name in names()},
        "additionalProperties": inner,
        "patternProperties": lambda: {"^a": inner()},
        "items": inner,
        "prefixItems": lambda: [inner()],
        "minItems": lambda: draw.randint(0, 2),
        "maxItems": lambda: draw.randint(0, 2),
        "minLength": lambda: draw.randint(0, 3),
        "maxLength": lambda: draw.randint(0, 3),
        "minimum": lambda: draw.choice([0, 1, 1.5, 2]),
        "exclusiveMaximum": lambda: draw.choice([0, 1, 1.5, 2]),
        "anyOf": lambda: [part(), part()],
        "oneOf": lambda: [part(), part()],
        "allOf": lambda: [part()],
    }
    if within:
        known["$ref"] = lambda: draw.choice(["#", "#/$defs/x", "#/$defs/y"])
    return {word: known[word]() for word in draw.sample(sorted(known), draw.randint(1, 4))}


def list_valid(schema: Any, root: dict[str, Any]) -> list[int]:
    """Return which of the values are valid, by their numbers."""
    validator = jsonschema.Draft202012Validator(root).evolve(schema=schema)
    return [at for at, value in enumerate(VALUES) if validator.is_valid(value)]


@pytest.mark.parametrize("seed", range(8))
def test_what_is_rewritten_takes_the_same_values(seed: int) -> None:
    draw, changed = random.Random(seed), 0
    for _ in range(150):
        inner, defs = draw_schema(draw), {"x": draw_schema(draw), "y": draw_schema(draw)}
        root = {"properties": {"a": inner}, "oneOf": [draw_schema(draw), draw_schema(draw)], "$defs": defs}
        made = simplify(root)
        before = list_valid(root, root)
        assert list_valid(made, made) == before, (root, made)
        changed += made != root
        if before:
            assert can_end(root), root
    assert changed > 5


@pytest.mark.parametrize("seed", range(8))
def test_what_is_shown_to_exclude_has_no_value_in_common(seed: int) -> None:
    draw, shown = random.Random(seed + 100), 0
    for _ in range(300):
        root: dict[str, Any] = {"$defs": {"x": {"type": "object", "required": ["a"]}, "y": {"enum": VALUES[:4]}}}
        one, other = draw_schema(draw), draw_schema(draw)

        def find(reference: Any, root: dict[str, Any] = root) -> Any:
            return root["$defs"].get(str(reference)[-1])

        if Exclusion(find).holds([one, other]):
            both = set(list_valid(one, root)) & set(list_valid(other, root))
            shown += 1
            assert not both, (one, other, [VALUES[at] for at in both])
    assert shown > 30


MAY_BE_BOTH: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"required": ["ab"]}, {"patternProperties": {"^a": {}}, "additionalProperties": False}),
    ({"properties": {"a": {"const": 1}}}, {"properties": {"a": {"const": 2}}}),
    ({"type": "array", "items": {"type": "string"}}, {"type": "array", "items": {"type": "integer"}}),
    ({"type": "number", "maximum": 1}, {"type": "number", "minimum": 1}),
    ({"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "^b"}),
    ({"const": [1, {"a": 1}]}, {"const": [1.0, {"a": 1.0}]}),
    ({"$ref": "#/nowhere"}, {"$ref": "#/elsewhere"}),
]


@pytest.mark.parametrize(("one", "other"), MAY_BE_BOTH)
def test_what_may_be_both_is_left_as_it_is(one: dict[str, Any], other: dict[str, Any]) -> None:
    objects = {"type": "object"} if "type" not in one and "const" not in one else {}
    schema = {"oneOf": [objects | one, objects | other]}
    assert simplify(schema) == schema
    assert simplify({"oneOf": [one, False]}) == {"anyOf": [one, False]}


HOSTILE: dict[str, dict[str, Any]] = {
    "a chain": {
        "$ref": "#/$defs/0",
        "$defs": {
            str(at): {"type": "object", "properties": {"a": {"$ref": f"#/$defs/{at + 1}"}}, "required": ["a"]}
            for at in range(900)
        },
    },
    "many options": {"oneOf": [{"type": "string", "maxLength": at} for at in range(1500)]},
    "many parts": {"oneOf": [{"allOf": [{}] * 8000}, {"allOf": [{}] * 8000}]},
    "options within options": {"oneOf": [{"anyOf": [{"oneOf": [{}] * 40}] * 20}] * 20},
    "everything needs everything": {
        "properties": {
            str(at): {"$ref": f"#/properties/{(at + 1) % 1000}", "type": "object", "required": ["0"]}
            for at in range(1000)
        }
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_take_no_time(name: str) -> None:
    started = time.process_time()
    simplify(HOSTILE[name])
    assert time.process_time() - started < 1
