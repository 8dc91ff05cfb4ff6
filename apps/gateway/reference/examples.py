"""Write each request as a program: for a shell, for Python and for JavaScript."""

import json
from typing import Any

from apps.gateway.routes import Route

_PYTHON_CLIENTS = {
    "/v1/chat/completions": "client.chat.completions.create",
    "/v1/completions": "client.completions.create",
    "/v1/embeddings": "client.embeddings.create",
    "/v1/moderations": "client.moderations.create",
    "/v1/responses": "client.responses.create",
    "/v1/batches": "client.batches.create",
    "/v1/messages": "client.messages.create",
    "/v1/messages/count_tokens": "client.messages.count_tokens",
}


def make_path(route: Route) -> str:
    """Return the path with something in place of its variable parts."""
    path = route.path.replace(":path", "")
    for name in route.pattern.groupindex:
        path = path.replace("{" + name + "}", "smollm2-135m-instruct" if name == "model" else f"{name.upper()}")
    return path


def write_curl(route: Route, base_url: str) -> str:
    lines = [f"curl {base_url}{make_path(route)}"]
    if route.method == "DELETE":
        lines[0] = f"curl -X DELETE {base_url}{make_path(route)}"
    elif route.method == "POST" and route.example is None and route.form is None:
        lines[0] = f"curl -X POST {base_url}{make_path(route)}"
    lines.append('  -H "Authorization: Bearer $AISCALE_API_KEY"')
    if route.example is not None:
        lines.append('  -H "Content-Type: application/json"')
        lines.append(f"  -d '{json.dumps(dict(route.example))}'")
    elif route.form is not None:
        lines += ["  -F purpose=batch", "  -F file=@lines.jsonl"]
    elif route.download:
        lines.append("  -o file.jsonl")
    return " \\\n".join(lines)


def write_python(route: Route, base_url: str) -> str:
    call = _PYTHON_CLIENTS.get(route.path) if route.method == "POST" else None
    if call is None or route.example is None:
        return _write_plain_python(route, base_url)
    arguments = "".join(f"    {name}={_python(value)},\n" for name, value in route.example.items())
    if route.path.startswith("/v1/messages"):
        head = f'from anthropic import Anthropic\n\nclient = Anthropic(base_url="{base_url}")  # key: ANTHROPIC_API_KEY'
    else:
        head = f'from openai import OpenAI\n\nclient = OpenAI(base_url="{base_url}/v1")  # key: OPENAI_API_KEY'
    return f"{head}\nprint({call}(\n{arguments}))"


def _write_plain_python(route: Route, base_url: str) -> str:
    call = {"GET": "get", "POST": "post", "DELETE": "delete"}[route.method]
    more = ""
    if route.form is not None:
        more = '\n    data={"purpose": "batch"},\n    files={"file": open("lines.jsonl", "rb")},'
    return (
        "import os\n\nimport httpx\n\n"
        f'answer = httpx.{call}(\n    "{base_url}{make_path(route)}",\n'
        f'    headers={{"Authorization": f"Bearer {{os.environ[\'AISCALE_API_KEY\']}}"}},{more}\n)\n'
        f"print({'answer.text' if route.download else 'answer.json()'})"
    )


def write_javascript(route: Route, base_url: str) -> str:
    fields = [f'method: "{route.method}"', "headers"]
    head = "const headers = { Authorization: `Bearer ${process.env.AISCALE_API_KEY}` };\n"
    if route.example is not None:
        head = (
            "const headers = {\n  Authorization: `Bearer ${process.env.AISCALE_API_KEY}`,\n"
            '  "Content-Type": "application/json",\n};\n'
        )
        fields.append(f"body: JSON.stringify({json.dumps(dict(route.example))})")
    elif route.form is not None:
        head += (
            'import { openAsBlob } from "node:fs";\nconst body = new FormData();\nbody.append("purpose", "batch");\n'
            'body.append("file", await openAsBlob("lines.jsonl"), "lines.jsonl");\n'
        )
        fields.append("body")
    options = "".join(f"  {field},\n" for field in fields)
    read = "text" if route.download else "json"
    return (
        f'{head}const answer = await fetch("{base_url}{make_path(route)}", {{\n{options}}});\n'
        f"console.log(await answer.{read}());"
    )


def _python(value: Any) -> str:
    return repr(value) if not isinstance(value, str) else json.dumps(value)
