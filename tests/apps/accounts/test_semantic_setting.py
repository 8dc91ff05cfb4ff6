"""Whether alike questions share answers: who may say it, where, and who hears of it."""

from decimal import Decimal
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import IntegrityError, transaction
from django.test import Client

from apps.accounts import callers, organizations
from apps.accounts.keys import KeyTerms, create_key
from apps.accounts.models import AuditEvent, Membership, Organization, User
from tests.apps.conftest import Cast

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def acme(cast: Cast) -> Organization:
    return organizations.create(cast.user, "Acme").organization


def known(raw: str) -> float | None:
    callers.forget()
    return async_to_sync(callers.get_by_key)(raw).semantic_max_error_percent


def test_it_is_said_on_the_cache_page_and_requests_know_it(cast: Cast) -> None:
    browser = Client()
    browser.force_login(cast.user)
    base = f"/account/organizations/{cast.organization.public_id}/"
    assert known(cast.raw) is None and b"Semantic cache" in browser.get(f"{base}cache/").content
    page = browser.post(f"{base}semantic-cache/", {"semantic_cache": "on", "max_error_percent": "0,5"}, follow=True)
    assert b"at most 0.5 % may be wrong" in page.content and b"checked" in page.content
    assert known(cast.raw) == 0.5
    for wrong in ("0", "11", "nan", "0.25", "a lot", "1e400"):
        page = browser.post(f"{base}semantic-cache/", {"semantic_cache": "on", "max_error_percent": wrong}, follow=True)
        assert b"rate of wrong answers" in page.content and known(cast.raw) == 0.5, wrong
    browser.post(f"{base}semantic-cache/", {"max_error_percent": "0.5"})
    assert known(cast.raw) is None
    said = AuditEvent.objects.filter(action="organization.semantic_cache").order_by("pk")
    assert [event.details for event in said] == [
        {"before": "off", "after": "on, at most 0.5 % wrong"},
        {"before": "on, at most 0.5 % wrong", "after": "off"},
    ]


@pytest.mark.parametrize(("role", "may"), [("admin", True), ("member", False), ("billing", False)])
def test_owners_and_admins_say_it(acme: Organization, role: str, may: bool) -> None:
    user = User.objects.create_user(f"{role}@example.com")
    Membership.objects.create(user=user, organization=acme, role=role)
    browser = Client()
    browser.force_login(user)
    base = f"/account/organizations/{acme.public_id}/"
    assert (b"Semantic cache" in browser.get(f"{base}cache/").content) is may
    browser.post(f"{base}semantic-cache/", {"semantic_cache": "on", "max_error_percent": "3"})
    acme.refresh_from_db()
    assert acme.semantic_cache is may


def test_programs_say_it(cast: Cast, acme: Organization) -> None:
    _, raw = create_key(acme, cast.user, "manager", KeyTerms(can_manage=True))
    program, path = Client(headers={"authorization": f"Bearer {raw}"}), f"/api/v1/organizations/{acme.public_id}"

    def patch(**values: Any) -> Any:
        return program.patch(path, values, content_type="application/json")

    assert program.get(path).json()["semantic_cache"] is False
    body = patch(semantic_cache=True, semantic_max_error_percent=1.5).json()
    assert (body["semantic_cache"], body["semantic_max_error_percent"], body["name"]) == (True, 1.5, "Acme")
    assert patch(name="Acme Two").json()["semantic_max_error_percent"] == 1.5
    # all or nothing
    for wrong in (
        {"semantic_max_error_percent": 20},
        {"semantic_max_error_percent": 1.23},
        {"semantic_cache": "perhaps"},
        {},
    ):
        assert patch(**({"name": "Other"} | wrong if wrong else {})).status_code == 400, wrong
    acme.refresh_from_db()
    assert acme.name == "Acme Two" and acme.semantic_max_error_percent == Decimal("1.5")


def test_the_database_refuses_what_cannot_be(cast: Cast) -> None:
    with pytest.raises(IntegrityError), transaction.atomic():
        Organization.objects.filter(pk=cast.organization.pk).update(semantic_max_error_percent=Decimal("0"))
