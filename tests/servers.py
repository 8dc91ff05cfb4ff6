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

ROOT = Path(__file__).resolve().parents[1]
DATA_DIR = Path(tempfile.mkdtemp(prefix="aiscale-test-"))
SUPERVISOR = Supervisor(print)

NEEDS_POSTGRES, NEEDS_VALKEY = "DATABASE_URL" not in os.environ, "REDIS_URL" not in os.environ
os.environ.setdefault("DATABASE_URL", embedded_database_url(DATA_DIR))
os.environ.setdefault("REDIS_URL", embedded_redis_url(DATA_DIR))
os.environ["AISCALE_DATA_DIR"] = str(DATA_DIR)
os.environ["AISCALE_MODELS_DIR"] = str(ROOT / ".cache" / "served")
os.environ["AISCALE_LOG_LEVEL"] = "ERROR"
os.environ["SECRET_KEY"] = "only for tests"


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.collectonly:
        start_servers(SUPERVISOR, DATA_DIR, postgres=NEEDS_POSTGRES, valkey=NEEDS_VALKEY, durable=False)


def pytest_unconfigure(config: pytest.Config) -> None:
    SUPERVISOR.stop_all(("valkey", "postgres"))
    shutil.rmtree(DATA_DIR, ignore_errors=True)


def empty_redis(client: Redis) -> None:
    """Empty Redis between tests, in one step with the epoch: to settlement it was not lost, and the gate stays open."""
    pipeline = client.pipeline(transaction=True)
    pipeline.flushall()
    pipeline.set(keys.EPOCH, "tests")
    pipeline.execute()
