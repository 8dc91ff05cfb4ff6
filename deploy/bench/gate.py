"""Measure the gate: decisions a second and their latency, beside a bare script and a PING in the same alternating run.

Usage: .venv/bin/python deploy/bench/gate.py [--seconds 20]

Starts a Postgres and a Valkey of its own in a temporary directory. The caller is a typical one: an organization and a key, both with limits
of requests and tokens, a budget of the site and one of the key beside the plan's monthly limit. Every decision admits: it reads all copies,
counts in four windows, and holds in six scopes. The holds are ended between the rounds, outside of the time that is measured.
"""

import argparse
import asyncio
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
ROUND_S = 0.5
CLIENTS = 32

Work = Callable[[], Awaitable[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the gate.")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to measure in all")
    options = parser.parse_args()
    data_dir = Path(tempfile.mkdtemp(prefix="aiscale-bench-"))
    from aiscale.embedded.children import Supervisor
    from aiscale.embedded.servers import start_servers
    from aiscale.embedded_urls import embedded_database_url, embedded_redis_url

    os.environ |= {
        "DATABASE_URL": embedded_database_url(data_dir),
        "REDIS_URL": embedded_redis_url(data_dir),
        "AISCALE_DATA_DIR": str(data_dir),
        "AISCALE_LOG_LEVEL": "ERROR",
        "SECRET_KEY": "only for the bench",
        "DJANGO_SETTINGS_MODULE": "aiscale.settings.base",
    }
    supervisor = Supervisor(lambda *_: None)
    try:
        start_servers(supervisor, data_dir, postgres=True, valkey=True, durable=False)
        caller = set_up()
        asyncio.run(measure(caller, options.seconds))
    finally:
        supervisor.stop_all(("valkey", "postgres"))
        shutil.rmtree(data_dir, ignore_errors=True)


def set_up() -> Any:
    """Make the tables and the caller."""
    import django

    django.setup()
    from django.core.management import call_command
    from django.db import connection

    call_command("migrate", verbosity=0)
    caller = make_caller()
    connection.close()
    return caller


def make_caller() -> Any:
    """Make the caller, with all of the gate's copies in place and the gate open."""
    from aiscale import redis as redis_clients
    from apps.accounts.callers import Caller
    from apps.accounts.keys import create_key
    from apps.accounts.models import Organization, Plan, User
    from apps.spend import balance, budgets, recovery
    from apps.spend.models import Budget

    most = 2_000_000_000
    plan = Plan.objects.create(
        slug="bench",
        name="Bench",
        requests_per_window=most,
        window_s=60,
        tokens_per_minute=most,
        max_in_flight=most,
        monthly_limit_nanousd=10**15,
    )
    user = User.objects.create_user("bench@example.com", "x")
    organization = Organization.objects.create(name="Bench", plan=plan)
    key, _ = create_key(organization, user, "bench")
    key.requests_per_window, key.window_s, key.tokens_per_minute, key.max_in_flight = most, 60, most, most
    key.save()
    Budget.objects.create(scope="site", limit_nanousd=10**15)
    Budget.objects.create(scope=f"key:{key.public_id}", period="daily", limit_nanousd=10**15)
    recovery.begin(redis_clients.get_sync())
    balance.publish(budgets.organization_scope(organization.public_id))
    return Caller(
        organization_id=organization.public_id,
        user_id=user.public_id,
        key_id=key.public_id,
        key_digest=key.digest,
        plan="bench",
    )


async def measure(caller: Any, seconds: float) -> None:
    """Run the three in turns, alone and with many clients at once, and print what came out."""
    from aiscale import redis as redis_clients
    from apps.spend import admission, budgets, holds

    client = redis_clients.get_async()
    nothing = await client.script_load("return 1")
    jobs: list[str] = []
    scopes = budgets.list_scopes(
        organization_id=caller.organization_id, plan="bench", model="m", user_id=caller.user_id, key_id=caller.key_id
    )

    async def decide() -> None:
        now_ms = time.time_ns() // 1_000_000
        job_id = f"job_{len(jobs)}_{now_ms}"
        jobs.append(job_id)
        ask = admission.Ask(
            caller=caller,
            model="m",
            job_id=job_id,
            worst_nanousd=1000,
            worst_tokens=500,
            deadline_at_ms=now_ms + 300_000,
        )
        answer = await admission.run_gate(client, ask, plan="bench", now_ms=now_ms)
        assert answer[0] == "admitted", answer

    works: dict[str, Work] = {
        "gate": decide,
        "empty script": lambda: client.evalsha(nothing, 0),
        "PING": client.ping,
    }
    alone: dict[str, list[float]] = {name: [] for name in works}
    together: dict[str, list[float]] = {name: [] for name in works}
    server_us: dict[str, float] = {}
    for work in works.values():
        await run(work, 0.2, 1)
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        for name, work in works.items():
            alone[name] += (await run(work, ROUND_S, 1))[0]
            await client.config_resetstat()
            _, rate = await run(work, ROUND_S, CLIENTS)
            together[name].append(rate)
            stats: Any = await client.info("commandstats")
            command = "cmdstat_ping" if name == "PING" else "cmdstat_evalsha"
            server_us[name] = stats[command]["usec_per_call"]
            redis = redis_clients.get_sync()
            for start in range(0, len(jobs), 200):
                holds.settle(redis, [holds.End(job, 1000, scopes, 0, 0) for job in jobs[start : start + 200]], [])
            jobs.clear()
    print_table(alone, together, server_us)


async def run(work: Work, seconds: float, clients: int) -> tuple[list[float], float]:
    """Repeat ``work`` in so many tasks. Returns each one's seconds, and how many a second there were."""
    times: list[float] = []
    started = time.perf_counter()

    async def repeat() -> None:
        while (begun := time.perf_counter()) < started + seconds:
            await work()
            times.append(time.perf_counter() - begun)

    await asyncio.gather(*(repeat() for _ in range(clients)))
    return times, len(times) / (time.perf_counter() - started)


def print_table(alone: dict[str, list[float]], together: dict[str, list[float]], server_us: dict[str, float]) -> None:
    print(f"{'':13} {'p50 alone':>10} {'p99 alone':>10} {f'a second, {CLIENTS} clients':>22} {'in the server':>14}")
    for name, times in alone.items():
        cuts = statistics.quantiles(times, n=100)
        print(
            f"{name:13} {cuts[49] * 1e6:>7.0f} us {cuts[98] * 1e6:>7.0f} us {statistics.median(together[name]):>22,.0f} "
            f"{server_us[name]:>11.1f} us"
        )
    gate, ping = statistics.median(together["gate"]), statistics.median(together["PING"])
    print(
        f"One decision costs one Redis trip and no SQL; {gate:,.0f} decisions a second are {gate / ping:.0%} of as many PINGs."
    )


if __name__ == "__main__":
    main()
