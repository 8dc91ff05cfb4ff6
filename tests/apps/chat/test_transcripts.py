"""Answers reach their conversation once, however they ended; answers that nobody makes any more are ended."""

import re
from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone
from redis import Redis

from aiscale import redis as redis_clients
from aiscale.wire import keys
from apps.accounts.models import User
from apps.chat import history, transcripts, turns
from apps.chat.models import Conversation, Message
from apps.chat.turns import Turn
from apps.inference.models import Model, Upstream
from tests.apps.conftest import Cast
from tests.apps.spend.cast import make_finished, send


def begin(cast: Cast, text: str = "Hello", conversation_id: str | None = None) -> Turn:
    return turns._begin(
        cast.user.public_id, conversation_id, "smollm2-135m-instruct", text, f"c{Message.objects.count()}"
    )


def finish(cast: Cast, turn: Turn, **changes: Any) -> Message:
    event = make_finished(cast.organization.public_id, turn.job_id, source="chat", **changes)
    send([event, event])
    transcripts.Writer(redis_clients.get_sync()).turn(block_ms=50)
    return Message.objects.get(public_id=turn.answer_id)


@pytest.mark.parametrize(
    ("ending", "status", "code"),
    [
        ({"finish_reason": "stop"}, "complete", ""),
        ({"finish_reason": "length"}, "complete", ""),
        ({"finish_reason": "cancelled", "error_code": "cancelled"}, "stopped", ""),
        ({"finish_reason": "killed", "error_message": "drill"}, "failed", "killed"),
        ({"finish_reason": "deadline"}, "failed", "deadline_exceeded"),
        ({"finish_reason": "error", "error_code": "worker_lost"}, "failed", "worker_lost"),
        ({"finish_reason": "error", "error_code": "engine_failed"}, "failed", "engine_failed"),
    ],
)
def test_every_end_is_written(cast: Cast, ending: dict[str, Any], status: str, code: str) -> None:
    answer = finish(cast, begin(cast), text="So far", **ending)
    assert (answer.content, answer.status, answer.error_code) == ("So far", status, code)
    assert bool(answer.error_message) == bool(code)
    client = redis_clients.get_sync()
    assert client.xpending(keys.FINISHED, keys.GROUP_TRANSCRIPTS)["pending"] == 0


def test_entries_of_others_and_broken_ones_are_passed_over(cast: Cast) -> None:
    send([b"broken", make_finished(cast.organization.public_id)])
    assert finish(cast, begin(cast), text="x", finish_reason="stop").status == "complete"


def test_a_writer_that_died_loses_nothing(cast: Cast) -> None:
    turn = begin(cast)
    client = redis_clients.get_sync()
    dead = transcripts.Writer(client)
    dead.turn(block_ms=1)
    send([make_finished(cast.organization.public_id, turn.job_id, source="chat", text="kept", finish_reason="stop")])
    assert dead._read(50)
    alive = transcripts.Writer(client)
    alive.turn(block_ms=1)
    assert Message.objects.get(public_id=turn.answer_id).status == "pending"
    client.xclaim(keys.FINISHED, keys.GROUP_TRANSCRIPTS, dead._consumer, 0, [_only_id(client)], idle=60_000)
    alive.turn(block_ms=1)
    assert Message.objects.get(public_id=turn.answer_id).content == "kept"


def _only_id(client: Redis) -> bytes:
    [entry] = client.xrange(keys.FINISHED)  # type: ignore[misc]
    return bytes(entry[0])


def test_an_answer_without_a_job_is_ended_once_it_is_old(cast: Cast) -> None:
    turn = begin(cast)
    client = redis_clients.get_sync()
    assert transcripts.sweep(client) == 0
    Message.objects.update(created_at=timezone.now() - timedelta(minutes=1))
    client.hset(keys.job_record(turn.job_id), "state", "running")
    assert transcripts.sweep(client) == 0
    client.delete(keys.job_record(turn.job_id))
    assert transcripts.sweep(client) == 1
    answer = Message.objects.get(public_id=turn.answer_id)
    assert (answer.status, answer.error_code) == ("failed", "worker_lost")
    # should its end come after all, that is what counts
    assert finish(cast, turn, text="late", finish_reason="stop").status == "complete"


def test_history_is_what_was_said_and_answered(cast: Cast) -> None:
    first = begin(cast, "One")
    finish(cast, first, text="Answer one", finish_reason="stop")
    lost = begin(cast, "Lost", first.conversation_id)
    turns.fail(lost.job_id, redis_clients.unavailable())
    last = begin(cast, "Two", first.conversation_id)
    told = [(message.role, message.content) for message in history.read(last.conversation_id, last.answer_id)]
    assert told == [("user", "One"), ("assistant", "Answer one"), ("user", "Two")]


async def test_old_turns_make_room(cast: Cast) -> None:
    from apps.accounts.callers import on_thread

    def talk() -> Turn:
        turn = begin(cast, "word " * 3000)
        finish(cast, turn, text="long " * 400, finish_reason="stop")
        return begin(cast, "And now?", turn.conversation_id)

    turn = await on_thread(talk)
    told = await history.fit(turn.conversation_id, turn.answer_id, turn.model, "enterprise", cast.user.public_id)
    assert [message.content for message in told] == ["And now?"]


def test_pages_show_ones_own_alone(cast: Cast) -> None:
    turn = begin(cast, "A <b>secret</b>")
    finish(cast, turn, text="**bold** <script>", finish_reason="stop")
    url = f"/c/{turn.conversation_id}/"
    mine, stranger, nobody = Client(), Client(), Client()
    mine.force_login(cast.user)
    stranger.force_login(User.objects.create_user("eve@example.com", "x"))
    page = mine.get(url)
    assert b"A &lt;b&gt;secret" in page.content and b"<strong>bold</strong> &lt;script&gt;" in page.content
    for action in ("", "rename/", "delete/"):
        answer = stranger.post(url + action, {"title": "mine now"}) if action else stranger.get(url)
        assert answer.status_code == 404
        assert nobody.get(url + action).status_code in (302, 405)
    assert mine.get("/c/conv%00x/").status_code == 404
    assert mine.post(url + "rename/", {"title": "  New\x00 name "}).status_code == 302
    assert Conversation.objects.get().title == "New name"
    assert b"New name" in mine.get("/c/").content
    assert mine.post(url + "delete/").status_code == 302
    assert Message.objects.count() == 0 and mine.get(url).status_code == 404


def test_landing_page_for_strangers(cast: Cast) -> None:
    page = Client().get("/")
    assert page.status_code == 200 and b"Make an account" in page.content
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert b"and to nobody else" in page.content
    acme = Upstream.objects.create(name="acme", base_url="https://acme.example/v1")
    Model.objects.filter(kind="generate").update(upstream=acme, upstream_model="large")
    assert b"nobody else" in (content := Client().get("/").content) and b"and to nobody else" not in content


def test_a_chat_without_models_says_so(cast: Cast) -> None:
    browser = Client()
    browser.force_login(cast.user)
    assert "data-starter" in (page := browser.get("/").content.decode()) and "There is no model" not in page
    Model.objects.update(is_enabled=False)
    assert (
        "There is no model to chat with." in (page := browser.get("/").content.decode()) and "data-starter" not in page
    )


def test_earlier_messages_lead_back_to_the_latest(cast: Cast) -> None:
    turn = begin(cast, "Number 0")
    for number in range(1, 60):
        finish(cast, turn, text="Yes.", finish_reason="stop")
        turn = begin(cast, f"Number {number}", turn.conversation_id)
    browser, url = Client(), f"/c/{turn.conversation_id}/"
    browser.force_login(cast.user)
    latest = browser.get(url).content.decode()
    assert "Number 59<" in latest and "Number 5<" not in latest and "These are earlier messages" not in latest
    [before] = re.findall(r"\?before=\d+", latest)
    earlier = browser.get(url + before).content.decode()
    assert "Number 5<" in earlier and "Number 59<" not in earlier and "These are earlier messages" in earlier
    assert f'<a href="{url}">Go to the latest</a>' in earlier
    assert "These are earlier messages" not in browser.get(url + "?before=x").content.decode()


@pytest.mark.parametrize(("cookie", "theme"), [("dark", "dark"), ("light", "light"), ("", None), ('"><script>', None)])
def test_pages_begin_in_the_colours_that_were_chosen(cast: Cast, cookie: str, theme: str | None) -> None:
    browser = Client()
    browser.cookies["aiscale_theme"] = cookie
    [found] = re.findall(r"<html[^>]*>", browser.get("/").content.decode())
    assert found == ('<html lang="en">' if theme is None else f'<html lang="en" data-theme="{theme}">')
