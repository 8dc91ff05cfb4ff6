"""Bring the whole product up for a benchmark, in a temporary directory, and look at it from outside: CPU and memory by process, ledger."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
PROCESSES = ("web", "worker", "settlement", "tasks", "valkey", "postgres")
PLANS = ("free", "pro", "enterprise")
KEYS_PER_PLAN = 8
SETTLE_TIMEOUT_S = 120
GENERATOR = "load generator"

SET_UP = """
import json
from apps.accounts.models import Plan, User
from apps.accounts.keys import create_key
from apps.accounts.organizations import ensure_personal_organization
keys = []
for plan in Plan.objects.filter(slug__in=%r):
    plan.requests_per_window, plan.max_in_flight, plan.tokens_per_minute = 10**8, 10**5, None
    plan.max_queued, plan.max_wait_s, plan.cache_scope = None, None, "site"
    plan.monthly_limit_nanousd = 10**15
    plan.save()
    for number in range(%d):
        user = User.objects.create_user(f"{plan.slug}{number}@bench.example", "correct horse 9 battery")
        organization = ensure_personal_organization(user)
        organization.plan = plan
        organization.save()
        keys.append(create_key(organization, user, "bench")[1])
print("KEYS " + json.dumps(keys))
"""
_HURRY = """
from apps.accounts.models import Plan
for plan in Plan.objects.filter(slug__in=%r):
    plan.max_queued, plan.max_wait_s = %d, 1
    plan.save()
print("DONE")
"""
_COUNT = "from apps.spend.models import UsageRecord; print('COUNT', UsageRecord.objects.exclude(finish_reason='error').count())"


@dataclass
class Stack:
    """Hold the running product."""

    data_dir: Path
    port: int
    process: subprocess.Popen[str]
    environ: dict[str, str]

    def run(self, code: str, word: str) -> str:
        """Run code in the product's own shell, and return what it printed after ``word``."""
        command = [sys.executable, "manage.py", "shell", "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=self.environ, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith(word)]
        if not lines:
            raise SystemExit(f"the bench could not be set up: {done.stderr[-500:]}")
        return lines[-1].removeprefix(word).strip()

    def make_keys(self) -> list[str]:
        """Make keys of three plans whose limits are counted and never reached."""
        keys: list[str] = json.loads(self.run(SET_UP % (PLANS, KEYS_PER_PLAN), "KEYS"))
        return keys

    def hurry(self, max_queued: int) -> None:
        """Have the plans refuse rather than let wait: at the most so many requests wait for a model."""
        self.run(_HURRY % (PLANS, max_queued), "DONE")

    def cpu_times_s(self) -> dict[str, float]:
        """Return the seconds of CPU that each process has used: its threads, its children, and those of them that have ended."""
        used = {GENERATOR: sum(psutil.Process().cpu_times()[:4])}
        for name in PROCESSES:
            used[name] = sum(sum(each.cpu_times()[:4]) for each in self._list_family(name))
        return used

    def memory_mb(self) -> dict[str, float]:
        """Return the resident memory of each process and its children."""
        return {name: sum(each.memory_info().rss for each in self._list_family(name)) / (1 << 20) for name in PROCESSES}

    def count_ledger(self) -> int:
        """Return how many answered requests are in the ledger. I/O: a process of its own, one SQL statement."""
        return int(self.run(_COUNT, "COUNT"))

    def wait_ledger(self, expected: int) -> tuple[int, float]:
        """Wait until so many requests are in the ledger; return how many are, and the seconds that it took."""
        began = time.monotonic()
        while True:
            settled = self.count_ledger()
            if settled >= expected or time.monotonic() - began > SETTLE_TIMEOUT_S:
                return settled, time.monotonic() - began
            time.sleep(1)

    def _list_family(self, name: str) -> list[psutil.Process]:
        pid = int((self.data_dir / "run" / f"{name}.pid").read_text().split()[0])
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


@contextlib.contextmanager
def running(settings: Mapping[str, str] | None = None) -> Iterator[Stack]:
    """Have the product run, with ``settings`` beside its defaults; afterwards nothing of it is left."""
    stack = bring_up(settings or {})
    try:
        yield stack
    finally:
        stack.process.send_signal(signal.SIGINT)
        stack.process.wait(60)
        shutil.rmtree(stack.data_dir, ignore_errors=True)


def bring_up(settings: Mapping[str, str]) -> Stack:
    data_dir, port = Path(tempfile.mkdtemp(prefix="aiscale-bench-")), find_port()
    dropped = {"DATABASE_URL", "REDIS_URL", "SECRET_KEY", "DJANGO_SETTINGS_MODULE"}
    environ = {name: value for name, value in os.environ.items() if name not in dropped}
    environ |= {
        "AISCALE_DATA_DIR": str(data_dir),
        "PORT": str(port),
        "AISCALE_LOG_LEVEL": "ERROR",
        "AISCALE_MODELS_DIR": os.environ.get("AISCALE_MODELS_DIR", str(ROOT / ".cache" / "models")),
        **settings,
    }
    process = subprocess.Popen(
        [sys.executable, "manage.py", "up"], cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("Ctrl-C"):
            return Stack(data_dir, port, process, environ)
    shutil.rmtree(data_dir, ignore_errors=True)
    raise SystemExit(f"up ended:\n{output}")


def find_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def show_cpu(before: dict[str, float], after: dict[str, float], elapsed_s: float, requests: int) -> None:
    """Print how many cores each process kept busy, and what a request cost it: the latter hardly depends on what else runs here."""
    used = {name: after[name] - before[name] for name in after}
    print("  cores: " + ", ".join(f"{name} {seconds / elapsed_s:.2f}" for name, seconds in used.items()))
    if requests:
        each = ", ".join(f"{name} {1e6 * seconds / requests:.0f}" for name, seconds in used.items())
        print(f"  CPU, microseconds a request: {each}; all {1e6 * sum(used.values()) / requests:.0f}")
