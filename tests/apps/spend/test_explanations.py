"""`explain`: why was I refused, and why does this cost what it costs; to whom it concerns, and to nobody else."""

from datetime import timedelta
from io import StringIO

import pytest
from django.core.management import CommandError, call_command
from django.db import transaction
from django.test import Client
from django.utils import timezone

from aiscale.errors import AiscaleError, Code
from aiscale.wire import codec, keys
from aiscale.wire.jobs import GenerateJob, Sampling
from apps.accounts import audit
from apps.accounts.keys import create_key
from apps.accounts.models import Membership, Organization, Plan, User
from apps.spend import corrections, explanations, prices, refusal_log, refusal_writer, settlement
from apps.spend.models import Price, RefusedRequest, UsageRecord
from tests.apps.spend.cast import make_finished
from tests.apps.spend.test_statements import Company

pytestmark = pytest.mark.django_db(transaction=True)
BY = audit.by_system("test")


@pytest.fixture
def company(client) -> Company:
    return Company()


def charge(company, request_id="req_x", **changes) -> explanations.Charge:
    settlement.settle(make_finished(company.id, request_id=request_id, **changes))
    [part] = explanations.explain(request_id, None)
    assert isinstance(part, explanations.Charge)
    return part


def test_a_cost_is_taken_apart_to_the_last_nano_dollar(company):
    terms = prices.Terms(
        prompt_nanousd_per_token=50,
        cached_prompt_nanousd_per_token=5,
        completion_nanousd_per_token=200,
        request_nanousd=1000,
    )
    price = prices.change("m", terms, reason="x", by=BY, confirmed=True)
    part = charge(
        company,
        model="m",
        prompt_tokens=10,
        cached_tokens=4,
        completion_tokens=5,
        price_id=price.public_id,
        hold_nanousd=5000,
        prompt_nanousd_per_token=50,
        cached_prompt_nanousd_per_token=5,
        completion_nanousd_per_token=200,
        request_nanousd=1000,
    )
    assert [(line.what, line.count, line.unit_nanousd, line.cost_nanousd) for line in part.lines] == [
        ("prompt tokens", 6, 50, 300),
        ("cached prompt tokens", 4, 5, 20),
        ("completion tokens", 5, 200, 1000),
        ("request", 1, 1000, 1000),
    ]
    assert part.cost_nanousd == 2320 == sum(line.cost_nanousd for line in part.lines)
    assert (part.hold_nanousd, part.given_back_nanousd, part.costs_now_nanousd) == (5000, 2680, 2320)
    assert part.price is not None and (part.price.price_id, part.price.valid_until) == (price.public_id, None)
    assert part.transaction_id.startswith("lt_")
    assert (part.queued_ms, part.first_token_ms, part.duration_ms) == (3, 90, 1400)


def test_lines_sum_to_the_cost_for_every_kind_of_end(company):
    for number, reason in enumerate(("stop", "length", "cancelled", "killed", "deadline", "error")):
        part = charge(company, f"req_end_{number}", finish_reason=reason, error_message="Too much smoke")
        assert sum(line.cost_nanousd for line in part.lines) == part.cost_nanousd == (0 if reason == "error" else 65)
        assert part.ended == reason and part.ended_because.endswith(".")
        assert ("Too much smoke" in part.ended_because) == (reason in ("cancelled", "killed", "error"))


def test_what_was_corrected_is_told(company):
    charge(company)
    record = UsageRecord.objects.get(request_id="req_x")
    corrections.refund(record, 40, reason="It was useless", by=BY, reference="corr_x")
    [part] = explanations.explain("req_x", None)
    assert [(line.kind, line.reason, line.amount_nanousd) for line in part.corrections] == [
        ("refund", "It was useless", -40)
    ]
    assert (part.cost_nanousd, part.costs_now_nanousd) == (65, 25)


def test_the_month_is_told_as_it_counted_then(company):
    first = charge(company, "req_first")
    second = charge(company, "req_second")
    assert second.month.spent_after_nanousd == first.month.spent_after_nanousd + 65


def test_a_batch_paid_half_of_the_price(company):
    price = prices.change(
        "m", prices.Terms(**dict.fromkeys(prices.Terms.__struct_fields__, 4)), reason="x", by=BY, confirmed=True
    )
    assert charge(company, source="batch", price_id=price.public_id).price.share == 2
    assert Price.objects.count() == 1


def note(request_id: str, error: AiscaleError, caller=None) -> None:
    """Note a refusal and write it down at once."""
    notes = refusal_log.Notes(sends_itself=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(refusal_log, "NOTES", notes)
        refusal_log.note(request_id, error, source="api", caller=caller)
    refusal_writer.write([notes.take()])


def refuse(company, request_id="req_no", code=Code.BUDGET_EXHAUSTED, key=None, **facts) -> None:
    key = key or company.member_key
    caller = refusal_log.Caller(
        organization_id=company.id,
        user_id=key.created_by.public_id,
        key_id=key.public_id,
        key_digest=key.digest,
        plan="pro",
    )
    error = AiscaleError(code, "Of your monthly limit nothing is left.", facts=facts)
    note(request_id, error, caller)


def test_a_refusal_is_explained_with_its_numbers(company):
    refuse(company, limit_nanousd="1000", spent_nanousd="990", scope="organization:x", model="m")
    [part] = explanations.explain("req_no", None)
    assert isinstance(part, explanations.Refusal)
    assert (part.code, part.model, part.plan) == ("insufficient_quota", "m", "pro")
    assert part.facts == {"limit_nanousd": 1000, "spent_nanousd": 990, "scope": "organization:x"}
    assert sorted(explanations.write_text(part).splitlines()[1:]) == [
        "  limit: $0.000001",
        "  scope: organization:x",
        "  spent: $0.00000099",
    ]


def test_a_job_that_runs_is_found_by_its_hold(company, client):
    event = make_finished(company.id, "job_runs", request_id="req_runs", user_id=company.member.public_id)
    job = GenerateJob(
        job_id="job_runs",
        model="m",
        model_version="1",
        prompt_token_ids=[1],
        sampling=Sampling(max_tokens=5),
        billing=event.billing,
        reply_to="p",
        deadline_at_ms=1,
    )
    record = {"kind": "generate", "payload": codec.encode_job(job), "state": "queued"}
    client.hset(keys.job_record("job_runs"), mapping=record)
    for scope in ("site", f"organization:{company.id}"):
        client.zadd(keys.holds(scope), {keys.hold("job_runs", 1000): 9e15})
    for viewer in (None, company.owner, company.member, company.root):
        [part] = explanations.explain("req_runs", viewer)
        assert isinstance(part, explanations.Running)
        assert (part.job_id, part.state, part.hold_nanousd) == ("job_runs", "waiting", 1000)
    with pytest.raises(AiscaleError):
        explanations.explain("req_runs", company.stranger)


# --- who may see it ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def both(company) -> Company:
    """A charge and a refusal of the member."""
    charge(company, "req_yes", user_id=company.member.public_id, key_id=company.member_key.public_id)
    refuse(company)
    other = User.objects.create_user("colleague@example.com", "x")
    Membership.objects.create(user=other, organization=company.organization, role="member")
    billing = User.objects.create_user("billing@example.com", "x")
    Membership.objects.create(user=billing, organization=company.organization, role="billing")
    return company


MAY_SEE = {"owner": 200, "member": 200, "billing": 200, "root": 200, "colleague": 404, "stranger": 404}


@pytest.mark.parametrize("request_id", ["req_yes", "req_no"])
@pytest.mark.parametrize("name", MAY_SEE)
def test_page_and_api_show_it_to_whom_it_concerns_alone(both, name, request_id):
    browser = both.log_in(User.objects.get(email=f"{name}@example.com"))
    assert browser.get(f"/account/requests/{request_id}/").status_code == MAY_SEE[name]
    response = browser.get(f"/api/v1/requests/{request_id}")
    assert response.status_code == MAY_SEE[name]
    if response.status_code == 404:
        assert response.json()["error"]["code"] == "not_found"
    # what is not there looks the same
    assert browser.get("/account/requests/req_nothing/").status_code == 404
    assert browser.get("/api/v1/requests/req_nothing").json()["error"]["code"] == "not_found"


def test_without_a_login_there_is_nothing(both):
    assert Client().get("/account/requests/req_yes/").status_code == 302
    assert Client().get("/api/v1/requests/req_yes").status_code == 401


def test_a_key_explains_its_organizations_requests_alone(both):
    def ask(raw: str, request_id: str) -> int:
        return Client().get(f"/api/v1/requests/{request_id}", headers={"Authorization": f"Bearer {raw}"}).status_code

    elsewhere = Organization.objects.create(name="Elsewhere", plan=Plan.objects.get(slug="pro"))
    Membership.objects.create(user=both.owner, organization=elsewhere, role="owner")
    _, foreign = create_key(elsewhere, both.owner, "foreign")
    for request_id in ("req_yes", "req_no"):
        assert (ask(both.owner_raw, request_id), ask(both.member_raw, request_id)) == (200, 200)
        assert ask(foreign, request_id) == 404


def test_a_refusal_of_nobody_known_is_for_administrators(company):
    note("req_who", AiscaleError(Code.INVALID_API_KEY, "Who?"))
    assert explanations.explain("req_who", company.root)
    with pytest.raises(AiscaleError):
        explanations.explain("req_who", company.owner)


def test_the_api_tells_the_numbers(both):
    browser = both.log_in(both.owner)
    answer = browser.get("/api/v1/requests/req_yes").json()
    [job] = answer["jobs"]
    assert (job["status"], job["cost_nanousd"], job["cost_usd"]) == ("charged", 65, "0.000000065")
    assert sum(line["cost_nanousd"] for line in job["lines"]) == 65
    [job] = browser.get("/api/v1/requests/req_no").json()["jobs"]
    assert (job["status"], job["code"]) == ("refused", "insufficient_quota")


# --- pages and command ---------------------------------------------------------------------------------------------------------------


def test_the_pages_say_it(both):
    refuse(
        both, "req_numbers", limit_nanousd="1000000000", retry_ms="61000", ends_at_ms="1800000000000", waiting="1234"
    )
    browser = both.log_in(both.owner)
    page = browser.get("/account/requests/req_yes/").content.decode()
    assert "Why it costs what it costs" in page and "$0.000000065" in page and "was held for it" in page
    page = browser.get("/account/requests/req_numbers/").content.decode()
    assert "Of your monthly limit nothing is left." in page
    for text in ('<dt>Limit</dt><dd class="breakable">$1.00', "1m1s", "15 January 2027, 08:00 UTC", "1,234"):
        assert text in page, text
    page = browser.get(f"/account/requests/?organization={both.id}").content.decode()
    assert "/account/requests/req_yes/" in page
    page = browser.get(f"/account/requests/?organization={both.id}&refused").content.decode()
    assert "/account/requests/req_no/" in page and "2 insufficient_quota" in page
    assert browser.get("/account/requests/?id=req_yes").headers["location"] == "/account/requests/req_yes/"
    page = browser.get(f"/account/usage/?organization={both.id}").content.decode()
    assert "Single requests" in page


def test_lists_go_on_page_by_page_and_d2_ask_a_bounded_number_of_times(both, django_assert_max_num_queries):
    now = timezone.now()
    RefusedRequest.objects.bulk_create(
        RefusedRequest(
            request_id=f"req_many_{number}",
            organization_id=both.id,
            source="api",
            code="killed",
            message="x",
            occurred_at=now - timedelta(seconds=number // 2),
        )
        for number in range(120)
    )
    browser = both.log_in(both.owner)
    url, seen = f"/account/requests/?organization={both.id}&refused", []
    browser.get(url)
    while url:
        with django_assert_max_num_queries(14):
            response = browser.get(url)
        seen += [row.request_id for row in response.context["rows"]]
        following = response.context["following"]
        url = f"/account/requests/?organization={both.id}&refused&before={following}" if following else ""
    assert len(seen) == len(set(seen)) >= 120
    with django_assert_max_num_queries(20):
        assert browser.get("/account/requests/req_yes/").status_code == 200
    for bad in ("before=x", "before=-1", "before=99999999999999999999", "before=0"):
        assert browser.get(f"/account/requests/?organization={both.id}&refused&{bad}").status_code == 200


def test_a_member_sees_their_own_in_the_lists(both):
    refuse(both, "req_owners", key=both.owner_key)
    browser = both.log_in(both.member)
    page = browser.get(f"/account/requests/?organization={both.id}&refused").content.decode()
    assert "req_no" in page and "req_owners" not in page and "These counts" not in page
    page = browser.get(f"/account/requests/?organization={both.id}").content.decode()
    assert "/account/requests/req_yes/" in page
    shown = browser.get(f"/account/requests/?organization={both.id}").context["rows"]
    assert {row.user_id for row in shown} == {both.member.public_id}


def test_the_command_explains_to_the_operator(both):
    corrections.refund(UsageRecord.objects.get(request_id="req_yes"), 5, reason="Sorry", by=BY, reference="corr_y")
    output = StringIO()
    call_command("explain", "req_yes", stdout=output)
    text = output.getvalue()
    assert "10 prompt tokens at $0.000000003: $0.00000003" in text and "Sorry" in text and "gave back" in text
    output = StringIO()
    call_command("explain", "req_no", stdout=output)
    assert "Refused with insufficient_quota" in output.getvalue()
    with pytest.raises(CommandError, match="no request of this id"):
        call_command("explain", "req_nothing")
    with transaction.atomic():
        assert explanations.explain("req_yes", None)
