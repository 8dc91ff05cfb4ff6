"""What an administrator does to a budget is audited: with the old values and the new, and in force at once."""

import pytest
from django.test import Client
from django.urls import reverse

from apps.accounts.models import AuditEvent, User
from apps.spend.models import Budget
from tests.apps.spend.cast import make_organization, read_spend, scope_of, warm

pytestmark = pytest.mark.django_db(transaction=True)
USD = 1_000_000_000


@pytest.fixture
def browser(client):
    browser = Client()
    browser.force_login(User.objects.create_superuser("root@example.com", "x"))
    return browser


def test_what_is_done_to_a_budget_is_audited(browser):
    organization = warm(make_organization())
    values = {
        "kind": "organization",
        "target": organization.public_id,
        "period": "monthly",
        "limit_nanousd": "2",
        "thresholds": "80%",
    }
    values |= {"time_zone": "", "raise_nanousd": "", "raise_until_0": "", "raise_until_1": "", "note": "A pilot"}
    page = browser.post(reverse("admin:spend_budget_add"), values)
    assert page.status_code == 302, page.content.decode()[-3000:]
    budget = Budget.objects.get()
    change = reverse("admin:spend_budget_change", args=[budget.pk])
    assert browser.post(change, values | {"limit_nanousd": "5"}).status_code == 302
    assert read_spend(scope_of(organization))["monthly_limit_nanousd"] == str(5 * USD)
    # saving what is there already says nothing
    assert browser.post(change, values | {"limit_nanousd": "5"}).status_code == 302
    chosen = {"action": "delete_selected", "_selected_action": [budget.pk], "post": "yes"}
    assert browser.post(reverse("admin:spend_budget_changelist"), chosen).status_code == 302
    assert not Budget.objects.exists()
    assert read_spend(scope_of(organization))["monthly_limit_nanousd"] == "plan"
    events = AuditEvent.objects.filter(action__startswith="budget.").order_by("pk")
    assert [event.action for event in events] == ["budget.create", "budget.change", "budget.delete"]
    for event in events:
        assert (event.actor, event.target) == ("root@example.com", f"budget:{budget.public_id}")
        assert event.organization_id == organization.public_id
    assert events[1].details["changed"] == {"limit_nanousd": {"from": 2 * USD, "to": 5 * USD}}
    assert (events[2].details["was"]["limit_nanousd"], events[2].details["was"]["note"]) == (5 * USD, "A pilot")


def test_one_budget_that_is_deleted_on_its_own_page_is_audited_too(browser):
    budget = Budget.objects.create(scope="site", period="daily", limit_nanousd=7, thresholds=[])
    page = browser.post(reverse("admin:spend_budget_delete", args=[budget.pk]), {"post": "yes"})
    assert page.status_code == 302 and not Budget.objects.exists()
    event = AuditEvent.objects.get(action="budget.delete")
    assert event.details["was"]["scope"] == "site" and event.organization_id == ""
