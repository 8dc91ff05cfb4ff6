"""What a person wants all chats to heed goes before each question, is theirs alone, and goes when they go."""

import dataclasses
import json
from typing import Any

import pytest
from django.test import Client

from apps.accounts import personal_data
from apps.accounts.callers import on_thread
from apps.chat import history, instructions, turns
from apps.chat.models import PersonalInstructions
from apps.inference import prompts
from apps.inference.prompts import ChatMessage
from apps.spend.models import UsageRecord
from tests.apps.chat.test_chat import ask, open_talk
from tests.apps.chat.test_transcripts import begin, finish
from tests.apps.conftest import Cast
from tests.apps.gateway.test_kill import settle_all
from tests.apps.inference.test_upstreams import enter

BRIEF = "I teach biology.\nAnswer briefly."


async def read_prompt(cast: Cast, turn: turns.Turn) -> list[tuple[str, str]]:
    told = await history.fit(turn.conversation_id, turn.answer_id, turn.model, "enterprise", cast.user.public_id)
    return [(each.role, each.content) for each in told]


def test_a_page_keeps_them_and_an_empty_text_is_none(cast: Cast) -> None:
    browser, other = Client(), Cast("bob@example.com")
    browser.force_login(cast.user)
    response = browser.post("/instructions/", {"text": f"  {BRIEF} \n".replace("\n", "\r\n")})
    assert response.status_code == 302 and instructions.read(cast.user.public_id) == BRIEF
    assert BRIEF in browser.get("/instructions/").content.decode()
    assert instructions.read(other.user.public_id) == ""
    for text, words in (
        ("x" * 1_501, "Your instructions have 1,501 characters; the most is 1,500."),
        ("a\x00b", "Your instructions hold a NUL character."),
    ):
        page = browser.post("/instructions/", {"text": text}).content.decode()
        assert words in page and text[:3] in page, "what was written is not lost"
    assert instructions.read(cast.user.public_id) == BRIEF
    browser.post("/instructions/", {"text": " "})
    assert not PersonalInstructions.objects.exists()


async def test_they_go_before_each_question_and_stay_when_old_turns_go(cast: Cast) -> None:
    def talk() -> turns.Turn:
        instructions.save(cast.user, BRIEF)
        first = begin(cast, "word " * 3000)
        finish(cast, first, text="long " * 400, finish_reason="stop")
        second = begin(cast, "What is a cell?", first.conversation_id)
        finish(cast, second, text="A small room.", finish_reason="stop")
        return begin(cast, "And a nucleus?", first.conversation_id)

    turn = await on_thread(talk)
    assert await read_prompt(cast, turn) == [
        ("system", BRIEF),
        ("user", "What is a cell?"),
        ("assistant", "A small room."),
        ("user", "And a nucleus?"),
    ]


async def test_a_model_whose_template_knows_no_system_message_reads_them_with_the_question(
    cast: Cast, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = prompts._load

    def load(slug: str, version: str) -> Any:
        reader = find(slug, version)
        words = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        template = prompts._compile(words + (reader.manifest.chat_template or ""))
        return dataclasses.replace(reader, template=template)

    monkeypatch.setattr(prompts, "_load", load)
    await on_thread(lambda: instructions.save(cast.user, BRIEF))
    turn = await on_thread(lambda: begin(cast, "What is a cell?"))
    assert await read_prompt(cast, turn) == [("user", f"{BRIEF}\n\nWhat is a cell?")]


async def test_a_second_question_to_another_servers_model_needs_no_files_here(cast: Cast) -> None:
    def talk() -> turns.Turn:
        enter(9)
        instructions.save(cast.user, BRIEF)
        first = turns._begin(cast.user.public_id, None, "acme-large", "One", "c1")
        finish(cast, first, text="Answer", finish_reason="stop")
        return turns._begin(cast.user.public_id, first.conversation_id, "acme-large", "Two", "c2")

    turn = await on_thread(talk)
    told = [("system", BRIEF), ("user", "One"), ("assistant", "Answer"), ("user", "Two")]
    assert await read_prompt(cast, turn) == told


async def test_the_model_reads_them_and_they_are_charged(cast: Cast, worker: None) -> None:
    talk = await open_talk(cast.user)

    async def hello(client_id: str) -> None:
        await talk.tell(**ask("Hello", client_id=client_id))
        turn, *_ = await talk.hear_until("delta")
        await talk.tell(type="stop", message_id=turn["message_id"])
        await talk.hear_until("finished")

    await hello("c1")
    await on_thread(lambda: instructions.save(cast.user, BRIEF * 20))
    await hello("c2")
    await talk.socket.leave()
    await on_thread(lambda: settle_all(2))
    rows = await on_thread(lambda: list(UsageRecord.objects.order_by("admitted_at")))
    assert rows[1].prompt_tokens > rows[0].prompt_tokens + 100


def test_they_are_in_the_copy_and_go_with_the_account(cast: Cast) -> None:
    instructions.save(cast.user, BRIEF)
    assert json.loads("".join(personal_data.iter_export(cast.user)))["instructions"] == BRIEF
    personal_data.delete_account(cast.user, address="")
    assert not PersonalInstructions.objects.exists()


def test_nothing_said_changes_nothing() -> None:
    said = [ChatMessage(role="user", content="Hello")]
    assert instructions.Preface("").add(said) is said
