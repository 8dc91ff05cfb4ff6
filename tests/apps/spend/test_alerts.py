"""An alert arrives once at everybody whom it concerns, over failures and repetitions."""

import base64
import dataclasses
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from django.core import mail
from django.utils import timezone
from redis import Redis

from apps.accounts.models import Membership, Organization, User
from apps.spend import alerts, settlement, thresholds, webhooks
from apps.spend.alert_models import AlertDelivery
from apps.spend.models import Budget, SpendAlert
from tests.apps.spend.cast import make_finished, make_organization, warm

pytestmark = pytest.mark.django_db(transaction=True)


class Receiver:
    """A real server that keeps what it is sent, and answers with ``status``."""

    def __init__(self) -> None:
        self.status, self.taken = 200, list[tuple[dict[str, str], bytes]]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.taken.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(outer.status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                return

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?a=1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


def spend_past(scope_of: str = "organization") -> tuple[Organization, SpendAlert]:
    """Have an organization with one person in each role spend past 50 % of its budget."""
    organization = warm(make_organization())
    for role in Membership.Role.values:
        user = User.objects.create_user(f"{role}@example.com")
        Membership.objects.create(user=user, organization=organization, role=role)
    User.objects.create_user("staff@example.com", is_staff=True)
    scope = f"organization:{organization.public_id}" if scope_of == "organization" else "site"
    Budget.objects.create(scope=scope, period="monthly", limit_nanousd=100, thresholds=["50%"])
    settlement.settle(make_finished(organization.public_id))
    return organization, SpendAlert.objects.get()


def test_who_reads_that_the_limit_is_reached_is_not_told_that_nothing_is_refused() -> None:
    _, alert = spend_past()
    assert "and passed 50%." in alerts.summarize(alert)
    assert "Nothing is refused yet." in alerts.write_mail(alert, "a@example.com").body
    alert.spent_nanousd = alert.limit_nanousd
    assert "are refused until" in alerts.write_mail(alert, "a@example.com").body
    alert.threshold, alert.spent_nanousd = thresholds.limit_text(100), 65
    mail_of_limit = alerts.write_mail(alert, "a@example.com")
    assert (
        mail_of_limit.subject.endswith("reached its limit of $0.0000001") and "are refused until" in mail_of_limit.body
    )


def test_the_right_people_are_told_once(client: Redis) -> None:
    _, alert = spend_past()
    assert alerts.deliver_due() == 3 and alerts.deliver_due() == 0
    assert sorted(message.to[0] for message in mail.outbox) == [
        "admin@example.com",
        "billing@example.com",
        "owner@example.com",
    ]
    assert alert.threshold in mail.outbox[0].subject and "$0.000000065" in mail.outbox[0].body
    settlement.settle(make_finished(alert.scope.partition(":")[2]))
    assert SpendAlert.objects.filter(threshold="50%").count() == 1


def test_the_sites_budget_concerns_the_staff_alone(client: Redis, receiver: Receiver) -> None:
    organization, _ = spend_past("site")
    webhooks.make_endpoint(receiver.url, organization)
    alerts.deliver_due()
    assert [message.to for message in mail.outbox] == [["staff@example.com"]] and receiver.taken == []


def test_a_webhook_is_signed_and_repeated_with_the_same_id(client: Redis, receiver: Receiver, settings: Any) -> None:
    settings.ENV = dataclasses.replace(settings.ENV, upstreams_private=True)
    organization, alert = spend_past()
    endpoint, secret = webhooks.make_endpoint(receiver.url, organization)
    assert secret not in endpoint.sealed_secret
    receiver.status = 503
    alerts.deliver_due()
    delivery = AlertDelivery.objects.get(endpoint=endpoint)
    assert delivery.delivered_at is None and "503" in delivery.error and delivery.due_at > timezone.now()
    receiver.status = 204
    assert alerts.deliver_due() == 0, "it is not due yet"
    AlertDelivery.objects.filter(endpoint=endpoint).update(due_at=timezone.now() - timedelta(seconds=1))
    assert alerts.deliver_due() == 1 and alerts.deliver_due() == 0
    (first, _), (second, body) = receiver.taken
    assert first["webhook-id"] == second["webhook-id"]
    signed = f"{second['webhook-id']}.{second['webhook-timestamp']}.".encode() + body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert second["webhook-signature"] == f"v1,{expected}"
    assert json.loads(body)["data"]["spent_nanousd"] == alert.spent_nanousd == 65


def test_an_organizations_endpoint_may_not_look_inside(client: Redis, receiver: Receiver) -> None:
    organization, _ = spend_past()
    endpoint, _ = webhooks.make_endpoint(receiver.url, organization)
    with pytest.raises(webhooks.NotDelivered, match="private"):
        webhooks.send(endpoint, "msg_1", {})
    site, _ = webhooks.make_endpoint(receiver.url)
    webhooks.send(site, "msg_1", {})
    assert len(receiver.taken) == 1


def test_what_never_arrives_is_given_up_after_a_day(client: Redis, receiver: Receiver) -> None:
    organization, _ = spend_past()
    endpoint, _ = webhooks.make_endpoint("http://nowhere.invalid/hook", organization)
    waited = timedelta()
    for _ in range(len(alerts.PAUSES_S) + 2):
        alerts.deliver_due()
        delivery = AlertDelivery.objects.get(endpoint=endpoint)
        if delivery.due_at is None:
            break
        waited += delivery.due_at - timezone.now()
        AlertDelivery.objects.filter(endpoint=endpoint).update(due_at=timezone.now())
    assert delivery.due_at is None and delivery.error and timedelta(hours=20) < waited < timedelta(hours=28)
