"""Prices: a change is a new row for the time to come, a mistake needs a confirmation (M9), nonsense cannot be (M10)."""

import html
import re
from datetime import timedelta

import pytest
from django.db import DatabaseError, Error, IntegrityError, connection, transaction
from django.db.migrations.executor import MigrationExecutor
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from aiscale.errors import AiscaleError, Code
from apps.accounts import audit
from apps.accounts.models import AuditEvent, User
from apps.spend import prices, pricing, settlement
from apps.spend.models import Price, UsageRecord
from apps.spend.prices import Terms
from tests.apps.spend.cast import make_finished, make_organization

pytestmark = pytest.mark.django_db(transaction=True)
BY = audit.by_system("test")


def make_terms(prompt=50, completion=200, cached=None, request=0) -> Terms:
    return Terms(
        prompt_nanousd_per_token=prompt,
        cached_prompt_nanousd_per_token=prompt if cached is None else cached,
        completion_nanousd_per_token=completion,
        request_nanousd=request,
    )


def change(model="m", *, confirmed=True, valid_from=None, **terms) -> Price:
    return prices.change(
        model, make_terms(**terms), valid_from=valid_from, reason="Dearer power", by=BY, confirmed=confirmed
    )


def test_a_change_is_a_new_row_and_the_past_stays():
    first = change()
    before = timezone.now()
    second = change(prompt=60)
    planned = change(prompt=70, valid_from=timezone.now() + timedelta(hours=1))
    assert prices.map_current()["m"] == second
    assert prices.map_current(before)["m"] == first
    assert prices.map_current(timezone.now() + timedelta(hours=2))["m"] == planned
    assert "m" not in prices.map_current(first.valid_from - timedelta(seconds=1))
    ends = {price.pk: price.valid_until for price in Price.objects.with_ends()}
    assert ends == {first.pk: second.valid_from, second.pk: planned.valid_from, planned.pk: None}


def test_of_two_planned_for_the_same_moment_the_one_written_last_counts():
    moment = timezone.now() + timedelta(hours=1)
    change()
    wrong, right = change(prompt=90, valid_from=moment), change(prompt=60, valid_from=moment)
    assert prices.map_current(moment)["m"] == right
    assert Price.objects.with_ends().get(pk=wrong.pk).valid_until == moment


def test_each_change_is_audited():
    change()
    price = change(prompt=60)
    event = AuditEvent.objects.filter(action="price.change").first()
    assert (event.target, event.reason) == (f"price:{price.public_id}", "Dearer power")
    assert event.details["from"]["prompt"] == "$0.05 a million tokens"
    assert event.details["to"]["prompt"] == "$0.06 a million tokens"


def test_a_price_does_not_begin_in_the_past():
    change()
    with pytest.raises(AiscaleError) as refused:
        change(prompt=60, valid_from=timezone.now() - timedelta(minutes=2))
    assert refused.value.param == "valid_from"
    with pytest.raises(IntegrityError, match="cannot begin in the past"):
        Price.objects.create(
            model="m",
            valid_from=timezone.now() - timedelta(hours=1),
            prompt_nanousd_per_token=1,
            cached_prompt_nanousd_per_token=1,
            completion_nanousd_per_token=1,
        )


def test_a_price_is_never_changed_or_deleted():
    price = change()
    with pytest.raises(Error, match="append-only"):
        price.save()
    with pytest.raises(Error, match="append-only"):
        Price.objects.all()._raw_delete("default")
    with connection.cursor() as cursor, pytest.raises(Error, match="append-only"):
        cursor.execute("TRUNCATE spend_price")


@pytest.mark.parametrize(
    ("terms", "param"),
    [
        ({"prompt": -1}, "prompt_nanousd_per_token"),
        ({"completion": -1}, "completion_nanousd_per_token"),
        ({"cached": -1}, "cached_prompt_nanousd_per_token"),
        ({"cached": 51}, "cached_prompt_nanousd_per_token"),
        ({"request": -1}, "request_nanousd"),
        ({"prompt": 1_000_000_001}, "prompt_nanousd_per_token"),
        ({"request": 1_001 * 10**9}, "request_nanousd"),
    ],
)
def test_m10_a_price_that_cannot_be_is_refused_by_code_and_database(terms, param):
    with pytest.raises(AiscaleError) as refused:
        change(**terms)
    assert (refused.value.code, refused.value.param) == (Code.INVALID_REQUEST, param)
    wrong = make_terms(**terms)
    with pytest.raises(DatabaseError), transaction.atomic():
        Price.objects.create(
            model="m",
            valid_from=timezone.now(),
            **{name: getattr(wrong, name) for name in Terms.__struct_fields__},
        )
    assert Price.objects.count() == 0


@pytest.mark.parametrize("missing", Terms.__struct_fields__)
def test_m10_no_price_is_undefined(missing):
    values = {name: getattr(make_terms(), name) for name in Terms.__struct_fields__} | {missing: None}
    with pytest.raises(IntegrityError), transaction.atomic():
        Price.objects.create(model="m", valid_from=timezone.now(), **values)


@pytest.mark.parametrize(
    ("terms", "doubt"),
    [
        # meant for a million tokens, written for one
        ({"prompt": 50_000_000}, "1,000,000 times the one before"),
        ({"prompt": 5_001, "cached": 50}, "100 times the one before"),
        ({"completion": 1}, "one 200th of the one before"),
        ({"prompt": 0, "cached": 0}, "becomes nothing"),
        ({"completion": 1_000_001}, "above $1,000.00 a million tokens"),
        ({"completion": 20_100}, "times the nearest one of another model"),
        ({"request": 1_000_000_001}, "above $1.00 a request"),
    ],
)
def test_m9_a_price_that_looks_like_a_mistake_needs_a_confirmation(terms, doubt):
    change()
    change("other", completion=100)
    with pytest.raises(AiscaleError) as refused:
        change(confirmed=False, **terms)
    assert refused.value.param == "sure" and doubt in refused.value.message, refused.value.message
    assert Price.objects.count() == 2
    change(**terms)
    assert Price.objects.count() == 3


def test_a_price_as_others_have_it_needs_none():
    change()
    change("other", completion=100)
    change(confirmed=False, prompt=4_000, completion=300, cached=1_000)
    assert Price.objects.count() == 3


def test_m5_hold_and_charge_come_from_the_same_terms():
    terms = make_terms(cached=5, request=1_000)
    organization = make_organization()
    event = make_finished(
        organization.public_id,
        cached_tokens=4,
        price_id="price_1",
        prompt_nanousd_per_token=50,
        completion_nanousd_per_token=200,
        cached_prompt_nanousd_per_token=5,
        request_nanousd=1_000,
    )
    settlement.settle(event)
    record = UsageRecord.objects.get()
    assert record.cost_nanousd == terms.cost_nanousd(10, 5, 4) == 6 * 50 + 4 * 5 + 5 * 200 + 1_000
    assert (record.price_id, record.cached_tokens, record.request_nanousd) == ("price_1", 4, 1_000)
    # the hold of the same request, before anything is known of the cache
    assert terms.cost_nanousd(10, 5) >= record.cost_nanousd


def test_what_computed_nothing_pays_no_flat_price():
    assert make_terms(request=1_000).cost_nanousd(0, 0) == 0


def test_a_worker_that_counts_more_cached_tokens_than_the_prompt_has_is_bounded():
    event = make_finished("org_1", cached_tokens=99, cached_prompt_nanousd_per_token=0)
    assert settlement.normalize(event, event.finished_at_ms).cached_tokens == 10
    with pytest.raises(AiscaleError):
        pricing.cost_nanousd(10, 5, 11, prompt_nanousd_per_token=1, completion_nanousd_per_token=1)


# --- in the admin --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def browser():
    browser = Client()
    browser.force_login(User.objects.create_superuser("root@example.com", "x"))
    return browser


def hidden(page) -> dict[str, str]:
    pairs = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', page.content.decode())
    return {name: html.unescape(value) for name, value in pairs if name != "csrfmiddlewaretoken"}


VALUES = {
    "model": "m",
    "prompt_nanousd_per_token": "0.06",
    "cached_prompt_nanousd_per_token": "",
    "completion_nanousd_per_token": "0.24",
    "request_nanousd": "",
    "valid_from": "",
    "reason": "Dearer power",
}


def test_the_form_shows_an_example_before_it_saves(browser):
    change()
    url = reverse("admin:spend_price_add")
    assert 'value="0.05"' in browser.get(f"{url}?model=m").content.decode()
    page = browser.post(url, VALUES)
    assert "1,000 prompt and 500 completion tokens cost $0.00018." in page.content.decode()
    assert "A million such requests cost $180.00" in page.content.decode()
    assert Price.objects.count() == 1
    assert browser.post(url, hidden(page) | {"confirm": "1"}).status_code == 302
    price = prices.map_current()["m"]
    assert prices.terms_of(price) == make_terms(prompt=60, completion=240)
    listed = browser.get(reverse("admin:spend_price_changelist")).content.decode()
    assert "in force" in listed and "past" in listed


def test_m9_the_form_asks_twice_for_what_looks_like_a_mistake(browser):
    change()
    url = reverse("admin:spend_price_add")
    page = browser.post(url, VALUES | {"prompt_nanousd_per_token": "60000"})
    assert "This looks like a mistake." in page.content.decode()
    confirmed = hidden(page) | {"confirm": "1"}
    assert "This looks like a mistake." in browser.post(url, confirmed).content.decode()
    assert Price.objects.count() == 1
    assert browser.post(url, confirmed | {"sure": "1"}).status_code == 302
    assert Price.objects.count() == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_nanousd_per_token": "-1"},
        {"prompt_nanousd_per_token": ""},
        {"prompt_nanousd_per_token": "NaN"},
        {"prompt_nanousd_per_token": "0.00001"},
        {"cached_prompt_nanousd_per_token": "0.07"},
        {"model": "unheard-of"},
        {"valid_from": "2020-01-01 00:00"},
        {"valid_from": "soon"},
        {"reason": ""},
    ],
)
def test_m10_bad_input_is_told_at_its_field(browser, wrong):
    change()
    page = browser.post(reverse("admin:spend_price_add"), VALUES | wrong | {"confirm": "1", "sure": "1"})
    assert page.status_code == 200 and 'role="alert"' in page.content.decode()
    assert Price.objects.count() == 1


# --- from the catalog's own prices ---------------------------------------------------------------------------------------------


def test_prices_of_the_catalog_become_rows():
    def migrate(name: str):
        executor = MigrationExecutor(connection)
        executor.migrate([("inference", name)])
        return MigrationExecutor(connection).loader.project_state([("inference", name)]).apps

    try:
        old = migrate("0001_catalog").get_model("inference", "Model")
        old.objects.create(
            public_id="mdl_1",
            slug="old",
            name="Old",
            kind="generate",
            version="1",
            prompt_nanousd_per_token=7,
            completion_nanousd_per_token=9,
            context_tokens=10,
        )
        created_at = old.objects.get().created_at
    finally:
        migrate("0003_catalog_without_prices")
        # whatever came after it, for the tests to come
        executor = MigrationExecutor(connection)
        executor.migrate(executor.loader.graph.leaf_nodes())
    price = Price.objects.get(model="old")
    assert prices.terms_of(price) == make_terms(prompt=7, completion=9)
    assert price.valid_from == created_at
