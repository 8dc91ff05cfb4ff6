"""An administrator credits, adjusts and refunds: sees in a sentence what it does, and does it once."""

import html
import re

import pytest
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from apps.accounts.models import AuditEvent, User
from apps.spend import settlement
from apps.spend.models import LedgerTransaction, RefusedRequest, UsageRecord
from tests.apps.spend.cast import make_finished, make_organization, spent, warm

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def organization(client):
    return warm(make_organization())


@pytest.fixture
def browser(client):
    browser = Client()
    browser.force_login(User.objects.create_superuser("root@example.com", "x"))
    return browser


def hidden(page) -> dict[str, str]:
    """Read the hidden fields of a page, as a browser sends them."""
    text = page.content.decode()
    pairs = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', text)
    return {name: html.unescape(value) for name, value in pairs if name != "csrfmiddlewaretoken"}


def walk(browser, url, values, expected) -> None:
    """Fill the form in, read the preview, confirm it, and send the confirmation a second time."""
    values = values | hidden(browser.get(url))
    page = browser.post(url, values)
    text = page.content.decode()
    assert expected in text, text[-3000:]
    before = LedgerTransaction.objects.count()
    confirmed = hidden(page) | {"confirm": "1"}
    for _ in range(2):
        assert browser.post(url, confirmed).status_code == 302
    assert LedgerTransaction.objects.count() == before + 1


def test_a_credit(browser, organization):
    url = reverse("admin:spend_ledgertransaction_credit")
    values = {"organization": "ADA'S", "amount": "0.5", "source": "prepaid", "reason": "Paid by bank"}
    walk(browser, url, values, "may still spend $1.50 in")
    assert spent(organization) == -500000000
    assert AuditEvent.objects.get(action="ledger.credit").actor == "root@example.com"


def test_an_adjustment(browser, organization):
    url = reverse("admin:spend_ledgertransaction_adjust") + f"?organization={organization.public_id}"
    assert organization.public_id in browser.get(url).content.decode()
    values = {"organization": organization.public_id, "amount": "0.25", "direction": "more", "reason": "Too little"}
    walk(browser, url, values, "may still spend $0.75 in")
    assert spent(organization) == 250000000


def test_a_refund_from_the_request(browser, organization):
    settlement.settle(make_finished(organization.public_id))
    record = UsageRecord.objects.get()
    page = browser.get(reverse("admin:spend_usagerecord_change", args=[record.pk]))
    url = reverse("admin:spend_usagerecord_refund", args=[record.pk])
    assert url in page.content.decode()
    too_much = {"amount": "0.000000066", "reason": "x"} | hidden(browser.get(url))
    assert "more than that cannot be given back" in browser.post(url, too_much).content.decode()
    walk(browser, url, {"amount": "0.00000002", "reason": "It was useless"}, "$0.000000045 is left")
    page = browser.get(reverse("admin:spend_usagerecord_change", args=[record.pk])).content.decode()
    assert "It was useless" in page and "-$0.00000002" in page
    assert spent(organization) == 45


def test_usage_and_refusals_name_whose_they_are(browser, organization, django_assert_max_num_queries):
    for number in range(12):
        other = make_organization(name=f"Ada {number}")
        settlement.settle(make_finished(other.public_id, job_id=f"job_{number}"))
        RefusedRequest.objects.create(
            organization_id=other.public_id, request_id=f"req_{number}", code="killed", occurred_at=timezone.now()
        )
    RefusedRequest.objects.create(organization_id="org_gone", request_id="x", code="killed", occurred_at=timezone.now())
    for model in ("usagerecord", "refusedrequest"):
        with django_assert_max_num_queries(15):
            page = browser.get(reverse(f"admin:spend_{model}_changelist")).content.decode()
        assert all(f">Ada {number}<" in page for number in range(12)), model
    assert ">org_gone<" in page
    page = browser.get(
        reverse("admin:spend_usagerecord_change", args=[UsageRecord.objects.first().pk])
    ).content.decode()
    assert "Ada " in page and "org_" in page


@pytest.mark.parametrize(
    "values",
    [
        {"organization": "nobody", "amount": "1", "source": "prepaid", "reason": "x"},
        {"organization": "Ada's", "amount": "0", "source": "prepaid", "reason": "x"},
        {"organization": "Ada's", "amount": "-1", "source": "prepaid", "reason": "x"},
        {"organization": "Ada's", "amount": "1,5", "source": "prepaid", "reason": "x"},
        {"organization": "Ada's", "amount": "1_5", "source": "prepaid", "reason": "x"},
        {"organization": "Ada's", "amount": "1e3", "source": "prepaid", "reason": "x"},
        {"organization": "Ada's", "amount": "\u0663", "source": "prepaid", "reason": "x"},
        {"organization": "Ada's", "amount": "NaN", "source": "prepaid", "reason": "x"},
        {"organization": "Ada's", "amount": "0.0000000001", "source": "prepaid", "reason": "x"},
        {"organization": "Ada's", "amount": "1", "source": "stolen", "reason": "x"},
        {"organization": "Ada's", "amount": "1", "source": "prepaid", "reason": ""},
        {"organization": "Ada's", "amount": "1", "source": "prepaid", "reason": "x", "reference": "mine"},
    ],
)
def test_bad_input_is_told_at_its_field(browser, organization, values):
    url = reverse("admin:spend_ledgertransaction_credit")
    for step in ({}, {"confirm": "1"}):
        page = browser.post(url, hidden(browser.get(url)) | values | step)
        assert page.status_code == 200
        assert 'role="alert"' in page.content.decode() or "errorlist" in page.content.decode()
        assert "may still spend" not in page.content.decode()
    assert LedgerTransaction.objects.count() == 0


def test_what_would_be_refused_is_not_previewed(browser, organization):
    url = reverse("admin:spend_ledgertransaction_adjust")
    values = {"organization": organization.public_id, "amount": "9000000", "direction": "less", "reason": "x"}
    walk(browser, url, values, "may still spend $9,000,001.00")
    values |= {"amount": "0.000000001"} | hidden(browser.get(url))
    assert "more than 9 million US dollars would be counted" in browser.post(url, values).content.decode()


def test_a_name_that_two_share_is_not_guessed(browser, organization):
    make_organization("pro", name="Ada's")
    url = reverse("admin:spend_ledgertransaction_credit")
    values = {"organization": "Ada's", "amount": "1", "source": "prepaid", "reason": "x"}
    assert "Several organizations" in browser.post(url, hidden(browser.get(url)) | values).content.decode()


def test_staff_without_the_right_cannot(organization):
    staff = User.objects.create_user("staff@example.com", "x", is_staff=True)
    browser = Client()
    browser.force_login(staff)
    settlement.settle(make_finished(organization.public_id))
    record = UsageRecord.objects.get()
    for url in (
        reverse("admin:spend_ledgertransaction_credit"),
        reverse("admin:spend_ledgertransaction_adjust"),
        reverse("admin:spend_usagerecord_refund", args=[record.pk]),
    ):
        assert browser.get(url).status_code == browser.post(url, {"confirm": "1"}).status_code == 403
