"""Another version of a message is shown: the talk goes on from it, nothing is lost, and nobody else may."""

import itertools
import json
import random
from dataclasses import dataclass, field

import pytest
from django.test import Client

from aiscale.errors import AiscaleError, Code
from apps.accounts.callers import on_thread
from apps.chat import turns, versions
from apps.chat.models import Conversation, Message
from tests.apps.chat.test_chat import CHAT, ask, open_talk
from tests.apps.chat.test_news import leave, settle, settle_watch
from tests.apps.chat.test_revisions import list_talk, read_history, say
from tests.apps.chat.test_transcripts import finish
from tests.apps.conftest import Cast


async def show(cast: Cast, message_id: str) -> versions.Shown:
    return await on_thread(lambda: versions.show(cast.user.public_id, message_id))


async def retry(cast: Cast, answer_id: str, text: str, client_id: str) -> turns.Turn:
    again = await turns.retry(cast.user.public_id, answer_id, CHAT, client_id)
    await on_thread(lambda: finish(cast, again, text=text))
    return again


async def test_an_older_answer_is_shown_and_the_talk_goes_on_from_it(cast: Cast) -> None:
    first = await say(cast, "One", "c1")
    second = await retry(cast, first.answer_id, "Another", "c2")
    third = await retry(cast, second.answer_id, "A third", "c3")
    ids = (first.answer_id, second.answer_id, third.answer_id)
    found = await on_thread(lambda: versions.list_versions(first.conversation_id))
    assert found == dict.fromkeys(ids, ids)
    assert await show(cast, second.answer_id) == versions.Shown(first.conversation_id, "One", second.answer_id)
    # what is shown already is shown again without a change: a click that is sent twice
    assert (await show(cast, second.answer_id)).last_id == second.answer_id
    assert await on_thread(lambda: list_talk(first)) == ["One", "Another"]
    fourth = await say(cast, "Two", "c4", first)
    assert await read_history(fourth) == ["One", "Another", "Two"], "the model is told what is shown"
    # it is put away with what followed it, and comes back with it
    await show(cast, first.answer_id)
    assert await on_thread(lambda: list_talk(first)) == ["One", "Answer to One"]
    await show(cast, second.answer_id)
    assert await on_thread(lambda: list_talk(first)) == ["One", "Another", "Two", "Answer to Two"]
    assert await on_thread(lambda: versions.list_versions(first.conversation_id)) == found


async def test_an_older_question_comes_back_with_its_name_and_all_that_followed(cast: Cast) -> None:
    first = await say(cast, "One", "c1")
    await say(cast, "Two", "c2", first)
    edited = await say(cast, "Eins", "c3", first, replaces=first.question_id)
    shown = await show(cast, first.question_id)
    assert shown.title == "One"
    assert await on_thread(lambda: list_talk(first)) == ["One", "Answer to One", "Two", "Answer to Two"]
    # tried again, the answer is to the question that it followed, not to the one that was written last
    again = await turns.retry(cast.user.public_id, shown.last_id, CHAT, "c4")
    repeated = await turns.retry(cast.user.public_id, shown.last_id, CHAT, "c4")
    assert (again.text, repeated.text) == ("Two", "Two") and repeated.answer_id == again.answer_id
    told = await on_thread(lambda: turns.find_turn(cast.user.public_id, again.answer_id))
    assert told is not None and told.question_id == again.question_id
    await on_thread(lambda: finish(cast, again, text="Once more"))
    await on_thread(lambda: Conversation.objects.update(title="Of numbers"))
    assert (await show(cast, edited.question_id)).title == "Of numbers", "a name that a person gave stays"


async def test_what_cannot_be_shown_says_why_and_changes_nothing(cast: Cast) -> None:
    first = await say(cast, "One", "c1")
    second = await retry(cast, first.answer_id, "Another", "c2")
    edited = await say(cast, "Eins", "c3", first, replaces=first.question_id)
    stranger = await on_thread(lambda: type(cast.user).objects.create_user(email="bob@example.com", password="x"))
    before = await on_thread(lambda: list_talk(first))

    async def refuse(code: Code, user_id: str, message_id: str) -> None:
        with pytest.raises(AiscaleError) as refusal:
            await on_thread(lambda: versions.show(user_id, message_id))
        assert refusal.value.code is code

    await refuse(Code.NOT_FOUND, stranger.public_id, first.question_id)
    await refuse(Code.NOT_FOUND, cast.user.public_id, "msg_nothing")
    # its question is not shown: a page that has not heard of the edit yet
    await refuse(Code.INVALID_REQUEST, cast.user.public_id, first.answer_id)
    pending = await turns.retry(cast.user.public_id, edited.answer_id, CHAT, "c4")
    await refuse(Code.INVALID_REQUEST, cast.user.public_id, first.question_id)
    await on_thread(lambda: finish(cast, pending, text=before[1]))
    assert await on_thread(lambda: list_talk(first)) == before
    await show(cast, first.question_id)
    assert await on_thread(lambda: list_talk(first)) == ["One", "Another"], second.answer_id


@dataclass
class Said:
    """Be one message of the talk as a person sees it: versions hang below what they follow, and one of them is shown."""

    message_id: str = ""
    below: list["Said"] = field(default_factory=list)
    shown: int = -1

    def add(self, message_id: str) -> "Said":
        self.below.append(Said(message_id))
        self.shown = len(self.below) - 1
        return self.below[-1]

    def list_shown(self) -> list["Said"]:
        """Return this one, and those that are shown below it."""
        return [self, *(self.below[self.shown].list_shown() if self.below else [])]


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_is_asked_anew_and_shown_the_talk_is_a_path_of_a_tree(cast: Cast, seed: int) -> None:
    chance, root = random.Random(seed), Said()
    turn = await say(cast, "0", "c0")
    root.add(turn.question_id).add(turn.answer_id)
    for number in range(1, 40):
        path = root.list_shown()
        choice = chance.random()
        if choice < 0.25:
            turn = await say(cast, str(number), f"c{number}", turn)
            path[-1].add(turn.question_id).add(turn.answer_id)
        elif choice < 0.4:
            turn = await retry(cast, path[-1].message_id, str(number), f"c{number}")
            path[-2].add(turn.answer_id)
        elif choice < 0.55:
            place = chance.randrange(0, len(path) - 1, 2)
            replaces = path[place + 1].message_id
            turn = await say(cast, str(number), f"c{number}", turn, replaces)
            path[place].add(turn.question_id).add(turn.answer_id)
        else:
            parent = chance.choice([each for each in path if each.below])
            parent.shown = chance.randrange(len(parent.below))
            await show(cast, parent.below[parent.shown].message_id)
        path = root.list_shown()
        told, found = await look(turn.conversation_id)
        assert told == [each.message_id for each in path[1:]], number
        for parent, each in itertools.pairwise(path):
            ids = tuple(version.message_id for version in parent.below)
            assert found.get(each.message_id, ids) == ids and (len(ids) > 1) == (each.message_id in found)


async def look(conversation_id: str) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    rows = Message.objects.filter(conversation__public_id=conversation_id, replaced_by=None).order_by("position")
    told = await on_thread(lambda: list(rows.values_list("public_id", flat=True)))
    return told, await on_thread(lambda: versions.list_versions(conversation_id))


async def test_pages_search_and_files_hold_what_is_shown(cast: Cast) -> None:
    first = await say(cast, "Whales", "c1")
    edited = await say(cast, "Dolphins", "c2", first, replaces=first.question_id)
    await show(cast, first.question_id)
    browser = Client()

    def visit() -> None:
        browser.force_login(cast.user)
        page = browser.get(f"/c/{first.conversation_id}/").content.decode()
        both = f'data-versions="{first.question_id} {edited.question_id}"'
        assert page.count(both) == page.count("data-versions") == 1 and ">Whales<" in page and ">Dolphins<" not in page
        assert first.conversation_id in browser.get("/c/", {"q": "answer to whales"}).content.decode()
        assert "Nothing like" in browser.get("/c/", {"q": "answer to dolphins"}).content.decode()
        path = f"/c/{first.conversation_id}/export/?format="
        text = b"".join(browser.get(path + "markdown").streaming_content).decode()
        assert "Answer to Whales" in text and "Dolphins" not in text
        told = json.loads(b"".join(browser.get(path + "json").streaming_content))
        assert [each["was_replaced"] for each in told["messages"]] == [False, False, True, True]
        follows = [each["follows"] for each in told["messages"]]
        assert follows == [None, first.question_id, None, edited.question_id]
        browser.post(f"/c/{first.conversation_id}/delete/")
        assert not Message.objects.exists()

    await on_thread(visit)


@pytest.mark.usefixtures("worker")
@pytest.mark.django_db(transaction=True)
async def test_other_pages_hear_of_it_and_a_turn_tells_its_versions(cast: Cast) -> None:
    first = await say(cast, "One", "c1")
    second = await retry(cast, first.answer_id, "Another", "c2")
    here, there = await open_talk(cast.user), await open_talk(cast.user)
    await settle(here, there)
    for page in (here, there):
        await page.tell(type="watch", conversation_id=first.conversation_id, last_id=second.answer_id)
        await settle_watch(page)
    await here.tell(type="show", message_id=first.answer_id)
    told = {"conversation_id": first.conversation_id, "title": "One", "message_id": first.answer_id}
    assert await here.hear() == {"type": "shown"} | told
    assert await there.hear() == {"type": "changed", "conversation_id": first.conversation_id}
    assert (await there.hear())["type"] == "conversation"
    # whoever was away meanwhile is told when it asks; whoever knows is not
    await here.tell(type="watch", conversation_id=first.conversation_id, last_id=first.answer_id)
    await settle_watch(here)
    edit = ask("Eins", client_id="c3", conversation_id=first.conversation_id, replaces=first.question_id)
    await here.tell(**edit)
    turn = (await here.hear_until("turn"))[-1]
    assert turn["versions"] == {turn["question_id"]: [first.question_id, turn["question_id"]]}
    assert (await there.hear_until("turn"))[-1]["versions"] == turn["versions"]
    await here.tell(type="stop", message_id=turn["message_id"])
    for page in (here, there):
        await page.hear_until("finished")
    await leave(here, there)
