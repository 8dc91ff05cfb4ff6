"""One address tells the metrics of all processes: to who may know them."""

import time
from typing import Any

import pytest
from django.test import AsyncClient
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from aiscale.observability import ENGINE_RUNNING, ENGINE_STEP_SECONDS
from aiscale.wire import keys, metrics
from apps.accounts.callers import on_thread
from apps.accounts.models import User

pytestmark = pytest.mark.django_db(transaction=True)
TOKEN = {"authorization": "Bearer of-the-scraper"}


@pytest.fixture
def client(redis_url: str) -> Any:
    client = Redis.from_url(redis_url)
    client.delete(keys.METRICS)
    yield client
    client.delete(keys.METRICS)
    client.close()


def samples(text: str, name: str) -> dict[str, float]:
    """Return a metric's values of the model ``told`` by process."""
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        each.labels["process"]: each.value for each in found if each.name == name and each.labels.get("model") == "told"
    }


async def test_all_processes_are_told_of_at_one_address(client: Redis, settings: Any) -> None:
    ENGINE_RUNNING.labels("told", "v1").set(3)
    ENGINE_STEP_SECONDS.labels("told").observe(0.02)
    metrics.report("worker-a", client)
    ENGINE_RUNNING.labels("told", "v1").set(5)
    metrics.report("worker-b", client)
    old_ns = time.time_ns() - int(metrics.STALE_S * 2e9)
    client.hset(keys.METRICS, "worker-gone", old_ns.to_bytes(8, "big") + b"# nothing\n")
    settings.ENV = settings.ENV.__class__(**{**vars(settings.ENV), "metrics_token": "of-the-scraper"})
    answer = await AsyncClient().get("/metrics", headers=TOKEN)
    assert answer.status_code == 200 and answer["content-type"].startswith("text/plain; version=0.0.4")
    text = answer.content.decode()
    assert samples(text, "aiscale_engine_running") == {"worker-a": 3, "worker-b": 5}
    assert samples(text, "aiscale_engine_step_seconds_count") == {"worker-a": 1, "worker-b": 1}
    assert text.count("# TYPE aiscale_engine_running gauge") == 1
    assert b"worker-gone" not in client.hkeys(keys.METRICS), "who is gone is told of no more"


async def test_only_the_scraper_and_staff_may_read(client: Redis, settings: Any) -> None:
    assert (await AsyncClient().get("/metrics", headers=TOKEN)).status_code == 403, "no token is set: none is right"
    assert (await AsyncClient().get("/metrics", headers={"authorization": "Bearer "})).status_code == 403
    settings.ENV = settings.ENV.__class__(**{**vars(settings.ENV), "metrics_token": "of-the-scraper"})
    assert (await AsyncClient().get("/metrics", headers={"authorization": "Bearer of"})).status_code == 403
    for is_staff, status in ((False, 403), (True, 200)):
        browser = AsyncClient()
        user = await on_thread(lambda staff=is_staff: User.objects.create_user(f"{staff}@example.com", is_staff=staff))
        await browser.aforce_login(user)
        assert (await browser.get("/metrics")).status_code == status
