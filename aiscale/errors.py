"""Name every way in which aiscale says no. No HTTP in here: the faces translate a code into their own dialect."""

from collections.abc import Mapping
from enum import StrEnum


class Code(StrEnum):
    """Every refusal and failure that a caller can meet. The value is what machines see."""

    # who are you
    MISSING_API_KEY = "missing_api_key"
    INVALID_API_KEY = "invalid_api_key"
    KEY_REVOKED = "key_revoked"
    KEY_EXPIRED = "key_expired"
    ACCOUNT_INACTIVE = "account_inactive"
    # what you sent
    INVALID_JSON = "invalid_json"
    INVALID_REQUEST = "invalid_request"
    UNSUPPORTED_PARAMETER = "unsupported_parameter"
    BODY_TOO_LARGE = "body_too_large"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_NOT_ALLOWED = "model_not_allowed"
    CONTENT_POLICY_VIOLATION = "content_policy_violation"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    STORAGE_FULL = "storage_full"
    RANGE_NOT_SATISFIABLE = "range_not_satisfiable"
    UNSUPPORTED_ENCODING = "unsupported_encoding"
    BODY_TIMEOUT = "body_timeout"
    BODY_CUT_SHORT = "body_cut_short"
    IDEMPOTENCY_MISMATCH = "idempotency_key_reused"
    IDEMPOTENCY_BUSY = "idempotency_key_in_use"
    PERMISSION_DENIED = "permission_denied"
    LAST_OWNER = "last_owner"
    ALREADY_MEMBER = "already_member"
    INVITATION_ENDED = "invitation_ended"
    TOO_MANY_OBJECTS = "too_many_objects"
    # the gate
    RATE_LIMITED = "rate_limit_exceeded"
    TOO_MANY_IN_FLIGHT = "too_many_in_flight"
    BUDGET_EXHAUSTED = "insufficient_quota"
    KILLED = "killed"
    QUEUE_FULL = "queue_full"
    OVERLOADED = "overloaded"
    BACKEND_UNAVAILABLE = "backend_unavailable"
    MODERATION_UNAVAILABLE = "moderation_unavailable"
    # after admission
    WORKER_LOST = "worker_lost"
    ENGINE_FAILED = "engine_failed"
    UPSTREAM_FAILED = "upstream_failed"
    UPSTREAM_UNAVAILABLE = "upstream_unavailable"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"


class AiscaleError(Exception):
    """Refuse or fail with a named reason.

    ``message`` is one or two sentences for the person who reads it: what was wrong and what to do next.
    ``param`` names the offending field of the request. ``retry_after_s`` is set when waiting helps.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = headers or {}
        """Facts that every face may pass on as they are, such as the rate limit's state."""
        self.facts = dict(facts or {})
        """The numbers behind a refusal, for who asks later why. Not for the answer."""

    def __repr__(self) -> str:
        return f"AiscaleError({self.code.value!r}, {self.message!r})"
