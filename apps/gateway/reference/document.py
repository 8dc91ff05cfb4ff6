"""Make the OpenAPI document of ``/v1`` and ``/api/v1``: from the routes' own types, and from Django REST framework's views."""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec
from django.conf import settings
from drf_spectacular.generators import SchemaGenerator

from apps.gateway import shapes
from apps.gateway.dialects import choose_dialect
from apps.gateway.endpoints import ROUTER
from apps.gateway.idempotency import MAX_KEY_CHARS
from apps.gateway.routes import Route

REF_TEMPLATE = "#/components/schemas/{name}"
STATUSES = {
    400: "What was sent cannot be served; `param` names the field",
    401: "Who is asking",
    403: "The plan or the organization does not permit it",
    404: "There is no such thing",
    405: "The path does not take this method",
    408: "The body did not come",
    409: "The same request is being answered",
    413: "The body is too large",
    415: "The body's encoding is not read here",
    416: "The file has no such range of bytes",
    422: "The Idempotency-Key was used for another request",
    429: "A limit; `Retry-After` says when to come back, where waiting helps",
    500: "Something went wrong on our side",
    502: "The worker was lost; nothing is charged",
    503: "Stopped by the owner, overloaded, or starting",
    504: "The answer took too long",
    529: "Overloaded, in Anthropic's words",
}
ALWAYS = (400, 401, 403, 405, 429, 500, 503)
WITH_INPUT = (404,)
WITH_BODY = (408, 413, 415)
WITH_KEY = (409, 422)
WITH_INFERENCE = (502, 504)


@cache
def make_document() -> dict[str, Any]:
    """Return the whole document. I/O: none but imports, once a process."""
    types = [kind for route in ROUTER.routes for kind in (route.request, route.response) if kind is not None]
    _, components = msgspec.json.schema_components(
        [*dict.fromkeys(types), shapes.Error, shapes.AnthropicError], ref_template=REF_TEMPLATE
    )
    for route in ROUTER.routes:
        if route.request is not None:
            _complete(components[route.request.__name__], *route.rules)
    managed = _make_managed()
    paths: dict[str, Any] = {}
    for route in ROUTER.routes:
        paths.setdefault(route.path.replace(":path", ""), {})[route.method.lower()] = _describe(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "aiscale",
            "version": "1",
            "description": "An AI service of your own: OpenAI's and Anthropic's dialects under /v1, management under /api/v1.",
        },
        "servers": [{"url": settings.PUBLIC_URL}],
        "security": [{"bearer": []}, {"x-api-key": []}],
        "paths": paths | managed.get("paths", {}),
        "components": {
            "schemas": components | managed.get("components", {}).get("schemas", {}),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


@cache
def encode_document() -> bytes:
    return msgspec.json.encode(make_document())


def _make_managed() -> Mapping[str, Any]:
    """Return what Django REST framework says of its views below ``/api/v1``."""
    document = SchemaGenerator().get_schema(request=None, public=True)
    found: dict[str, Any] = json.loads(json.dumps(document, default=str))
    found["paths"] = {path: item for path, item in found["paths"].items() if path.startswith("/api/v1/")}
    for item in found["paths"].values():
        for operation in item.values():
            operation["security"] = [{"bearer": []}]
    return found


def _complete(schema: dict[str, Any], harmless: frozenset[str], defaults_only: Mapping[str, tuple[Any, ...]]) -> None:
    """Add the parameters that are taken but change nothing, and say that there are no others."""
    properties = schema["properties"]
    for name in sorted(harmless):
        properties[name] = {"description": "Taken, and changes nothing in an answer."}
    for name, served in sorted(defaults_only.items()):
        described = {"description": "Refused unless it is left out or has a value that is named here."}
        properties[name] = described | {"enum": [None, *served]}
    schema["additionalProperties"] = False
    schema.pop("title", None)


def _describe(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "tags": [route.tag],
        "summary": route.summary,
        "operationId": _name(route),
        "responses": _make_answers(route),
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in route.pattern.groupindex
    ]
    parameters += [{"name": name, "in": "query", "schema": dict(schema)} for name, schema in route.query.items()]
    if route.body in ("json", "large"):
        key = {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARS, "pattern": "^[!-~]+$"}
        parameters.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "description": "Sent again with the same key, the request has the same answer and is charged once.",
                "schema": key,
            }
        )
    if parameters:
        operation["parameters"] = parameters
    content = _make_body(route)
    if content:
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _make_body(route: Route) -> dict[str, Any]:
    if route.form is not None:
        schema = {
            "type": "object",
            "properties": dict(route.form),
            "required": list(route.form),
            "additionalProperties": False,
        }
        return {"multipart/form-data": {"schema": schema}}
    if route.request is None:
        return {}
    body: dict[str, Any] = {"schema": {"$ref": REF_TEMPLATE.format(name=route.request.__name__)}}
    if route.example is not None:
        body["example"] = dict(route.example)
    return {"application/json": body}


def _make_answers(route: Route) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    if route.response is not None:
        schema = {"$ref": REF_TEMPLATE.format(name=route.response.__name__)}
        content: dict[str, Any] = {"application/json": {"schema": schema}}
        if route.streams:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        answers["200"] = {"description": "Answered", "content": content}
    elif route.download:
        content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        answers["200"] = {"description": "The file's bytes", "content": content}
        answers["206"] = {"description": "The bytes that the header Range asks for", "content": content}
    elif route.method != "DELETE":
        answers["200"] = {"description": "Answered", "content": {"application/json": {"schema": {}}}}
    for status in sorted(_list_statuses(route)):
        answers[str(status)] = _make_error(route, status)
    return answers


def _list_statuses(route: Route) -> set[int]:
    found = {*ALWAYS}
    if route.pattern.groupindex or route.query or route.body != "none":
        found.update(WITH_INPUT)
    if route.body != "none":
        found.update(WITH_BODY, WITH_INFERENCE)
    if route.method == "POST":
        found.update(WITH_KEY)
    if route.download:
        found.add(416)
    if _is_anthropics(route):
        found.add(529)
    return found


def _make_error(route: Route, status: int) -> dict[str, Any]:
    kind = shapes.AnthropicError if _is_anthropics(route) else shapes.Error
    schema = {"$ref": REF_TEMPLATE.format(name=kind.__name__)}
    return {"description": STATUSES[status], "content": {"application/json": {"schema": schema}}}


def _is_anthropics(route: Route) -> bool:
    return choose_dialect(route.path, has_anthropic_version=False).name == "anthropic"


def _name(route: Route) -> str:
    words = route.path.removeprefix("/v1/").replace(":path", "").replace("{", "").replace("}", "")
    return f"{route.method.lower()}_{words.replace('/', '_').replace('-', '_')}"
