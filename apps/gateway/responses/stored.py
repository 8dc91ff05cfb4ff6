"""Answer for responses that are stored: find, list what was said, cancel, delete."""

import asyncio

from aiscale import listing
from aiscale.errors import AiscaleError, Code
from apps.accounts.callers import Caller, on_thread
from apps.gateway.exchange import Exchange
from apps.gateway.models import StoredResponse
from apps.gateway.parameters import QUERIES_OF_CLIENTS, read_query
from apps.gateway.responses import following, storage, upkeep
from apps.gateway.responses.items import describe
from apps.inference import queue

_QUERIES: dict[str, tuple[str, ...]] = {"beta": QUERIES_OF_CLIENTS["beta"], "include": ()}
CANCEL_TRIES, CANCEL_PAUSE_S = 50, 0.1


async def answer_stored(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Return one response as it is now, or its events. Raises: AiscaleError (NOT_FOUND, INVALID_REQUEST)."""
    query = read_query(exchange.query_string, known=following.PARAMETERS, defaults_only=_QUERIES)
    streams, starting_after, exchange.obfuscates = following.read_wish(query)
    row = await _get(exchange, caller)
    if streams:
        await following.send(exchange, row, starting_after)
    else:
        await exchange.send_json(200, row.response)


async def answer_input_items(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """List what was said to a response, newest first as OpenAI does, or in its order. Raises: AiscaleError."""
    query = read_query(exchange.query_string, known=("order", "limit", "after"), defaults_only={"include": ()})
    page = listing.read_page(query, most=100, default=20)
    row = await _get(exchange, caller)
    number = row.public_id.partition("_")[2]
    items = [part for index, item in enumerate(row.input_items) for part in describe(item, f"{number}_{index}")]
    await exchange.send_json(200, listing.cut_list(items, page))


async def answer_cancellation(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Stop a background response. What was made until then is kept, and charged. Raises: AiscaleError."""
    row = await _get(exchange, caller)
    if not row.is_background:
        raise AiscaleError(
            Code.INVALID_REQUEST,
            "Only a response that was created with background can be cancelled. Close the connection of any other one.",
            param="response_id",
        )
    if row.status == StoredResponse.Status.IN_PROGRESS:
        await queue.cancel(row.job_id, "cancelled by its caller")
        for _ in range(CANCEL_TRIES):
            row = await _get(exchange, caller)
            if row.status != StoredResponse.Status.IN_PROGRESS:
                break
            await asyncio.sleep(CANCEL_PAUSE_S)
    await exchange.send_json(200, row.response)


async def answer_deletion(exchange: Exchange, caller: Caller, body: bytes) -> None:
    """Delete a response with all that it holds; one that is still made is stopped. Raises: AiscaleError (NOT_FOUND)."""
    row = await _get(exchange, caller)
    if row.status == StoredResponse.Status.IN_PROGRESS:
        await queue.cancel(row.job_id, "deleted by its caller")
    await on_thread(row.delete)
    await exchange.send_json(200, {"id": row.public_id, "object": "response", "deleted": True})


async def _get(exchange: Exchange, caller: Caller) -> StoredResponse:
    """Return the response that the path names; should its web process have died, with the end that its job came to."""
    response_id = exchange.path_values["response_id"]
    row = await on_thread(lambda: storage.get(caller.organization_id, response_id))
    if row.status == StoredResponse.Status.IN_PROGRESS:
        ended = await upkeep.find_end(row)
        if ended is not None:
            await on_thread(lambda: storage.finish(ended))
            row = await on_thread(lambda: storage.get(caller.organization_id, response_id))
    return row
