"""Say in a sentence why a job ended before its answer was whole."""

from aiscale.errors import AiscaleError, Code
from aiscale.wire.events import Finished
from apps.accounts.mirror import REVOKED_REASON


def make_failure(event: Finished, headers: dict[str, str] | None = None) -> AiscaleError:
    """Word the end of a job that was killed, cancelled, came to its deadline or failed."""
    reason = event.finish_reason
    detail = (event.error_message or "").strip().rstrip(".")
    if reason == "killed":
        detail = detail.removeprefix("killed: ") or "an administrator stopped it"
        if detail == REVOKED_REASON:
            # nobody stopped the answer: who may ask did
            message = "The API key was revoked while it answered. Make a new one on the API keys page."
            return AiscaleError(Code.KEY_REVOKED, message, headers=headers)
        return AiscaleError(
            Code.KILLED, f"The administrator of this service stopped this answer: {detail}.", headers=headers
        )
    if reason == "deadline":
        return AiscaleError(
            Code.DEADLINE_EXCEEDED,
            "The answer took longer than this service allows. Ask for a shorter answer, or try again when it is less busy.",
            headers=headers,
        )
    if reason == "cancelled":
        return AiscaleError(Code.CANCELLED, "The answer was stopped.", headers=headers)
    if event.error_code in (Code.UPSTREAM_FAILED, Code.UPSTREAM_UNAVAILABLE, Code.INVALID_REQUEST):
        return AiscaleError(
            Code(event.error_code),
            event.error_message or "The service behind this model failed.",
            retry_after_s=5 if event.error_code == Code.UPSTREAM_UNAVAILABLE else None,
            headers=headers,
        )
    if event.error_code == Code.CONTEXT_LENGTH_EXCEEDED:
        return AiscaleError(Code.CONTEXT_LENGTH_EXCEEDED, event.error_message or "", param="messages", headers=headers)
    if event.error_code == Code.WORKER_LOST:
        return AiscaleError(
            Code.WORKER_LOST,
            "The worker that made this answer stopped in the middle of it. It is not charged. Try again.",
            headers=headers,
        )
    return AiscaleError(
        Code.ENGINE_FAILED,
        f"The model could not answer{f': {detail}' if detail else ''}. It is not charged. Try again.",
        headers=headers,
    )
