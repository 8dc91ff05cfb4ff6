"""Set the stage for tests that run requests: the catalog, a caller with a key, and a real worker with the fake runner."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest
from django.core.management import call_command
from redis import Redis

from aiscale.wire import keys
from apps.accounts import audit, callers
from apps.accounts.keys import create_key
from apps.accounts.models import Plan, User
from apps.accounts.organizations import ensure_personal_organization
from apps.inference import catalog
from apps.spend import killswitch, settlement
from tests.servers import empty_redis

ROOT = Path(__file__).resolve().parents[2]


class Cast:
    """Hold a customer on the enterprise plan: the user, the organization and a raw key."""

    def __init__(self, email: str = "ada@example.com", plan: str = "enterprise") -> None:
        self.user = User.objects.create_user(email, "correct horse 9 battery")
        self.organization = ensure_personal_organization(self.user)
        self.organization.plan = Plan.objects.get(slug=plan)
        self.organization.save()
        self.key, self.raw = create_key(self.organization, self.user, "test")

    @property
    def caller(self) -> callers.Caller:
        return callers.Caller(
            organization_id=self.organization.public_id,
            user_id=self.user.public_id,
            key_id=self.key.public_id,
            key_digest=self.key.digest,
            plan=self.organization.plan.slug,
        )


@pytest.fixture
def cast(transactional_db: None, redis_url: str, served_models_dir: Path) -> Iterator[Cast]:
    """An empty Redis, a full catalog, and Ada with her key."""
    client = Redis.from_url(redis_url)
    empty_redis(client)
    catalog.forget()
    callers._plans.clear()
    callers._unknown.clear()
    callers.forget()
    call_command("seed_plans", stdout=StringIO())
    call_command("seed_catalog", stdout=StringIO())
    yield Cast()
    for switch in killswitch.list_active():
        # also to a worker that outlives this test
        killswitch.release(switch.scope, by=audit.by_system("the end of the test"))
    catalog.forget()
    client.close()


@contextmanager
def run_worker(
    redis_url: str, *, step_ms: int = 20, slots: int = 16, runner: str = "fake"
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Celery inference worker, with the fake runner where no other is named."""
    queues = "model.smollm2-135m-instruct,model.all-minilm-l6-v2,model.moderation"
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "workers.celery",
        "worker",
        "-P",
        "threads",
        "-c",
        str(slots),
        "-Q",
        queues,
    ]
    settings = {"AISCALE_ENGINE_RUNNER": runner, "AISCALE_FAKE_STEP_MS": str(step_ms), "REDIS_URL": redis_url}
    settings["AISCALE_ENGINE_SLOTS"] = str(slots)
    options = ["--without-gossip", "--without-mingle", "--loglevel", "error"]
    process = subprocess.Popen([*command, *options], cwd=ROOT, env={**os.environ, **settings})
    yield process
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def worker_process(redis_url: str, served_models_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker: 20 ms a token. It is gone before the next module's tests begin."""
    with run_worker(redis_url) as process:
        yield process


@pytest.fixture
def worker(cast: Cast, worker_process: subprocess.Popen[bytes], redis_url: str) -> Iterator[None]:
    """The worker, there and with nothing to do."""
    client = Redis.from_url(redis_url)
    ends_at = time.monotonic() + 30
    while not list(client.scan_iter(keys.WORKER_PRESENCE_PATTERN)):
        assert time.monotonic() < ends_at and worker_process.poll() is None, "the worker did not come up"
        time.sleep(0.05)
    yield
    client.close()


@pytest.fixture
def settling(cast: Cast) -> Iterator[None]:
    """Settlement, running."""
    stop = threading.Event()
    thread = threading.Thread(target=settlement.run, args=(stop,))
    thread.start()
    yield
    stop.set()
    thread.join(20)
