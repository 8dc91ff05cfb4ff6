"""Run the tests in several processes at once, each with servers of its own: ``pytest -n auto``. A pytest plugin (see ``addopts``).

A file's tests stay together and in their order, and so do all that share the real stack. What takes longest begins first, so that
all processes end at about the same time. Without ``-n`` nothing of this happens.
"""

import fcntl
import os
from collections.abc import Generator

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.servers import GIVEN, RUN_DIR, WORKER

FEWEST, MOST = 3, 4
"""Processes. Much of the suite is waiting: three take an eighth less time on two cores than two. Each costs a Postgres, a Valkey and a
model or two."""

TOGETHER = {"tests/e2e/": ("tests/e2e/test_storms.py",)}
"""Folders whose files share something that is dear to start, and the files in there that do not."""

LONGEST = (
    "tests/e2e/",
    "tests/e2e/test_storms.py",
    "tests/apps/access/test_access.py",
    "tests/workers/test_runner_onnx.py",
    "tests/apps/gateway/test_responses.py",
    "tests/apps/gateway/test_semantic.py",
    "tests/apps/inference/test_workers.py",
)
"""What takes longest, longest first: ``pytest --durations=0`` says. All else is short and comes in the order of its name."""


def find_unit(nodeid: str) -> str:
    """Return what runs in one process: a file, or a folder with a slash at its end."""
    path = nodeid.split("::", 1)[0]
    for folder, apart in TOGETHER.items():
        if path.startswith(folder) and path not in apart:
            return folder
    return path


class Spread(LoadScopeScheduling):
    """Hand out one unit after the other, in the order of the collection."""

    def _split_scope(self, nodeid: str) -> str:
        return find_unit(nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers() -> int:
    """Answer ``-n auto``: none means this process alone."""
    return 0 if "REDIS_URL" in GIVEN else min(max(len(os.sched_getaffinity(0)), FEWEST), MOST)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.tx and "REDIS_URL" in GIVEN:
        raise pytest.UsageError(
            "tests empty their Redis, so that of REDIS_URL can serve one process only: leave out -n"
        )


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Spread:
    # else it would sort by number of tests
    config.option.loadscopereorder = False
    return Spread(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if WORKER is None:
        return
    ranks = {unit: rank for rank, unit in enumerate(LONGEST)}

    def rank(item: pytest.Item) -> tuple[int, str]:
        unit = find_unit(item.nodeid)
        return ranks.get(unit, len(ranks)), unit

    items.sort(key=rank)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test that is marked ``quiet`` run alone; those beside it end first, and the next ones wait."""
    if WORKER is None:
        return (yield)
    quiet = item.get_closest_marker("quiet") is not None
    with open(RUN_DIR / "turn.lock", "w") as turn, open(RUN_DIR / "running.lock", "w") as running:
        # whoever waits for its turn holds back the ones behind it, else a quiet test would wait for long
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if quiet else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        return (yield)
