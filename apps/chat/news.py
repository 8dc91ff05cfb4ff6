"""Tell a person's other open pages what happens in one of them, in whichever process each of them is.

News name ids alone: a page that hears of one reads what it may see from Postgres. Nobody depends on them. What is lost on the way, while
Redis is away, is made good when a page asks (`frames.Watch`) whether it shows what there is.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from aiscale import redis as redis_clients
from aiscale.wire import keys

log = logging.getLogger(__name__)

LISTEN_S = 5.0
FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 2.0


class News(msgspec.Struct, frozen=True, kw_only=True):
    """Say what became of a conversation. All ids are public."""

    kind: Literal["turn", "shown", "renamed", "deleted"]
    user_id: str
    conversation_id: str
    message_id: str = ""
    """The answer that was asked for."""
    origin: str = ""
    """The page that knows already."""


Hear = Callable[[News | None], None]
"""Takes news, or None when some may have been missed. Must not block."""

_encoder, _decoder = msgspec.json.Encoder(), msgspec.json.Decoder(News)


async def tell(news: News) -> None:
    """Tell everybody who listens for this user. I/O: one Redis trip, shared. A Redis that is away is not an error."""
    try:
        await redis_clients.execute("PUBLISH", keys.CHAT_NEWS, _encoder.encode(news))
    except redis_clients.UNAVAILABLE as error:
        log.warning("a person's other pages do not hear of a %s: %s", news.kind, error)


def tell_from_thread(news: News) -> None:
    """As `tell`, for code that is not asynchronous."""
    try:
        redis_clients.get_sync().publish(keys.CHAT_NEWS, _encoder.encode(news))
    except redis_clients.UNAVAILABLE as error:
        log.warning("a person's other pages do not hear of a %s: %s", news.kind, error)


class Board:
    """Hand news to the pages of one event loop: one subscription for all of them, as long as there is a page."""

    def __init__(self) -> None:
        self._pages: dict[str, set[Hear]] = {}
        self._task: asyncio.Task[None] | None = None

    def add(self, user_id: str, hear: Hear) -> None:
        """Have ``hear`` told what concerns a user, from now on."""
        self._pages.setdefault(user_id, set()).add(hear)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._listen(), name="chat-news")

    def remove(self, user_id: str, hear: Hear) -> None:
        pages = self._pages.get(user_id, set())
        pages.discard(hear)
        if not pages:
            self._pages.pop(user_id, None)

    async def _listen(self) -> None:
        pause_s = FIRST_PAUSE_S
        task = asyncio.current_task()
        # a cancellation that the client's own retries swallowed must end this all the same
        while self._pages and task is not None and not task.cancelling():
            channel: Any = redis_clients.get_async_reader().pubsub()
            try:
                await channel.subscribe(keys.CHAT_NEWS)
                while self._pages and not task.cancelling():
                    message = await channel.get_message(timeout=LISTEN_S)
                    pause_s = FIRST_PAUSE_S
                    if message is not None and message["type"] == "subscribe":
                        # what came before this is missed: the client connects again by itself
                        self._tell_all()
                    elif message is not None:
                        self._hand_out(message["data"])
            except redis_clients.UNAVAILABLE as error:
                log.warning("news of chats wait for Redis: %s", error)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, LAST_PAUSE_S)
            finally:
                await channel.aclose()

    def _hand_out(self, data: bytes) -> None:
        try:
            news = _decoder.decode(data)
        except msgspec.MsgspecError as error:
            log.warning("news cannot be read: %s", error)
            return
        for hear in tuple(self._pages.get(news.user_id, ())):
            hear(news)

    def _tell_all(self) -> None:
        for pages in tuple(self._pages.values()):
            for hear in tuple(pages):
                hear(None)


_boards = redis_clients.PerLoop(Board)


def get_board() -> Board:
    """Return the running loop's board. I/O: none until a page listens."""
    return _boards.get()
