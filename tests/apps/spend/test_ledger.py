"""Show that the ledger balances and that the database itself keeps it from being changed."""

import pytest
from django.db import Error, IntegrityError, connection, transaction
from django.utils import timezone

from apps.spend import ledger
from apps.spend.models import LedgerEntry, LedgerTransaction, UsageRecord
from apps.spend.settlement import settle
from tests.apps.spend.cast import make_finished, make_organization, warm

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def settled(client) -> None:
    settle(make_finished(warm(make_organization()).public_id, "job_1"))


def posting(*entries, reference="r1") -> ledger.Posting:
    return ledger.Posting(kind="adjustment", reference=reference, occurred_at=timezone.now(), entries=entries)


TABLES = [UsageRecord, LedgerTransaction, LedgerEntry]


@pytest.mark.parametrize("model", TABLES)
def test_no_row_is_changed_deleted_or_truncated(settled, model):
    table = model._meta.db_table
    row = model.objects.get() if model is not LedgerEntry else model.objects.first()
    with pytest.raises(Error, match="append-only"):
        row.save()
    with pytest.raises(Error, match="append-only"):
        model.objects.filter(pk=row.pk)._raw_delete("default")
    with pytest.raises(Error, match="append-only"), transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET LOCAL aiscale.allow_truncate = 'on'")  # opened the door until migration 0016
        cursor.execute(f"TRUNCATE {table} CASCADE")
    assert model.objects.filter(pk=row.pk).exists()


@pytest.mark.parametrize("entries", [(("a", 5), ("b", -4)), (("a", 5),), ()])
def test_what_does_not_balance_is_refused_by_the_code(entries):
    with pytest.raises(ValueError, match="do not balance"):
        ledger.post([posting(*entries)])
    assert LedgerTransaction.objects.count() == 0


@pytest.mark.parametrize("amounts", [(5, -4), (5,), ()])
def test_what_does_not_balance_is_refused_by_the_database(amounts):
    with pytest.raises(IntegrityError, match="at least two that sum to zero"), transaction.atomic():
        row = LedgerTransaction.objects.create(kind="adjustment", reference="r", occurred_at=timezone.now())
        for amount in amounts:
            LedgerEntry.objects.create(transaction=row, account="a", amount_nanousd=amount, occurred_at=row.occurred_at)
    assert LedgerTransaction.objects.count() == 0


def test_an_entry_that_is_added_later_must_balance_too(settled):
    row = LedgerTransaction.objects.get()
    with pytest.raises(IntegrityError, match="sum to"):
        LedgerEntry.objects.create(transaction=row, account="a", amount_nanousd=1, occurred_at=row.occurred_at)


def test_nothing_is_posted_twice():
    ledger.post([posting(("a", 5), ("b", -5))])
    with pytest.raises(IntegrityError):
        ledger.post([posting(("a", 5), ("b", -5), reference="r2"), posting(("a", 5), ("b", -5))])
    assert LedgerTransaction.objects.count() == 1


def test_m9_an_adjusting_entry_mends_a_mistake(settled):
    account = LedgerEntry.objects.get(amount_nanousd__gt=0).account
    organization_id = account.partition(":")[2]
    ledger.post([posting((account, -60), (ledger.REVENUE_ACCOUNT, 60))])
    assert ledger.sum_charges(organization_id, f"{timezone.now():%Y-%m}") == 5
