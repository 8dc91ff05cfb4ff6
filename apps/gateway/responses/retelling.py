"""Tell what became of a response's job again, from the job's log: while it runs, and an hour longer."""

from collections.abc import AsyncIterator
from typing import Any

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError
from aiscale.wire.events import Delta, Event, Started
from apps.gateway.responses import items
from apps.inference import catalog, prompts, replies
from apps.inference.call_readers import read_calls
from apps.inference.tools import Style


async def retell(job_id: str, response: dict[str, Any]) -> AsyncIterator[Event]:
    """Yield the events of a job, each once and always alike, and go on until its last one.

    I/O: blocks on the job's log. Raises: AiscaleError (WORKER_LOST, BACKEND_UNAVAILABLE).
    """
    heard, tools = _listen(job_id), items.recall_tools(response)
    if tools is not None:
        heard = read_calls(heard, tools, await _find_style(response["model"]), 1)
    async for event in heard:
        yield event


async def _listen(job_id: str) -> AsyncIterator[Event]:
    next_seq = 0
    try:
        async for event in replies.follow(job_id):
            if isinstance(event, Started):
                next_seq = 1
            elif isinstance(event, Delta):
                if event.seq < next_seq:
                    continue
                next_seq = event.seq + 1
            yield event
    except redis_clients.UNAVAILABLE as error:
        raise redis_clients.unavailable() from error


async def _find_style(slug: str) -> Style:
    """Say how a model calls tools. I/O: as `catalog.get_model`."""
    try:
        return prompts.get_reader(await catalog.get_model(slug)).style or Style.HERMES
    except AiscaleError:
        return Style.HERMES
