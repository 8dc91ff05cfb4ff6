"""schemathesis reads the published document and asks for everything in it: no 500, no undocumented status, no other shape."""

import time
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.e2e.conftest import CHAT_MODEL, EMBED_MODEL, Stack

pytestmark = pytest.mark.stack

EXAMPLES = 12
"""Of each operation."""
MOST_S = 55.0
MODELS = {"/v1/embeddings": EMBED_MODEL, "/v1/moderations": None}


def make_affordable(case: Any) -> None:
    """Name a model that is there, and ask for few tokens: so that requests get past the first check, and end soon."""
    body = case.body
    if not isinstance(body, dict):
        return
    model = MODELS.get(case.operation.path, CHAT_MODEL)
    if isinstance(body.get("model"), str) and model and len(body["model"]) % 4:
        body["model"] = model
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if isinstance(body.get(name), int) and not isinstance(body[name], bool) and body[name] > 0:
            body[name] = min(body[name], 4)
    # without a limit an answer is as long as the plan allows: longer than a test can wait on a busy machine
    limit = {"/v1/responses": "max_output_tokens", "/v1/chat/completions": "max_tokens"}.get(case.operation.path)
    if limit and "max_completion_tokens" not in body:
        body.setdefault(limit, 4)
    if "/chat/" in case.operation.path and isinstance(body.get("n"), int):
        body["n"] = min(body["n"], 2)


def test_everything_that_is_documented(healthy: Stack, api_key: str) -> None:
    schema = schemathesis.openapi.from_url(f"{healthy.base_url}/api/openapi.json")
    checks = [status_code_conformance, content_type_conformance, response_schema_conformance]
    headers = {"Authorization": f"Bearer {api_key}"}
    ends_at, asked, answered = time.monotonic() + MOST_S, 0, set()
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path.startswith("/api/v1/"):
            continue

        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            nonlocal asked
            if time.monotonic() > ends_at:
                return
            make_affordable(case)
            response = case.call(headers=headers, timeout=60)
            asked += 1
            answered.add(response.status_code)
            assert response.status_code != 500, response.text
            assert "x-request-id" in response.headers
            case.validate_response(response, checks=checks)

        ask()
    assert asked > 100 and {200, 400, 404} <= answered, (asked, answered)
