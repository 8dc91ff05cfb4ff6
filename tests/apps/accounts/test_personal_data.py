"""People get a copy of what is theirs, and are forgotten when they go; the ledger stays whole and names nobody."""

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from allauth.account.models import EmailAddress
from django.apps import apps
from django.db import connection
from django.test import Client
from redis import Redis

from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys as names
from apps.accounts import invitations, organizations, personal_data
from apps.accounts.callers import on_thread
from apps.accounts.models import ApiKey, AuditEvent, Invitation, Membership, Organization, User
from apps.chat.models import Conversation, Message
from apps.chat.turns import _begin
from apps.gateway.files import keeping
from apps.gateway.files import upkeep as files
from apps.gateway.models import StoredFile
from apps.inference import completions
from apps.inference.completions import CompletionRequest
from apps.inference.prompts import ChatMessage
from apps.spend import alerts, settlement, webhooks
from apps.spend.models import Budget, LedgerEntry, UsageRecord
from tests.apps.conftest import Cast
from tests.apps.inference.claims import claim
from tests.apps.spend.cast import make_finished

PASSWORD = "correct horse 9 battery"
CHAT = "smollm2-135m-instruct"
WORDS = "my dog is called Bartholomew"


@pytest.fixture
def browser(cast: Cast, settings: Any) -> Iterator[Client]:
    settings.STORAGES = {**settings.STORAGES, "files": {"BACKEND": "django.core.files.storage.InMemoryStorage"}}
    browser = Client()
    browser.force_login(cast.user)
    yield browser


def talk(cast: Cast, organization: Organization, words: str = WORDS) -> str:
    turn = _begin(cast.user.public_id, None, CHAT, words, f"c{Conversation.objects.count()}", organization.public_id)
    Message.objects.filter(public_id=turn.answer_id).update(status="complete", content="A fine name.")
    return turn.conversation_id


def read_export(browser: Client) -> dict[str, Any]:
    response = browser.post("/account/export/")
    assert response.status_code == 200 and "attachment" in response.headers["Content-Disposition"]
    value: dict[str, Any] = json.loads(b"".join(response.streaming_content))  # type: ignore[attr-defined]
    return value


def test_the_copy_holds_what_is_theirs_and_no_secret(cast: Cast, browser: Client) -> None:
    acme = organizations.create(cast.user, "Acme").organization
    mine, gone = talk(cast, cast.organization), talk(cast, acme, "never mind")
    browser.post(f"/c/{gone}/delete/")
    other = Cast("bob@example.com")
    talk(other, other.organization, "bob's own words")
    value = read_export(browser)
    assert value["format"] == "aiscale.export.1" and value["profile"]["email"] == "ada@example.com"
    assert [each["name"] for each in value["organizations"]] == ["Personal", "Acme"]
    [conversation] = value["conversations"]
    assert conversation["id"] == mine and conversation["organization_id"] == cast.organization.public_id
    assert [(each["role"], each["content"]) for each in conversation["messages"]] == [
        ("user", WORDS),
        ("assistant", "A fine name."),
    ]
    [key] = value["api_keys"]
    text = json.dumps(value)
    assert key["id"] == cast.key.public_id
    assert cast.raw not in text and cast.key.digest not in text and cast.user.password not in text and "bob" not in text


def test_a_copy_of_nothing_is_a_document_too(cast: Cast) -> None:
    new = Cast("new@example.com")
    value = json.loads("".join(personal_data.iter_export(new.user)))
    assert value["conversations"] == [] and value["profile"]["id"] == new.user.public_id


def iter_rows() -> Iterator[tuple[str, str]]:
    """Yield every row of every table that may hold something of a person, as text."""
    with connection.cursor() as cursor:
        for model in apps.get_models():
            table = model._meta.db_table
            if table in ("accounts_auditevent", "django_session"):
                # the one stays by decision 32, the other's session opens nothing (tested below)
                continue
            cursor.execute(f'SELECT t::text FROM "{table}" t')
            for (row,) in cursor.fetchall():
                yield table, row


def test_nothing_of_a_deleted_person_is_left_but_what_was_charged(cast: Cast, browser: Client, redis_url: str) -> None:
    """All tables are searched for the addresses and words of who is gone."""
    _fill(cast)
    sums = LedgerEntry.objects.count(), UsageRecord.objects.count()
    assert sums[0] and sums[1]
    told = [(table, row) for table, row in iter_rows() if "ada@" in row or "Bartholomew" in row]
    assert {"accounts_user", "chat_message", "gateway_storedfile", "spend_alertdelivery"} <= {
        table for table, _ in told
    }
    elsewhere = Client()
    elsewhere.force_login(cast.user)

    answer = browser.post("/account/delete/", {"password": PASSWORD}, follow=True)

    assert "Your account is deleted" in answer.content.decode() and answer.redirect_chain[-1][0] == "/"
    StoredFile.objects.update(expires_at="2020-01-01T00:00Z")
    files.tidy()
    assert [(table, row) for table, row in iter_rows() if "ada@" in row or "Bartholomew" in row] == []
    assert (LedgerEntry.objects.count(), UsageRecord.objects.count()) == sums, "the ledger is whole"
    assert UsageRecord.objects.filter(user_id=cast.user.public_id).exists()
    user = User.objects.get(pk=cast.user.pk)
    assert user.email == f"deleted-{user.public_id}@deleted.invalid" and not user.is_active
    assert Redis.from_url(redis_url).hget(names.api_key(cast.key.digest), "state") == b"revoked"
    for gone in (browser, elsewhere):
        assert gone.get("/account/keys/").status_code == 302, "every browser is logged out"
    assert not Client().login(email="ada@example.com", password=PASSWORD)
    event = AuditEvent.objects.get(action="user.delete")
    assert event.actor == event.actor_id == user.public_id and "ada@" not in str(event.details)
    # the address is free for somebody new, who has nothing of the old one
    fresh = Cast("ada@example.com")
    assert fresh.user.pk != user.pk and not fresh.user.conversations.exists()


def _fill(cast: Cast) -> None:
    """Have something of Ada in every table that can hold it."""
    user, own = cast.user, cast.organization
    user.first_name = "Bartholomew"
    user.save()
    EmailAddress.objects.create(user=user, email="ada@work.example", verified=True)
    ApiKey.objects.filter(pk=cast.key.pk).update(name="Bartholomew's key")
    talk(cast, own)
    boss = Cast("boss@example.com")
    acme = organizations.create(boss.user, "Acme").organization
    invitations.invite(boss.user, acme, "ada@example.com", "billing")
    invitations.accept(user, Invitation.objects.get(), holds_link=True)
    Membership.objects.filter(user=user, organization=acme).update(role="member")
    talk(cast, acme)
    keeping.keep(
        own.public_id, io.BytesIO(b"{}"), filename="Bartholomew.jsonl", purpose="batch", size_bytes=2, file_id="file_1"
    )
    webhooks.make_endpoint("https://example.com/ada@home", own)
    scope = f"organization:{own.public_id}"
    Budget.objects.create(scope=scope, period="monthly", limit_nanousd=100, thresholds=["50%"])
    tag = {"user_id": user.public_id, "key_id": cast.key.public_id}
    settlement.settle(make_finished(own.public_id, **tag))
    alerts.deliver_due()


def test_whoever_does_not_know_the_password_deletes_nothing(cast: Cast, browser: Client) -> None:
    for password in ("", "wrong"):
        page = browser.post("/account/delete/", {"password": password})
        assert page.status_code == 200 and "This is not your password" in page.content.decode()
    for _ in range(10):
        page = browser.post("/account/delete/", {"password": "wrong"})
    assert "very often within a short time" in page.content.decode()
    assert User.objects.get(pk=cast.user.pk).is_active


def test_the_only_owner_hands_over_first(cast: Cast, browser: Client) -> None:
    acme, lonely = (organizations.create(cast.user, name).organization for name in ("Acme", "Lonely"))
    bob = User.objects.create_user("bob@example.com")
    member = Membership.objects.create(user=bob, organization=acme, role="member")
    page = browser.post("/account/delete/", {"password": PASSWORD}).content.decode()
    assert "You are the only owner of Acme" in page and User.objects.get(pk=cast.user.pk).is_active
    member.role = "owner"
    member.save()
    page = browser.get("/account/delete/").content.decode()
    assert "you leave" in page and "Lonely" in page and "which only you are in" in page
    browser.post("/account/delete/", {"password": PASSWORD})
    acme.refresh_from_db()
    lonely.refresh_from_db()
    assert acme.deleted_at is None and [each.user for each in acme.memberships.all()] == [bob]
    assert lonely.deleted_at is not None and not lonely.memberships.exists()


def test_the_last_administrator_stays(cast: Cast) -> None:
    cast.user.is_superuser = True
    cast.user.save()
    with pytest.raises(AiscaleError) as refused:
        personal_data.delete_account(cast.user)
    assert refused.value.code is Code.PERMISSION_DENIED
    User.objects.create_superuser("second@example.com")
    personal_data.delete_account(cast.user)
    with pytest.raises(AiscaleError) as refused:
        personal_data.delete_account(cast.user)
    assert refused.value.code is Code.ACCOUNT_INACTIVE


def test_a_failure_half_way_deletes_nothing(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is one transaction."""
    talk(cast, cast.organization)

    def die(*_: object) -> None:
        raise RuntimeError("the process dies here")

    monkeypatch.setattr("apps.gateway.personal_data.forget_person", die)
    with pytest.raises(RuntimeError):
        personal_data.delete_account(cast.user)
    user = User.objects.get(pk=cast.user.pk)
    assert user.email == "ada@example.com" and user.is_active and Conversation.objects.count() == 1
    assert ApiKey.objects.get(pk=cast.key.pk).revoked_at is None


def test_a_closed_organization_keeps_nothing_that_was_said(cast: Cast) -> None:
    acme = organizations.create(cast.user, "Acme").organization
    talk(cast, acme)
    mine = talk(cast, cast.organization)
    organizations.delete(cast.user, acme)
    assert [each.public_id for each in Conversation.objects.all()] == [mine]


def test_the_account_page_leads_everywhere(cast: Cast, browser: Client) -> None:
    page = browser.get("/account/").content.decode()
    for path in ("/accounts/email/", "/accounts/password/change/", "/account/delete/"):
        assert path in page and browser.get(path).status_code == 200
    assert Client().get("/account/").status_code == 302


async def test_an_answer_that_is_being_written_ends(cast: Cast, redis_url: str) -> None:
    request = CompletionRequest(
        request_id="req_1",
        source="chat",
        model=CHAT,
        messages=[ChatMessage(role="user", content="Hello")],
        max_tokens=5,
    )
    run = await completions.start(request, cast.caller)

    def go() -> None:
        conversation = talk(cast, cast.organization)
        answer = Message.objects.filter(conversation__public_id=conversation, role="assistant")
        answer.update(status="pending", job_id=run.job_id)
        personal_data.delete_account(cast.user)

    await on_thread(go)
    assert claim(Redis.from_url(redis_url)) == {}, "no worker is given it"
