"""Nobody guesses passwords or floods mailboxes: counted by address and by account, for all processes together, and said kindly."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import django_ratelimit.core
import pytest
from django.core import mail
from django.core.cache import caches
from django.test import Client, RequestFactory

from aiscale import env
from aiscale.caches import ForgivingCache
from apps.accounts import rates
from apps.accounts.models import ApiKey
from apps.accounts.rates import Limit
from tests.apps.conftest import ROOT, Cast

PASSWORD = "correct horse 9 battery"


@pytest.fixture(autouse=True)
def one_window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the clock by which attempts are counted, so that no window ends within a test."""
    if "processes" not in request.node.name:
        now_s = time.time()
        monkeypatch.setattr(django_ratelimit.core, "time", SimpleNamespace(time=lambda: now_s))


def log_in(browser: Client, email: str = "ada@example.com", password: str = "wrong", **headers: Any) -> Any:
    return browser.post("/accounts/login/", {"login": email, "password": password}, **headers)


def test_guessing_at_one_account_ends_with_a_time_to_wait(cast: Cast) -> None:
    browser = Client(REMOTE_ADDR="203.0.113.1")
    assert [log_in(browser).status_code for _ in range(10)] == [200] * 10
    refused = log_in(browser, "  ADA@example.com ", PASSWORD)
    assert refused.status_code == 429
    assert 0 < int(refused.headers["retry-after"]) <= 300
    assert "Try again in " in refused.content.decode() and "Too many tries" in refused.content.decode()
    assert "_auth_user_id" not in browser.session, "also the right password is not tried"
    # neither another account nor the same person elsewhere is shut out by it
    assert log_in(browser, "bob@example.com").status_code == 200
    assert log_in(Client(REMOTE_ADDR="203.0.113.2"), password=PASSWORD).status_code == 302


def test_one_address_cannot_try_many_accounts(cast: Cast) -> None:
    browser = Client(REMOTE_ADDR="203.0.113.1")
    statuses = [log_in(browser, f"user{n}@example.com").status_code for n in range(31)]
    assert statuses[:30] == [200] * 30 and statuses[30] == 429


def test_many_addresses_cannot_guess_at_one_account(cast: Cast) -> None:
    for n in range(98):
        rates.check_rate(RequestFactory().post("/", REMOTE_ADDR=f"203.0.113.{n}"), rates.LOGIN, "ada@example.com")
    assert [log_in(Client(REMOTE_ADDR=f"203.0.113.{n}")).status_code for n in (98, 99, 100)] == [200, 200, 429]


def test_one_ipv6_customer_counts_once(cast: Cast) -> None:
    statuses = [log_in(Client(REMOTE_ADDR=f"2001:db8:0:1::{n:x}"), f"u{n}@example.com").status_code for n in range(31)]
    assert statuses[30] == 429
    assert log_in(Client(REMOTE_ADDR="2001:db8:0:2::1")).status_code == 200


def test_a_forged_header_makes_no_new_client(cast: Cast) -> None:
    statuses = [
        log_in(
            Client(REMOTE_ADDR="203.0.113.1"), f"u{n}@example.com", HTTP_X_FORWARDED_FOR=f"198.51.100.{n}"
        ).status_code
        for n in range(31)
    ]
    assert statuses[30] == 429


def test_clients_behind_a_trusted_proxy_are_told_apart(cast: Cast, settings: Any) -> None:
    settings.ENV = env.load({"AISCALE_TRUSTED_PROXIES": "10.0.0.1"})
    for n in range(31):
        answer = log_in(Client(REMOTE_ADDR="10.0.0.1"), f"u{n}@example.com", HTTP_X_FORWARDED_FOR=f"198.51.100.{n}")
        assert answer.status_code == 200


def test_many_at_once_do_not_slip_through(cast: Cast) -> None:
    """An attempt counts before it is known how it ends."""
    passed: list[bool] = []
    limit = Limit("test.at_once", ip_rate="5/h")

    def attempt() -> None:
        try:
            rates.check_rate(RequestFactory().post("/", REMOTE_ADDR="203.0.113.1"), limit)
            passed.append(True)
        except rates.AiscaleError:
            passed.append(False)

    threads = [threading.Thread(target=attempt) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert passed.count(True) == 5 and len(passed) == 40


def test_a_mailbox_is_not_flooded(cast: Cast) -> None:
    statuses = [
        Client(REMOTE_ADDR=f"203.0.113.{n}").post("/accounts/password/reset/", {"email": "ada@example.com"}).status_code
        for n in range(6)
    ]
    assert statuses == [302] * 5 + [429]
    assert len(mail.outbox) == 5


def test_signing_up_and_new_passwords_are_limited(cast: Cast) -> None:
    browser = Client(REMOTE_ADDR="203.0.113.1")
    pages = {"/accounts/signup/": 30, "/accounts/password/reset/key/0-set-password/": 30}
    for page, most in pages.items():
        statuses = [
            browser.post(page, {"email": f"u{n}@example.com", "password1": "x"}).status_code for n in range(most + 1)
        ]
        assert statuses[-2] != 429 and statuses[-1] == 429, page


def test_looking_is_not_counted(cast: Cast) -> None:
    browser = Client(REMOTE_ADDR="203.0.113.1")
    assert {browser.get("/accounts/login/").status_code for _ in range(40)} == {200}


def test_keys_are_counted_by_user_and_by_address(cast: Cast) -> None:
    browser = Client(REMOTE_ADDR="203.0.113.1")
    browser.force_login(cast.user)
    for n in range(21):
        page = browser.post("/account/keys/", {"name": f"key {n}"})
    assert "very often within a short time" in page.content.decode()
    assert ApiKey.objects.count() == 21, "20, and the one that was there"


@contextmanager
def no_redis(tmp_path: Path) -> Iterator[None]:
    """Let Django's caches look for Redis where nobody listens."""
    kept = []
    for cache in (caches["default"], caches["sessions"]):
        client: Any = cache._cache  # type: ignore[attr-defined]
        kept.append((client, client._servers[:]))
        client._pools.clear()
        client._servers[:] = [f"unix://{tmp_path}/nobody.sock"]
    yield
    for client, servers in kept:
        client._pools.clear()
        client._servers[:] = servers
    caches["process"].clear()
    ForgivingCache._away_until_s = 0.0


def test_without_redis_people_log_in_and_guessing_stays_limited(cast: Cast, tmp_path: Path) -> None:
    browser = Client(REMOTE_ADDR="203.0.113.1")
    with no_redis(tmp_path):
        assert browser.get("/accounts/login/").status_code == 200
        assert log_in(browser, password=PASSWORD).status_code == 302
        assert browser.get("/account/keys/").status_code == 200, "and stays logged in"
        guesser = Client(REMOTE_ADDR="203.0.113.2")
        assert [log_in(guesser).status_code for _ in range(11)] == [200] * 10 + [429]
    assert browser.get("/account/keys/").status_code == 200, "also when it is back"


def test_without_redis_logging_out_says_that_it_cannot(cast: Cast, tmp_path: Path) -> None:
    """Its copy of the session would open the pages once more when it is back."""
    browser = Client(REMOTE_ADDR="203.0.113.1")
    browser.force_login(cast.user)
    with no_redis(tmp_path):
        answer = browser.post("/accounts/logout/")
    text = answer.content.decode()
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert "Back in a moment" in text and "Traceback" not in text
    assert browser.post("/accounts/logout/").status_code == 302


def test_a_redis_that_failed_is_asked_again(cast: Cast, tmp_path: Path) -> None:
    cache: Any = caches["default"]
    cache.set("word", "shared")
    with no_redis(tmp_path):
        assert cache.get("word") is None
        with pytest.raises(ValueError, match="not found"):
            cache.incr("count")
        assert cache.add("count", 1, timeout=60) and cache.incr("count") == 2
        assert "count" in cache and cache.delete("count") and "count" not in cache
        ForgivingCache._away_until_s = 0.0
        assert cache.get("word") is None and ForgivingCache._away_until_s > 0
    assert cache.get("word") == "shared"


def test_a_limit_holds_for_all_processes_together(cast: Cast) -> None:
    """L2: limits that do not hold across processes."""
    code = (
        "import django; django.setup()\n"
        "from django.test import RequestFactory\n"
        "from apps.accounts import rates\n"
        "for _ in range(3): rates.check_rate(RequestFactory().post('/', REMOTE_ADDR='203.0.113.9'), rates.Limit('two', ip_rate='5/d'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)
    request = RequestFactory().post("/", REMOTE_ADDR="203.0.113.9")
    for _ in range(2):
        rates.check_rate(request, Limit("two", ip_rate="5/d"))
    with pytest.raises(rates.AiscaleError, match="Try again in "):
        rates.check_rate(request, Limit("two", ip_rate="5/d"))


def test_the_api_says_when_to_come_back(cast: Cast) -> None:
    browser = Client(REMOTE_ADDR="203.0.113.1")
    browser.force_login(cast.user)
    places = [
        browser.post("/api/v1/organizations", {"name": f"Number {n}"}, content_type="application/json")
        for n in range(21)
    ]
    assert places[-1].status_code == 429 and places[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert 0 < int(places[-1].headers["Retry-After"]) <= 86_400
