"""Make the world that the table speaks of."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.apps.access.world import World
from tests.apps.conftest import Cast


@pytest.fixture
def world(cast: Cast, settings: Any) -> Iterator[World]:
    """Acme and all who are in it or not. Sessions are in Postgres alone, so that a request can be taken back as a whole."""
    settings.SESSION_ENGINE = "django.contrib.sessions.backends.db"
    # who comes often is refused whoever they are: tests/apps/accounts/test_login_limits.py
    settings.RATELIMIT_ENABLE = False
    settings.STORAGES = {**settings.STORAGES, "files": {"BACKEND": "django.core.files.storage.InMemoryStorage"}}
    yield World(cast)
