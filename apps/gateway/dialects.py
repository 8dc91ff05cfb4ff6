"""Say an error in the words of the dialect that was spoken: OpenAI's, or Anthropic's under ``/v1/messages``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiscale.errors import AiscaleError, Code
from apps.gateway.errors import STATUSES, error_headers, error_object, internal_error


class Dialect:
    """Word errors as OpenAI does."""

    name = "openai"

    def status_of(self, error: AiscaleError) -> int:
        return STATUSES[error.code][0]

    def headers_of(self, error: AiscaleError) -> dict[str, str]:
        return error_headers(error)

    def word(self, error: AiscaleError, request_id: str) -> dict[str, Any]:
        return error_object(error)

    def word_bug(self, request_id: str) -> dict[str, Any]:
        return internal_error(request_id)

    def frame_error(self, value: dict[str, Any]) -> str | None:
        """Return the name of the event that carries an error in a stream; None: events have no names."""
        return None

    def common_headers(self, request_id: str) -> Mapping[str, str]:
        return {}


OPENAI = Dialect()

_ANTHROPIC: dict[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
OVERLOADED = 529
"""Anthropic's status of a service that has too much to do; its clients try again after it."""


@dataclass(frozen=True)
class _Anthropic(Dialect):
    name = "anthropic"

    def status_of(self, error: AiscaleError) -> int:
        if error.code in (Code.QUEUE_FULL, Code.OVERLOADED):
            return OVERLOADED
        return STATUSES[error.code][0]

    def word(self, error: AiscaleError, request_id: str) -> dict[str, Any]:
        status = self.status_of(error)
        kind = _ANTHROPIC.get(status, "invalid_request_error" if status < 500 else "api_error")
        if error.code is Code.BUDGET_EXHAUSTED:
            kind = "billing_error"
        detail = {"type": kind, "message": error.message, "code": error.code.value}
        if error.param:
            detail["param"] = error.param
        return {"type": "error", "error": detail, "request_id": request_id}

    def word_bug(self, request_id: str) -> dict[str, Any]:
        message = internal_error(request_id)["error"]["message"]
        return {"type": "error", "error": {"type": "api_error", "message": message}, "request_id": request_id}

    def frame_error(self, value: dict[str, Any]) -> str | None:
        return "error"

    def common_headers(self, request_id: str) -> Mapping[str, str]:
        return {"request-id": request_id}


ANTHROPIC: Dialect = _Anthropic()


def choose_dialect(path: str, *, has_anthropic_version: bool) -> Dialect:
    """Return the dialect of a request: Anthropic's for its own paths, and for the shared ones when its version is named."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return ANTHROPIC
    return ANTHROPIC if has_anthropic_version else OPENAI
