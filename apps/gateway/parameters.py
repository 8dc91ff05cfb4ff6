"""Read a JSON body into typed parameters. Each one is honoured, harmless, or refused by its name."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec

from aiscale.errors import AiscaleError, Code

T = TypeVar("T")

_PATH = re.compile(r" - at `(?:\$\.?)?([^`]*)`$")
_SURROGATE = re.compile("[\ud800-\udfff]")

QUERIES_OF_CLIENTS = {"beta": ("true",), "stream": ("false",)}
"""What clients say in the query of a route that takes no such parameters, and what changes nothing."""

TEXTS_OR_TOKENS: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            "minItems": 1,
        },
    ]
}
"""The JSON schema of what may be texts or their token ids; told apart by hand, since msgspec does not tell lists apart."""


def read_object(body: bytes) -> dict[str, Any]:
    """Decode a body that must be a JSON object of clean text. Raises: AiscaleError (INVALID_JSON, INVALID_REQUEST)."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _check_surrogates(body)
        reason = (
            "it is nested too deeply" if isinstance(error, RecursionError) else _PATH.sub("", str(error)).rstrip(".")
        )
        raise AiscaleError(
            Code.INVALID_JSON, f"We could not parse the body of your request as JSON: {reason}."
        ) from error
    if not isinstance(value, dict):
        raise AiscaleError(Code.INVALID_JSON, "The body of your request must be a JSON object.")
    _check_text(value, "")
    # each name is followed by a colon: one that was overwritten took its colon with it
    if body.count(b":") > msgspec.json.encode(value).count(b":"):
        _check_repeated(body)
    return value


@cache
def _list_names(kind: type[Any]) -> frozenset[str]:
    """Return the names of a body's parameters. Looking at a class costs more than reading a body."""
    return frozenset(field.encode_name for field in msgspec.structs.fields(kind))


def convert(
    values: dict[str, Any], kind: type[T], *, harmless: frozenset[str], defaults_only: Mapping[str, tuple[Any, ...]]
) -> T:
    """Type an object's values. ``null`` means that a parameter was not given.

    ``harmless`` names parameters that change nothing here; ``defaults_only`` those of which only these values are served.
    Raises: AiscaleError (INVALID_REQUEST, UNSUPPORTED_PARAMETER) with ``param``.
    """
    known = _list_names(kind)  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        if name in harmless:
            _check_label(name, value)
            continue
        if name in defaults_only:
            if isinstance(value, dict):
                value = {inner: given for inner, given in value.items() if given is not None}
            if not any(type(value) is type(allowed) and value == allowed for allowed in defaults_only[name]):
                raise _refuse_value(name, defaults_only[name])
        elif name in known:
            given[name] = value
        else:
            raise AiscaleError(
                Code.INVALID_REQUEST, f"Unrecognized request argument supplied: {name[:100]}.", param=name[:100]
            )
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise _explain(error, kind) from error


_LABELS: dict[str, type] = {
    "cache_control": dict,
    "eager_input_streaming": bool,
    "input_examples": list,
    "metadata": dict,
}
"""What harmless parameters hold that are no strings."""


def _check_label(name: str, value: Any) -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for a harmless parameter that is none of its kind: its caller is mistaken about something."""
    wanted = _LABELS.get(name, str)
    if not isinstance(value, wanted):
        kinds = {str: "a string", dict: "an object", list: "an array", bool: "true or false"}
        raise AiscaleError(Code.INVALID_REQUEST, f"Invalid type for {name}: it must be {kinds[wanted]}.", param=name)


def read_query(
    query_string: bytes, *, known: Sequence[str] = (), defaults_only: Mapping[str, tuple[str, ...]] | None = None
) -> dict[str, str]:
    """Read a query's parameters, each given once. Raises: AiscaleError, which names one that is not honoured."""
    served = defaults_only or {}
    found: dict[str, str] = {}
    seen: set[str] = set()
    for name, value in parse_qsl(query_string.decode("latin-1"), keep_blank_values=True):
        _check_text(value, name)
        if name in seen:
            what = f"{name[:100]!r} stands twice in the query. Send it once"
            raise AiscaleError(Code.INVALID_REQUEST, f"{what}.", param=name[:100])
        seen.add(name)
        if name in known:
            found[name] = value
        elif name in served:
            if value not in served[name]:
                raise _refuse_value(name, served[name])
        else:
            raise AiscaleError(
                Code.INVALID_REQUEST, f"Unrecognized request argument supplied: {name[:100]}.", param=name[:100]
            )
    return found


def check_names(value: Mapping[str, Any], known: Collection[str], path: str) -> None:
    """Refuse what a part of the body holds besides ``known``; ``null`` was not given. Raises: AiscaleError (INVALID_REQUEST)."""
    for name, given in value.items():
        if name not in known and given is not None:
            place = f"{path}.{name[:100]}"
            raise AiscaleError(Code.INVALID_REQUEST, f"Unrecognized request argument supplied: {place}.", param=place)


@contextmanager
def within(path: str) -> Iterator[None]:
    """Name errors of a part of the body by its place in it."""
    try:
        yield
    except AiscaleError as error:
        error.param = f"{path}.{error.param}" if error.param else path
        error.message = f"{path}: {error.message}"
        raise


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors speak of a dialect's own parameters: each name of ours is replaced by theirs."""
    try:
        yield
    except AiscaleError as error:
        for ours, theirs in names.items():
            error.message = re.sub(rf"\b{ours}\b", theirs, error.message)
        error.param = re.sub(r"^\w+", lambda head: names.get(head[0], head[0]), error.param) if error.param else None
        raise


def check_range(name: str, value: float | None, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise: AiscaleError (INVALID_REQUEST) for a number outside the range."""
    if value is None or ((low < value if open_low else low <= value) and value <= high):
        return
    words = f"more than {low:g} and at most {high:g}" if open_low else f"from {low:g} to {high:g}"
    raise AiscaleError(Code.INVALID_REQUEST, f"{name} is {value:g}; it must be {words}.", param=name)


def _refuse_value(name: str, served: Sequence[Any]) -> AiscaleError:
    """Refuse a parameter of which only some values are served, and name those that are words."""
    words = [json.dumps(value) for value in served if isinstance(value, str)]
    what = f"only supports {_list(words)} for {name!r}. Send that, or leave it out" if words else ""
    what = what or f"does not support the parameter {name!r}. Leave it out"
    return AiscaleError(Code.UNSUPPORTED_PARAMETER, f"This service {what}.", param=name)


def _list(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _list_choices(kind: Any, path: str) -> list[str]:
    """List the words that may stand at a place in a body, as JSON; none where any may. For errors: it looks at classes."""
    types = [msgspec.inspect.type_info(kind)]
    for step in re.findall(r"\w+|\[", path):
        fields = [field for each in types if isinstance(each, msgspec.inspect.StructType) for field in each.fields]
        if step == "[":
            types = [each.item_type for each in types if isinstance(each, msgspec.inspect.ListType)]
        elif not step.isdigit():
            types = [field.type for field in fields if field.encode_name == step]
        types = [one for each in types for one in getattr(each, "types", (each,))]
    return [json.dumps(value) for each in types for value in getattr(each, "values", ()) if value is not None]


def _explain(error: msgspec.ValidationError, kind: Any) -> AiscaleError:
    text = str(error)
    found = _PATH.search(text)
    reason = _PATH.sub("", text).replace("Object missing required field", "You must provide the parameter")
    missing = re.fullmatch(r"You must provide the parameter `(\w+)`", reason)
    param = found.group(1) if found else ""
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", reason, re.DOTALL)
    if unknown:
        name = unknown.group(1)[:100]
        return AiscaleError(
            Code.INVALID_REQUEST,
            f"Unrecognized request argument supplied: {name}.",
            param=f"{param}.{name}" if param else name,
        )
    if missing:
        param = f"{param}.{missing.group(1)}" if param else missing.group(1)
        reason = f"You must provide the parameter {param}"
    elif param and reason.startswith("Invalid enum value") and (choices := _list_choices(kind, param)):
        reason = f"{reason.replace('Invalid enum value', f'Invalid value for {param}:')}; it must be {_list(choices)}"
    elif param:
        reason = f"Invalid type for {param}: {reason[:1].lower()}{reason[1:]}"
    return AiscaleError(Code.INVALID_REQUEST, f"{reason.replace('`', '')}.", param=param or None)


def _check_repeated(body: bytes) -> None:
    """Find the name that an object of the body holds twice, of which the last would count. Raises: AiscaleError (INVALID_REQUEST)."""

    def check(pairs: list[tuple[str, Any]]) -> None:
        names = set[str]()
        for name, _ in pairs:
            if name in names:
                what = f"{name[:100]!r} stands twice in one object of the body. Send it once"
                raise AiscaleError(Code.INVALID_REQUEST, f"{what}.", param=name[:100])
            names.add(name)

    json.loads(body, object_pairs_hook=check)


def _check_surrogates(body: bytes) -> None:
    """Find out whether a body was refused for half a surrogate pair, which is proper JSON. Raises: AiscaleError (INVALID_REQUEST)."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return
    _check_text(value, "")


def _check_text(value: Any, path: str) -> None:
    """Refuse text that no model and no database can hold: NUL and halves of surrogate pairs."""
    if isinstance(value, str):
        if "\x00" in value or _SURROGATE.search(value):
            what = "a NUL character" if "\x00" in value else "half of a surrogate pair"
            raise AiscaleError(
                Code.INVALID_REQUEST, f"{path or 'A name'} holds {what}. Send clean Unicode text.", param=path or None
            )
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_text(name, path)
            _check_text(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            if not isinstance(inner, int | float):
                _check_text(inner, f"{path}[{index}]")
