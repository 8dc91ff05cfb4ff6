"""Invitations reach their address, work once, for that address alone, and tell nothing of accounts."""

import json
import re
from collections.abc import Callable
from datetime import timedelta

import pytest
from allauth.account.models import EmailAddress
from django.core import mail as outbox
from django.core.mail.backends.locmem import EmailBackend
from django.utils import timezone
from kombu.exceptions import OperationalError
from redis import Redis

from aiscale.errors import AiscaleError, Code
from aiscale.wire.broker import BROKER_PREFIX
from apps.accounts import invitations, mail, members, organizations, tasks
from apps.accounts.models import AuditEvent, Invitation, Membership, Organization, User
from tests.apps.conftest import Cast


def refuse(work: Callable[[], object]) -> Code:
    with pytest.raises(AiscaleError) as refused:
        work()
    assert len(refused.value.message) > 20
    return refused.value.code


@pytest.fixture
def acme(cast: Cast) -> Organization:
    return organizations.create(cast.user, "Acme").organization


def read_link() -> str:
    """Return the token in the last mail."""
    found = re.search(r"/account/invitations/(\S+?)/", str(outbox.outbox[-1].body))
    assert found
    return found[1]


def confirmed(email: str) -> User:
    user = User.objects.create_user(email)
    invitations.confirm_address(user)
    return user


def test_a_mail_brings_a_link_that_works_once(cast: Cast, acme: Organization) -> None:
    made = invitations.invite(cast.user, acme, " Bob@Example.com ", "admin")
    assert made.email == "bob@example.com"
    assert mail.send_due() == 1 and mail.send_due() == 0
    letter = outbox.outbox[-1]
    assert letter.to == ["bob@example.com"] and letter.subject == "You are invited to Acme on aiscale"
    assert "ada@example.com invites you" in str(letter.body) and "with the role admin" in str(letter.body)
    found = invitations.find_by_token(read_link())
    assert found is not None and found.pk == made.pk
    bob = User.objects.create_user("BOB@example.com")
    assert invitations.accept(bob, found, holds_link=True).role == "admin"
    assert invitations.is_confirmed(bob), "the mail reached its address"
    assert refuse(lambda: invitations.accept(bob, found, holds_link=True)) is Code.INVITATION_ENDED
    assert [event.action for event in AuditEvent.objects.order_by("id") if "invitation" in event.action] == [
        "invitation.create",
        "invitation.accept",
    ]


def test_a_used_link_lets_nobody_back_in(cast: Cast, acme: Organization) -> None:
    bob = confirmed("bob@example.com")
    made = invitations.invite(cast.user, acme, bob.email, "member")
    invitations.accept(bob, made, holds_link=True)
    members.remove(cast.user, acme, Membership.objects.get(user=bob, organization=acme).public_id)
    assert refuse(lambda: invitations.accept(bob, made, holds_link=True)) is Code.INVITATION_ENDED
    assert refuse(lambda: invitations.accept(bob, made, holds_link=False)) is Code.INVITATION_ENDED


def test_only_its_address_accepts(cast: Cast, acme: Organization) -> None:
    made = invitations.invite(cast.user, acme, "bob@example.com", "member")
    eve, bob = confirmed("eve@example.com"), User.objects.create_user("bob@example.com")
    assert refuse(lambda: invitations.accept(eve, made, holds_link=True)) is Code.PERMISSION_DENIED
    # an account with that address that nobody confirmed may be anybody's
    assert refuse(lambda: invitations.accept(bob, made, holds_link=False)) is Code.PERMISSION_DENIED
    assert invitations.list_for(bob) == [] and invitations.list_for(eve) == []
    EmailAddress.objects.create(user=bob, email="Bob@Example.com", verified=True, primary=True)
    assert invitations.list_for(bob) == [made]
    assert invitations.accept(bob, made, holds_link=False).role == "member"


@pytest.mark.parametrize("state", ["expired", "revoked", "declined", "organization deleted"])
def test_links_that_no_longer_work(cast: Cast, acme: Organization, state: str) -> None:
    made = invitations.invite(cast.user, acme, "bob@example.com", "member")
    token = invitations.make_token(made)
    if state == "expired":
        Invitation.objects.update(expires_at=timezone.now() - timedelta(seconds=1))
    elif state == "revoked":
        invitations.revoke(cast.user, acme, made.public_id)
    elif state == "declined":
        invitations.decline(None, made, holds_link=True)
    else:
        organizations.delete(cast.user, acme)
    bob = confirmed("bob@example.com")
    assert refuse(lambda: invitations.accept(bob, made, holds_link=True)) is Code.INVITATION_ENDED
    assert invitations.list_for(bob) == []
    found = invitations.find_by_token(token)
    assert (found is None) == (state == "organization deleted")
    assert mail.send_due() == 0


def test_links_that_nobody_made(cast: Cast, acme: Organization) -> None:
    made = invitations.invite(cast.user, acme, "bob@example.com", "member")
    token = invitations.make_token(made)
    for wrong in ("", made.public_id, token[:-1], token + "x", f"{made.public_id}:", "\x00", ":", "inv_1:abc"):
        assert invitations.find_by_token(wrong) is None, wrong


def test_inviting_again_renews_and_sends_again(cast: Cast, acme: Organization) -> None:
    first = invitations.invite(cast.user, acme, "bob@example.com", "member")
    mail.send_due()
    Invitation.objects.update(expires_at=timezone.now() - timedelta(days=1))
    again = invitations.invite(cast.user, acme, "BOB@example.com", "billing")
    assert again.pk == first.pk and again.role == "billing" and not again.is_expired
    invitations.resend(cast.user, acme, first.public_id)
    assert mail.send_due() == 1 and len(outbox.outbox) == 2
    invitations.revoke(cast.user, acme, first.public_id)
    assert refuse(lambda: invitations.resend(cast.user, acme, first.public_id)) is Code.NOT_FOUND
    assert invitations.invite(cast.user, acme, "bob@example.com", "member").pk != first.pk


def test_the_inviting_side_learns_nothing_of_accounts(cast: Cast, acme: Organization) -> None:
    confirmed("has@example.com")
    shown = []
    for email in ("has@example.com", "new@example.com"):
        made = invitations.invite(cast.user, acme, email, "member")
        mail.send_due()
        letter = outbox.outbox[-1]
        text = str(letter.body).replace(email, "").replace(invitations.make_token(made), "")
        shown.append((made.state, made.role, letter.subject, text))
    assert shown[0] == shown[1]


def test_who_may_invite_whom(cast: Cast, acme: Organization) -> None:
    users = {role: User.objects.create_user(f"{role}@example.com") for role in ("admin", "member", "billing")}
    for role, user in users.items():
        Membership.objects.create(user=user, organization=acme, role=role)
    stranger = User.objects.create_user("stranger@example.com")
    invite = invitations.invite
    invite(users["admin"], acme, "x@example.com", "admin")
    for by, role, code in (
        (users["admin"], "owner", Code.PERMISSION_DENIED),
        (users["member"], "member", Code.PERMISSION_DENIED),
        (users["billing"], "member", Code.PERMISSION_DENIED),
        (stranger, "member", Code.NOT_FOUND),
        (cast.user, "emperor", Code.INVALID_REQUEST),
    ):
        assert refuse(lambda: invite(by, acme, "y@example.com", role)) is code, (by, role)  # noqa: B023
    owner_to_be = invite(cast.user, acme, "z@example.com", "owner")
    for verb in (invitations.revoke, invitations.resend):
        assert refuse(lambda: verb(users["admin"], acme, owner_to_be.public_id)) is Code.PERMISSION_DENIED  # noqa: B023
        assert refuse(lambda: verb(cast.user, cast.organization, owner_to_be.public_id)) is Code.NOT_FOUND  # noqa: B023
    work = lambda: invite(users["admin"], acme, "z@example.com", "member")  # noqa: E731
    assert refuse(work) is Code.PERMISSION_DENIED, "an admin takes no invitation from an owner-to-be"
    assert refuse(lambda: invite(cast.user, acme, "MEMBER@example.com", "admin")) is Code.ALREADY_MEMBER
    assert refuse(lambda: invite(cast.user, cast.organization, "y@example.com", "member")) is Code.INVALID_REQUEST


@pytest.mark.parametrize(
    "email", ["", "nobody", "a@b", "a\x00@example.com", "a@example.com\nBcc: b@example.com", "x" * 250 + "@example.com"]
)
def test_bad_addresses(cast: Cast, acme: Organization, email: str) -> None:
    assert refuse(lambda: invitations.invite(cast.user, acme, email, "member")) is Code.INVALID_REQUEST
    assert not Invitation.objects.exists()


def test_a_mail_server_that_is_down_loses_no_mail(
    cast: Cast, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitations.invite(cast.user, acme, "bob@example.com", "member")

    def fail(self: EmailBackend, messages: object) -> int:
        raise ConnectionRefusedError

    with monkeypatch.context() as broken:
        broken.setattr(EmailBackend, "send_messages", fail)
        assert mail.send_due() == 0
        waiting = Invitation.objects.get()
        assert waiting.send_at is not None and waiting.send_at > timezone.now() and waiting.send_attempts == 1
    assert mail.send_due() == 0, "not due yet"
    Invitation.objects.update(send_at=timezone.now())
    assert mail.send_due() == 1 and len(outbox.outbox) == 1


def test_a_mail_is_sent_at_once_by_whoever_runs_tasks(cast: Cast, acme: Organization, redis_url: str) -> None:
    client = Redis.from_url(redis_url)
    queue = f"{BROKER_PREFIX}default"
    client.delete(queue)
    made = invitations.invite(cast.user, acme, "bob@example.com", "member")
    waiting = [json.loads(each)["headers"]["task"] for each in client.lrange(queue, 0, -1)]  # type: ignore[union-attr]
    assert waiting == ["aiscale.accounts.send_invitations"]
    tasks.send_invitations()
    assert [letter.to for letter in outbox.outbox] == [["bob@example.com"]]
    invitations.resend(cast.user, acme, made.public_id)
    assert client.llen(queue) == 2


def test_without_a_broker_a_mail_waits_for_the_next_round(
    cast: Cast, acme: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(*_: object, **__: object) -> None:
        raise OperationalError("nobody listens")

    monkeypatch.setattr(tasks.send_invitations, "apply_async", nobody)
    made = invitations.invite(cast.user, acme, "bob@example.com", "member")
    assert Invitation.objects.get(pk=made.pk).send_at is not None
    assert mail.send_due() == 1
