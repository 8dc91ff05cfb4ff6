"""The audit log is written with the change or not at all, keeps no secret, and cannot be changed."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from django.db import DatabaseError, connection, transaction
from django.db.transaction import TransactionManagementError
from django.test import Client, RequestFactory
from django.urls import reverse

from apps.accounts import audit
from apps.accounts.addresses import client_address
from apps.accounts.models import AuditEvent, Plan, User
from tests.apps.conftest import Cast


def record(**details: object) -> AuditEvent:
    with transaction.atomic():
        return audit.record(
            "thing.change", target="thing:1", by=audit.by_system("test"), reason="Because", details=details
        )


@pytest.mark.parametrize("change", ["update", "delete", "truncate"])
@pytest.mark.django_db(transaction=True)
def test_the_database_refuses_to_change_it(change: str) -> None:
    event = record()
    with pytest.raises(DatabaseError, match="append-only"), transaction.atomic(), connection.cursor() as cursor:
        if change == "update":
            AuditEvent.objects.update(reason="Another")
        elif change == "delete":
            AuditEvent.objects.filter(pk=event.pk).delete()
        else:
            cursor.execute("SET LOCAL aiscale.allow_truncate = 'on'")  # opened the door until migration 0012
            cursor.execute("TRUNCATE accounts_auditevent")
    event.refresh_from_db()
    assert event.reason == "Because"


@pytest.mark.django_db(transaction=True)
def test_it_stands_and_falls_with_its_change() -> None:
    with pytest.raises(TransactionManagementError, match="belongs into the transaction"):
        audit.record("thing.change", target="thing:1", by=audit.by_system("test"))
    with pytest.raises(RuntimeError, match="afterwards"), transaction.atomic():
        record()
        raise RuntimeError("something failed afterwards")
    assert not AuditEvent.objects.exists()


@pytest.mark.django_db
def test_it_keeps_no_secret_and_takes_what_python_has() -> None:
    event = record(
        secret="s3cret",
        new_password="s3cret",
        token="s3cret",
        prompt_tokens=7,
        text="the key sk-aiscale-abcdefghijklmnopqrstuvwxyz was shown",
        nested=[{"signing_secret": "s3cret"}, ("a\0b", Decimal("1.5"), datetime(2026, 1, 2, tzinfo=UTC))],
    )
    event.refresh_from_db()
    assert "s3cret" not in str(event.details) and "sk-aiscale-abc" not in str(event.details)
    assert event.details["prompt_tokens"] == 7
    assert event.details["nested"][1] == ["ab", "1.5", "2026-01-02T00:00:00Z"]
    with pytest.raises(ValueError, match="no action"):
        audit.record("Something odd", target="thing:1", by=audit.by_system("test"))


def test_what_an_admin_changes_is_written_with_old_and_new(cast: Cast) -> None:
    browser = Client(REMOTE_ADDR="203.0.113.9")
    root = User.objects.create_superuser("root@example.com", "x")
    browser.force_login(root)
    plan = Plan.objects.get(slug="free")
    url = reverse("admin:accounts_plan_change", args=[plan.pk])
    page = browser.get(url)
    form = {name: field.initial for name, field in page.context["adminform"].form.fields.items()}
    form |= {name: page.context["adminform"].form[name].value() for name in form}
    form["max_in_flight"] = "3"
    posted = {name: value for name, value in form.items() if value is not None}
    assert browser.post(url, posted).status_code == 302
    event = AuditEvent.objects.get(action="plan.change")
    assert (event.actor, event.actor_id, event.address) == ("root@example.com", root.public_id, "203.0.113.9")
    assert event.target == f"plan:{plan.public_id}"
    assert event.details["changed"] == {"max_in_flight": {"from": 2, "to": 3}}
    assert browser.post(url, posted).status_code == 302
    assert AuditEvent.objects.filter(action="plan.change").count() == 1, "nothing was changed"


def test_the_page_is_for_reading(cast: Cast) -> None:
    event = record(number=7)
    browser = Client()
    browser.force_login(User.objects.create_superuser("root@example.com", "x"))
    page = browser.get(reverse("admin:accounts_auditevent_changelist"), {"actor_kind__exact": "system"})
    assert "thing.change" in page.content.decode() and "Because" in page.content.decode()
    page = browser.get(reverse("admin:accounts_auditevent_change", args=[event.pk]))
    assert "Number: 7" in page.content.decode()
    assert browser.post(reverse("admin:accounts_auditevent_change", args=[event.pk]), {}).status_code == 403
    assert (
        browser.post(reverse("admin:accounts_auditevent_delete", args=[event.pk]), {"post": "yes"}).status_code == 403
    )


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "expected"),
    [
        ((), "203.0.113.9", "198.51.100.1", "203.0.113.9"),
        (("10.0.0.0/8",), "203.0.113.9", "198.51.100.1", "203.0.113.9"),
        (("10.0.0.0/8",), "10.0.0.1", "198.51.100.1", "198.51.100.1"),
        (("10.0.0.0/8",), "10.0.0.1", "1.2.3.4, 198.51.100.1", "198.51.100.1"),
        (("10.0.0.0/8",), "10.0.0.1", "1.2.3.4, 198.51.100.1, 10.0.0.2", "198.51.100.1"),
        (("10.0.0.0/8",), "10.0.0.1", "nonsense", "10.0.0.1"),
        (("10.0.0.0/8",), "10.0.0.1", "", "10.0.0.1"),
        (("10.0.0.0/8",), "::ffff:10.0.0.1", "::ffff:198.51.100.1", "198.51.100.1"),
        ((), "", "198.51.100.1", ""),
    ],
)
def test_only_trusted_proxies_name_the_client(
    settings: object, trusted: tuple[str, ...], peer: str, forwarded: str, expected: str
) -> None:
    from aiscale import env

    settings.ENV = env.load({"AISCALE_TRUSTED_PROXIES": ",".join(trusted)})  # type: ignore[attr-defined]
    request = RequestFactory().get("/", REMOTE_ADDR=peer, HTTP_X_FORWARDED_FOR=forwarded)
    assert client_address(request) == expected
