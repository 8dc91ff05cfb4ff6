"""A key may be kept to an amount a month, from the moment it is made: on the page, over the API and on the command line."""

from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.test import Client

from apps.accounts import key_limits
from apps.accounts.callers import on_thread
from apps.accounts.keys import KeyTerms, create_key
from apps.accounts.models import ApiKey, AuditEvent
from apps.spend import settlement
from apps.spend.models import Budget
from tests.apps.conftest import Cast
from tests.apps.gateway.driver import Exchange
from tests.apps.spend.cast import make_finished

CHAT = "smollm2-135m-instruct"


async def ask(raw: str) -> tuple[int, Any]:
    value = {"model": CHAT, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    exchange = Exchange("POST", "/v1/chat/completions", key=raw, value=value)
    return (await exchange.read_json(), exchange.status)[::-1]


def read_form(**changes: Any) -> dict[str, Any]:
    return {"name": "cheap", **changes}


async def test_what_does_not_fit_is_refused_and_other_keys_go_on(worker: None, cast: Cast) -> None:
    """M4: through the public API, at once after the key was made."""
    _, cheap = await on_thread(lambda: create_key(cast.organization, cast.user, "", KeyTerms(monthly_limit_nanousd=1)))
    status, answer = await ask(cheap)
    assert status == 429 and answer["error"]["code"] == "insufficient_quota", answer
    assert "key" in answer["error"]["message"]
    assert (await ask(cast.raw))[0] == 200


def test_the_page_sets_it_and_shows_what_is_spent(cast: Cast) -> None:
    browser = Client()
    browser.force_login(cast.user)
    page = browser.post("/account/keys/", read_form(monthly_limit="2.5"))
    assert b"Your new key" in page.content
    key = ApiKey.objects.get(name="cheap")
    budget = Budget.objects.get(scope=f"key:{key.public_id}")
    assert (budget.limit_nanousd, budget.period) == (2_500_000_000, "monthly")
    assert (
        AuditEvent.objects.get(action="key.create", target=f"key:{key.public_id}").details["monthly_limit_usd"]
        == "$2.50"
    )
    settlement.settle(make_finished(cast.organization.public_id, key_id=key.public_id))
    assert "$0.000000065 of $2.50 spent this month." in browser.get("/account/keys/").content.decode()


@pytest.mark.parametrize("limit", ["-1", "x", "9000001", "0.0000000001"])
def test_an_amount_that_cannot_be(cast: Cast, limit: str) -> None:
    browser = Client()
    browser.force_login(cast.user)
    page = browser.post("/account/keys/", read_form(monthly_limit=limit))
    assert b"errorlist" in page.content and b"Your new key" not in page.content
    with pytest.raises(CommandError):
        call_command("create_api_key", email="ada@example.com", monthly_limit=limit, stdout=StringIO())
    assert ApiKey.objects.count() == 1 and not Budget.objects.exists()


def test_programs_set_and_read_it(cast: Cast) -> None:
    manager = create_key(cast.organization, cast.user, "", KeyTerms(can_manage=True))[1]
    path = f"/api/v1/organizations/{cast.organization.public_id}/keys"
    headers = {"Authorization": f"Bearer {manager}"}
    browser = Client()
    made = browser.post(path, {"monthly_limit_nanousd": 5}, content_type="application/json", headers=headers)
    assert made.status_code == 201 and made.json()["monthly_limit_nanousd"] == 5
    listed = browser.get(path, headers=headers).json()["data"]
    assert [each["monthly_limit_nanousd"] for each in listed] == [5, None, None]
    assert [each["month_spent_nanousd"] for each in listed] == [0, None, None]
    bad = browser.post(path, {"monthly_limit_nanousd": -1}, content_type="application/json", headers=headers)
    assert bad.status_code == 400 and bad.json()["error"]["param"] == "monthly_limit_nanousd"
    # a key with a budget makes no key without one
    key = ApiKey.objects.get(can_manage=True)
    key_limits.set_limit(key, 10)
    wider = browser.post(path, {}, content_type="application/json", headers=headers)
    assert wider.status_code == 403


def test_the_command_sets_it(cast: Cast) -> None:
    call_command("create_api_key", email="ada@example.com", monthly_limit="0.50", stdout=StringIO())
    key = ApiKey.objects.latest("pk")
    key_limits.attach([key])
    assert key.month_limit_nanousd == 500_000_000
