"""The statement: one sum for page, API, CSV, ledger and gate; for whom it concerns and nobody else."""

import csv
import io
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import Permission
from django.db import connections
from django.test import AsyncClient, Client

from apps.accounts import audit
from apps.accounts.callers import on_thread
from apps.accounts.keys import create_key
from apps.accounts.models import Membership, Organization, Plan, User
from apps.accounts.plans import seed_plans
from apps.spend import balance, corrections, ledger, periods, statement_files, statements, usage
from apps.spend.models import Budget, LedgerEntry, UsageRecord
from tests.apps.spend.cast import make_finished, scope_of, spent

pytestmark = pytest.mark.django_db(transaction=True)
MONTH = periods.month_of(periods.now_ms())
START, _ = periods.bounds(MONTH)


class Company:
    """An organization with an owner, a member with a key, and a month of usage."""

    def __init__(self) -> None:
        seed_plans()
        self.owner, self.member, self.stranger, self.root = (
            User.objects.create_user(f"{name}@example.com", "x") for name in ("owner", "member", "stranger", "root")
        )
        self.root.is_staff = True
        self.root.save()
        self.root.user_permissions.add(Permission.objects.get(codename="view_usagerecord"))
        self.organization = Organization.objects.create(name="Acme", plan=Plan.objects.get(slug="pro"))
        for user, role in ((self.owner, "owner"), (self.member, "member")):
            Membership.objects.create(user=user, organization=self.organization, role=role)
        self.id = self.organization.public_id
        self.owner_key, self.owner_raw = create_key(self.organization, self.owner, "Website")
        self.member_key, self.member_raw = create_key(self.organization, self.member, "=cmd()")
        now = datetime.now(UTC)
        moments = [START, START + (now - START) / 2, now]
        usage.record(
            make_finished(
                self.id,
                user_id=key.created_by.public_id,
                key_id=key.public_id,
                model=model,
                prompt_tokens=number + 1,
                finish_reason="error" if number == 3 else "stop",
                finished_at_ms=int(moment.timestamp() * 1000),
                admitted_at_ms=int(moment.timestamp() * 1000) - 1,
                request_id=f"req_{number}",
            )
            for moment in moments
            for number in range(5)
            for model in ("m1", "m2")
            for key in (self.owner_key, self.member_key)
        )
        # of the month before: on no statement of this one
        before = int(START.timestamp() * 1000) - 1
        usage.record([make_finished(self.id, finished_at_ms=before, admitted_at_ms=before)])
        by = audit.by_user(self.root)
        corrections.give_credit(self.id, 777, source="goodwill", reason="=HYPERLINK(1)", by=by, reference="c1")
        corrections.adjust(self.id, 13, reason="Too little", by=by, reference="a1")
        record = UsageRecord.objects.filter(cost_nanousd__gt=9).first()
        assert record is not None
        corrections.refund(record, 9, reason="Broken", by=by, reference="r1")

    def log_in(self, user: User) -> Client:
        browser = Client()
        browser.force_login(user)
        return browser


@pytest.fixture
def company(client) -> Company:
    return Company()


@pytest.fixture
async def browser() -> AsyncIterator[AsyncClient]:
    """A client whose requests run as under ASGI."""
    yield AsyncClient()
    # its requests ran on a thread that outlives the test: a connection of that one would keep the database from being removed
    await sync_to_async(connections.close_all)()


async def read_csv(browser: AsyncClient, url: str, **headers: str) -> list[dict[str, str]]:
    response = await browser.get(url, headers=headers)
    assert response.status_code == 200, response.content
    text = b"".join([part async for part in response.streaming_content]).decode()
    return list(csv.DictReader(io.StringIO(text)))


def test_m5_statement_ledger_records_and_gate_agree_to_the_last_nano_dollar(company):
    statement = statements.build(company.id, statements.read_days(company.id, MONTH))
    balance.publish(scope_of(company.organization))
    account = LedgerEntry.objects.filter(account=f"organization:{company.id}", occurred_at__gte=START)
    assert statement.total_nanousd == sum(account.values_list("amount_nanousd", flat=True))
    assert statement.total_nanousd == statement.ledger_nanousd == ledger.sum_charges(company.id, MONTH)
    assert statement.total_nanousd == spent(company.organization)
    records = UsageRecord.objects.filter(organization_id=company.id, occurred_at__gte=START)
    assert statement.usage_nanousd == sum(records.values_list("cost_nanousd", flat=True)) > 0
    assert statement.entries_nanousd == -777 + 13 - 9
    assert statement.requests == 60
    assert sum(line.failed_requests for line in statement.usage) == 12
    for field in ("date", "model", "key_id", "user_id"):
        assert sum(line.cost_nanousd for line in statements.roll_up(statement.usage, field).values()) == (
            statement.usage_nanousd
        )


async def test_m5_page_api_and_csv_say_the_same(client, browser):
    company = await on_thread(Company)
    total = await on_thread(lambda: ledger.sum_charges(company.id, MONTH))
    await browser.aforce_login(company.owner)
    answer = (await browser.get(f"/api/v1/usage?month={MONTH}&organization={company.id}")).json()
    assert answer["totals"]["total_nanousd"] == total
    assert sum(line["cost_nanousd"] for line in answer["usage"]) == answer["totals"]["usage_nanousd"]
    rows = await read_csv(browser, f"/account/usage/statement.csv?month={MONTH}&organization={company.id}")
    assert [row["kind"] for row in rows[-3:]] == ["total", "included", "total beyond included"]
    sums = [int(row["nanousd"]) for row in rows[-3:]]
    assert sum(int(row["nanousd"]) for row in rows[:-3]) == total == sums[0] and sums[0] + sums[1] == sums[2]
    assert sums[1] == -min(20 * 10**9, max(total, 0))
    assert [row["usd"] for row in rows[-3:]] == [statement_files.format_amount(amount) for amount in sums]
    # what the plan includes is said in all three
    month = answer["month"]
    assert (month["spent_nanousd"], month["month"], month["included_usd"]) == (total, MONTH, "20.000000000")
    assert month["included_left_nanousd"] == 20 * 10**9 - max(total, 0)
    assert (-month["included_used_nanousd"], month["beyond_included_nanousd"]) == (sums[1], sums[2])
    assert month["left_nanousd"] == month["limit_nanousd"] - total
    assert rows[-2]["memo"].startswith("The plan includes $20.00 a month: ") and "is left." in rows[-2]["memo"]
    other = (await browser.get(f"/api/v1/usage?month=2025-01&organization={company.id}")).json()
    assert other["month"] is None, "what a plan includes is told of the month that runs"
    requests = await read_csv(browser, f"/account/usage/requests.csv?month={MONTH}&organization={company.id}")
    assert sum(int(row["nanousd"]) for row in requests) == answer["totals"]["usage_nanousd"]
    assert len(requests) == 60
    page = (await browser.get(f"/account/usage/?organization={company.id}")).content.decode()
    assert "These lines add up to the ledger" in page and rows[-2]["memo"] in page


async def test_a_spreadsheet_runs_none_of_it(client, browser):
    company = await on_thread(Company)
    await browser.aforce_login(company.owner)
    rows = await read_csv(browser, f"/account/usage/statement.csv?organization={company.id}")
    texts = {row["key"] for row in rows} | {row["memo"] for row in rows}
    assert any(text.startswith("'=cmd()") for text in texts) and "'=HYPERLINK(1)" in texts
    assert not any(text.startswith(("=", "+", "-", "@")) for text in texts)


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@SUM", "\t=1", "\r=1", "\n=1"])
def test_formulas_are_disarmed(text):
    assert statement_files.disarm(text) == f"'{text}"


async def test_files_are_written_piece_by_piece_in_order(client, monkeypatch):
    company = await on_thread(Company)
    monkeypatch.setattr(statement_files, "CHUNK_ROWS", 7)
    days = await on_thread(lambda: statements.read_days(company.id, MONTH))
    parts = [part async for part in statement_files.iter_requests(company.id, days)]
    assert len(parts) == 1 + 60 // 7 + 1
    rows = list(csv.DictReader(io.StringIO(b"".join(parts).decode())))
    assert len({row["job_id"] for row in rows}) == 60
    assert [row["ended_at"] for row in rows] == sorted(row["ended_at"] for row in rows)


# --- who sees what ---------------------------------------------------------------------------------------------------------------


async def test_a_key_sees_what_its_maker_may_see(client, browser):
    company = await on_thread(Company)

    async def ask(raw: str) -> dict:
        response = await browser.get("/api/v1/usage", headers={"Authorization": f"Bearer {raw}"})
        assert response.status_code == 200, response.content
        return response.json()

    assert {line["user_id"] for line in (await ask(company.owner_raw))["usage"]} == {
        company.owner.public_id,
        company.member.public_id,
    }
    own = await ask(company.member_raw)
    assert {line["user_id"] for line in own["usage"]} == {company.member.public_id} and own["entries"] == []
    rows = await read_csv(browser, "/api/v1/usage/requests.csv", Authorization=f"Bearer {company.member_raw}")
    assert {row["user_id"] for row in rows} == {company.member.public_id}
    rows = await read_csv(browser, "/api/v1/usage.csv", Authorization=f"Bearer {company.owner_raw}", Accept="text/csv")
    assert len(rows) == 12 + 3 + 3
    # another organization's name in the query changes nothing for a key
    other = await browser.get(
        "/api/v1/usage?organization=org_x", headers={"Authorization": f"Bearer {company.owner_raw}"}
    )
    assert other.json()["organization"] == company.id


def test_a_member_sees_their_own_usage_alone(company):
    page = company.log_in(company.member).get(f"/account/usage/?organization={company.id}").content.decode()
    assert "what you used yourself" in page and "Website" not in page and "=HYPERLINK" not in page
    assert "owner@example.com" not in page and "This month" not in page


@pytest.mark.parametrize("path", ["/account/usage/", "/account/usage/statement.csv", "/account/usage/requests.csv"])
def test_to_a_stranger_the_organization_does_not_exist(company, path):
    url = f"{path}?organization={company.id}"
    assert company.log_in(company.stranger).get(url).status_code == 404
    assert company.log_in(company.stranger).get(f"{path}?organization=%00").status_code == 404
    assert Client().get(url).status_code == 302
    assert company.log_in(company.root).get(url).status_code == 200
    assert company.log_in(company.stranger).get(path).status_code == 200


@pytest.mark.parametrize("path", ["usage", "usage.csv", "usage/requests.csv"])
def test_the_api_refuses_in_openais_shape(company, path):
    stranger = company.log_in(company.stranger)
    response = stranger.get(f"/api/v1/{path}?organization={company.id}")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    response = Client().get(f"/api/v1/{path}")
    assert (response.status_code, response.json()["error"]["code"]) == (401, "missing_api_key")
    for query, param in (
        ("month=2026-13", "month"),
        ("month=soon", "month"),
        ("month=0001-01", "month"),
        ("from=2026-01-01", "to"),
        ("from=x&to=2026-01-01", "from"),
        ("from=2026-01-02&to=2026-01-01", "to"),
        ("from=2020-01-01&to=2026-01-01", "to"),
        ("month=2026-01&from=2026-01-01", "month"),
    ):
        response = stranger.get(f"/api/v1/{path}?{query}")
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), query
        assert stranger.get(f"/account/usage/?{query}").status_code == 302
    assert stranger.post(f"/api/v1/{path}").status_code == 405
    response = stranger.get("/api/v1/nothing/here")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


def test_some_days_are_accounted_for_like_a_month(company):
    today = datetime.now(UTC).date()
    parts = [
        statements.build(company.id, statements.read_days(company.id, first=f"{first}", last=f"{last}")).total_nanousd
        for first, last in ((START.date(), today - timedelta(days=1)), (today, today))
        if first <= last
    ]
    assert sum(parts) == ledger.sum_charges(company.id, MONTH)


def test_m5_a_month_is_that_of_the_organizations_budget(company):
    """Fourteen hours ahead of Greenwich, the month begins when the budget's does."""
    Budget.objects.create(
        scope=scope_of(company.organization), period="monthly", time_zone="Pacific/Kiritimati", limit_nanousd=10**9
    )
    moment = START - timedelta(hours=13)
    usage.record(
        [make_finished(company.id, model="early", finished_at_ms=int(moment.timestamp() * 1000), admitted_at_ms=1)]
    )
    days = statements.read_days(company.id, MONTH)
    statement = statements.build(company.id, days)
    assert (days.start, days.zone) == (START - timedelta(hours=14), "Pacific/Kiritimati")
    assert [line.date for line in statement.usage if line.model == "early"] == [START.date()]
    balance.publish(scope_of(company.organization))
    assert statement.total_nanousd == statement.ledger_nanousd == spent(company.organization)


def test_d2_the_page_asks_the_database_a_bounded_number_of_times(company, django_assert_max_num_queries):
    browser = company.log_in(company.owner)
    url = f"/account/usage/?organization={company.id}"
    browser.get(url)
    with django_assert_max_num_queries(16):
        assert browser.get(url).status_code == 200
    usage.record(make_finished(company.id, model=f"model-{number}", key_id=f"key_{number}") for number in range(300))
    with django_assert_max_num_queries(16):
        page = browser.get(url).content.decode()
    assert "more lines are in the CSV" in page and "The biggest 20 of" in page
