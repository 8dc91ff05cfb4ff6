"""Keys belong to an organization, narrow what it may do, and are seen and revoked by whom they concern."""

from datetime import timedelta

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from redis import Redis

from aiscale.errors import AiscaleError, Code
from aiscale.wire import keys as names
from apps.accounts import organizations
from apps.accounts.keys import KeyTerms, create_key, create_member_key
from apps.accounts.models import ApiKey, Membership, Organization, User
from tests.apps.conftest import Cast

CHAT = "smollm2-135m-instruct"


@pytest.fixture
def acme(cast: Cast) -> Organization:
    return organizations.create(cast.user, "Acme").organization


def add(organization: Organization, role: str) -> User:
    user = User.objects.create_user(f"{role}@example.com")
    Membership.objects.create(user=user, organization=organization, role=role)
    return user


def work_for(user: User, organization: Organization) -> Client:
    browser = Client()
    browser.force_login(user)
    browser.post(f"/account/organizations/{organization.public_id}/switch/")
    return browser


def test_a_key_is_made_with_its_limits(cast: Cast, acme: Organization, redis_url: str) -> None:
    browser = work_for(cast.user, acme)
    values = {"name": "Site", "expires": "30", "models": [CHAT], "requests": "5", "window": "3600"}
    page = browser.post("/account/keys/", values | {"tokens_per_minute": "1000", "max_in_flight": "2"})
    assert b"Your new key" in page.content
    key = ApiKey.objects.get(name="Site")
    assert key.organization == acme and key.allowed_models == [CHAT] and not key.can_manage
    assert (key.requests_per_window, key.window_s, key.tokens_per_minute, key.max_in_flight) == (5, 3600, 1000, 2)
    assert key.expires_at is not None and timedelta(days=29) < key.expires_at - timezone.now() < timedelta(days=31)
    mirrored = Redis.from_url(redis_url).hgetall(names.api_key(key.digest))
    assert mirrored[b"models"] == CHAT.encode() and mirrored[b"requests_per_window"] == b"5"  # type: ignore[index]
    shown = browser.get("/account/keys/").content.decode()
    assert f"Only {CHAT}." in shown and "5 requests in 3600 s." in shown and "Never" in shown


@pytest.mark.parametrize(
    "values",
    [{"models": ["nope"]}, {"requests": "0"}, {"tokens_per_minute": "-1"}, {"max_in_flight": "x"}, {"expires": "1000"}],
)
def test_limits_that_cannot_be(cast: Cast, values: dict[str, str]) -> None:
    browser = work_for(cast.user, cast.organization)
    page = browser.post("/account/keys/", {"name": "bad"} | values)
    assert page.status_code == 200 and b"errorlist" in page.content and b"Your new key" not in page.content
    assert not ApiKey.objects.filter(name="bad").exists()


@pytest.mark.parametrize(
    ("terms", "param"),
    [
        (KeyTerms(expires_at=timezone.now() - timedelta(days=1)), "expires_at"),
        (KeyTerms(requests_per_window=5), "window_s"),
        (KeyTerms(window_s=5), "window_s"),
        (KeyTerms(max_in_flight=0), "max_in_flight"),
        (KeyTerms(tokens_per_minute=3_000_000_000), "tokens_per_minute"),
        (KeyTerms(allowed_models=("a,b",)), "allowed_models"),
        (KeyTerms(allowed_models=("",)), "allowed_models"),
        (KeyTerms(allowed_models=("a\x00",)), "allowed_models"),
    ],
)
def test_terms_that_cannot_be(cast: Cast, terms: KeyTerms, param: str) -> None:
    with pytest.raises(AiscaleError) as refused:
        create_key(cast.organization, cast.user, "bad", terms)
    assert (refused.value.code, refused.value.param) == (Code.INVALID_REQUEST, param)


def test_members_see_their_own_keys_and_admins_all(cast: Cast, acme: Organization) -> None:
    users = {role: add(acme, role) for role in ("admin", "member", "billing")}
    keys = {role: create_key(acme, user, f"key of {role}")[0] for role, user in users.items()}
    strange, _ = create_key(cast.organization, cast.user, "elsewhere")
    for role, seen in (("admin", {"admin", "member", "billing"}), ("member", {"member"}), ("billing", {"billing"})):
        page = work_for(users[role], acme).get("/account/keys/").content.decode()
        assert {each for each in users if f"key of {each}" in page} == seen
        assert "elsewhere" not in page
        assert ("Create a key" in page) == (role != "billing")
    member = work_for(users["member"], acme)
    for other in (keys["admin"], keys["billing"], strange):
        assert member.post(f"/account/keys/{other.public_id}/revoke/").status_code == 404
    assert member.post(f"/account/keys/{keys['member'].public_id}/revoke/").status_code == 302
    assert work_for(users["admin"], acme).post(f"/account/keys/{keys['billing'].public_id}/revoke/").status_code == 302
    states = {role: ApiKey.objects.get(pk=key.pk).state for role, key in keys.items()}
    assert states == {"admin": "active", "member": "revoked", "billing": "revoked"}
    assert ApiKey.objects.get(pk=strange.pk).state == "active"


def test_the_role_billing_makes_none(cast: Cast, acme: Organization) -> None:
    page = work_for(add(acme, "billing"), acme).post("/account/keys/", {"name": "x"})
    assert page.status_code == 200 and b"your role" in page.content.lower()
    assert not ApiKey.objects.filter(organization=acme).exists()


def test_there_is_a_most_of_active_keys(cast: Cast, acme: Organization, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.accounts.keys.MAX_ACTIVE", 2)
    for _ in range(2):
        create_member_key(acme, cast.user)
    with pytest.raises(AiscaleError) as refused:
        create_member_key(acme, cast.user)
    assert refused.value.code is Code.TOO_MANY_OBJECTS
    create_member_key(cast.organization, cast.user)


def test_the_page_asks_few_questions_and_turns(cast: Cast, acme: Organization) -> None:
    """D2: as many queries for 120 keys of many people as for one."""
    browser, counts = work_for(cast.user, acme), []
    for number in (1, 120):
        ApiKey.objects.bulk_create(
            ApiKey(
                organization=acme,
                created_by=User.objects.create_user(f"u{number}-{n}@example.com"),
                public_id=f"key_{number}_{n}",
                digest=f"{number}-{n}",
                hint="abcd",
            )
            for n in range(number)
        )
        browser.get("/account/keys/")
        with CaptureQueriesContext(connection) as queries:
            page = browser.get("/account/keys/?page=2")
        counts.append(len(queries))
    assert counts[0] == counts[1] <= 7
    assert b"Page 2 of 3" in page.content
