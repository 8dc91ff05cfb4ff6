"""Have hundreds of people chat at once over WebSockets, and measure how late each token is at its reader.

The answers come from the fake runner: every stream gets a token with each of its steps. A token's time of making stands in its job's log,
as the worker wrote it; the frames say how many tokens they bring the reader to. All clocks are this machine's.
"""

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import uvloop
from redis import Redis
from websockets.asyncio.client import ClientConnection, connect

from aiscale.embedded_urls import embedded_redis_url
from aiscale.wire import codec, keys
from aiscale.wire.events import Delta
from deploy.bench.stack import HOST, Stack, running, show_cpu

CHAT = "smollm2-135m-instruct"
GOAL_MS = 100
TOKENS = 120
"""Tokens of each answer."""
OPENINGS_AT_ONCE = 20
ANSWER_TIMEOUT_S = 120

_SET_UP = """
import json
from django.conf import settings
from django.test import Client
from apps.accounts.models import Plan, User
from apps.accounts.organizations import ensure_personal_organization
plan = Plan.objects.get(slug="enterprise")
plan.requests_per_window, plan.max_in_flight, plan.tokens_per_minute, plan.max_output_tokens = 10**8, 10**5, None, %d
plan.max_queued, plan.max_wait_s, plan.monthly_limit_nanousd, plan.moderation = None, None, 10**15, "off"
plan.save()
sessions = []
for number in range(%d):
    user = User.objects.create_user(f"talker{number}@bench.example", None)
    organization = ensure_personal_organization(user)
    organization.plan = plan
    organization.save()
    client = Client()
    client.force_login(user)
    sessions.append(client.cookies[settings.SESSION_COOKIE_NAME].value)
print("SESSIONS " + json.dumps([settings.SESSION_COOKIE_NAME, *sessions]))
"""
_JOBS = """
import json
from apps.chat.models import Message
print("JOBS " + json.dumps(dict(Message.objects.exclude(job_id=None).values_list("public_id", "job_id"))))
"""


@dataclass
class Reading:
    """Hold what one reader saw: when they had been brought to so many tokens."""

    message_id: str = ""
    status: str = "none"
    seen: list[tuple[int, float]] = field(default_factory=list)
    first_s: float = 0.0
    last_s: float = 0.0


def measure(options: argparse.Namespace) -> bool:
    """Run the part. True when every answer came whole and is in the ledger."""
    slots = options.streams + 12
    settings = {
        "AISCALE_ENGINE_RUNNER": "fake",
        "AISCALE_FAKE_STEP_MS": str(options.step_ms),
        "AISCALE_ENGINE_SLOTS": str(slots),
        "AISCALE_WORKER_CONCURRENCY": str(slots + 32),
        "AISCALE_QUEUE_LIMIT": str(10 * slots),
        # the fake runner keeps no keys and values
        "AISCALE_KV_MEMORY_MB": str(1 << 20),
    }
    with running(settings) as stack:
        name, *sessions = json.loads(stack.run(_SET_UP % (TOKENS, options.streams), "SESSIONS"))
        # all have begun when the first ones are in the middle
        begin, ramp_s = Beginning(stack), TOKENS * options.step_ms / 1000 / 2
        cookies = [f"{name}={session}" for session in sessions]
        with no_pauses():
            readings = uvloop.run(read_all(stack.port, cookies, begin, ramp_s))
        elapsed_s, after = time.perf_counter() - begin.at_s, stack.cpu_times_s()
        late_ms, made = find_lateness(stack, readings)
        together_s = max(each.last_s for each in readings) - min(each.first_s for each in readings if each.first_s)
        at_once = count_at_once(readings)
        print(
            f"\n{len(readings)} chats over WebSockets, {at_once} at once, the fake runner's step takes {options.step_ms} ms"
        )
        print(f"  {made / together_s:.0f} tokens/s, {made} in all")
        show_lateness(late_ms)
        show_cpu(begin.used_s, after, elapsed_s, made)
        whole = sum(each.status == "complete" for each in readings)
        settled, waited_s = stack.wait_ledger(whole)
        print(f"  {whole} answers came whole, {settled} are in the ledger {waited_s:.0f} s later")
        is_good = whole == settled == options.streams and len(late_ms) == made
        if not is_good:
            print(f"NOT A GOOD RUN: {options.streams - whole} streams failed, {made - len(late_ms)} tokens never came")
        return is_good


@contextlib.contextmanager
def no_pauses() -> Iterator[None]:
    """Keep this process's collector from stopping all readers for a tenth of a second: what it holds up would count as the product's."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Beginning:
    """Look at the CPU once all connections are open."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.at_s = 0.0
        self.used_s: dict[str, float] = {}

    def note(self) -> None:
        self.at_s, self.used_s = time.perf_counter(), self._stack.cpu_times_s()


async def read_all(port: int, cookies: list[str], begin: Beginning, ramp_s: float) -> list[Reading]:
    """Open all connections, then ask on one after the other for ``ramp_s``, and read all answers to their ends."""
    opening, ready = asyncio.Semaphore(OPENINGS_AT_ONCE), asyncio.Barrier(len(cookies))

    async def read(number: int, cookie: str, pause_s: float) -> Reading:
        headers = {"cookie": cookie, "origin": f"http://{HOST}:{port}"}
        async with opening:
            socket = await connect(
                f"ws://{HOST}:{port}/ws/chat/", additional_headers=headers, compression=None, open_timeout=60
            )
        try:
            if await ready.wait() == 0:
                begin.note()
            await asyncio.sleep(pause_s)
            ask = {"type": "send", "text": f"Tell me of the number {number}.", "model": CHAT, "client_id": f"c{number}"}
            await socket.send(json.dumps(ask))
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await _read(socket)
        except (OSError, TimeoutError) as error:
            return Reading(status=repr(error))
        finally:
            await socket.close()

    return await asyncio.gather(
        *(read(number, cookie, ramp_s * number / len(cookies)) for number, cookie in enumerate(cookies))
    )


async def _read(socket: ClientConnection) -> Reading:
    reading = Reading()
    async for text in socket:
        now_s = time.time()
        frame = json.loads(text)
        kind = frame["type"]
        if kind in ("delta", "block"):
            reading.message_id = frame["message_id"]
            reading.first_s = reading.first_s or now_s
            reading.seen.append((frame["tokens"], now_s))
        elif kind in ("finished", "error", "interrupted"):
            reading.status = frame.get("status", kind) if kind == "finished" else str(frame)
            reading.last_s = now_s
            break
    return reading


def find_lateness(stack: Stack, readings: list[Reading]) -> tuple[list[float], int]:
    """Return how late each token was, in ms, and how many were made. I/O: reads the logs of the jobs."""
    jobs = json.loads(stack.run(_JOBS, "JOBS"))
    redis: Any = Redis.from_url(embedded_redis_url(stack.data_dir))
    late_ms: list[float] = []
    made_count = 0
    for reading in readings:
        if reading.message_id not in jobs:
            continue
        made: list[tuple[int, int]] = []
        for _, fields in redis.xrange(keys.job_log(jobs[reading.message_id])):
            events = [codec.decode_event(data) for data in fields.values()]
            made += [(event.completion_tokens, event.made_at_ms) for event in events if isinstance(event, Delta)]
        made_count += len(made)
        seen = iter(reading.seen)
        reached, at_s = next(seen, (0, 0.0))
        for tokens, made_at_ms in sorted(made):
            while reached < tokens:
                following = next(seen, None)
                if following is None:
                    break
                reached, at_s = following
            if reached >= tokens:
                late_ms.append(1000 * at_s - made_at_ms)
    redis.close()
    return late_ms, made_count


def count_at_once(readings: list[Reading]) -> int:
    """Return how many answers were streaming at the same time, at the most."""
    changes = sorted((at_s, change) for each in readings for at_s, change in ((each.first_s, 1), (each.last_s, -1)))
    return max(itertools.accumulate(change for _, change in changes))


def show_lateness(late_ms: list[float]) -> None:
    ordered = sorted(late_ms)
    if not ordered:
        print("  no token came")
        return
    spots = {50: 0.0, 95: 0.0, 99: 0.0, 99.9: 0.0}
    for percent in spots:
        spots[percent] = ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]
    text = "   ".join(f"p{percent:g} {value:.0f} ms" for percent, value in spots.items())
    within = sum(value <= GOAL_MS for value in ordered)
    print(f"  late at the reader: {text}   most {ordered[-1]:.0f} ms")
    print(
        f"  goal: every token within {GOAL_MS} ms: {'met' if within == len(ordered) else 'MISSED'} ({100 * within / len(ordered):.2f} %)"
    )
