"""Owners and admins say which of their servers are told of alerts: the secret is shown once, may be changed, and can be tried."""

import dataclasses
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from apps.accounts import organizations, rates
from apps.accounts.models import AuditEvent, Membership, User
from apps.spend import alerts, endpoints, webhooks
from apps.spend.alert_models import AlertDelivery, WebhookEndpoint
from tests.apps.conftest import Cast
from tests.apps.spend.test_alerts import Receiver, receiver, spend_past

__all__ = ["receiver"]
SECRET = re.compile(r"whsec_[A-Za-z0-9+/=]{32}")


class Owner:
    """Hold an owner's browser and the pages of their organization."""

    def __init__(self, cast: Cast) -> None:
        self.user = cast.user
        self.organization = organizations.create(cast.user, "Acme").organization
        self.browser = Client()
        self.browser.force_login(cast.user)
        self.page = reverse("spend:webhooks", args=[self.organization.public_id])

    def add(self, url: str) -> str:
        return self.browser.post(self.page, {"url": url}).content.decode()

    def act(self, what: str, endpoint: WebhookEndpoint) -> Any:
        path = reverse(f"spend:{what}_webhook", args=[self.organization.public_id, endpoint.public_id])
        return self.browser.post(path, follow=True)


@pytest.fixture
def owner(cast: Cast, settings: Any) -> Iterator[Owner]:
    settings.ENV = dataclasses.replace(settings.ENV, upstreams_private=True)
    yield Owner(cast)


def test_an_endpoint_is_added_and_its_secret_shown_once(owner: Owner) -> None:
    page = owner.add(" https://example.com/hooks ")
    endpoint = WebhookEndpoint.objects.get()
    found = SECRET.search(page)
    assert found and endpoint.organization == owner.organization and endpoint.url == "https://example.com/hooks"
    assert found[0] not in endpoint.sealed_secret
    again = owner.browser.get(owner.page).content.decode()
    assert "https://example.com/hooks" in again and not SECRET.search(again)
    event = AuditEvent.objects.get(action="webhook.create")
    assert event.organization_id == owner.organization.public_id and found[0] not in str(event.details)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "no web address"),
        ("ftp://example.com", "no web address"),
        ("https://exa mple.com", "no web address"),
        ("https://[::1", "no web address"),
        ("https://example.com:99999/", "no web address"),
        ("https://example.com/" + "a" * 500, "no web address"),
        ("https://ada:secret@example.com/", "Leave name and password out"),
        ("http://example.com/", "begin with https://"),
        ("https://localhost/", "private"),
        ("https://127.0.0.1/", "private"),
        ("https://[::1]/", "private"),
        ("https://169.254.169.254/latest", "private"),
    ],
)
def test_an_address_that_cannot_be_told_is_refused(owner: Owner, settings: Any, url: str, why: str) -> None:
    settings.ENV = dataclasses.replace(settings.ENV, upstreams_private=False)
    assert why in owner.add(url)
    assert not WebhookEndpoint.objects.exists()


def test_there_are_not_too_many_and_none_twice(owner: Owner) -> None:
    for n in range(endpoints.MAX_ENDPOINTS):
        owner.add(f"https://example.com/{n}")
    assert "told already, the most there can be" in owner.add("https://example.com/another")
    assert "This URL is told already" in owner.add("https://example.com/0")
    assert WebhookEndpoint.objects.count() == endpoints.MAX_ENDPOINTS


def test_a_test_message_says_whether_it_arrived(owner: Owner, receiver: Receiver) -> None:
    owner.add(receiver.url)
    endpoint = WebhookEndpoint.objects.get()
    assert "took the test message" in owner.act("test", endpoint).content.decode()
    receiver.status = 500
    page = owner.act("test", endpoint).content.decode()
    assert "it answered 500" in page and "Last message: it answered 500" in page
    assert receiver.taken[0][1].startswith(b'{"type":"test"')


def test_a_new_secret_signs_beside_the_old_one_for_a_day(owner: Owner, receiver: Receiver) -> None:
    old = SECRET.search(owner.add(receiver.url))
    endpoint = WebhookEndpoint.objects.get()
    new = SECRET.search(owner.act("rotate", endpoint).content.decode())
    assert old and new and old[0] != new[0]
    owner.act("test", endpoint)
    headers, body = receiver.taken[-1]
    signed = (headers["webhook-id"], int(headers["webhook-timestamp"]), body)
    expected = [webhooks.sign(secret, *signed) for secret in (new[0], old[0])]
    assert headers["webhook-signature"].split() == expected
    WebhookEndpoint.objects.update(old_secret_until=timezone.now() - timedelta(seconds=1))
    owner.act("test", endpoint)
    headers, body = receiver.taken[-1]
    signed = (headers["webhook-id"], int(headers["webhook-timestamp"]), body)
    assert headers["webhook-signature"] == webhooks.sign(new[0], *signed)


def test_a_deleted_endpoint_is_told_nothing(owner: Owner, receiver: Receiver) -> None:
    organization, _ = spend_past()
    Membership.objects.create(user=owner.user, organization=organization, role="owner")
    owner.organization = organization
    endpoint, _ = webhooks.make_endpoint(receiver.url, organization)
    receiver.status = 503
    alerts.deliver_due()
    page = owner.browser.get(reverse("spend:webhooks", args=[organization.public_id])).content.decode()
    assert "Passed 50%" in page and "Tried once: it answered 503" in page
    owner.act("delete", endpoint)
    AlertDelivery.objects.update(due_at=timezone.now())
    receiver.taken.clear()
    alerts.deliver_due()
    assert receiver.taken == [] and not WebhookEndpoint.objects.exists()
    assert AuditEvent.objects.filter(action="webhook.delete").count() == 1


def test_who_may_not_manage_sees_nothing(owner: Owner) -> None:
    owner.add("https://example.com/hooks")
    endpoint = WebhookEndpoint.objects.get()
    for role, status in (("member", 403), ("billing", 403), ("", 404)):
        user = User.objects.create_user(f"{role or 'stranger'}@example.com")
        if role:
            Membership.objects.create(user=user, organization=owner.organization, role=role)
        owner.browser.force_login(user)
        assert owner.browser.get(owner.page).status_code == status
        for what in ("test", "rotate", "delete"):
            assert owner.act(what, endpoint).status_code == status
    # and an owner of another organization does not reach it through their own
    mine = organizations.create(user, "Mine").organization
    for what in ("test", "rotate", "delete"):
        path = reverse(f"spend:{what}_webhook", args=[mine.public_id, endpoint.public_id])
        assert owner.browser.post(path).status_code == 404
    assert WebhookEndpoint.objects.count() == 1


def test_trying_often_is_limited(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    owner.add("https://example.invalid/hooks")
    monkeypatch.setattr("apps.spend.webhook_views.TEST_WEBHOOK", rates.Limit("test.webhook", rate="2/d"))
    endpoint = WebhookEndpoint.objects.get()
    pages = [owner.act("test", endpoint).content.decode() for _ in range(3)]
    assert "its name cannot be found" in pages[1] and "very often within a short time" in pages[2]


def test_an_endpoint_pauses_and_goes_on(owner: Owner, receiver: Receiver) -> None:
    organization, _ = spend_past()
    Membership.objects.create(user=owner.user, organization=organization, role="owner")
    owner.organization = organization
    endpoint, _ = webhooks.make_endpoint(receiver.url, organization)
    receiver.status = 503
    alerts.deliver_due()
    page = reverse("spend:pause_webhook", args=[organization.public_id, endpoint.public_id])
    for _ in range(2):
        assert b"told nothing until you resume it" in owner.browser.post(page, {"active": "no"}, follow=True).content
    receiver.status = 200
    AlertDelivery.objects.filter(endpoint=endpoint).update(due_at=timezone.now())
    receiver.taken.clear()
    assert alerts.deliver_due() == 0 and receiver.taken == [], "what is owed to it waits"
    assert b"Send again" not in owner.browser.get(reverse("spend:webhooks", args=[organization.public_id])).content
    owner.browser.post(page, {"active": "yes"})
    assert alerts.deliver_due() == 1 and len(receiver.taken) == 1
    changes = AuditEvent.objects.filter(action__startswith="webhook.").values_list("action", flat=True)
    assert sorted(changes) == ["webhook.pause", "webhook.resume"]


def test_what_the_service_blocks_its_organization_cannot_let_go_on(owner: Owner, receiver: Receiver) -> None:
    organization, _ = spend_past()
    Membership.objects.create(user=owner.user, organization=organization, role="owner")
    owner.organization = organization
    endpoint, _ = webhooks.make_endpoint(receiver.url, organization)
    WebhookEndpoint.objects.update(is_blocked=True)
    assert alerts.deliver_due() > 0 and receiver.taken == [], "mails go out"
    page = owner.browser.get(reverse("spend:webhooks", args=[organization.public_id])).content.decode()
    assert "administrators of this service stopped it" in page and "Resume" not in page and "Send a test" not in page
    for action, words in (("pause", {"active": "yes"}), ("test", {}), ("delete", {})):
        url = reverse(f"spend:{action}_webhook", args=[organization.public_id, endpoint.public_id])
        assert "blocked by the administrators" in owner.browser.post(url, words, follow=True).content.decode(), action
    assert receiver.taken == [] and WebhookEndpoint.objects.get().is_blocked
    WebhookEndpoint.objects.update(is_blocked=False)
    assert alerts.deliver_due() == 0, "what happened meanwhile is not told, as with one that paused"


def test_a_message_is_sent_again_under_its_id(owner: Owner, receiver: Receiver) -> None:
    organization, _ = spend_past()
    Membership.objects.create(user=owner.user, organization=organization, role="owner")
    webhooks.make_endpoint(receiver.url, organization)
    alerts.deliver_due()
    [delivery] = endpoints.list_deliveries(organization)
    assert delivery.public_id == receiver.taken[0][0]["webhook-id"]
    path = reverse("spend:resend_webhook", args=[organization.public_id, delivery.public_id])
    assert b"sent again within seconds" in owner.browser.post(path, follow=True).content
    assert alerts.deliver_due() == 1 and alerts.deliver_due() == 0
    assert receiver.taken[1][0]["webhook-id"] == delivery.public_id and receiver.taken[1][1] == receiver.taken[0][1]
    elsewhere = reverse("spend:resend_webhook", args=[owner.organization.public_id, delivery.public_id])
    assert owner.browser.post(elsewhere).status_code == 404
    WebhookEndpoint.objects.update(is_active=False)
    assert b"Resume it first" in owner.browser.post(path, follow=True).content
