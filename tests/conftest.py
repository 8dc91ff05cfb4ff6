"""Share what many tests need: addresses, and the real models that ship with aiscale."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from asgiref.sync import SyncToAsync
from django.db import connections
from django.test import TransactionTestCase

from tests.database import empty_tables

TransactionTestCase._fixture_teardown = empty_tables

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None) -> Iterator[None]:
    """The test database. Whoever used ``sync_to_async`` left a connection with its thread, and it could not be dropped."""
    yield
    SyncToAsync.single_thread_executor.submit(connections.close_all).result()


@pytest.fixture(scope="session")
def redis_url() -> str:
    """Return the test server's address. Tests empty it."""
    return os.environ["REDIS_URL"]


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Where converted models of all precisions live between runs; git ignores it."""
    return Path(os.environ.get("AISCALE_TEST_MODELS_DIR") or ROOT / ".cache" / "models")


@pytest.fixture(scope="session")
def served_models_dir(models_dir: Path) -> Path:
    """Where the models are as a server finds them: one version of each. AISCALE_MODELS_DIR names it; each test process has its own."""
    from workers.artifacts import build

    served = Path(os.environ["AISCALE_MODELS_DIR"])
    for manifest in build.ensure(models_dir):
        link = served / manifest.name / manifest.version
        link.parent.mkdir(parents=True)
        link.symlink_to(models_dir / manifest.name / manifest.version)
    return served
