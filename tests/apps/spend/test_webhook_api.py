"""Programs keep an organization's webhooks over /api/v1, by the rules of the page."""

import dataclasses
import json
from typing import Any

import pytest

from apps.accounts import organizations
from apps.accounts.keys import KeyTerms, create_key
from apps.accounts.models import AuditEvent, Membership, User
from apps.spend import alerts, webhook_api, webhooks
from apps.spend.alert_models import WebhookEndpoint
from tests.apps.accounts.test_api import Program, has_shape
from tests.apps.conftest import Cast
from tests.apps.spend.test_alerts import Receiver, receiver, spend_past

__all__ = ["receiver"]


@pytest.fixture(autouse=True)
def private_addresses(settings: Any) -> None:
    settings.ENV = dataclasses.replace(settings.ENV, upstreams_private=True)


def test_webhooks_over_the_api(cast: Cast, receiver: Receiver) -> None:
    acme = organizations.create(cast.user, "Acme").organization
    program = Program(create_key(acme, cast.user, "", KeyTerms(can_manage=True))[1])
    base = f"/{acme.public_id}/webhooks"
    made = program.tell("POST", base, {"url": receiver.url}, 201)
    assert has_shape(made, webhook_api.NewWebhookShape) and made["secret"].startswith("whsec_")
    listed = program.tell("GET", base)["data"]
    assert listed == [program.tell("GET", f"{base}/{made['id']}")] and has_shape(listed[0], webhook_api.WebhookShape)
    assert program.tell("POST", base, {"url": receiver.url}, 400)["error"]["param"] == "url"
    assert program.tell("POST", base, {"url": "x"}, 400)["error"]["param"] == "url"
    assert program.tell("POST", f"{base}/{made['id']}/test")["delivered"] is True
    receiver.status = 500
    assert program.tell("POST", f"{base}/{made['id']}/test")["error"] == "it answered 500"
    assert program.tell("PATCH", f"{base}/{made['id']}", {"active": False})["active"] is False
    program.tell("PATCH", f"{base}/{made['id']}", {}, 400)
    assert program.tell("PATCH", f"{base}/{made['id']}", {"active": True})["active"] is True
    again = program.tell("POST", f"{base}/{made['id']}/secret")
    assert again["secret"] != made["secret"] and again["old_secret_until"]
    assert made["secret"] not in json.dumps(program.tell("GET", base))
    assert program.tell("DELETE", f"{base}/{made['id']}")["deleted"] is True
    program.tell("GET", f"{base}/{made['id']}", status=404)
    done = AuditEvent.objects.filter(action__startswith="webhook.").order_by("pk").values_list("action", flat=True)
    assert list(done) == [f"webhook.{verb}" for verb in ("create", "pause", "resume", "rotate", "delete")]


def test_messages_are_listed_and_sent_again(cast: Cast, receiver: Receiver) -> None:
    organization, _ = spend_past()
    owner = User.objects.get(email="owner@example.com")
    program = Program(create_key(organization, owner, "", KeyTerms(can_manage=True))[1])
    endpoint, _ = webhooks.make_endpoint(receiver.url, organization)
    base = f"/{organization.public_id}/webhooks/{endpoint.public_id}/deliveries"
    receiver.status = 503
    alerts.deliver_due()
    [waits] = program.tell("GET", base)["data"]
    assert has_shape(waits, webhook_api.DeliveryShape) and waits["id"] == receiver.taken[0][0]["webhook-id"]
    assert (waits["status"], waits["attempts"], waits["error"]) == ("pending", 1, "it answered 503")
    receiver.status = 200
    sent = program.tell("POST", f"{base}/{waits['id']}/resend", status=202)
    assert (sent["status"], sent["attempts"]) == ("pending", 0)
    assert alerts.deliver_due() == 1 and receiver.taken[1][0]["webhook-id"] == waits["id"]
    assert program.tell("GET", f"{base}?limit=1")["data"][0]["status"] == "delivered"
    assert program.tell("GET", f"{base}?after={waits['id']}")["data"] == []
    program.tell("POST", f"{base}/msg_1_whe_x/resend", status=404)
    WebhookEndpoint.objects.update(is_active=False)
    assert "paused" in program.tell("POST", f"{base}/{waits['id']}/resend", status=400)["error"]["message"]


def test_who_may_not(cast: Cast) -> None:
    acme = organizations.create(cast.user, "Acme").organization
    endpoint, _ = webhooks.make_endpoint("https://example.com/hooks", acme)
    member = User.objects.create_user("member@example.com")
    Membership.objects.create(user=member, organization=acme, role="member")
    asked = [
        ("GET", "", None),
        ("POST", "", {"url": "https://example.com/"}),
        ("GET", f"/{endpoint.public_id}", None),
        ("PATCH", f"/{endpoint.public_id}", {"active": False}),
        ("POST", f"/{endpoint.public_id}/secret", None),
        ("POST", f"/{endpoint.public_id}/test", None),
        ("GET", f"/{endpoint.public_id}/deliveries", None),
        ("POST", f"/{endpoint.public_id}/deliveries/msg_1_x/resend", None),
        ("DELETE", f"/{endpoint.public_id}", None),
    ]
    manages = KeyTerms(can_manage=True)
    plain, weak = create_key(acme, cast.user)[1], create_key(acme, member, "", manages)[1]
    foreign = create_key(cast.organization, cast.user, "", manages)[1]
    for raw, status in ((plain, 403), (weak, 403), (foreign, 404)):
        for method, path, value in asked:
            Program(raw).tell(method, f"/{acme.public_id}/webhooks{path}", value, status)
    for method, path, value in asked[2:]:
        Program(foreign).tell(method, f"/{cast.organization.public_id}/webhooks{path}", value, 404)
    assert WebhookEndpoint.objects.get().is_active
