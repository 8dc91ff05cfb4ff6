"""Talk with one browser over one WebSocket."""

import asyncio
import logging
import secrets
from typing import Any

from channels.generic.websocket import AsyncWebsocketConsumer
from django.db import Error as DatabaseError

from aiscale import redis as redis_clients
from aiscale.errors import AiscaleError, Code
from apps.accounts import active_organization
from apps.accounts.callers import on_thread
from apps.chat import answers, frames, news, turns, versions
from apps.chat.frames import (
    MAX_FRAME_BYTES,
    Ping,
    Resume,
    Retry,
    Send,
    Show,
    Stop,
    Watch,
    read_frame,
    write_error,
    write_frame,
)
from apps.chat.news import News
from apps.inference import queue

log = logging.getLogger(__name__)

NO_SESSION, TOO_LARGE = 4401, 1009
MAX_STREAMS = 8
STOP_TRIES = 10
STRAIGHT = "aiscale.send"
"""Where a scope holds the server's own ``send``: past the session's middleware, which has nothing to do with a token and costs as much."""


class ChatConsumer(AsyncWebsocketConsumer):  # type: ignore[misc]
    """Read frames and answer them; several answers may stream at once. Leaving stops no answer."""

    async def connect(self) -> None:
        user = self.scope.get("user")
        self._streams: dict[str, asyncio.Task[None]] = {}
        # accepted first: a browser sees a close code only of a connection that was open
        await self.accept()
        if user is None or not user.is_authenticated:
            await self.close(code=NO_SESSION)
            return
        self._user_id: str = user.public_id
        self._page_id, self._watched, self._last_id = secrets.token_hex(8), "", ""
        self._heard: set[asyncio.Task[None]] = set()
        self._one_by_one = asyncio.Lock()
        news.get_board().add(self._user_id, self._hear)

    async def disconnect(self, code: int) -> None:
        if hasattr(self, "_user_id"):
            news.get_board().remove(self._user_id, self._hear)
            for task in self._heard:
                task.cancel()
        for task in self._streams.values():
            task.cancel()

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        if not hasattr(self, "_user_id"):
            return
        if text_data is None or len(text_data) > MAX_FRAME_BYTES or len(text_data.encode()) > MAX_FRAME_BYTES:
            message = f"A frame must be text of at most {MAX_FRAME_BYTES} bytes."
            await self.send(write_error(AiscaleError(Code.BODY_TOO_LARGE, message)))
            await self.close(code=TOO_LARGE)
            return
        frame: frames.ClientFrame | None = None
        try:
            frame = read_frame(text_data)
            await self._obey(frame)
        except AiscaleError as error:
            await self.send(write_error(error, client_id=getattr(frame, "client_id", None)))
        except (*redis_clients.UNAVAILABLE, DatabaseError) as error:
            log.error("a frame could not be answered: %s", error)
            await self.send(write_error(redis_clients.unavailable(), client_id=getattr(frame, "client_id", None)))

    async def _obey(self, frame: frames.ClientFrame) -> None:
        if isinstance(frame, Ping):
            await self.send(write_frame("pong"))
            return
        if not await on_thread(self._has_session):
            await self.close(code=NO_SESSION)
            return
        if isinstance(frame, Send | Retry):
            await self._begin(frame)
        elif isinstance(frame, Show):
            await self._show(frame.message_id)
        elif isinstance(frame, Stop):
            await self._stop(frame.message_id)
        elif isinstance(frame, Resume):
            await self._resume(frame.message_id)
        elif isinstance(frame, Watch):
            await self._watch(frame)

    def _has_session(self) -> bool:
        """Tell whether the browser is still logged in: a log-out in another tab ends this one, too. I/O: one SQL statement."""
        session: Any = self.scope["session"]
        return bool(session.session_key) and session.exists(session.session_key)

    async def _begin(self, frame: Send | Retry) -> None:
        self._check_streams()
        if isinstance(frame, Retry):
            turn = await turns.retry(self._user_id, frame.message_id, frame.model, frame.client_id)
        else:
            turn = await turns.begin(
                self._user_id,
                frame.conversation_id,
                frame.model,
                frame.text,
                frame.client_id,
                frame.organization_id or self.scope["session"].get(active_organization.SESSION_KEY),
                frame.replaces,
            )
        self._watched, self._last_id = turn.conversation_id, turn.answer_id
        await self.send(await _write_turn(turn, client_id=frame.client_id))
        if turn.repeated:
            await self._resume(turn.answer_id)
            return
        self._stream(turn.answer_id, answers.stream_new(turn, self._user_id, self._tell))
        await news.tell(
            News(
                kind="turn",
                user_id=self._user_id,
                conversation_id=turn.conversation_id,
                message_id=turn.answer_id,
                origin=self._page_id,
            )
        )

    async def _show(self, message_id: str) -> None:
        shown = await on_thread(lambda: versions.show(self._user_id, message_id))
        self._watched, self._last_id = shown.conversation_id, shown.last_id
        told = {"conversation_id": shown.conversation_id, "title": shown.title, "message_id": message_id}
        await self.send(write_frame("shown", **told))
        user_id, page_id = self._user_id, self._page_id
        await news.tell(News(kind="shown", user_id=user_id, conversation_id=shown.conversation_id, origin=page_id))

    async def _stop(self, message_id: str) -> None:
        answer = await on_thread(lambda: turns.find_answer(self._user_id, message_id))
        if answer is None:
            raise _not_found()
        for _ in range(STOP_TRIES):
            # it may have been asked for so shortly ago that it is not queued yet
            if answer.status != "pending" or await queue.cancel(answer.job_id or "", "stopped"):
                return
            await asyncio.sleep(0.2)

    async def _resume(self, message_id: str) -> None:
        if message_id in self._streams and not self._streams[message_id].done():
            return
        self._check_streams()
        answer = await on_thread(lambda: turns.find_answer(self._user_id, message_id))
        if answer is None:
            raise _not_found()
        self._stream(message_id, answers.stream_known(answer, self._tell))

    async def _watch(self, frame: Watch) -> None:
        self._watched, self._last_id = frame.conversation_id or "", frame.last_id or ""
        if not await self._check_watched():
            raise _not_found("conversation")

    async def _check_watched(self) -> bool:
        """Tell the page when its conversation has another last message; False: there is none. I/O: one SQL statement."""
        if not self._watched:
            return True
        found = await on_thread(lambda: turns.find_last(self._user_id, self._watched))
        if found is not None and found != self._last_id:
            await self.send(write_frame("changed", conversation_id=self._watched))
        return found is not None

    def _hear(self, what: News | None) -> None:
        if what is None or what.origin != self._page_id:
            task = asyncio.create_task(self._take_up(what))
            self._heard.add(task)
            task.add_done_callback(self._heard.discard)

    async def _take_up(self, what: News | None) -> None:
        """Tell the page what another one of the same person did. I/O: SQL."""
        try:
            async with self._one_by_one:
                if not await on_thread(self._has_session):
                    await self.close(code=NO_SESSION)
                elif what is None:
                    if not await self._check_watched():
                        await self.send(write_frame("deleted", conversation_id=self._watched))
                elif what.kind == "deleted":
                    await self.send(write_frame("deleted", conversation_id=what.conversation_id))
                else:
                    await self._follow(what)
        except (AiscaleError, *redis_clients.UNAVAILABLE, DatabaseError) as error:
            log.warning("a page does not hear of a %s: %s", what.kind if what else "missed one", error)

    async def _follow(self, what: News) -> None:
        if what.kind == "turn" and what.conversation_id == self._watched:
            turn = await on_thread(lambda: turns.find_turn(self._user_id, what.message_id))
            if turn is not None:
                self._last_id = turn.answer_id
                await self.send(await _write_turn(turn, text=turn.text))
                await self._resume(turn.answer_id)
        elif what.kind == "shown" and what.conversation_id == self._watched:
            await self._check_watched()
        found = await on_thread(lambda: turns.find_conversation(self._user_id, what.conversation_id))
        if found is not None:
            organization_id, title = found
            await self.send(
                write_frame(
                    "conversation",
                    conversation_id=what.conversation_id,
                    organization_id=organization_id,
                    title=title,
                    used=what.kind == "turn",
                )
            )

    async def _tell(self, text: str) -> None:
        await self.scope[STRAIGHT]({"type": "websocket.send", "text": text})

    def _check_streams(self) -> None:
        self._streams = {key: task for key, task in self._streams.items() if not task.done()}
        if len(self._streams) >= MAX_STREAMS:
            raise AiscaleError(
                Code.TOO_MANY_IN_FLIGHT,
                f"{MAX_STREAMS} answers are being written already. Wait until one has finished.",
            )

    def _stream(self, message_id: str, work: Any) -> None:
        self._streams[message_id] = asyncio.create_task(work)


async def _write_turn(turn: turns.Turn, **more: str) -> str:
    """Tell a turn, and the versions of its messages where there are several. I/O: SQL, when it replaced something."""
    found = await on_thread(lambda: versions.list_versions(turn.conversation_id)) if turn.replaced else {}
    return write_frame(
        "turn",
        conversation_id=turn.conversation_id,
        title=turn.title,
        question_id=turn.question_id,
        message_id=turn.answer_id,
        replaced=turn.replaced,
        versions={each: found[each] for each in (turn.question_id, turn.answer_id) if each in found},
        **more,
    )


def _not_found(what: str = "message") -> AiscaleError:
    return AiscaleError(Code.NOT_FOUND, f"This {what} does not exist.", param=f"{what}_id")
