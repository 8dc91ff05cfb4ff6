"""Describe the routes of ``/v1``: one table that routes requests and that the OpenAPI document is made from."""

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from apps.accounts.callers import Caller
from apps.gateway.exchange import Exchange

Answer = Callable[[Exchange, Caller, bytes], Awaitable[None]]
BodyKind = Literal["none", "json", "large", "stream"]


@dataclass(frozen=True, kw_only=True)
class Route:
    """Name one method of one path and who answers it.

    ``path`` holds ``{names}`` of its variable parts, which the handler finds in ``exchange.path_values``; ``{name:path}`` takes slashes
    too. ``body``: a ``json`` body is read before the handler is called; a ``stream``, and JSON that may be ``large``, by the handler
    itself.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    answer: Answer
    body: BodyKind = "none"
    tag: str = ""
    summary: str = ""
    request: Any = None
    """What the body holds: a msgspec type."""
    rules: tuple[frozenset[str], Mapping[str, tuple[Any, ...]]] = (frozenset(), {})
    """The body's harmless parameters, and those of which only the default is served (see `parameters.convert`)."""
    response: Any = None
    """What a 200 holds: a msgspec type; None for a route that never answers so, or that sends a file."""
    streams: bool = False
    """Whether ``stream`` turns the answer into server-sent events."""
    download: bool = False
    form: Mapping[str, Any] | None = None
    """The fields of a multipart body, each with its JSON schema; all are required."""
    query: Mapping[str, Any] = field(default_factory=dict)
    """The query's parameters, each with its JSON schema."""
    example: Mapping[str, Any] | None = None
    """A body that works."""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        text = re.sub(r"\\\{(\w+):path\\\}", r"(?P<\1>.+)", re.escape(self.path).replace(r"\:", ":"))
        return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", text))


class Router:
    """Find routes: fixed paths by name, the rest by pattern in the order in which they stand."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        self._fixed: dict[str, dict[str, Route]] = {}
        self._variable: dict[str, dict[str, Route]] = {}
        for route in self.routes:
            table = self._variable if "{" in route.path else self._fixed
            table.setdefault(route.path, {})[route.method] = route

    def find(self, path: str) -> tuple[dict[str, Route], dict[str, str]]:
        """Return the path's routes by method, and the values of its variable parts; no routes for an unknown path."""
        if (found := self._fixed.get(path)) is not None:
            return found, {}
        for methods in self._variable.values():
            match = next(iter(methods.values())).pattern.fullmatch(path)
            if match:
                return methods, match.groupdict()
        return {}, {}
