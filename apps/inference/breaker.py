"""Stop asking an upstream that fails, for all processes together, and let one request at a time find out whether it is back."""

import logging
import time

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys

log = logging.getLogger(__name__)

OPENS_AFTER = 5
OPEN_MS = 10_000
PROBE_MS = 30_000


async def check(provider: str) -> None:
    """Pass, or refuse at once. I/O: one Redis trip; without Redis it passes. Raises: AiscaleError (UPSTREAM_UNAVAILABLE)."""
    may_ask, wait_ms = await _run(provider, "ask")
    if not may_ask:
        raise AiscaleError(
            Code.UPSTREAM_UNAVAILABLE,
            "The service behind this model has failed several times and is left alone for a moment. Try again soon.",
            retry_after_s=wait_ms / 1000,
        )


async def report(provider: str, *, good: bool) -> None:
    """Say how the upstream answered. I/O: one Redis trip."""
    await _run(provider, "good" if good else "bad")


async def _run(provider: str, what: str) -> tuple[int, int]:
    values: list[str | int | bytes] = [what, time.time_ns() // 1_000_000, OPENS_AFTER, OPEN_MS, PROBE_MS]
    try:
        answer = await redis_clients.run_script_async("breaker", [keys.breaker(provider)], values)
    except redis_clients.UNAVAILABLE:
        log.warning("a breaker cannot be read; the upstream is asked", exc_info=True)
        return 1, 0
    return int(answer[0]), int(answer[1])
