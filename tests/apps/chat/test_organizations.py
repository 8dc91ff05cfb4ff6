"""A conversation belongs to the organization that pays for it, and who leaves that organization stops spending."""

import asyncio
import time
from typing import Any

import pytest
from django.test import Client

from apps.accounts import members, organizations
from apps.accounts.callers import on_thread
from apps.accounts.models import Membership, Organization, User
from apps.chat import departures, turns
from apps.chat.models import Conversation, Message
from apps.spend.models import UsageRecord
from tests.apps.chat.test_chat import CHAT, Talk, ask, open_talk, write_transcripts
from tests.apps.conftest import Cast


@pytest.fixture
def acme(cast: Cast) -> Organization:
    return organizations.create(cast.user, "Acme").organization


def add(organization: Organization, role: str, email: str = "bob@example.com") -> User:
    user = User.objects.create_user(email)
    Membership.objects.create(user=user, organization=organization, role=role)
    return user


def begin(user: User, organization: Organization | None = None, text: str = "A question") -> Conversation:
    organization_id = organization.public_id if organization else None
    turn = turns._begin(user.public_id, None, CHAT, text, text, organization_id)
    Message.objects.filter(public_id=turn.answer_id).update(status="complete")
    return Conversation.objects.get(public_id=turn.conversation_id)


async def finish(talk: Talk) -> dict[str, Any]:
    return (await talk.hear_until("finished"))[-1]


@pytest.mark.usefixtures("worker", "settling")
async def test_a_turn_is_paid_by_the_conversations_organization(cast: Cast, acme: Organization) -> None:
    talk = await open_talk(cast.user)
    ids = {}
    for name, frame in (
        ("personal", ask(client_id="a")),
        ("acme", ask(client_id="b", organization_id=acme.public_id)),
    ):
        await talk.tell(**frame)
        ids[name] = (await talk.hear())["conversation_id"]
        await talk.tell(type="stop", message_id=(await talk.hear_until("delta"))[0]["message_id"])
        await finish(talk)
        await on_thread(write_transcripts)
    # another tab works for the other organization: what was begun goes on being paid by who began it
    await talk.tell(**ask(client_id="c", conversation_id=ids["acme"], organization_id=cast.organization.public_id))
    turn = await talk.hear()
    await talk.hear_until("delta")
    await talk.tell(type="stop", message_id=turn["message_id"])
    await finish(talk)

    def read_payers() -> list[str]:
        payers: list[str] = []
        for _ in range(200):
            payers = list(UsageRecord.objects.order_by("admitted_at").values_list("organization_id", flat=True))
            if len(payers) == 3:
                return payers
            time.sleep(0.1)
        return payers

    own = cast.organization.public_id
    assert await on_thread(read_payers) == [own, acme.public_id, acme.public_id]
    await talk.socket.leave()


async def test_roles_and_strangers(cast: Cast, acme: Organization) -> None:
    billing = await on_thread(lambda: add(acme, "billing"))
    stranger = await on_thread(lambda: User.objects.create_user("eve@example.com"))
    for user, code in ((billing, "permission_denied"), (stranger, "not_found")):
        talk = await open_talk(user)
        await talk.tell(**ask(organization_id=acme.public_id))
        answer = await talk.hear()
        assert (answer["type"], answer["code"]) == ("error", code)
        await talk.socket.leave()
    assert await on_thread(Conversation.objects.count) == 0


@pytest.mark.usefixtures("worker")
async def test_who_is_removed_stops_spending_with_the_next_sweep(cast: Cast, acme: Organization) -> None:
    bob = await on_thread(lambda: add(acme, "member"))
    talk = await open_talk(bob)
    await talk.tell(**ask(organization_id=acme.public_id))
    turn = await talk.hear()
    await talk.hear_until("delta")
    assert await on_thread(departures.sweep) == 0
    place = await on_thread(lambda: Membership.objects.get(user=bob, organization=acme))
    await on_thread(lambda: members.remove(cast.user, acme, place.public_id))
    assert await on_thread(departures.sweep) == 1
    assert (await finish(talk))["status"] == "stopped"
    # and what they said there is no longer theirs to see, to go on with, or to stop
    for frame in (
        ask(client_id="c2", conversation_id=turn["conversation_id"]),
        {"type": "resume", "message_id": turn["message_id"]},
        {"type": "stop", "message_id": turn["message_id"]},
    ):
        await talk.tell(**frame)
        assert (await talk.hear())["code"] == "not_found"
    await asyncio.sleep(0)
    await talk.socket.leave()


def test_pages_show_the_active_organization_alone(cast: Cast, acme: Organization) -> None:
    ours, mine = begin(cast.user, acme, "About Acme"), begin(cast.user, None, "About me")
    browser = Client()
    browser.force_login(cast.user)
    page = browser.get("/").content.decode()
    assert "About me" in page and "About Acme" not in page and "Enterprise plan" in page
    assert f'data-organization="{cast.organization.public_id}"' in page
    # opening a conversation goes to its organization
    page = browser.get(f"/c/{ours.public_id}/").content.decode()
    assert "About Acme" in page and "About me" not in page and "Free plan" in page
    assert f'data-organization="{acme.public_id}"' in browser.get("/").content.decode()
    assert "About me" not in browser.get("/c/").content.decode()
    browser.post(f"/account/organizations/{cast.organization.public_id}/switch/", {"next": "/c/"})
    page = browser.get("/c/").content.decode()
    assert "About me" in page and "About Acme" not in page
    assert mine.organization == cast.organization


def test_colleagues_see_nothing_of_each_other(cast: Cast, acme: Organization) -> None:
    bob = add(acme, "admin")
    talk = begin(bob, acme, "Bob's own words")
    browser = Client()
    browser.force_login(cast.user)
    browser.post(f"/account/organizations/{acme.public_id}/switch/")
    assert "own words" not in browser.get("/").content.decode()
    base = f"/c/{talk.public_id}"
    for response in (
        browser.get(f"{base}/"),
        browser.post(f"{base}/rename/", {"title": "Mine"}),
        browser.post(f"{base}/delete/"),
    ):
        assert response.status_code == 404
    members.leave(bob, acme)
    browser.force_login(bob)
    assert browser.get(f"{base}/").status_code == 404


def test_the_role_billing_reads_why_it_does_not_chat(cast: Cast, acme: Organization) -> None:
    bob = add(acme, "billing")
    browser = Client()
    browser.force_login(bob)
    assert "does not chat" not in browser.get("/").content.decode()
    browser.post(f"/account/organizations/{acme.public_id}/switch/")
    page = browser.get("/").content.decode()
    assert "it sees costs and does not chat" in page and "disabled></textarea>" in page


def test_the_chats_pages_ask_few_questions(cast: Cast, acme: Organization, django_assert_max_num_queries: Any) -> None:
    """D2: a page's queries do not grow with what it lists."""
    talks = [begin(cast.user, acme, f"Question {number}") for number in range(30)]
    for number in range(4):
        organizations.create(cast.user, f"Other {number}")
    browser = Client()
    browser.force_login(cast.user)
    browser.post(f"/account/organizations/{acme.public_id}/switch/")
    browser.get("/")
    for path, most in (("/", 9), (f"/c/{talks[0].public_id}/", 11), ("/c/", 5)):
        with django_assert_max_num_queries(most):
            assert browser.get(path).status_code == 200
