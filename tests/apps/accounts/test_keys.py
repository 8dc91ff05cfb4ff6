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
from apps.accounts import audit, key_limits, organizations
from apps.accounts.keys import KeyTerms, change_key, create_key, create_member_key, read_terms, revoke_key
from apps.accounts.models import ApiKey, AuditEvent, Membership, Organization, User
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
    assert f"Only {CHAT}." in shown and "5 requests an hour." in shown and "Never" in shown


def test_one_request_is_one(cast: Cast) -> None:
    browser = work_for(cast.user, cast.organization)
    browser.post("/account/keys/", {"name": "Rare", "requests": "1", "window": "60", "tokens_per_minute": "1"})
    assert "1 request a minute. 1 token a minute." in browser.get("/account/keys/").content.decode()


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


def make_member_key(organization: Organization, **terms: object) -> ApiKey:
    return create_key(organization, add(organization, "member"), "Site", KeyTerms(**terms))[0]  # type: ignore[arg-type]


def test_an_owner_changes_what_a_key_may_do(cast: Cast, acme: Organization, redis_url: str) -> None:
    browser = work_for(cast.user, acme)
    key = make_member_key(acme, requests_per_window=7, window_s=100, expires_at=timezone.now() + timedelta(days=3))
    path = f"/account/keys/{key.public_id}/"
    assert path in browser.get("/account/keys/").content.decode()
    shown = browser.get(path).content.decode()
    assert '<option value="100" selected>100 seconds</option>' in shown and 'type="datetime-local"' in shown
    expires = f"{key.expires_at:%Y-%m-%dT%H:%M}"
    values = {"name": "Shop", "models": [CHAT], "requests": "9", "window": "100", "max_in_flight": "2"}
    assert browser.post(path, values | {"expires": expires, "monthly_limit": "1.5"}).status_code == 302
    changed = ApiKey.objects.get(pk=key.pk)
    assert (changed.name, changed.requests_per_window, changed.window_s, changed.max_in_flight) == ("Shop", 9, 100, 2)
    assert changed.allowed_models == [CHAT] and changed.expires_at == key.expires_at, "its seconds are not cut off"
    mirrored = Redis.from_url(redis_url, decode_responses=True).hgetall(names.api_key(key.digest))
    assert mirrored["models"] == CHAT and mirrored["requests_per_window"] == "9"  # type: ignore[index]
    told = AuditEvent.objects.get(action="key.change").details["changed"]
    assert told["requests_per_window"] == {"from": 7, "to": 9} and "expires_at" not in told
    assert told["monthly_limit_usd"] == {"from": None, "to": "$1.50"}
    assert "$0.00 of $1.50 spent this month." in browser.get("/account/keys/").content.decode()
    assert browser.post(path, {"name": "Shop"}).status_code == 302
    [bare] = key_limits.attach([ApiKey.objects.get(pk=key.pk)])
    assert read_terms(bare) == KeyTerms(), "what is left empty on the page is no limit"


@pytest.mark.parametrize(
    "values", [{"expires": "2020-01-01T00:00"}, {"expires": "x"}, {"requests": "0"}, {"models": "no"}]
)
def test_a_change_that_cannot_be_changes_nothing(cast: Cast, acme: Organization, values: dict[str, str]) -> None:
    key, browser = make_member_key(acme, max_in_flight=3), work_for(cast.user, acme)
    page = browser.post(f"/account/keys/{key.public_id}/", values)
    assert page.status_code == 200 and b"errorlist" in page.content
    assert ApiKey.objects.get(pk=key.pk).max_in_flight == 3 and not AuditEvent.objects.filter(action="key.change")


def test_who_may_not_change_a_key(cast: Cast, acme: Organization) -> None:
    key = make_member_key(acme, max_in_flight=3)
    path, maker = f"/account/keys/{key.public_id}/", key.created_by
    member = work_for(maker, acme)
    assert member.get(path).status_code == member.post(path, {}).status_code == 403, "an admin's limit is not lifted"
    assert path.encode() + b'"' not in member.get("/account/keys/").content
    stranger = User.objects.create_user("eve@example.com")
    assert work_for(stranger, acme).get(path).status_code == 404
    place = Membership.objects.get(user=maker, organization=acme)
    with pytest.raises(AiscaleError) as refused:
        change_key(place, key, {"max_in_flight": None}, by=audit.by_user(maker))
    assert refused.value.code == Code.PERMISSION_DENIED
    revoke_key(key)
    owner = work_for(cast.user, acme)
    assert all(b"This key is revoked" in page.content for page in (owner.get(path), owner.post(path, {"name": "x"})))
    assert ApiKey.objects.get(pk=key.pk).max_in_flight == 3
