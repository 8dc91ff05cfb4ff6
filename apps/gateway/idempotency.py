"""Answer a request that is sent again with the same Idempotency-Key with the same answer, charged once (M7).

- The answer of a request that was served is kept for a day and sent again. One that was refused or failed is not kept: it cost nothing,
  and the next try is a new one.
- While a try runs, another one with the same key is told so (409, come back in a second). A client that leaves does not end a request
  with a key: it is answered all the same, and the answer waits for the next try.
- A try whose process died is repeated. Its job is named after its request, so what was charged is not charged again.
"""

import asyncio
import contextlib
import hashlib
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from django.conf import settings
from django.db import Error as DatabaseError

from aiscale.db import make_public_id
from aiscale.errors import AiscaleError, Code
from apps.accounts.callers import Caller, on_thread
from apps.gateway import idempotency_records as records
from apps.gateway.exchange import Exchange
from apps.gateway.models import IdempotentRequest
from apps.inference import replays
from apps.inference.lanes import name_job

log = logging.getLogger(__name__)

HEADER = "idempotency-key"
MAX_KEY_CHARS = 255
RENEW_EACH_S = 4.0
REPLAYED = {"idempotent-replayed": "true"}
MOST_KEPT_BYTES = 64 << 20

Work = Callable[[], Awaitable[None]]


async def answer(exchange: Exchange, caller: Caller, key: str, body: bytes, work: Work) -> None:
    """Do the work once for this key, or send again what it gave.

    I/O: two SQL transactions. Raises: AiscaleError (INVALID_REQUEST, IDEMPOTENCY_MISMATCH, IDEMPOTENCY_BUSY; what the work raises).
    """
    if not (1 <= len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()):
        message = f"Idempotency-Key must be 1 to {MAX_KEY_CHARS} printable ASCII characters."
        raise AiscaleError(Code.INVALID_REQUEST, message, param="Idempotency-Key")
    fingerprint = _fingerprint(exchange, body)
    claim, row = await on_thread(
        lambda: records.claim(caller.organization_id, key, fingerprint, exchange.request_id, secrets.token_hex(8))
    )
    if claim == "other":
        raise AiscaleError(
            Code.IDEMPOTENCY_MISMATCH,
            "This Idempotency-Key was used for another request: path or body differ. Use a new key for a new request.",
            param="Idempotency-Key",
        )
    if claim == "running":
        raise AiscaleError(
            Code.IDEMPOTENCY_BUSY,
            "A request with this Idempotency-Key is being answered. Send it again in a second to get its answer.",
            param="Idempotency-Key",
            retry_after_s=1,
        )
    if claim == "done":
        stored = records.read(row)
        await exchange.send_again(stored.status, stored.headers, stored.body, REPLAYED)
        return
    await _do(exchange, row, work, repeated=claim == "again")


def _fingerprint(exchange: Exchange, body: bytes) -> str:
    digest = hashlib.sha256(f"{exchange.method} {exchange.path.rstrip('/')}\n".encode())
    digest.update(exchange.query_string + b"\n" + body)
    return digest.hexdigest()


async def _do(exchange: Exchange, row: IdempotentRequest, work: Work, *, repeated: bool) -> None:
    renewing = asyncio.create_task(_keep(row))
    try:
        if repeated:
            await _look_back(row)
        exchange.request_id = row.request_id
        exchange.record(MOST_KEPT_BYTES)
        await work()
        kept = exchange.recorded
        if kept is None or exchange.failed or kept.status >= 300:
            await on_thread(lambda: records.drop(row))
        else:
            stored = records.Stored(status=kept.status, headers=kept.headers, body=b"".join(kept.parts))
            await on_thread(lambda: records.finish(row, stored))
    except BaseException as error:
        if isinstance(error, AiscaleError | asyncio.CancelledError):
            log.debug("a request with a key was not served: %r", error, extra={"request_id": exchange.request_id})
        with contextlib.suppress(DatabaseError):
            await asyncio.shield(on_thread(lambda: records.drop(row)))
        raise
    finally:
        renewing.cancel()


async def _look_back(row: IdempotentRequest) -> None:
    """See what became of the try that died, so that its repetition is charged once. Raises: AiscaleError."""
    outcome = await replays.await_outcome(name_job(row.request_id), settings.ENV.request_deadline_s + 30.0)
    if outcome == "free":
        await on_thread(lambda: records.rename(row, make_public_id("req")))


async def _keep(row: IdempotentRequest) -> None:
    while True:
        await asyncio.sleep(RENEW_EACH_S)
        with contextlib.suppress(DatabaseError):
            if not await on_thread(lambda: records.renew(row)):
                return


_going_on: set[asyncio.Future[Any]] = set()


def go_on_alone(work: asyncio.Future[Any]) -> None:
    """Let the work of a client that left come to its end."""
    _going_on.add(work)
    work.add_done_callback(_end)


def _end(work: asyncio.Future[Any]) -> None:
    _going_on.discard(work)
    if not work.cancelled() and (error := work.exception()) is not None and not isinstance(error, AiscaleError):
        log.error("a request failed after its client had left", exc_info=error)
