"""Put refusals into OpenAI's error object, with the statuses that its clients turn into exception classes."""

import math
from typing import Any

from aiscale.errors import AiscaleError, Code

_INVALID, _SERVER, _QUOTA = "invalid_request_error", "server_error", "insufficient_quota"

STATUSES: dict[Code, tuple[int, str]] = {
    Code.MISSING_API_KEY: (401, _INVALID),
    Code.INVALID_API_KEY: (401, _INVALID),
    Code.KEY_REVOKED: (401, _INVALID),
    Code.KEY_EXPIRED: (401, _INVALID),
    Code.ACCOUNT_INACTIVE: (403, "permission_error"),
    Code.INVALID_JSON: (400, _INVALID),
    Code.INVALID_REQUEST: (400, _INVALID),
    Code.UNSUPPORTED_PARAMETER: (400, _INVALID),
    Code.BODY_TOO_LARGE: (413, _INVALID),
    Code.CONTEXT_LENGTH_EXCEEDED: (400, _INVALID),
    Code.MODEL_NOT_FOUND: (404, _INVALID),
    Code.MODEL_NOT_ALLOWED: (403, "permission_error"),
    Code.CONTENT_POLICY_VIOLATION: (400, _INVALID),
    Code.NOT_FOUND: (404, _INVALID),
    Code.METHOD_NOT_ALLOWED: (405, _INVALID),
    Code.STORAGE_FULL: (400, _INVALID),
    Code.RANGE_NOT_SATISFIABLE: (416, _INVALID),
    Code.UNSUPPORTED_ENCODING: (415, _INVALID),
    Code.BODY_TIMEOUT: (408, _INVALID),
    Code.BODY_CUT_SHORT: (400, _INVALID),
    Code.IDEMPOTENCY_MISMATCH: (422, _INVALID),
    Code.IDEMPOTENCY_BUSY: (409, _INVALID),
    Code.PERMISSION_DENIED: (403, "permission_error"),
    Code.LAST_OWNER: (409, _INVALID),
    Code.ALREADY_MEMBER: (409, _INVALID),
    Code.INVITATION_ENDED: (410, _INVALID),
    Code.TOO_MANY_OBJECTS: (409, _INVALID),
    Code.RATE_LIMITED: (429, "requests"),
    Code.TOO_MANY_IN_FLIGHT: (429, "requests"),
    Code.BUDGET_EXHAUSTED: (429, _QUOTA),
    Code.KILLED: (503, _SERVER),
    Code.QUEUE_FULL: (503, _SERVER),
    Code.OVERLOADED: (503, _SERVER),
    Code.BACKEND_UNAVAILABLE: (503, _SERVER),
    Code.MODERATION_UNAVAILABLE: (503, _SERVER),
    Code.WORKER_LOST: (502, _SERVER),
    Code.ENGINE_FAILED: (500, _SERVER),
    Code.UPSTREAM_FAILED: (502, _SERVER),
    Code.UPSTREAM_UNAVAILABLE: (503, _SERVER),
    Code.DEADLINE_EXCEEDED: (504, _SERVER),
    Code.CANCELLED: (499, _INVALID),
}

NOT_WORTH_RETRYING = frozenset({Code.RATE_LIMITED, Code.BUDGET_EXHAUSTED, Code.KILLED, Code.DEADLINE_EXCEEDED})
"""The official clients send 429 and 5xx again by themselves, unless a header says that it is of no use: these, when waiting helps late or
never."""
CLIENTS_WAIT_S = 60
"""The official clients wait so long at the most; what is to come later they try again at once."""


def error_object(error: AiscaleError) -> dict[str, Any]:
    _, kind = STATUSES[error.code]
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code.value}}


def error_headers(error: AiscaleError) -> dict[str, str]:
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(math.ceil(error.retry_after_s), 1))
    soon = error.retry_after_s is not None and error.retry_after_s <= CLIENTS_WAIT_S
    if error.code in NOT_WORTH_RETRYING and not soon:
        headers["x-should-retry"] = "false"
    if STATUSES[error.code][0] == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def internal_error(request_id: str) -> dict[str, Any]:
    return {
        "error": {
            "message": f"Something went wrong on our side. Tell the administrator of this service the request id {request_id}.",
            "type": _SERVER,
            "param": None,
            "code": "internal_error",
        }
    }
