"""Find every route that Django answers, and a real path for each."""

import re
from collections.abc import Iterator
from typing import Any

from django.apps import apps
from django.urls import URLResolver, get_resolver

from tests.apps.access.world import World

_PLACEHOLDER = re.compile(r"<(?:\w+:)?(\w+)>")
_GROUP = re.compile(r"\(\?P<(\w+)>(?:[^()]|\\.)*\)")


def list_routes() -> list[str]:
    """List all routes as the table writes them: ``<name>`` for what varies."""
    return [route for route, _ in _walk(get_resolver(), "")]


def list_methods(route: str) -> list[str]:
    """List the methods that the table must name: all that a view of our API has; GET and POST elsewhere."""
    view: Any = next(pattern for name, pattern in _walk(get_resolver(), "") if name == route).callback
    cls = getattr(view, "cls", None)
    if route.startswith("api/v1/") and cls is not None:
        return [name for name in ("GET", "POST", "PATCH", "DELETE") if hasattr(cls, name.lower())]
    return ["GET", "POST"]


def make_path(route: str, world: World) -> str:
    """Put real values into a route."""
    values = world.values | _find_odd_values(route)
    missing = set(_PLACEHOLDER.findall(route)) - set(values)
    assert not missing, f"{route}: World.values needs a value for {missing}, something of the member's or of Acme's"
    return "/" + _PLACEHOLDER.sub(lambda match: values[match[1]], route.lstrip("/"))


def _walk(resolver: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for pattern in resolver.url_patterns:
        route = prefix + _clean(str(pattern.pattern))
        if isinstance(pattern, URLResolver):
            yield from _walk(pattern, route)
        else:
            yield route or "/", pattern


def _clean(pattern: str) -> str:
    """Write a regular expression as a route, and a converter's route without its type."""
    text = _GROUP.sub(r"<\1>", pattern).replace("/?$", "").replace("\\.", ".").strip("^$")
    return _PLACEHOLDER.sub(r"<\1>", text)


def _find_odd_values(route: str) -> dict[str, str]:
    """Return what only this route names: the first row of an admin's table, or something that was never there."""
    values = {"key": "a", "uidb36": "a", "app_label": "accounts", "url": "nothing", "content_type_id": "1", "id": "1"}
    words = route.split("/")
    for model in apps.get_models():
        if words[:3] == ["admin", model._meta.app_label, model._meta.model_name]:
            values["id"] = values["pk"] = values["object_id"] = str(
                model._default_manager.values_list("pk", flat=True).first() or 1
            )
    return {"object_id": "1"} | values
