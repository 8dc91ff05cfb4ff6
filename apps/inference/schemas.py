"""Rewrite JSON schemas into ones that mean the same and that grammars can be made of.

A schema may ask for itself within itself without end: no answer could be finished, and a model that begins one is stuck in it. The maker of
grammars does not see that, and so references to such schemas become ``false``, which it knows how to leave out. It takes ``oneOf`` only
where it proves that options exclude each other, which it seldom can: where it is shown here (`exclusion`), it becomes ``anyOf``.
"""

from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

from apps.inference.exclusion import Exclusion

MOST_DEPTH = 32
"""What is nested deeper is left as it is."""

_ONE = frozenset({"items", "additionalItems", "additionalProperties", "contains", "not", "if", "then", "else"})
_MANY = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def simplify(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema of the same meaning. CPU: some milliseconds for the largest that are taken."""
    if measure_depth(schema) > MOST_DEPTH:
        return schema
    endless = _Endings(schema).list_endless()
    return _Rewriting(schema, endless).rewrite(schema)


def can_end(schema: Any) -> bool:
    """Whether some finite value is what the schema asks for, as far as its references, its types and what it requires can tell."""
    return not isinstance(schema, dict) or id(schema) not in _Endings(schema).list_endless()


def measure_depth(value: Any) -> int:
    """Count levels up to one more than are taken, without recursion: what is asked about may be hostile."""
    deepest, open_ = 0, [(value, 1)]
    while open_:
        inner, depth = open_.pop()
        deepest = max(deepest, depth)
        if depth <= MOST_DEPTH:
            parts = inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ()
            open_ += [(part, depth + 1) for part in parts]
    return deepest


def find_target(root: dict[str, Any], reference: Any) -> Any:
    """Return what a reference within the schema points to; None for another one, and where there is nothing."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return None
    found: Any = root
    for part in reference.split("/")[1:]:
        part = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            return None
    return found


class _Rewriting:
    def __init__(self, root: dict[str, Any], endless: frozenset[int]) -> None:
        self._root = root
        self._endless = endless
        self._exclusion = Exclusion(lambda reference: find_target(root, reference))

    def rewrite(self, schema: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in schema.items():
            if key in _NAMED and isinstance(value, dict):
                made[key] = {name: self._rewrite_inner(inner) for name, inner in value.items()}
            elif key in _MANY and isinstance(value, list):
                made[key] = [self._rewrite_inner(inner) for inner in value]
            elif key in _ONE:
                made[key] = self._rewrite_inner(value)
            else:
                made[key] = value
        options = schema.get("oneOf")
        if isinstance(options, list) and options and self._exclusion.holds(options):
            made["allOf"] = [*_list(made.get("allOf")), {"anyOf": made.pop("oneOf")}]
            if len(made["allOf"]) == 1 and "anyOf" not in made:
                made |= made.pop("allOf")[0]
        return made

    def _rewrite_inner(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        target = find_target(self._root, schema.get("$ref"))
        return False if id(target) in self._endless else self.rewrite(schema)


class _Node:
    """Be something that holds once ``missing`` of its conditions do."""

    def __init__(self, missing: int = 0) -> None:
        self.missing = missing
        self.parents: list[_Node] = []


class _Endings:
    """Find the schemas that some finite value fulfils: what can end without any reference first, then what can end by these, and so on.

    Each condition is looked at once. What is not understood is taken to end.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._of: dict[int, _Node] = {}
        self._nodes: list[_Node] = []
        self._open: list[tuple[dict[str, Any], _Node]] = []
        self._see(root)
        while self._open:
            schema, node = self._open.pop()
            self._require(node, self._list_conditions(schema))
            for inner in _list_inner(schema):
                self._see(inner)
        ready = [node for node in self._nodes if not node.missing]
        while ready:
            for parent in ready.pop().parents:
                parent.missing -= 1
                if not parent.missing:
                    ready.append(parent)

    def list_endless(self) -> frozenset[int]:
        """Return the identities of the schemas that nothing finite fulfils."""
        return frozenset(identity for identity, node in self._of.items() if node.missing > 0)

    def _make(self, missing: int) -> _Node:
        self._nodes.append(_Node(missing))
        return self._nodes[-1]

    def _see(self, schema: Any) -> _Node:
        if not isinstance(schema, dict):
            return self._make(1 if schema is False else 0)
        node = self._of.get(id(schema))
        if node is None:
            node = self._of[id(schema)] = self._make(0)
            self._open.append((schema, node))
        return node

    def _require(self, node: _Node, conditions: Iterable[_Node]) -> None:
        for condition in conditions:
            node.missing += 1
            condition.parents.append(node)

    def _any(self, choices: Iterable[_Node]) -> _Node:
        node = self._make(1)
        for choice in choices:
            choice.parents.append(node)
        return node

    def _list_conditions(self, schema: dict[str, Any]) -> list[_Node]:
        conditions = [self._see(part) for part in _list(schema.get("allOf"))]
        target = find_target(self._root, schema.get("$ref"))
        if target is not None:
            conditions.append(self._see(target))
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list):
                conditions.append(self._any([self._see(part) for part in schema[key]]))
        kinds = schema.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        ways = {"object": self._list_required, "array": self._list_items}
        if (
            kinds
            and all(isinstance(kind, str) and kind in ways for kind in kinds)
            and not {"const", "enum"} & set(schema)
        ):
            made = []
            for kind in kinds:
                made.append(self._make(0))
                self._require(made[-1], [self._see(part) for part in ways[kind](schema)])
            conditions.append(self._any(made))
        return conditions

    def _list_required(self, schema: dict[str, Any]) -> list[Any]:
        """List the schemas of what an object must have."""
        known = schema.get("properties")
        known = known if isinstance(known, dict) else {}
        others = True if "patternProperties" in schema else schema.get("additionalProperties", True)
        names = [name for name in _list(schema.get("required")) if isinstance(name, str)]
        return [known.get(name, others) for name in names]

    def _list_items(self, schema: dict[str, Any]) -> list[Any]:
        """List the schemas of the items that an array must have."""
        least = schema.get("minItems")
        if type(least) is not int or least < 1:
            return []
        rest, first = schema.get("items", True), _list(schema.get("prefixItems"))
        if isinstance(rest, list):
            first, rest = rest, schema.get("additionalItems", True)
        return [*first[:least], *([rest] if least > len(first) else [])]


def _list_inner(schema: dict[str, Any]) -> list[Any]:
    """List the schemas that stand within one."""
    found = [schema[key] for key in _ONE & set(schema)]
    for key in _MANY & set(schema):
        found += _list(schema[key])
    for key in _NAMED & set(schema):
        found += schema[key].values() if isinstance(schema[key], dict) else ()
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
