"""Limit how often somebody may do what is guessed at, sends mails or fills tables, on pages and over the API together.

Counted by django-ratelimit in the shared Redis, for all web processes together; while Redis is away, by each process for itself
(``aiscale.caches``). An attempt counts before it is known how it ends, so that many at once do not slip through.

Its windows are fixed: around the moment in which one ends, twice the number fit into a short time. That is left so: 20 guesses at a
password instead of 10 help nobody, since the hourly limits of the account stand behind them, and no money is counted here. What costs
money is limited by the gate (`apps.spend.admission`), whose windows slide.
"""

import hashlib
import math
from ipaddress import ip_network
from typing import NamedTuple

from django.http import HttpRequest
from django_ratelimit.core import get_usage

from aiscale.errors import AiscaleError, Code
from apps.accounts.addresses import client_address

NO_ADDRESS = "0.0.0.0"  # noqa: S104  # where all count who come over a Unix socket that no proxy names


class Limit(NamedTuple):
    """Allow so many of something: each rate is ``<number>/<s, m, h or d>``, or '' for none.

    ``rate`` counts by user; ``ip_rate`` by the client's address (a /64 network of IPv6); ``account_rate`` by the e-mail address that
    the form names, whoever sends it; ``guess_rate`` by that and the client's address together.
    """

    group: str
    rate: str = ""
    ip_rate: str = ""
    account_rate: str = ""
    guess_rate: str = ""


CREATE_KEY = Limit("accounts.create_key", rate="20/h", ip_rate="60/h")
CREATE_ORGANIZATION = Limit("accounts.create_organization", rate="20/d", ip_rate="60/d")
INVITE = Limit("accounts.invite", rate="100/h", ip_rate="300/h")
ADD_WEBHOOK = Limit("accounts.add_webhook", rate="20/h", ip_rate="60/h")
TEST_WEBHOOK = Limit("accounts.test_webhook", rate="30/h", ip_rate="90/h")
EXPORT = Limit("accounts.export", rate="10/h")
DELETE_ACCOUNT = Limit("accounts.delete_account", rate="10/h", ip_rate="30/h")
LOGIN = Limit("accounts.login", ip_rate="30/m", account_rate="100/h", guess_rate="10/5m")
SIGNUP = Limit("accounts.signup", ip_rate="30/h", account_rate="10/h")
RESET_PASSWORD = Limit("accounts.reset_password", ip_rate="30/h", account_rate="5/h")
SET_PASSWORD = Limit("accounts.set_password", ip_rate="30/h")


def check_rate(request: HttpRequest, limit: Limit, account: str = "") -> None:
    """Count this once more, for each rate of ``limit``. ``account`` is what a form names as its account.

    I/O: one or two Redis trips a rate. Raises: AiscaleError (RATE_LIMITED, with the time to wait).
    """
    account = hashlib.sha256(account.strip().lower().encode("utf-8", "replace")).hexdigest() if account.strip() else ""
    address = client_address(request) or NO_ADDRESS
    counted = [
        (limit.ip_rate, "ip", address),
        (limit.account_rate, "account", account),
        (limit.guess_rate, "guess", f"{account} {address}" if account else ""),
        (limit.rate, "user", str(request.user.pk) if limit.rate else ""),
    ]
    for rate, word, value in counted:
        if rate and value:
            _count(request, f"{limit.group}.{word}", rate, value)


def _count(request: HttpRequest, group: str, rate: str, value: str) -> None:
    def key(group: str, request: HttpRequest) -> str:
        return _mask(value)

    usage = get_usage(request, group=group, key=key, rate=rate, increment=True)
    if usage is None or not usage["should_limit"]:
        return
    wait_s = max(int(usage["time_left"]), 1)
    raise AiscaleError(
        Code.RATE_LIMITED,
        f"You have done this very often within a short time. Try again in {say_duration(wait_s)}.",
        retry_after_s=wait_s,
    )


def _mask(value: str) -> str:
    """Count all addresses of an IPv6 network as one: a single customer has 2**64 of them."""
    words = value.split(" ")
    if ":" in words[-1]:
        words[-1] = ":".join(ip_network(f"{words[-1]}/64", strict=False).network_address.exploded.split(":")[:4])
    return " ".join(words)


def say_duration(duration_s: int) -> str:
    """Write a time to wait for people, rounded up."""
    if duration_s < 90:
        return f"{duration_s} second{'s' if duration_s != 1 else ''}"
    if duration_s < 5400:
        return f"{math.ceil(duration_s / 60)} minutes"
    return f"{math.ceil(duration_s / 3600)} hours"
