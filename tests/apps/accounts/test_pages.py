"""Signing up, logging in, resetting a password, and the keys page."""

import re
from typing import Any

import pytest
from django.core import mail
from django.test import Client

from apps.accounts.callers import hash_key
from apps.accounts.models import ApiKey, User
from tests.apps.conftest import Cast

PASSWORD = "correct horse 9 battery"


@pytest.fixture
def browser(cast: Cast) -> Client:
    return Client()


def sign_up(browser: Client, email: str, password: str = PASSWORD) -> None:
    browser.post("/accounts/signup/", {"email": email, "password1": password})


def log_in(browser: Client, email: str, password: str) -> bool:
    browser.post("/accounts/login/", {"login": email, "password": password})
    return "_auth_user_id" in browser.session


def test_signing_up_gives_a_personal_organization_on_the_free_plan(browser: Client) -> None:
    sign_up(browser, "new@example.com")
    user = User.objects.get(email="new@example.com")
    assert "_auth_user_id" in browser.session
    assert user.personal_organization.plan.slug == "free"
    assert user.personal_organization.memberships.get(user=user).role == "owner"
    assert browser.post("/accounts/logout/").status_code == 302
    assert "_auth_user_id" not in browser.session
    assert not log_in(browser, "new@example.com", "wrong")
    assert log_in(browser, "NEW@example.com", PASSWORD)


@pytest.mark.parametrize("email", ["ada@example.com", "ADA@Example.COM"])
def test_an_address_signs_up_once(browser: Client, email: str) -> None:
    sign_up(browser, email)
    assert User.objects.count() == 1 and "_auth_user_id" not in browser.session


@pytest.mark.parametrize(
    ("email", "password"),
    [("no address", PASSWORD), ("x@example.com", "123"), ("x@example.com\x00", PASSWORD), ("", "")],
)
def test_bad_sign_ups_say_why(browser: Client, email: str, password: str) -> None:
    page = browser.post("/accounts/signup/", {"email": email, "password1": password})
    assert page.status_code == 200 and b"errorlist" in page.content
    assert User.objects.count() == 1


def test_a_forgotten_password_is_reset_by_mail(browser: Client) -> None:
    browser.post("/accounts/password/reset/", {"email": "ada@example.com"})
    [letter] = mail.outbox
    assert letter.subject == "Choose a new password for aiscale"
    assert "Thank you for using" not in letter.body and "comes from aiscale on" in letter.body
    link = re.search(r"http://\S+(/accounts/password/reset/key/\S+)", str(letter.body))
    assert link
    page = browser.get(link[1], follow=True)
    browser.post(
        page.redirect_chain[-1][0], {"password1": "another fine 7 phrase", "password2": "another fine 7 phrase"}
    )
    browser.post("/accounts/logout/")
    assert not log_in(browser, "ada@example.com", PASSWORD)
    assert log_in(browser, "ada@example.com", "another fine 7 phrase")


@pytest.mark.parametrize("email", ["ada@example.com", "nobody@example.com"])
def test_whoever_asks_for_a_mail_does_not_choose_where_its_links_lead(
    browser: Client, settings: Any, email: str
) -> None:
    settings.ALLOWED_HOSTS = ["*"]
    settings.PUBLIC_URL = "https://ai.example.org"
    browser.post("/accounts/password/reset/", {"email": email}, HTTP_HOST="evil.example.net")
    browser.post("/accounts/signup/", {"email": "new@example.com", "password1": PASSWORD}, HTTP_HOST="evil.example.net")
    assert len(mail.outbox) == 2
    for letter in mail.outbox:
        assert "https://ai.example.org/accounts/" in letter.body and "aiscale on ai.example.org" in letter.body
        assert "evil" not in letter.body + letter.subject


def test_guessing_passwords_is_slowed_down(browser: Client) -> None:
    statuses = [
        browser.post("/accounts/login/", {"login": "ada@example.com", "password": f"guess {n}"}).status_code
        for n in range(40)
    ]
    assert statuses[0] == 200 and 429 in statuses
    assert not log_in(browser, "ada@example.com", PASSWORD)


def test_a_key_is_shown_once_and_kept_as_a_hash(browser: Client, cast: Cast) -> None:
    assert browser.get("/account/keys/").status_code == 302
    browser.force_login(cast.user)
    page = browser.post("/account/keys/", {"name": "My site"})
    raw = re.search(rb"sk-aiscale-[\w-]{43}", page.content)
    assert raw and "no-store" in page.headers["cache-control"]
    key = ApiKey.objects.get(name="My site")
    assert key.digest == hash_key(raw[0].decode())
    again = browser.get("/account/keys/").content
    assert raw[0] not in again and b"My site" in again
    assert browser.post("/account/keys/", {"name": "a\x00b"}).status_code == 200
    assert ApiKey.objects.count() == 2


def test_only_ones_own_keys_can_be_revoked(browser: Client, cast: Cast) -> None:
    url = f"/account/keys/{cast.key.public_id}/revoke/"
    browser.force_login(User.objects.create_user("eve@example.com"))
    assert browser.post(url).status_code == 404
    cast.key.refresh_from_db()
    assert cast.key.state == "active"
    browser.force_login(cast.user)
    assert browser.get(url).status_code == 405
    assert browser.post(url).status_code == 302
    cast.key.refresh_from_db()
    assert cast.key.state == "revoked"


def test_every_page_tells_what_it_may_load(browser: Client) -> None:
    for path in ("/", "/accounts/login/", "/accounts/signup/", "/accounts/password/reset/", "/nothing/"):
        assert "default-src 'none'" in browser.get(path).headers["content-security-policy"], path
