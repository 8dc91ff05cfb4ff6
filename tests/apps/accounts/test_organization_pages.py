"""The pages of organizations: making one, its people, invitations, and what a stranger sees (nothing)."""

import re
from typing import Any

import pytest
from django.core import mail as outbox
from django.test import Client

from apps.accounts import invitations, mail, organizations
from apps.accounts.keys import create_member_key
from apps.accounts.models import ApiKey, Invitation, Membership, Organization, User
from tests.apps.conftest import Cast

PASSWORD = "correct horse 9 battery"


@pytest.fixture
def acme(cast: Cast) -> Organization:
    return organizations.create(cast.user, "Acme").organization


def log_in(user: User) -> Client:
    browser = Client()
    browser.force_login(user)
    return browser


def add(organization: Organization, role: str) -> User:
    user = User.objects.create_user(f"{role}@example.com")
    Membership.objects.create(user=user, organization=organization, role=role)
    return user


def place(user: User, organization: Organization) -> Membership:
    return Membership.objects.get(user=user, organization=organization)


def test_an_organization_is_made_and_worked_for(cast: Cast) -> None:
    browser = log_in(cast.user)
    assert b"Make an organization" in browser.get("/account/organizations/").content
    page = browser.post("/account/organizations/", {"name": "  Acme <b>Tools "}, follow=True)
    organization = Organization.objects.get(personal_of=None)
    assert page.redirect_chain[-1][0] == f"/account/organizations/{organization.public_id}/members/"
    assert b"Acme &lt;b&gt;Tools" in page.content and b"Acme <b>" not in page.content
    assert browser.session["organization"] == organization.public_id
    personal = cast.organization.public_id
    switched = browser.post(f"/account/organizations/{personal}/switch/", {"next": "/account/keys/"})
    assert switched.headers["location"] == "/account/keys/" and browser.session["organization"] == personal
    for elsewhere in ("https://evil.example/", "//evil.example", "javascript:alert(1)"):
        moved = browser.post(f"/account/organizations/{personal}/switch/", {"next": elsewhere})
        assert moved.headers["location"] == "/"
    page = browser.post("/account/organizations/", {"name": "x\x00"})
    assert page.status_code == 200 and b"invisible characters" in page.content


def test_the_whole_way_of_an_invitation_to_somebody_new(cast: Cast, acme: Organization) -> None:
    browser = log_in(cast.user)
    base = f"/account/organizations/{acme.public_id}"
    page = browser.post(f"{base}/invitations/", {"email": "New@Example.com", "role": "member"}, follow=True)
    assert b"new@example.com is invited" in page.content
    mail.send_due()
    link = re.search(r"http://[^/]+(/account/invitations/\S+)", str(outbox.outbox[-1].body))
    assert link
    # a mail program that looks at the link uses nothing up
    assert Client().get(link[1]).status_code == 200
    guest = Client()
    page = guest.get(link[1])
    assert b"Join Acme" in page.content and b"ada@example.com" in page.content
    signup = re.search(rb'href="(/accounts/signup/[^"]+)"', page.content)
    assert signup and b'value="new@example.com"' in guest.get(signup[1].decode().replace("&amp;", "&")).content
    letters = len(outbox.outbox)
    values = {"email": "NEW@example.com", "password1": PASSWORD, "next": link[1]}
    page = guest.post("/accounts/signup/", values, follow=True)
    assert b"You are a member of Acme" in page.content
    user = User.objects.get(email="new@example.com")
    assert place(user, acme).role == "member" and user.personal_organization.memberships.get().role == "owner"
    assert invitations.is_confirmed(user) and len(outbox.outbox) == letters, "the link confirmed the address already"
    assert Client().get(link[1]).status_code == 410


def test_who_signs_up_with_another_address_does_not_join(cast: Cast, acme: Organization) -> None:
    made = invitations.invite(cast.user, acme, "bob@example.com", "admin")
    link = f"/account/invitations/{invitations.make_token(made)}/"
    guest = Client()
    guest.get(link)
    page = guest.post(
        "/accounts/signup/", {"email": "eve@example.com", "password1": PASSWORD, "next": link}, follow=True
    )
    assert b"this invitation is for another address" in page.content
    eve = User.objects.get(email="eve@example.com")
    assert not Membership.objects.filter(user=eve, organization=acme).exists()
    assert not invitations.is_confirmed(eve)
    page = guest.post(link, {"answer": "join"}, follow=True)
    assert b"is for another address" in page.content
    assert not Membership.objects.filter(user=eve, organization=acme).exists()


def test_somebody_with_an_account_joins_or_declines(cast: Cast, acme: Organization) -> None:
    bob = User.objects.create_user("bob@example.com", PASSWORD)
    made = invitations.invite(cast.user, acme, "bob@example.com", "billing")
    link = f"/account/invitations/{invitations.make_token(made)}/"
    guest = Client()
    assert guest.post(link, {"answer": "join"}).headers["location"].startswith("/accounts/login/?next=")
    page = guest.post("/accounts/login/", {"login": "bob@example.com", "password": PASSWORD, "next": link}, follow=True)
    assert b"Join Acme" in page.content
    page = guest.post(link, {"answer": "join"}, follow=True)
    assert b"You are a member of Acme now." in page.content and place(bob, acme).role == "billing"
    other = invitations.invite(cast.user, acme, "cyd@example.com", "member")
    declined = Client().post(f"/account/invitations/{invitations.make_token(other)}/", {"answer": "decline"})
    assert declined.status_code == 302
    other.refresh_from_db()
    assert other.state == Invitation.State.DECLINED
    assert Client().get("/account/invitations/inv_1:forged/").status_code == 404


def test_confirmed_addresses_see_their_invitations(cast: Cast, acme: Organization) -> None:
    bob = User.objects.create_user("bob@example.com")
    invitations.invite(cast.user, acme, "bob@example.com", "member")
    page = log_in(bob).get("/account/organizations/")
    assert b"Acme" not in page.content and b"confirm your e-mail address" in page.content
    invitations.confirm_address(bob)
    page = log_in(bob).get("/account/organizations/")
    assert b"Acme" in page.content and re.search(rb'href="/account/invitations/inv_[^"]+"', page.content)


def test_people_are_managed_on_their_page(cast: Cast, acme: Organization) -> None:
    bob = add(acme, "member")
    browser, base = log_in(cast.user), f"/account/organizations/{acme.public_id}"
    member = f"{base}/members/{place(bob, acme).public_id}"
    key, _ = create_member_key(acme, bob, "Bob's script")
    browser.post(f"{member}/role/", {"role": "admin"})
    assert place(bob, acme).role == "admin"
    page = browser.get(f"{member}/remove/")
    assert b"This key is refused within a second" in page.content and key.hint.encode() in page.content
    assert b"Bob&#x27;s script" in page.content
    page = browser.get(f"{member}/transfer/")
    assert b"becomes an owner" in page.content
    browser.post(f"{member}/transfer/")
    assert (place(bob, acme).role, place(cast.user, acme).role) == ("owner", "admin")
    page = browser.post(f"{member}/remove/", follow=True)
    assert page.status_code == 403 and b"Only an owner may remove an owner" in page.content
    bobs = log_in(bob)
    page = bobs.post(f"{base}/leave/", follow=True)
    assert b"needs an owner, and this is the only one" in page.content
    bobs.post(f"{base}/members/{place(cast.user, acme).public_id}/remove/")
    assert not Membership.objects.filter(user=cast.user, organization=acme).exists()
    assert browser.get(f"{base}/members/").status_code == 404
    # whoever worked for it works for their own one again
    assert b"Personal" in browser.get("/account/organizations/").content


def test_an_organization_is_renamed_and_deleted(cast: Cast, acme: Organization) -> None:
    browser, base = log_in(cast.user), f"/account/organizations/{acme.public_id}"
    assert b"has its new name" in browser.post(f"{base}/", {"name": "Better"}, follow=True).content
    assert b"Give the organization a name" in browser.post(f"{base}/", {"name": " "}, follow=True).content
    assert b"This is not its name" in browser.post(f"{base}/delete/", {"name": "Acme"}).content
    browser.post(f"{base}/delete/", {"name": "Better"})
    assert browser.get(f"{base}/").status_code == 404
    acme.refresh_from_db()
    assert acme.deleted_at is not None and not ApiKey.objects.filter(organization=acme, revoked_at=None).exists()


def test_nobody_is_invited_without_end(cast: Cast, acme: Organization) -> None:
    browser = log_in(cast.user)
    for number in range(101):
        page = browser.post(
            f"/account/organizations/{acme.public_id}/invitations/",
            {"email": f"u{number}@example.com", "role": "member"},
        )
    assert page.status_code == 302 and acme.invitations.count() == 100
    assert b"very often" in browser.get(page.headers["location"]).content


@pytest.mark.parametrize("count", [1, 200])
def test_pages_ask_as_often_for_two_hundred_members_as_for_one(
    cast: Cast, acme: Organization, count: int, django_assert_max_num_queries: Any
) -> None:
    """D2: the number of queries of a page does not depend on what it lists."""
    users = [User(email=f"u{n:03}@example.com", public_id=f"usr_{n}") for n in range(count)]
    User.objects.bulk_create(users)
    Membership.objects.bulk_create(
        [Membership(user=user, organization=acme, public_id=f"mem_{user.public_id}") for user in users]
    )
    for number in range(min(count, 20)):
        invitations.invite(cast.user, acme, f"i{number}@example.com", "member")
    browser, base = log_in(cast.user), f"/account/organizations/{acme.public_id}"
    browser.get("/account/organizations/")
    for path, most in (
        (f"{base}/members/", 6),
        (f"{base}/members/?page=3&q=u", 6),
        (f"{base}/", 3),
        ("/account/organizations/", 4),
    ):
        with django_assert_max_num_queries(most):
            page = browser.get(path)
        assert page.status_code == 200, path
    listed = browser.get(f"{base}/members/?page=2").content.decode()
    assert ("Page 2 of 5" in listed) == (count == 200)
    assert ("u199@example.com" in browser.get(f"{base}/members/?q=U199").content.decode()) == (count == 200)
