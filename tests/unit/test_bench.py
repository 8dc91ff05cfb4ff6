"""The benchmarks call no run good that was not: every request counts, and a process that grows is named."""

import shutil
from typing import Any

import pytest

from deploy.bench.gateway import show_memory
from deploy.bench.ledger import Books
from deploy.bench.streams import Reading, count_at_once
from deploy.bench.wrk import run_wrk
from tests.unit.test_load import Answers, Server, port

__all__ = ["Answers", "Server", "port"]


class Ledger:
    """Stand where the product is: a ledger with so many entries."""

    def __init__(self, entries: int) -> None:
        self.entries = entries

    def count_ledger(self) -> int:
        return 10

    def wait_ledger(self, expected: int) -> tuple[int, float]:
        return 10 + self.entries, 0.0


@pytest.mark.parametrize(
    ("entries", "added", "is_good"),
    [
        (100, {"answered": 100}, True),
        (99, {"answered": 100}, False),
        (101, {"answered": 100}, False),
        (101, {"answered": 100, "cut_off": 1}, True),
        (100, {"answered": 100, "failed": 1}, False),
    ],
)
def test_a_run_is_good_when_the_ledger_says_so_too(entries: int, added: dict[str, int], is_good: bool) -> None:
    stack: Any = Ledger(entries)
    books = Books(stack)
    books.add(**added)
    assert books.close() is is_good


def test_a_run_that_took_longer_than_it_was_to_is_not_good() -> None:
    stack: Any = Ledger(5)
    books = Books(stack)
    books.add(5)
    books.check_pace(elapsed_s=10.5, seconds=10)
    assert books.close()
    books.check_pace(elapsed_s=12, seconds=10)
    assert not books.close()


def test_a_process_that_grows_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [0, 1_000, 2_000, 3_000, 4_000]
    flat = [{"web": 200.0, "worker": 300.0 + look, "postgres": 100.0 * look} for look in range(5)]
    assert show_memory(flat, asked) and "GROWS" not in capsys.readouterr().out
    growing = [{"web": 200.0 + 8 * look, "worker": 300.0} for look in range(5)]
    assert not show_memory(growing, asked)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "GROWS" in line] == ["web"]


def test_streams_are_at_once_when_they_overlap() -> None:
    readings = [Reading(first_s=begin, last_s=end) for begin, end in ((1, 4), (2, 5), (4.5, 6))]
    assert count_at_once(readings) == 2


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not there")
def test_wrk_counts_answers_by_level_and_the_rest_as_errors(port: int) -> None:
    wrk = shutil.which("wrk")
    assert wrk is not None
    result = run_wrk(
        wrk, f"http://127.0.0.1:{port}", [("key", "/ok", b"{}"), ("key", "/busy", b"{}")], clients=2, seconds=1
    )
    assert result.answered > 0 and result.levels == {"l1": result.answered}
    assert abs(result.errors["status"] - result.answered) <= 2
    assert result.percentiles_ms[99] >= result.percentiles_ms[50] > 0
