"""A question is edited and an answer asked for again: what was there is kept, out of the talk, and each answer is charged once."""

import json
from typing import Any

import pytest
from django.test import Client

from aiscale.errors import AiscaleError, Code
from apps.accounts.callers import on_thread
from apps.chat import history, turns
from apps.chat.models import Conversation, Message
from apps.chat.turns import Turn
from tests.apps.chat.test_chat import CHAT, ask, open_talk, write_transcripts
from tests.apps.chat.test_transcripts import finish
from tests.apps.conftest import Cast


async def say(cast: Cast, text: str, client_id: str, after: Turn | None = None, replaces: str | None = None) -> Turn:
    conversation_id = after.conversation_id if after else None
    turn = await turns.begin(cast.user.public_id, conversation_id, CHAT, text, client_id, None, replaces)
    await on_thread(lambda: finish(cast, turn, text=f"Answer to {text}"))
    return turn


def list_talk(turn: Turn) -> list[str]:
    rows = Message.objects.filter(conversation__public_id=turn.conversation_id, replaced_by=None).order_by("position")
    return [row.content for row in rows]


async def read_history(turn: Turn) -> list[str]:
    return [message.content for message in await on_thread(lambda: history.read(turn.conversation_id, turn.answer_id))]


async def test_an_answer_that_is_asked_for_again_takes_the_others_place(cast: Cast) -> None:
    first = await say(cast, "One", "c1")
    second = await say(cast, "Two", "c2", first)
    again = await turns.retry(cast.user.public_id, second.answer_id, CHAT, "c3")
    assert again.replaced == (second.answer_id,) and again.question_id == second.question_id
    assert await read_history(again) == ["One", "Answer to One", "Two"], "it sees what the first one saw"
    # a frame that is sent twice, because its answer was lost with the connection, is one retry
    repeated = await turns.retry(cast.user.public_id, second.answer_id, CHAT, "c3")
    assert repeated.repeated and (repeated.answer_id, repeated.replaced) == (again.answer_id, again.replaced)
    await on_thread(lambda: finish(cast, again, text="Another"))
    assert await on_thread(lambda: list_talk(first)) == ["One", "Answer to One", "Two", "Another"]
    kept = await on_thread(lambda: Message.objects.get(public_id=second.answer_id))
    assert kept.content == "Answer to Two", "nothing that was paid for is lost"


async def test_an_edited_question_takes_out_what_followed(cast: Cast) -> None:
    first = await say(cast, "One", "c1")
    await say(cast, "Two", "c2", first)
    edited = await say(cast, "Eins", "c3", first, replaces=first.question_id)
    assert len(edited.replaced) == 4 and edited.title == "Eins", "the name came from the question"
    assert await on_thread(lambda: list_talk(first)) == ["Eins", "Answer to Eins"]
    third = await say(cast, "Three", "c4", edited)
    assert await read_history(third) == ["Eins", "Answer to Eins", "Three"]
    assert await on_thread(lambda: Message.objects.filter(conversation__public_id=first.conversation_id).count()) == 8


async def test_what_cannot_be_revised_says_why_and_changes_nothing(cast: Cast) -> None:
    first = await say(cast, "One", "c1")
    second = await say(cast, "Two", "c2", first)
    stranger = await on_thread(lambda: type(cast.user).objects.create_user(email="bob@example.com", password="x"))

    async def refuse(code: Code, work: Any) -> None:
        with pytest.raises(AiscaleError) as refusal:
            await work
        assert refusal.value.code is code

    await refuse(Code.INVALID_REQUEST, turns.retry(cast.user.public_id, first.answer_id, CHAT, "c3"))
    await refuse(Code.NOT_FOUND, turns.retry(stranger.public_id, second.answer_id, CHAT, "c4"))
    await refuse(Code.NOT_FOUND, turns.retry(cast.user.public_id, second.question_id, CHAT, "c5"))
    for name in (second.answer_id, "msg_nothing", ""):
        work = turns.begin(cast.user.public_id, first.conversation_id, CHAT, "X", "c6", None, name)
        await refuse(Code.NOT_FOUND, work)
    # of another conversation
    other = await say(cast, "Elsewhere", "c7")
    work = turns.begin(cast.user.public_id, first.conversation_id, CHAT, "X", "c8", None, other.question_id)
    await refuse(Code.NOT_FOUND, work)
    pending = await turns.retry(cast.user.public_id, second.answer_id, CHAT, "c9")
    await refuse(Code.INVALID_REQUEST, turns.retry(cast.user.public_id, pending.answer_id, CHAT, "c10"))
    talk = await on_thread(lambda: list_talk(first))
    assert talk == ["One", "Answer to One", "Two", ""]


@pytest.mark.usefixtures("worker")
async def test_over_the_socket_each_turn_is_a_job_of_its_own(cast: Cast) -> None:
    talk = await open_talk(cast.user)

    async def take_turn(**frame: Any) -> dict[str, Any]:
        await talk.tell(**frame)
        turn = await talk.hear()
        await talk.hear_until("delta")
        await talk.tell(type="stop", message_id=turn["message_id"])
        last = (await talk.hear_until("finished"))[-1]
        assert last["status"] == "stopped" and last["text"]
        await on_thread(write_transcripts)
        return turn

    first = await take_turn(**ask())
    assert first["replaced"] == []
    again = await take_turn(type="retry", message_id=first["message_id"], model=CHAT, client_id="c2")
    assert again["replaced"] == [first["message_id"]] and again["question_id"] == first["question_id"]
    edit = ask("Hello again", client_id="c3", conversation_id=first["conversation_id"], replaces=first["question_id"])
    assert (await take_turn(**edit))["replaced"] == [first["question_id"], again["message_id"]]
    await talk.socket.leave()
    answers = await on_thread(lambda: list(Message.objects.filter(role="assistant").values_list("job_id", "content")))
    assert len({job_id for job_id, _ in answers}) == 3 and all(content for _, content in answers)


async def test_a_conversation_is_found_renamed_in_place_and_saved(cast: Cast) -> None:
    first = await say(cast, "Where do whales sleep?", "c1")
    await turns.retry(cast.user.public_id, first.answer_id, CHAT, "c2")
    other = await say(cast, "Bread", "c3")
    browser = Client()

    def look() -> None:
        browser.force_login(cast.user)
        page = browser.get("/c/", {"q": "whales sl"}).content.decode()
        assert first.conversation_id in page and other.conversation_id not in page
        assert "Nothing like" in browser.get("/c/", {"q": "100% \x00 gone"}).content.decode()
        path = f"/c/{first.conversation_id}/"
        saved = browser.get(path + "export/?format=json")
        told = json.loads(b"".join(saved.streaming_content))
        assert [each["was_replaced"] for each in told["messages"]] == [False, True, False]
        question = first.question_id
        assert [each["follows"] for each in told["messages"]] == [None, question, question]
        assert "attachment" in saved["Content-Disposition"]
        text = b"".join(browser.get(path + "export/?format=nonsense").streaming_content).decode()
        assert "## You\n\nWhere do whales sleep?" in text and "Answer to" not in text
        answer = browser.post(path + "rename/", {"title": "Whales", "next": f"/c/{other.conversation_id}/"})
        assert answer["Location"] == f"/c/{other.conversation_id}/"
        answer = browser.post(path + "rename/", {"title": "Whales", "next": "https://evil.example/"})
        assert answer["Location"] == path
        answer = browser.post(path + "delete/", {"next": path})
        assert answer["Location"] == "/"
        assert browser.get(path + "export/").status_code == 404
        assert Conversation.objects.get(public_id=first.conversation_id).title == ""

    await on_thread(look)
