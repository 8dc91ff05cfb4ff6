"""Show that JSON schemas exclude each other: that no value fulfils two of them. What is not shown may still be so."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

MOST_STEPS = 10_000
"""Schemas, values and names that are looked at for one schema that a caller sends. What takes more is not shown."""
MOST_DEPTH = 16
"""Schemas refer to themselves: where two still have to be compared so far inside, nothing is shown."""

_KINDS = {
    "null": frozenset({"null"}),
    "boolean": frozenset({"boolean"}),
    "string": frozenset({"string"}),
    "object": frozenset({"object"}),
    "array": frozenset({"array"}),
    "integer": frozenset({"integer"}),
    "number": frozenset({"integer", "fraction"}),
}
_ALL: frozenset[str] = frozenset().union(*_KINDS.values())
_Range = tuple[float, bool, float, bool]
"""From, whether that is left out, to, whether that is left out."""


class Exclusion:
    """Compare schemas; ``find`` returns what a reference points to, or None."""

    def __init__(self, find: Callable[[Any], Any]) -> None:
        self._find = find
        self._left = MOST_STEPS
        self._depth = 0

    def holds(self, schemas: list[Any]) -> bool:
        """Whether each of them excludes each other one."""
        return all(self._exclude(one, other) for one, other in itertools.combinations(schemas, 2))

    def _exclude(self, one: Any, other: Any) -> bool:
        if one is False or other is False:
            return True
        if self._depth >= MOST_DEPTH:
            return False
        self._depth += 1
        try:
            return self._compare(one, other)
        finally:
            self._depth -= 1

    def _compare(self, one: Any, other: Any) -> bool:
        parts, others = self._list_parts(one), self._list_parts(other)
        if self._left < 0:
            return False
        for mine, theirs in ((parts, other), (others, one)):
            for part in mine:
                for options in (part.get("anyOf"), part.get("oneOf")):
                    if isinstance(options, list) and all(self._exclude(option, theirs) for option in options):
                        return True
        common = _list_kinds(parts) & _list_kinds(others)
        return all(self._differ(kind, parts, others) for kind in common)

    def _list_parts(self, schema: Any) -> list[dict[str, Any]]:
        """List what a value must fulfil all of: a schema, what it refers to, and what it puts together."""
        found: dict[int, dict[str, Any]] = {}
        open_ = [schema]
        while open_ and self._left >= 0:
            part = open_.pop()
            self._left -= 1
            if isinstance(part, dict) and id(part) not in found:
                found[id(part)] = part
                open_ += [self._find(part.get("$ref")), *_list(part.get("allOf"))]
                self._left -= len(_list(part.get("enum"))) + len(_list(part.get("required")))
        return list(found.values())

    def _differ(self, kind: str, parts: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
        """Whether no value of this kind fulfils both."""
        values, theirs = _list_values(kind, parts), _list_values(kind, others)
        if values is not None and theirs is not None:
            return not {_write(value) for value in values} & {_write(value) for value in theirs}
        if kind in ("integer", "fraction", "string"):
            extent, their_extent = _measure(kind, parts), _measure(kind, others)
            for known, bounds in ((values, their_extent), (theirs, extent)):
                if known is not None:
                    sizes = [len(value) if kind == "string" else value for value in known]
                    return all(_are_apart((size, False, size, False), bounds) for size in sizes)
            return _are_apart(extent, their_extent)
        if kind == "array":
            return _are_apart(_measure(kind, parts), _measure(kind, others)) or self._differ_in_items(parts, others)
        return kind == "object" and self._differ_in_names(parts, others)

    def _differ_in_names(self, parts: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
        """Whether objects must have what they may not have, or what cannot be both."""
        mine, theirs = _list_required(parts), _list_required(others)
        if any(_forbids(others, name) for name in mine) or any(_forbids(parts, name) for name in theirs):
            return True
        return any(
            self._exclude(one, other)
            for name in sorted(mine | theirs)
            for one in _list_properties(parts, name)
            for other in _list_properties(others, name)
        )

    def _differ_in_items(self, parts: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
        """Whether both have a first item that cannot be both."""
        if min(_measure("array", parts)[0], _measure("array", others)[0]) < 1:
            return False
        firsts = [[_find_first_item(part) for part in side] for side in (parts, others)]
        return any(self._exclude(one, other) for one in firsts[0] for other in firsts[1])


def _list_kinds(parts: list[dict[str, Any]]) -> frozenset[str]:
    kinds = _ALL
    for part in parts:
        said = part.get("type")
        if said is not None:
            names = said if isinstance(said, list) else [said]
            kinds &= frozenset().union(*(_KINDS.get(name, _ALL) if isinstance(name, str) else _ALL for name in names))
        values = _read_values(part)
        if values is not None:
            kinds &= frozenset(_name_kind(value) for value in values)
    return kinds


def _read_values(part: dict[str, Any]) -> list[Any] | None:
    if "const" in part:
        return [part["const"]]
    return part["enum"] if isinstance(part.get("enum"), list) else None


def _list_values(kind: str, parts: list[dict[str, Any]]) -> list[Any] | None:
    """Return the only values of a kind that there may be; None where they are not told."""
    for part in parts:
        values = _read_values(part)
        if values is not None:
            return [value for value in values if _name_kind(value) == kind]
    return None


def _name_kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "integer" if value == value // 1 else "fraction"
    return "string" if isinstance(value, str) else "object" if isinstance(value, dict) else "array"


def _write(value: Any) -> str:
    """Write a value so that what is equal in JSON's sense is alike: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, dict):
        return json.dumps({key: _write(inner) for key, inner in value.items()}, sort_keys=True)
    if isinstance(value, list):
        return json.dumps([_write(inner) for inner in value])
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def _measure(kind: str, parts: list[dict[str, Any]]) -> _Range:
    """Return the range of a number, or of how long a text or an array is."""
    least, most = {"string": ("minLength", "maxLength"), "array": ("minItems", "maxItems")}.get(
        kind, ("minimum", "maximum")
    )
    lows = [(0 if kind in ("string", "array") else -math.inf, False), *_list_bounds(parts, least, "exclusiveMinimum")]
    highs = [(math.inf, False), *_list_bounds(parts, most, "exclusiveMaximum")]
    low, high = max(lows), min(highs, key=lambda bound: (bound[0], not bound[1]))
    return *low, *high


def _list_bounds(parts: list[dict[str, Any]], plain: str, exclusive: str) -> Iterator[tuple[float, bool]]:
    """Give each bound, and whether it is left out itself."""
    for part in parts:
        for key, is_open in ((plain, False), *(((exclusive, True),) if plain in ("minimum", "maximum") else ())):
            bound = part.get(key)
            if isinstance(bound, int | float) and not isinstance(bound, bool):
                yield bound, is_open


def _are_apart(one: _Range, other: _Range) -> bool:
    return any(
        upper[2] < lower[0] or (upper[2] == lower[0] and (upper[3] or lower[1]))
        for upper, lower in ((one, other), (other, one))
    )


def _list_required(parts: list[dict[str, Any]]) -> set[str]:
    return {name for part in parts for name in _list(part.get("required")) if isinstance(name, str)}


def _list_properties(parts: list[dict[str, Any]], name: str) -> list[Any]:
    known = [part["properties"] for part in parts if isinstance(part.get("properties"), dict)]
    return [properties[name] for properties in known if name in properties]


def _forbids(parts: list[dict[str, Any]], name: str) -> bool:
    for part in parts:
        known = part.get("properties", {})
        if not isinstance(known, dict):
            continue
        if known.get(name) is False:
            return True
        if part.get("additionalProperties") is False and name not in known and "patternProperties" not in part:
            return True
    return False


def _find_first_item(part: dict[str, Any]) -> Any:
    rest = part.get("items", True)
    first = _list(part.get("prefixItems")) or _list(rest)
    return first[0] if first else part.get("additionalItems", True) if isinstance(rest, list) else rest


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
