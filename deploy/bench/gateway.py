"""Measure the gateway on this machine, load generator included: known answers as fast as they go, and a mixed load at a fixed pace.

Usage: .venv/bin/python deploy/bench/gateway.py [--seconds 10] [--rate 1000]

Brings up everything in a temporary directory (`manage.py up`), with the real encoder. Every request is authenticated, limited, budgeted,
metered, and in the ledger afterwards: the run is called bad when one is not, when an answer failed, or when the pace was not kept.

- known: few texts, asked again and again by many keys of three plans. Requests a second with as many clients as asked for.
- mixed: texts by Zipf's law over a large vocabulary; what is not known goes through Celery and the real model. An open load: latency counts
  from when a request was due.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from deploy.bench.load import Result, make_request, run_closed, run_open

ROOT = Path(__file__).resolve().parents[2]


HOST, MODEL = "127.0.0.1", "all-minilm-l6-v2"
PLANS = ("free", "pro", "enterprise")
KEYS_PER_PLAN = 8
VOCABULARY = 60_000
SETTLE_TIMEOUT_S = 120
CONNECTIONS = 256

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
_COUNT = "from apps.spend.models import UsageRecord; print('COUNT', UsageRecord.objects.exclude(finish_reason='error').count())"


@dataclass
class Stack:
    """Hold the running product."""

    data_dir: Path
    port: int
    process: subprocess.Popen[str]
    environ: dict[str, str]
    answered: int = 0

    def run(self, code: str, word: str) -> str:
        """Run code in the product's own shell, and return what it printed after ``word``."""
        command = [sys.executable, "manage.py", "shell", "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=self.environ, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith(word)]
        if not lines:
            raise SystemExit(f"the bench could not be set up: {done.stderr[-500:]}")
        return lines[-1].removeprefix(word).strip()

    def cpu_times_s(self) -> dict[str, float]:
        """Return the seconds of CPU that each process has used, children included."""
        used = {"load generator": sum(psutil.Process().cpu_times()[:2])}
        for name in ("web", "worker", "settlement", "tasks", "valkey", "postgres"):
            pid = int((self.data_dir / "run" / f"{name}.pid").read_text().split()[0])
            family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            used[name] = sum(sum(each.cpu_times()[:2]) for each in family)
        return used


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the gateway.")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each part takes")
    parser.add_argument("--rate", type=float, default=1000.0, help="requests a second of the mixed load")
    parser.add_argument("--clients", type=int, default=48, help="clients of the known load")
    options = parser.parse_args()
    stack = bring_up()
    try:
        keys = json.loads(stack.run(SET_UP % (PLANS, KEYS_PER_PLAN), "KEYS"))
        is_good = asyncio.run(measure(stack, keys, options))
    finally:
        stack.process.send_signal(signal.SIGINT)
        stack.process.wait(60)
        shutil.rmtree(stack.data_dir, ignore_errors=True)
    raise SystemExit(0 if is_good else 1)


def bring_up() -> Stack:
    data_dir = Path(tempfile.mkdtemp(prefix="aiscale-bench-"))
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    dropped = {"DATABASE_URL", "REDIS_URL", "SECRET_KEY", "DJANGO_SETTINGS_MODULE"}
    environ = {name: value for name, value in os.environ.items() if name not in dropped}
    environ |= {
        "AISCALE_DATA_DIR": str(data_dir),
        "PORT": str(port),
        "AISCALE_LOG_LEVEL": "ERROR",
        "AISCALE_MODELS_DIR": os.environ.get("AISCALE_MODELS_DIR", str(ROOT / ".cache" / "models")),
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
    raise SystemExit(f"up ended:\n{output}")


async def measure(stack: Stack, keys: list[str], options: argparse.Namespace) -> bool:
    """Run both loads, print what came out, and tell whether every request is accounted for."""
    chance = random.Random(7)  # noqa: S311 - a load, no secret
    known = make_requests(keys, [0] * 40 + list(range(160)), chance)
    zipf = make_requests(keys, draw_zipf(chance, 200_000), chance)
    warm = await run_closed(HOST, stack.port, known, clients=4, seconds=2)
    first = stack.cpu_times_s()
    fast = await run_closed(HOST, stack.port, known, clients=options.clients, seconds=options.seconds)
    second = stack.cpu_times_s()
    show("known answers, as fast as they go", fast, first, second)
    warmer = await run_open(HOST, stack.port, zipf, per_second=options.rate / 4, seconds=5, clients=CONNECTIONS)
    third = stack.cpu_times_s()
    mixed = await run_open(
        HOST, stack.port, zipf, per_second=options.rate, seconds=options.seconds, clients=CONNECTIONS
    )
    show(f"mixed, {options.rate:.0f} a second", mixed, third, stack.cpu_times_s())
    parts = [warm, fast, warmer, mixed]
    answered = sum(part.statuses[200] for part in parts)
    settled, waited_s = wait_settled(stack, answered)
    print(f"{answered} requests were answered, {settled} are in the ledger {waited_s:.0f} s later")
    failed = sum(part.count - part.statuses[200] + part.broken for part in parts)
    kept_pace = mixed.elapsed_s < options.seconds * 1.05 + 1
    if failed or settled != answered or not kept_pace:
        print(f"NOT A GOOD RUN: {failed} failed, {answered - settled} are not accounted for, pace kept: {kept_pace}")
        return False
    return True


def make_requests(keys: list[str], ranks: list[int], chance: random.Random) -> Iterator[bytes]:
    """Repeat requests for texts of these ranks without end, each with a key by chance."""
    made: dict[tuple[int, str], bytes] = {}
    order = [(rank, chance.choice(keys)) for rank in ranks]
    chance.shuffle(order)
    for rank, key in itertools.cycle(order):
        name = (rank, key)
        if name not in made:
            body: dict[str, Any] = {"model": MODEL, "input": make_text(rank), "encoding_format": "base64"}
            made[name] = make_request(HOST, "/v1/embeddings", key, json.dumps(body).encode())
        yield made[name]


def make_text(rank: int) -> str:
    """Return a text of about twenty tokens that is this rank's own."""
    words = ("river", "engine", "purple", "contract", "window", "signal", "garden", "metric", "silent", "orbit")
    chance = random.Random(rank)  # noqa: S311 - a text, no secret
    return f"Question {rank}: " + " ".join(chance.choice(words) for _ in range(12)) + "?"


def draw_zipf(chance: random.Random, count: int) -> list[int]:
    """Draw ranks by Zipf's law with the exponent 1.1: a few texts are asked all the time, most ones once."""
    weights = [1 / (rank + 1) ** 1.1 for rank in range(VOCABULARY)]
    return [1_000 + rank for rank in chance.choices(range(VOCABULARY), weights, k=count)]


def wait_settled(stack: Stack, answered: int) -> tuple[int, float]:
    began = time.monotonic()
    while True:
        settled = int(stack.run(_COUNT, "COUNT"))
        if settled >= answered or time.monotonic() - began > SETTLE_TIMEOUT_S:
            return settled, time.monotonic() - began
        time.sleep(1)


def show(title: str, result: Result, before: dict[str, float], after: dict[str, float]) -> None:
    hits = sum(count for level, count in result.levels.items() if level != "miss")
    print(f"\n{title}")
    print(
        f"  {result.count / result.elapsed_s:8.0f} requests/s   p50 {result.percentile_ms(50):.1f} ms   "
        f"p95 {result.percentile_ms(95):.1f} ms   p99 {result.percentile_ms(99):.1f} ms"
    )
    print(f"  hits {100 * hits / max(result.count, 1):.1f} %  by level: {dict(result.levels)}")
    print(f"  statuses {dict(result.statuses)}   broken {result.broken}   late {result.late}")
    show_cores(before, after, result.elapsed_s)


def show_cores(before: dict[str, float], after: dict[str, float], elapsed_s: float) -> None:
    """Print how many cores each process kept busy."""
    used = {name: (after[name] - before[name]) / elapsed_s for name in after}
    print("  cores: " + ", ".join(f"{name} {cores:.2f}" for name, cores in used.items()))


if __name__ == "__main__":
    main()
