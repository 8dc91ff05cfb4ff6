"""Readiness names what is not as it must be."""

import time
from types import SimpleNamespace

import pytest
from django.test import AsyncClient

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.parametrize(
    ("ahead_s", "expected"),
    [
        (0, "ok"),
        (90, "this machine's clock is 90 s ahead of that of Redis's machine; set both by NTP"),
        (-90, "this machine's clock is 90 s behind that of Redis's machine; set both by NTP"),
    ],
)
async def test_a_clock_that_goes_wrong_is_told(
    ahead_s: int, expected: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiscale.health.time", SimpleNamespace(time=lambda: time.time() + ahead_s))
    answer = await AsyncClient().get("/readyz")
    assert answer.json()["checks"]["redis"] == expected
    assert answer.status_code == 503, "nobody settles here, so it is not ready either way"
