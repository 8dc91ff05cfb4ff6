"""Load the whole product with Locust, headless, and say whether it kept up: requests a second, latency, hits by level, CPU by process.

Usage: PYTHONPATH=. .venv/bin/python deploy/bench/loadtest.py [--rate 400] [--users 100] [--seconds 30]

Brings up everything in a temporary directory, as deploy/bench/gateway.py does. Locust itself takes a core for a thousand requests a second,
of the two that a small machine has: there, `make bench-gateway` says more of the server, and this more of how it looks from outside. A run
is bad when a request failed, when fewer were made than the pace asks for, or when one is not in the ledger afterwards.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from deploy.bench.ledger import Books
from deploy.bench.stack import ROOT, Stack, running, show_cpu

STOP_TIMEOUT_S = 30


def main() -> None:
    parser = argparse.ArgumentParser(description="Load the product with Locust.")
    parser.add_argument("--rate", type=float, default=400.0, help="requests a second")
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--seconds", type=int, default=30)
    options = parser.parse_args()
    with running() as stack:
        keys, books = json.dumps(stack.make_keys()), Books(stack)
        books.add(**count(load(stack, keys, options, max(options.seconds // 3, 5), options.rate / 4)))
        before = stack.cpu_times_s()
        entries = load(stack, keys, options, options.seconds, options.rate)
        show(entries, options, before, stack.cpu_times_s())
        books.add(**count(entries))
        made = count(entries)["answered"]
        # Locust begins a little late, and its users not at once
        books.check_pace(options.seconds * options.rate * options.seconds / max(made, 1), options.seconds)
        is_good = books.close()
    raise SystemExit(0 if is_good else 1)


Entries = dict[tuple[str, str], dict[str, Any]]


def load(stack: Stack, keys: str, options: argparse.Namespace, seconds: int, rate: float) -> Entries:
    """Run Locust once; return its statistics by method and name."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report"
        command = [sys.executable, "-m", "locust", "-f", str(ROOT / "deploy/bench/locustfile.py"), "--headless"]
        command += ["-u", str(options.users), "-r", str(options.users), "-t", f"{seconds}s", "--only-summary"]
        command += ["-H", f"http://127.0.0.1:{stack.port}", "--json-file", str(report), "--exit-code-on-error", "0"]
        # what is under way at the end is waited for: Locust would drop it uncounted, and the ledger has it
        command += ["--stop-timeout", str(STOP_TIMEOUT_S)]
        environ = os.environ | {
            "BENCH_KEYS": keys,
            "BENCH_USERS": str(options.users),
            "BENCH_RATE": str(rate),
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
        written = report.with_suffix(".json")
        if not written.exists():
            raise SystemExit(f"Locust failed:\n{done.stderr[-1500:]}")
        entries = json.loads(written.read_text(encoding="utf-8"))
    return {(entry["method"], entry["name"]): entry for entry in entries}


def count(entries: Entries) -> dict[str, int]:
    posts = [entry for (method, _), entry in entries.items() if method == "POST"]
    failed = sum(entry["num_failures"] for entry in posts)
    return {"answered": sum(entry["num_requests"] for entry in posts) - failed, "failed": failed}


def show(entries: Entries, options: argparse.Namespace, before: dict[str, float], after: dict[str, float]) -> None:
    """Print what came out."""
    counted, times = count(entries), dict[int, int]()
    for (method, _), entry in entries.items():
        for time_ms, number in entry["response_times"].items() if method == "POST" else ():
            times[int(float(time_ms))] = times.get(int(float(time_ms)), 0) + number
    levels = {name: entry["num_requests"] for (method, name), entry in entries.items() if method == "cache"}
    hits = sum(number for level, number in levels.items() if level not in ("miss", "none"))
    made = sum(counted.values())
    print(f"{made / options.seconds:.0f} requests/s of {options.rate:.0f} asked for, {counted['failed']} failed")
    print("  " + "   ".join(f"p{percent} {find_percentile(times, percent)} ms" for percent in (50, 95, 99)))
    print(f"  hits {100 * hits / max(counted['answered'], 1):.1f} %   by level: {levels}")
    show_cpu(before, after, options.seconds, made)


def find_percentile(times: dict[int, int], percent: float) -> int:
    """Return the latency, ms, that so many percent stay below; ``times`` counts answers by their latency."""
    left = sum(times.values()) * percent / 100
    for time_ms in sorted(times):
        left -= times[time_ms]
        if left <= 0:
            return time_ms
    return 0


if __name__ == "__main__":
    main()
