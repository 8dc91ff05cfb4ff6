"""Tell a stored response's events again, from its first or from any of them on: while it is made, and an hour longer."""

from collections.abc import AsyncIterator
from typing import Any

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire.events import Event, Finished
from apps.gateway.exchange import Exchange
from apps.gateway.models import StoredResponse
from apps.gateway.responses import retelling
from apps.gateway.responses.stream import Stream
from apps.inference import replies

PARAMETERS = ("stream", "starting_after", "include_obfuscation")
_FRESH: dict[str, Any] = {
    "status": "in_progress",
    "completed_at": None,
    "output": [],
    "usage": None,
    "error": None,
    "incomplete_details": None,
}


class Follower:
    """Tell what a job's log holds, and go on as it grows."""

    def __init__(self, job_id: str, response: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.headers = headers or {}
        self._job_id = job_id
        self._response = response

    def events(self) -> AsyncIterator[Event]:
        """Tell the job's events, each once. Raises: AiscaleError (WORKER_LOST, BACKEND_UNAVAILABLE)."""
        return retelling.retell(self._job_id, self._response)


def read_wish(query: dict[str, str]) -> tuple[bool, int, bool]:
    """Return whether events are wanted, the number of the last one that is known (-1: none), and whether they are padded.

    Raises: AiscaleError (INVALID_REQUEST).
    """
    for name in ("stream", "include_obfuscation"):
        if query.get(name, "false") not in ("true", "false"):
            raise AiscaleError(Code.INVALID_REQUEST, f"{name} must be true or false.", param=name)
    streams, after = query.get("stream") == "true", query.get("starting_after")
    if after is None:
        return streams, -1, query.get("include_obfuscation") == "true"
    if not streams:
        raise AiscaleError(
            Code.INVALID_REQUEST, "starting_after is only allowed when stream is true.", param="starting_after"
        )
    if not (after.isascii() and after.isdigit() and len(after) < 10):
        raise AiscaleError(
            Code.INVALID_REQUEST, "starting_after must be the sequence_number of an event.", param="starting_after"
        )
    return True, int(after), query.get("include_obfuscation") == "true"


async def send(exchange: Exchange, row: StoredResponse, starting_after: int) -> None:
    """Send a stored response's events. Raises: AiscaleError (INVALID_REQUEST when they are not kept any more), before anything was sent."""
    if row.status != StoredResponse.Status.IN_PROGRESS and await _is_forgotten(row):
        message = (
            f"The events of the response {row.public_id} are not kept any more. Leave out stream to fetch it as it is."
        )
        raise AiscaleError(Code.INVALID_REQUEST, message, param="stream")
    follower = Follower(row.job_id, row.response)
    await Stream(exchange, row.response | _FRESH, follower, starting_after, is_own=False).send()


async def _is_forgotten(row: StoredResponse) -> bool:
    """I/O: one Redis trip. Raises: AiscaleError (BACKEND_UNAVAILABLE)."""
    try:
        ending: Finished | None = await replies.find_ending(row.job_id)
    except redis_clients.UNAVAILABLE as error:
        raise redis_clients.unavailable() from error
    return ending is None
