"""Start a Postgres and a Valkey for the tests, before Django reads its settings. A pytest plugin (see ``addopts``).

Those of DATABASE_URL and REDIS_URL are used instead when they are given: they must hold nothing that matters.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from redis import Redis

from aiscale.embedded.children import Supervisor
from aiscale.embedded.servers import start_servers
from aiscale.embedded_urls import embedded_database_url, embedded_redis_url
from aiscale.wire import keys

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
"""The name of this process when the tests run in several (see ``tests/spread.py``); None in the one that hands them out too."""
ADDRESSES = ("DATABASE_URL", "REDIS_URL")
if WORKER is None:
    # the other processes inherit what is set here
    os.environ["AISCALE_TEST_GIVEN"] = " ".join(name for name in ADDRESSES if name in os.environ)
    os.environ["AISCALE_TEST_RUN_DIR"] = tempfile.mkdtemp(prefix="aiscale-test-")

GIVEN = os.environ["AISCALE_TEST_GIVEN"].split()
RUN_DIR = Path(os.environ["AISCALE_TEST_RUN_DIR"])
DATA_DIR = RUN_DIR / (WORKER or "all")
SUPERVISOR = Supervisor(print)

if "DATABASE_URL" not in GIVEN:
    os.environ["DATABASE_URL"] = embedded_database_url(DATA_DIR)
if "REDIS_URL" not in GIVEN:
    os.environ["REDIS_URL"] = embedded_redis_url(DATA_DIR)
os.environ["AISCALE_DATA_DIR"] = str(DATA_DIR)
os.environ["AISCALE_MODELS_DIR"] = str(DATA_DIR / "models")
os.environ["AISCALE_LOG_LEVEL"] = "ERROR"
os.environ["SECRET_KEY"] = "only for tests"


def pytest_configure(config: pytest.Config) -> None:
    if config.option.collectonly or config.option.tx:
        return
    start_servers(
        SUPERVISOR,
        DATA_DIR,
        postgres="DATABASE_URL" not in GIVEN,
        valkey="REDIS_URL" not in GIVEN,
        durable=False,
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    SUPERVISOR.stop_all(("valkey", "postgres"))
    shutil.rmtree(DATA_DIR if WORKER else RUN_DIR, ignore_errors=True)


def empty_redis(client: Redis) -> None:
    """Empty Redis between tests, in one step with the epoch: to settlement it was not lost, and the gate stays open."""
    pipeline = client.pipeline(transaction=True)
    pipeline.flushall()
    pipeline.set(keys.EPOCH, "tests")
    pipeline.execute()
