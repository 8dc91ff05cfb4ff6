"""What an administrator does to a budget is audited: with the old values and the new, and in force at once."""

import threading
import time
from datetime import UTC, datetime
from html import unescape

import pytest
from django.db import connection, transaction
from django.test import Client
from django.urls import reverse

from apps.accounts.models import AuditEvent, User
from apps.spend import killswitch, prices
from apps.spend.models import Budget, SpendAlert
from tests.apps.spend.cast import ADA, make_organization, read_spend, scope_of, warm

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


EMPTY = {"kind": "site", "target": "", "period": "daily", "time_zone": "", "limit_nanousd": "5", "thresholds": ""}
EMPTY |= {"raise_nanousd": "", "raise_until_0": "", "raise_until_1": "", "note": ""}


def test_a_second_budget_of_a_scope_and_period_is_refused_in_words(browser):
    url = reverse("admin:spend_budget_add")
    assert browser.post(url, EMPTY).status_code == 302
    page = browser.post(url, EMPTY | {"limit_nanousd": "7"})
    assert page.status_code == 200
    assert "There is a budget of this scope and period already: change that one." in page.content.decode()
    assert browser.post(url, EMPTY | {"period": "monthly"}).status_code == 302
    assert list(Budget.objects.order_by("period").values_list("limit_nanousd", flat=True)) == [5 * USD, 5 * USD]


def test_a_thousand_dollars_stay_a_thousand_when_a_budget_is_saved_again(browser):
    budget = Budget.objects.create(
        scope="site", period="daily", limit_nanousd=2000 * USD, thresholds=["80%", "$100.00", "$1,500.00"]
    )
    change = reverse("admin:spend_budget_change", args=[budget.pk])
    form = browser.get(change).context["adminform"].form
    values = EMPTY | {"limit_nanousd": "2000", "thresholds": form["thresholds"].value(), "note": "Looked at"}
    assert browser.post(change, values).status_code == 302
    budget.refresh_from_db()
    assert (budget.note, budget.thresholds) == ("Looked at", ["80%", "$100.00", "$1,500.00"])


@pytest.mark.parametrize("words", ["$1,500", "100,500,1000", "80%, $1,000.50"])
def test_a_comma_that_may_mean_either_is_not_guessed(browser, words):
    page = browser.post(reverse("admin:spend_budget_add"), EMPTY | {"thresholds": words})
    assert "Write amounts without thousands separators" in page.content.decode()
    assert not Budget.objects.exists()


def test_a_raise_that_is_over_is_refused_unless_it_was_there(browser):
    past = {"raise_nanousd": "5", "raise_until_0": "2020-01-01", "raise_until_1": "00:00"}
    page = browser.post(reverse("admin:spend_budget_add"), EMPTY | past)
    assert "This moment is over" in page.content.decode() and not Budget.objects.exists()
    budget = Budget.objects.create(
        scope="site",
        period="daily",
        limit_nanousd=5 * USD,
        raise_nanousd=5 * USD,
        raise_until=datetime(2020, 1, 1, tzinfo=UTC),
    )
    change = reverse("admin:spend_budget_change", args=[budget.pk])
    assert browser.post(change, EMPTY | past | {"limit_nanousd": "6"}).status_code == 302
    page = browser.post(change, EMPTY | past | {"raise_nanousd": "7"})
    assert "This moment is over" in page.content.decode()


def test_what_a_budget_is_for_can_be_named_as_people_do(browser):
    organization = make_organization(name="Ada & Co")
    url = reverse("admin:spend_budget_add")
    assert browser.post(url, EMPTY | {"kind": "organization", "target": "ada & co"}).status_code == 302
    assert browser.post(url, EMPTY | {"kind": "user", "target": "ROOT@example.com"}).status_code == 302
    root = User.objects.get(email="root@example.com")
    scopes = set(Budget.objects.values_list("scope", flat=True))
    assert scopes == {f"organization:{organization.public_id}", f"user:{root.public_id}"}
    for kind in ("organization", "user", "key", "plan", "model"):
        assert "Say which one." in browser.post(url, EMPTY | {"kind": kind}).content.decode()


def test_a_budget_of_a_model_that_is_not_there_is_kept_with_a_warning(browser):
    url = reverse("admin:spend_budget_add")
    page = browser.post(url, EMPTY | {"kind": "model", "target": "smolm2"}, follow=True)
    assert "There is no model &#x27;smolm2&#x27; yet." in page.content.decode()
    terms = prices.Terms(
        prompt_nanousd_per_token=50, cached_prompt_nanousd_per_token=50, completion_nanousd_per_token=50
    )
    prices.change("known", terms, reason="x", by=ADA, confirmed=True)
    page = browser.post(url, EMPTY | {"kind": "model", "target": "known"}, follow=True)
    assert "There is no model" not in page.content.decode()
    assert Budget.objects.count() == 2


def test_the_same_budget_made_at_the_same_moment_is_refused_in_words(browser):
    """A rival's budget is written, and not yet committed, while this one is checked: the form sees none, and saving waits for it."""
    url, pages = reverse("admin:spend_budget_add"), []

    def post():
        try:
            pages.append(browser.post(url, EMPTY))
        finally:
            connection.close()

    thread = threading.Thread(target=post)
    with transaction.atomic():
        Budget.objects.create(scope="site", period="daily", limit_nanousd=7 * USD, thresholds=[])
        thread.start()
        with connection.cursor() as cursor:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'")
                if cursor.fetchone()[0]:
                    break
                time.sleep(0.02)
            else:
                pytest.fail("the second budget did not wait for the first")
    thread.join(30)
    [page] = pages
    assert page.status_code == 200
    assert "There is a budget of this scope and period already: change that one." in page.content.decode()
    assert Budget.objects.get().limit_nanousd == 7 * USD
    assert not AuditEvent.objects.filter(action="budget.create").exists()


def test_lists_name_whom_a_budget_alert_or_kill_switch_is_for(browser, django_assert_max_num_queries):
    names = [f"Ada {number} & Co" for number in range(12)]
    for name in names:
        scope = f"organization:{make_organization(name=name).public_id}"
        Budget.objects.create(scope=scope, limit_nanousd=USD, thresholds=[])
        killswitch.trip(scope, reason="Abuse", by=ADA)
        SpendAlert.objects.create(
            scope=scope, period="daily", period_start=datetime(2026, 1, 1, tzinfo=UTC), threshold="80%", spent_nanousd=1
        )
    root = User.objects.get(email="root@example.com")
    for scope in (f"user:{root.public_id}", "plan:free", "model:smol", "site", "organization:org_gone"):
        Budget.objects.create(scope=scope, limit_nanousd=USD, thresholds=[])
    for model in ("budget", "killswitch", "spendalert"):
        with django_assert_max_num_queries(15):
            page = unescape(browser.get(reverse(f"admin:spend_{model}_changelist")).content.decode())
        assert all(f"Organization {name}" in page for name in names), model
    page = browser.get(reverse("admin:spend_budget_changelist")).content.decode()
    for name in ("User root@example.com", "Plan Free", "Model smol", "The whole service", "Organization org_gone"):
        assert name in page
    of_root = Budget.objects.get(scope=f"user:{root.public_id}")
    page = browser.get(reverse("admin:spend_budget_change", args=[of_root.pk])).content.decode()
    assert "User root@example.com" in page and of_root.scope in page
