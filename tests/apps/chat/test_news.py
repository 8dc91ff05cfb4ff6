"""Two pages of one person follow each other, whatever process they are in; nobody else hears of it."""

import asyncio

import pytest
from django.contrib.sessions.models import Session
from django.test import Client
from django.utils import timezone

from aiscale import redis as redis_clients
from apps.accounts.callers import on_thread
from apps.accounts.models import User
from apps.chat.models import Conversation
from tests.apps.chat.test_chat import Talk, _clear_cached_sessions, ask, close_with, open_talk, write_transcripts
from tests.apps.conftest import Cast

pytestmark = pytest.mark.django_db(transaction=True)


async def settle(*talks: Talk) -> None:
    """Have each page be listening: its process subscribes in its own time."""
    for talk in talks:
        await talk.tell(type="watch")
        await talk.tell(type="ping")
        await talk.hear_until("pong")
    await asyncio.sleep(0.3)


async def leave(*talks: Talk) -> None:
    for talk in talks:
        await talk.socket.leave()


def post(user: User, path: str, **values: str) -> int:
    browser = Client()
    browser.force_login(user)
    return browser.post(path, values).status_code


@pytest.mark.usefixtures("worker")
async def test_another_page_hears_the_question_and_follows_the_answer(cast: Cast) -> None:
    stranger = await on_thread(lambda: Cast("eve@example.com"))
    here, there, eve = await open_talk(cast.user), await open_talk(cast.user), await open_talk(stranger.user)
    await settle(here, there, eve)
    await here.tell(**ask("Hello"))
    first = await here.hear()
    told = await there.hear()
    assert told == {
        "type": "conversation",
        "conversation_id": first["conversation_id"],
        "organization_id": (await on_thread(lambda: Conversation.objects.get().organization)).public_id,
        "title": "Hello",
        "used": True,
    }
    await here.tell(type="stop", message_id=first["message_id"])
    await here.hear_until("finished")
    # the other page opens it, and follows what is said next
    await there.tell(type="watch", conversation_id=first["conversation_id"], last_id=first["message_id"])
    await on_thread(write_transcripts)
    await settle_watch(there)
    await here.tell(**ask("And then?", client_id="c2", conversation_id=first["conversation_id"]))
    second = (await here.hear_until("turn"))[-1]
    turn = (await there.hear_until("turn"))[-1]
    assert turn == {key: value for key, value in second.items() if key != "client_id"} | {"text": "And then?"}
    frames = await there.hear_until("delta")
    assert "begin" in {frame["type"] for frame in frames}
    # it may stop the answer, too, and both pages see the same end
    await there.tell(type="stop", message_id=second["message_id"])
    ends = [(await each.hear_until("finished"))[-1] for each in (here, there)]
    assert ends[0] == ends[1] and ends[0]["status"] == "stopped"
    await eve.tell(type="ping")
    assert (await eve.hear())["type"] == "pong"
    await leave(here, there, eve)


async def settle_watch(talk: Talk) -> None:
    await talk.tell(type="ping")
    assert (await talk.hear())["type"] == "pong"


async def test_pages_hear_of_new_names_and_of_deletions(cast: Cast) -> None:
    conversation = await on_thread(lambda: begin(cast))
    talk = await open_talk(cast.user)
    await settle(talk)
    path = f"/c/{conversation.public_id}/"
    assert await on_thread(lambda: post(cast.user, f"{path}rename/", title="The sea")) == 302
    told = await talk.hear()
    assert (told["type"], told["title"], told["used"]) == ("conversation", "The sea", False)
    assert await on_thread(lambda: post(cast.user, f"{path}delete/")) == 302
    assert await talk.hear() == {"type": "deleted", "conversation_id": conversation.public_id}
    await leave(talk)


async def test_a_page_is_told_when_it_shows_less_than_there_is(cast: Cast) -> None:
    conversation = await on_thread(lambda: begin(cast))
    stranger = await on_thread(lambda: Cast("eve@example.com"))
    talk, eve = await open_talk(cast.user), await open_talk(stranger.user)
    watch = {"type": "watch", "conversation_id": conversation.public_id}
    last = await on_thread(lambda: conversation.messages.create(position=0, role="user", content="Hello"))
    await talk.tell(**watch, last_id=last.public_id)
    await settle_watch(talk)
    for stale in ("", "msg_before"):
        await talk.tell(**watch, last_id=stale)
        assert await talk.hear() == {"type": "changed", "conversation_id": conversation.public_id}
    # another one's conversation, and one that is deleted, look the same: there is none
    await eve.tell(**watch, last_id=last.public_id)
    assert (await eve.hear())["code"] == "not_found"
    await on_thread(lambda: post(cast.user, f"/c/{conversation.public_id}/delete/"))
    assert (await talk.hear())["type"] == "deleted"
    await talk.tell(**watch, last_id=last.public_id)
    refusal = await talk.hear()
    assert (refusal["code"], refusal["param"]) == ("not_found", "conversation_id")
    await leave(talk, eve)


async def test_what_is_missed_while_redis_is_away_is_told_when_it_is_back(cast: Cast) -> None:
    conversation = await on_thread(lambda: begin(cast))
    talk = await open_talk(cast.user)
    await settle(talk)
    await talk.tell(type="watch", conversation_id=conversation.public_id, last_id="")
    await settle_watch(talk)
    await on_thread(lambda: conversation.messages.create(position=0, role="user", content="Hello"))
    await on_thread(lambda: redis_clients.get_sync().client_kill_filter(_type="pubsub"))
    assert await talk.hear() == {"type": "changed", "conversation_id": conversation.public_id}
    await leave(talk)


async def test_a_page_that_is_logged_out_hears_nothing_and_closes(cast: Cast) -> None:
    conversation = await on_thread(lambda: begin(cast))
    talk = await open_talk(cast.user)
    await settle(talk)
    await on_thread(lambda: Session.objects.all().delete())
    await on_thread(_clear_cached_sessions)
    await on_thread(lambda: post(cast.user, f"/c/{conversation.public_id}/rename/", title="Secret"))
    assert await close_with(talk.socket) == 4401


def begin(cast: Cast) -> Conversation:
    return Conversation.objects.create(
        user=cast.user, organization=cast.organization, title="Hello", model="m", used_at=timezone.now()
    )
