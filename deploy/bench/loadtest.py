"""Load the whole product with Locust, headless, and say whether it kept up: requests a second, latency, hits by level, CPU by process.

Usage: PYTHONPATH=. .venv/bin/python deploy/bench/loadtest.py [--rate 1000] [--users 100] [--seconds 30]

Brings up everything in a temporary directory, as deploy/bench/gateway.py does. Locust itself takes most of a core at a thousand requests a
second: on a small machine `make bench-gateway` says more of the server, and this more of how it looks from outside. A run is bad when a
request failed, when fewer were made than the pace asks for, or when one is not in the ledger afterwards.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from deploy.bench.gateway import KEYS_PER_PLAN, PLANS, ROOT, SET_UP, Stack, bring_up, show_cores, wait_settled

KEPT_PACE = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description="Load the product with Locust.")
    parser.add_argument("--rate", type=float, default=1000.0, help="requests a second")
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--seconds", type=int, default=30)
    options = parser.parse_args()
    stack = bring_up()
    try:
        keys = stack.run(SET_UP % (PLANS, KEYS_PER_PLAN), "KEYS")
        load(stack, keys, options, max(options.seconds // 3, 5), options.rate / 4)
        before = stack.cpu_times_s()
        entries = load(stack, keys, options, options.seconds, options.rate)
        is_good = judge(stack, entries, options, before)
    finally:
        stack.process.send_signal(signal.SIGINT)
        stack.process.wait(60)
        shutil.rmtree(stack.data_dir, ignore_errors=True)
    raise SystemExit(0 if is_good else 1)


def load(
    stack: Stack, keys: str, options: argparse.Namespace, seconds: int, rate: float
) -> dict[tuple[str, str], dict[str, Any]]:
    """Run Locust once; return its statistics by method and name."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report"
        command = [sys.executable, "-m", "locust", "-f", str(ROOT / "deploy/bench/locustfile.py"), "--headless"]
        command += ["-u", str(options.users), "-r", str(options.users), "-t", f"{seconds}s", "--only-summary"]
        command += ["-H", f"http://127.0.0.1:{stack.port}", "--json-file", str(report), "--exit-code-on-error", "0"]
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
    stack.answered += sum(
        entry["num_requests"] - entry["num_failures"] for entry in entries if entry["method"] == "POST"
    )
    return {(entry["method"], entry["name"]): entry for entry in entries}


def judge(
    stack: Stack,
    entries: dict[tuple[str, str], dict[str, Any]],
    options: argparse.Namespace,
    before: dict[str, float],
) -> bool:
    """Print what came out, and tell whether the run was good."""
    posts = [entry for (method, _), entry in entries.items() if method == "POST"]
    made, failed = sum(entry["num_requests"] for entry in posts), sum(entry["num_failures"] for entry in posts)
    times: dict[int, int] = {}
    for entry in posts:
        for time_ms, count in entry["response_times"].items():
            times[int(float(time_ms))] = times.get(int(float(time_ms)), 0) + count
    levels = {name: entry["num_requests"] for (method, name), entry in entries.items() if method == "cache"}
    hits = sum(count for level, count in levels.items() if level not in ("miss", "none"))
    print(f"{made / options.seconds:.0f} requests/s of {options.rate:.0f} asked for, {failed} failed")
    print("  " + "   ".join(f"p{percent} {find_percentile(times, percent)} ms" for percent in (50, 95, 99)))
    print(f"  hits {100 * hits / max(made, 1):.1f} %  by level: {levels}")
    show_cores(before, stack.cpu_times_s(), options.seconds)
    settled, waited_s = wait_settled(stack, stack.answered)
    print(f"{stack.answered} requests were answered, {settled} are in the ledger {waited_s:.0f} s later")
    kept_pace = made >= KEPT_PACE * options.rate * options.seconds
    if failed or settled < stack.answered or not kept_pace:
        print(f"NOT A GOOD RUN: {failed} failed, {stack.answered - settled} not accounted for, pace kept: {kept_pace}")
        return False
    return True


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
