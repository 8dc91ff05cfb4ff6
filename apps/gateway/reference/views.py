"""Publish the OpenAPI document, and show it to people."""

import hashlib
from typing import Any

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.cache import cache_control
from django.views.decorators.http import require_safe

from apps.gateway.endpoints import ROUTER
from apps.gateway.errors import STATUSES
from apps.gateway.reference import document, examples
from apps.gateway.routes import Route


@require_safe
@cache_control(public=True, max_age=60)
def show_document(request: HttpRequest) -> HttpResponse:
    """Send the OpenAPI document. Anybody may read it, pages of other origins too."""
    body = document.encode_document()
    response = HttpResponse(body, content_type="application/json")
    response.headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    response.headers["Access-Control-Allow-Origin"] = "*"
    return response


@require_safe
def show_docs(request: HttpRequest) -> HttpResponse:
    """Show every route with its parameters and programs that call it."""
    made = document.make_document()
    groups: dict[str, list[dict[str, Any]]] = {}
    for route in ROUTER.routes:
        groups.setdefault(route.tag, []).append(_describe(route, made))
    managed = [
        {
            "method": method.upper(),
            "path": path,
            "summary": operation.get("description") or operation.get("summary", ""),
        }
        for path, item in sorted(made["paths"].items())
        if path.startswith("/api/v1/")
        for method, operation in item.items()
    ]
    refusals: dict[int, list[str]] = {}
    for code, (status, _) in STATUSES.items():
        refusals.setdefault(status, []).append(code.value)
    context = {
        "groups": groups,
        "managed": managed,
        "base_url": settings.PUBLIC_URL,
        "refusals": [(status, codes, document.STATUSES.get(status, "")) for status, codes in sorted(refusals.items())],
    }
    return render(request, "gateway/docs.html", context)


def _describe(route: Route, made: dict[str, Any]) -> dict[str, Any]:
    operation = made["paths"][route.path.replace(":path", "")][route.method.lower()]
    base_url = settings.PUBLIC_URL
    return {
        "id": operation["operationId"],
        "method": route.method,
        "path": route.path.replace(":path", ""),
        "summary": route.summary,
        "streams": route.streams,
        "parameters": _list_parameters(route, operation, made),
        "harmless": sorted(route.rules[0]),
        "refused": sorted(route.rules[1]),
        "curl": examples.write_curl(route, base_url),
        "python": examples.write_python(route, base_url),
        "javascript": examples.write_javascript(route, base_url),
    }


def _list_parameters(route: Route, operation: dict[str, Any], made: dict[str, Any]) -> list[dict[str, Any]]:
    found = [
        {"name": item["name"], "place": item["in"], "type": _name_type(item["schema"]), "default": ""}
        for item in operation.get("parameters", ())
    ]
    if route.request is not None:
        schema = made["components"]["schemas"][route.request.__name__]
        required = schema.get("required", ())
        shown = [name for name in schema["properties"] if name not in route.rules[0] and name not in route.rules[1]]
        for name in shown:
            described = schema["properties"][name]
            default = "required" if name in required else described.get("default")
            found.append(
                {"name": name, "place": "body", "type": _name_type(described), "default": _show_default(default)}
            )
    for name, described in (route.form or {}).items():
        found.append({"name": name, "place": "form", "type": _name_type(described), "default": "required"})
    return found


def _show_default(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else str(value).replace("True", "true").replace("False", "false")


def _name_type(schema: dict[str, Any]) -> str:
    """Say a JSON schema in a few words."""
    if "enum" in schema:
        return " or ".join(str(value) for value in schema["enum"] if value is not None)
    if "anyOf" in schema:
        return " or ".join(_name_type(part) for part in schema["anyOf"] if part.get("type") != "null")
    if "$ref" in schema:
        return "object"
    kind = schema.get("type", "any")
    if kind == "array":
        return f"array of {_name_type(schema.get('items', {}))}"
    return str(kind)
