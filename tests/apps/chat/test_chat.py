"""The chat over its WebSocket, with a real worker."""

import asyncio
import json
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from asgiref.testing import ApplicationCommunicator
from django.conf import settings
from django.test import Client
from prometheus_client import REGISTRY

from apps.accounts.callers import on_thread
from apps.accounts.models import User
from apps.chat import transcripts
from apps.chat.models import Conversation, Message
from apps.chat.routing import websocket_application
from apps.spend import killswitch
from tests.apps.conftest import Cast
from tests.apps.spend.cast import ADA

CHAT = "smollm2-135m-instruct"
ORIGIN = "http://testserver"


def log_in(user: User) -> str:
    client = Client()
    client.force_login(user)
    return client.cookies[settings.SESSION_COOKIE_NAME].value


class Socket(ApplicationCommunicator):
    """Be a WebSocket's other end (that of Channels needs a web server of its own)."""

    async def connect(self) -> bool:
        await self.send_input({"type": "websocket.connect"})
        return bool((await self.receive_output(10))["type"] == "websocket.accept")

    async def tell(self, text: str) -> None:
        await self.send_input({"type": "websocket.receive", "text": text})

    async def hear(self) -> str:
        message = await self.receive_output(15)
        assert message["type"] == "websocket.send", message
        return str(message["text"])

    async def leave(self) -> None:
        await self.send_input({"type": "websocket.disconnect", "code": 1000})
        await self.wait(10)


async def connect(user: User | None, origin: str = ORIGIN) -> Socket:
    headers = [(b"origin", origin.encode()), (b"host", b"testserver")]
    if user is not None:
        session = await on_thread(lambda: log_in(user))
        headers.append((b"cookie", f"{settings.SESSION_COOKIE_NAME}={session}".encode()))
    scope = {"type": "websocket", "path": "/ws/chat/", "headers": headers, "query_string": b"", "subprotocols": []}
    return Socket(websocket_application, scope)


class Talk:
    """Be one browser tab."""

    def __init__(self, socket: Socket) -> None:
        self.socket = socket

    async def tell(self, **frame: Any) -> None:
        await self.socket.tell(json.dumps(frame))

    async def hear(self) -> dict[str, Any]:
        frame: dict[str, Any] = json.loads(await self.socket.hear())
        return frame

    async def hear_until(self, kind: str) -> list[dict[str, Any]]:
        frames = [await self.hear()]
        while frames[-1]["type"] != kind:
            frames.append(await self.hear())
        return frames


async def open_talk(user: User) -> Talk:
    socket = await connect(user)
    assert await socket.connect()
    return Talk(socket)


def ask(text: str = "Hello", **changes: Any) -> dict[str, Any]:
    return {"type": "send", "text": text, "model": CHAT, "client_id": "c1", "conversation_id": None} | changes


async def close_with(socket: Socket) -> int:
    message = await socket.receive_output(timeout=5)
    assert message["type"] == "websocket.close", message
    return int(message["code"])


def write_transcripts() -> int:
    from aiscale import redis as redis_clients

    return transcripts.Writer(redis_clients.get_sync()).turn(block_ms=100)


async def test_without_a_session_it_closes(cast: Cast) -> None:
    socket = await connect(None)
    assert await socket.connect()
    assert await close_with(socket) == 4401


@pytest.mark.parametrize("origin", ["http://evil.example", "http://testserver.evil.example", "null", ""])
async def test_another_sites_page_is_refused(cast: Cast, origin: str) -> None:
    socket = await connect(cast.user, origin)
    assert not await socket.connect()


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("no json", "invalid_json"),
        ("[]", "invalid_request"),
        ('{"type": "dance"}', "invalid_request"),
        ('{"type": "send"}', "invalid_request"),
        (json.dumps(ask(text=7)), "invalid_request"),
        (json.dumps(ask(text="  ")), "invalid_request"),
        (json.dumps(ask(text="x" * 40_000)), "invalid_request"),
        (json.dumps(ask(text="a\x00b")), "invalid_request"),
        ('{"type": "send", "text": "\\ud800", "model": "m", "client_id": "c"}', "invalid_json"),
        (json.dumps(ask(client_id="")), "invalid_request"),
        (json.dumps(ask(model="nope")), "model_not_found"),
        (json.dumps(ask(conversation_id="conv_of_somebody")), "not_found"),
        (json.dumps({"type": "stop", "message_id": "msg_of_somebody"}), "not_found"),
        (json.dumps({"type": "show", "message_id": "msg_of_somebody"}), "not_found"),
        (json.dumps({"type": "show", "message_id": "msg\x00"}), "invalid_request"),
        (json.dumps({"type": "resume", "message_id": "msg\x00"}), "invalid_request"),
        (json.dumps(ask(conversation_id="conv\x00")), "invalid_request"),
        (json.dumps(ask(client_id="c\x00")), "invalid_request"),
        ('{"type": "watch", "conversation_id": 7}', "invalid_request"),
        ('{"type": "watch", "conversation_id": "c\\u0000"}', "invalid_request"),
    ],
)
async def test_bad_frames_are_answered_and_the_socket_stays(cast: Cast, frame: str, code: str) -> None:
    talk = await open_talk(cast.user)
    await talk.socket.tell(frame)
    answer = await talk.hear()
    assert (answer["type"], answer["code"]) == ("error", code)
    await talk.tell(type="ping")
    assert (await talk.hear())["type"] == "pong"
    assert await on_thread(Message.objects.count) == 0
    await talk.socket.leave()


async def test_a_model_that_is_gone_is_told_in_the_words_of_the_chat(cast: Cast) -> None:
    talk = await open_talk(cast.user)
    await talk.tell(**ask(model="gone"))
    error = await talk.hear()
    assert error["message"] == "This model is no longer offered. Reload the page and choose another one."
    await talk.socket.leave()


async def test_frames_that_are_too_large_close_it(cast: Cast) -> None:
    talk = await open_talk(cast.user)
    await talk.socket.tell('"' + "ä" * 40_000 + '"')
    assert (await talk.hear())["code"] == "body_too_large"
    assert await close_with(talk.socket) == 1009


@pytest.mark.usefixtures("worker")
async def test_a_turn_streams_and_is_kept(cast: Cast) -> None:
    talk = await open_talk(cast.user)
    await talk.tell(**ask("Hello <there>"))
    turn = await talk.hear()
    assert turn["type"] == "turn" and turn["title"] == "Hello <there>"
    assert (await talk.hear_until("delta"))[-1]["tokens"] >= 1
    assert REGISTRY.get_sample_value("aiscale_token_delivery_seconds_count", {"model": CHAT})
    await talk.tell(type="stop", message_id=turn["message_id"])
    *_, last = await talk.hear_until("finished")
    assert last["status"] == "stopped" and last["html"]
    await on_thread(write_transcripts)
    question, answer = await on_thread(lambda: list(Message.objects.order_by("position")))
    assert (question.content, question.role) == ("Hello <there>", "user")
    assert (answer.status, answer.role) == ("stopped", "assistant") and answer.content
    # sent once more, as after a lost confirmation: the same turn, the same answer
    await talk.tell(**ask("Hello <there>"))
    again = await talk.hear()
    assert again["message_id"] == turn["message_id"]
    assert (await talk.hear())["html"] == last["html"]
    assert await on_thread(Message.objects.count) == 2
    await talk.socket.leave()


@pytest.mark.usefixtures("worker")
async def test_a_browser_that_comes_back_goes_on_where_the_answer_is(cast: Cast) -> None:
    talk = await open_talk(cast.user)
    await talk.tell(**ask())
    turn = await talk.hear()
    await talk.hear_until("delta")
    await talk.socket.leave()
    back = await open_talk(cast.user)
    await back.tell(type="resume", message_id=turn["message_id"])
    assert (await back.hear())["type"] == "begin"
    await back.hear_until("delta")
    stranger = await on_thread(lambda: Cast("eve@example.com"))
    other = await open_talk(stranger.user)
    for kind in ("resume", "stop"):
        await other.tell(type=kind, message_id=turn["message_id"])
        assert (await other.hear())["code"] == "not_found"
    await other.tell(**ask(conversation_id=turn["conversation_id"]))
    assert (await other.hear())["code"] == "not_found"
    # a second question has to wait for the first answer
    await back.tell(**ask(client_id="c2", conversation_id=turn["conversation_id"]))
    refusal = (await back.hear_until("error"))[-1]
    assert refusal["client_id"] == "c2" and "stop it first" in refusal["message"]
    await back.tell(type="stop", message_id=turn["message_id"])
    assert (await back.hear_until("finished"))[-1]["status"] == "stopped"
    for each in (back, other):
        await each.socket.leave()


async def test_a_refusal_is_kept_with_its_reason(cast: Cast) -> None:
    await on_thread(lambda: killswitch.trip("site", reason="Spring cleaning", by=ADA))
    talk = await open_talk(cast.user)
    await talk.tell(**ask())
    await talk.hear_until("turn")
    finished = await talk.hear()
    assert (finished["status"], finished["error"]["code"]) == ("failed", "killed")
    assert "Spring cleaning" in finished["error"]["message"]
    question, answer = await on_thread(lambda: list(Message.objects.order_by("position")))
    assert question.content == "Hello"
    assert (answer.status, answer.error_code) == ("failed", "killed")
    await talk.socket.leave()


async def test_a_message_that_is_too_long_is_told_so_without_the_words_of_the_api(cast: Cast) -> None:
    talk = await open_talk(cast.user)
    await talk.tell(**{**ask(), "text": "word " * 6000})
    await talk.hear_until("turn")
    error = (await talk.hear())["error"]
    assert error["code"] == "context_length_exceeded"
    assert "and your message has " in error["message"] and error["message"].endswith("the length of your message.")
    await talk.socket.leave()


@pytest.mark.usefixtures("worker")
async def test_a_kill_ends_a_running_answer_and_says_why(cast: Cast) -> None:
    talk = await open_talk(cast.user)
    await talk.tell(**ask())
    await talk.hear_until("delta")
    await on_thread(lambda: killswitch.trip("plan:enterprise", reason="Spring cleaning", by=ADA))
    finished = (await talk.hear_until("finished"))[-1]
    assert (finished["status"], finished["error"]["code"]) == ("failed", "killed")
    assert "Spring cleaning" in finished["error"]["message"]
    await on_thread(write_transcripts)
    answer = await on_thread(lambda: Message.objects.get(role=Message.Role.ASSISTANT))
    assert (answer.status, answer.error_code) == ("failed", "killed")
    assert answer.content and "Spring cleaning" in answer.error_message
    await talk.socket.leave()


async def test_logging_out_elsewhere_ends_the_socket(cast: Cast) -> None:
    talk = await open_talk(cast.user)
    from django.contrib.sessions.models import Session

    await on_thread(lambda: Session.objects.all().delete())
    await sync_to_async(_clear_cached_sessions)()
    await talk.tell(**ask())
    assert await close_with(talk.socket) == 4401
    assert await on_thread(Conversation.objects.count) == 0
    await asyncio.sleep(0)


def _clear_cached_sessions() -> None:
    from django.core.cache import cache

    cache.clear()
