"""Stream one answer to one browser: text as it comes, blocks as HTML when they close, and at last how it ended."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from django.db import Error as DatabaseError

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError
from aiscale.wire.events import Delta, Event, Finished, Started
from apps.accounts.callers import on_thread
from apps.chat import turns
from apps.chat.frames import write_frame
from apps.chat.markdown import StreamRenderer, render
from apps.chat.models import Message
from apps.chat.turns import Turn
from apps.inference import replies
from apps.inference.endings import make_failure

log = logging.getLogger(__name__)

Tell = Callable[[str], Awaitable[None]]


async def stream_new(turn: Turn, user_id: str, tell: Tell) -> None:
    """Ask for an answer, and stream it. A browser that leaves meanwhile changes nothing: the answer goes on, and is kept."""
    try:
        try:
            run = await asyncio.shield(asyncio.ensure_future(turns.launch(turn, user_id)))
        except AiscaleError as error:
            await _tell_failure(turn.answer_id, error, tell)
            return
        try:
            await _relay(turn.answer_id, run.events(), tell)
        except AiscaleError as error:
            log.warning("an answer is taken up again from its log: %s", error, extra={"job_id": turn.job_id})
            await _follow(turn.answer_id, turn.job_id, tell)
        finally:
            run.detach()
    except (*redis_clients.UNAVAILABLE, DatabaseError) as error:
        log.warning("an answer could not be told to the end: %s", error, extra={"job_id": turn.job_id})
        await tell(write_frame("interrupted", message_id=turn.answer_id))


async def stream_known(answer: Message, tell: Tell) -> None:
    """Tell an answer from its start: as it is, or, while it is being made, as it goes on."""
    if answer.status != Message.Status.PENDING:
        await tell(describe_end(answer))
        return
    try:
        await _follow(answer.public_id, answer.job_id or "", tell)
    except (*redis_clients.UNAVAILABLE, DatabaseError) as error:
        log.warning("an answer could not be told to the end: %s", error, extra={"job_id": answer.job_id})
        await tell(write_frame("interrupted", message_id=answer.public_id))


def describe_end(answer: Message) -> str:
    """Write the frame that tells an answer that has ended."""
    return write_frame(
        "finished",
        message_id=answer.public_id,
        status=answer.status,
        html=render(answer.content),
        text=answer.content,
        error={"code": answer.error_code, "message": answer.error_message} if answer.error_code else None,
    )


async def _follow(message_id: str, job_id: str, tell: Tell) -> None:
    try:
        await _relay(message_id, replies.follow(job_id), tell)
    except AiscaleError:
        # the job is unknown by now: either its answer was written, or the sweep will say that it was lost
        answer = await on_thread(lambda: Message.objects.filter(public_id=message_id).first())
        if answer is not None and answer.status != Message.Status.PENDING:
            await tell(describe_end(answer))
        else:
            await tell(write_frame("interrupted", message_id=message_id))


async def _relay(message_id: str, events: AsyncIterator[Event], tell: Tell) -> None:
    """Pass events on. Raises: AiscaleError when the job was lost."""
    page = StreamRenderer()
    async for event in events:
        if isinstance(event, Started):
            page = StreamRenderer()
            await tell(write_frame("begin", message_id=message_id))
        elif isinstance(event, Delta):
            html, tokens = page.add(event.text), event.completion_tokens
            if html:
                await tell(write_frame("block", message_id=message_id, html=html, tail=page.tail, tokens=tokens))
            else:
                await tell(write_frame("delta", message_id=message_id, text=event.text, tokens=tokens))
        elif isinstance(event, Finished):
            await tell(_write_end(message_id, event, page.text))


def _write_end(message_id: str, event: Finished, text: str) -> str:
    status, error = Message.Status.COMPLETE, None
    if event.finish_reason == "cancelled":
        status = Message.Status.STOPPED
    elif event.finish_reason not in ("stop", "length"):
        status, failure = Message.Status.FAILED, make_failure(event)
        error = {"code": failure.code.value, "message": failure.message}
    text = event.text if event.text is not None else text
    return write_frame("finished", message_id=message_id, status=status, html=render(text), text=text, error=error)


async def _tell_failure(message_id: str, failure: AiscaleError, tell: Tell) -> None:
    error = {"code": failure.code.value, "message": failure.message, "retry_after_s": failure.retry_after_s}
    await tell(
        write_frame("finished", message_id=message_id, status=Message.Status.FAILED, html="", text="", error=error)
    )
