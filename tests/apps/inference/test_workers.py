"""Two workers share a queue: no lane idles while something waits, nobody holds what he cannot begin, and a dead one loses nothing."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import Redis

from aiscale.db import make_public_id
from aiscale.wire import keys
from aiscale.wire.codec import decode_event
from aiscale.wire.events import Event, Finished, Started
from apps.accounts.callers import on_thread
from apps.inference import completions, embeddings, presence, reaper
from apps.inference.cache import policy
from apps.inference.completions import CompletionRequest, Run
from apps.inference.embeddings import EmbeddingRequest
from apps.inference.prompts import ChatMessage
from apps.spend.models import UsageRecord
from tests.apps.conftest import ROOT, Cast
from tests.apps.inference.claims import CHAT, EMBED, claim, list_lanes, read_state

WORKERS, SLOTS = 2, 2


@pytest.fixture(scope="module")
def processes(redis_url: str, served_models_dir: Any) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two workers with two slots each, and the fake runner: 20 ms a token."""
    settings = {"AISCALE_ENGINE_RUNNER": "fake", "AISCALE_FAKE_STEP_MS": "20", "AISCALE_ENGINE_SLOTS": str(SLOTS)}
    environ = {**os.environ, **settings, "REDIS_URL": redis_url}
    processes = [start_worker(environ, n) for n in range(WORKERS)]
    yield processes
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(20)


def start_worker(environ: dict[str, str], number: int) -> subprocess.Popen[bytes]:
    options = ["-P", "threads", "-c", "12", "-n", f"w{number}@%h", "-Q", f"model.{CHAT},model.{EMBED}"]
    quiet = ["--without-gossip", "--without-mingle", "--loglevel", "error"]
    command = [sys.executable, "-m", "celery", "-A", "workers.celery", "worker", *options, *quiet]
    return subprocess.Popen(command, cwd=ROOT, env=environ)


@pytest.fixture
def client(cast: Cast, redis_url: str) -> Iterator[Redis]:
    client = Redis.from_url(redis_url)
    yield client
    client.close()


@pytest.fixture
def workers(client: Redis, processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Both workers, there and with nothing to do, and the reaper."""
    wait_for(lambda: len(presence.list_workers()) == WORKERS)
    stop = threading.Event()
    thread = threading.Thread(target=reaper.run, args=(stop,))
    thread.start()
    yield
    stop.set()
    thread.join(20)


def wait_for(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    ends_at = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < ends_at, "it did not happen"
        time.sleep(0.02)
    return answer


def widen(cast: Cast) -> None:
    """Let the plan be in nobody's way."""
    plan = cast.organization.plan
    plan.requests_per_window = plan.max_in_flight = 100_000
    plan.tokens_per_minute = None
    plan.save()


async def start(cast: Cast, max_tokens: int) -> Run:
    request = CompletionRequest(
        request_id=make_public_id("req"),
        source="api",
        model=CHAT,
        messages=[ChatMessage(role="user", content="Hello")],
        max_tokens=max_tokens,
        temperature=0.0,
        cache=policy.NOTHING,
    )
    return await completions.start(request, cast.caller)


async def read(run: Run) -> list[Event]:
    async with asyncio.timeout(60):
        return [event async for event in run.events()]


def list_ends(client: Redis) -> list[Finished]:
    events = [decode_event(fields[b"0"]) for _, fields in client.xrange(keys.FINISHED)]  # type: ignore[union-attr]
    return [event for event in events if isinstance(event, Finished)]


def count_running(client: Redis, runs: list[Run]) -> int:
    states = [client.hget(keys.job_record(run.job_id), "state") for run in runs]
    return states.count(b"running")


async def test_every_lane_works_and_none_holds_more_than_it_can_begin(cast: Cast, client: Redis, workers: None) -> None:
    runs = [await start(cast, 150) for _ in range(7)]
    await asyncio.to_thread(wait_for, lambda: count_running(client, runs) == WORKERS * SLOTS)
    assert client.zcard(keys.queue_depth(CHAT)) == 7 - WORKERS * SLOTS
    told = await asyncio.gather(*(read(run) for run in runs))
    ends = [events[-1] for events in told]
    assert all(isinstance(end, Finished) and end.finish_reason == "length" for end in ends)
    by_worker = [event.worker_id for events in told for event in events if isinstance(event, Started)]
    assert len(set(by_worker)) == WORKERS
    assert list_lanes(client) == [] and "call_after_ms" not in read_state(client)
    assert float(read_state(client)["rate_tokens"]) > 0


async def test_one_request_of_somebody_passes_the_thirty_of_somebody_else(
    cast: Cast, client: Redis, workers: None
) -> None:
    other = await on_thread(lambda: Cast("bob@example.com"))
    many = [await start(cast, 40) for _ in range(30)]
    one = await start(other, 40)
    await asyncio.gather(*(read(run) for run in [*many, one]))
    order = [end.job_id for end in list_ends(client)]
    assert len(order) == 31
    # it waited for the jobs that ran when it came and for one of the others in each lane, at the most
    assert order.index(one.job_id) < 3 * WORKERS * SLOTS


async def test_a_dead_claim_is_tried_again_by_a_living_worker(cast: Cast, client: Redis, workers: None) -> None:
    blockers = [await start(cast, 60) for _ in range(WORKERS * SLOTS)]
    await asyncio.to_thread(wait_for, lambda: count_running(client, blockers) == WORKERS * SLOTS)
    run = await start(cast, 5)
    # a worker takes it, and is gone
    assert claim(client, dead=True) == {run.job_id: 1}
    events = await read(run)
    assert isinstance(events[0], Started) and events[0].attempt == 2
    last = events[-1]
    assert isinstance(last, Finished) and (last.finish_reason, last.completion_tokens) == ("length", 5)
    await asyncio.gather(*(read(run) for run in blockers))


async def test_small_jobs_share_tickets_and_each_ends_by_itself(cast: Cast, client: Redis, workers: None) -> None:
    await on_thread(lambda: widen(cast))
    client.config_resetstat()

    async def embed(n: int) -> embeddings.EmbeddingResult:
        request = EmbeddingRequest(
            request_id=make_public_id("req"), source="api", model=EMBED, inputs=[f"text {n % 7}"]
        )
        return await embeddings.embed(request, cast.caller)

    results = []
    for first in range(0, 300, 60):
        results += await asyncio.gather(*(embed(first + n) for n in range(60)))
    vectors = {result.vectors for result in results}
    assert len(vectors) == 7
    ends = list_ends(client)
    assert len({end.job_id for end in ends}) == len(ends) == 300
    assert all(end.finish_reason == "stop" and end.prompt_tokens > 0 for end in ends)
    tickets = client.info("commandstats")["cmdstat_lpush"]["calls"]
    assert tickets < 150, f"{tickets} tickets for 300 jobs"


async def test_s1_stop_works_from_any_process(cast: Cast, client: Redis, workers: None, redis_url: str) -> None:
    """S1: the process that is told to stop knows nothing of the job."""
    running = [await start(cast, 3000) for _ in range(WORKERS * SLOTS)]
    await asyncio.to_thread(wait_for, lambda: count_running(client, running) == WORKERS * SLOTS)
    waiting = await start(cast, 3000)
    code = (
        "import asyncio, sys; from apps.inference import queue\n"
        "async def stop():\n    print([await queue.cancel(job_id, 'stopped') for job_id in sys.argv[1:]])\n"
        "asyncio.run(stop())"
    )
    script = f"import django; django.setup()\n{code}"
    jobs = [run.job_id for run in [*running, waiting]]
    command = [sys.executable, "-c", script, *jobs]
    environ = {**os.environ, "DJANGO_SETTINGS_MODULE": "aiscale.settings.test", "REDIS_URL": redis_url}
    done = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.stdout.strip() == str([True] * len(jobs)), done.stderr
    ends = [(await read(run))[-1] for run in [*running, waiting]]
    assert all(isinstance(end, Finished) and end.finish_reason == "cancelled" for end in ends)
    assert isinstance(ends[-1], Finished) and ends[-1].prompt_tokens == 0, "what only waited is free"


async def test_s2_m6_the_worker_stops_after_the_client_left_and_what_was_made_is_paid(
    cast: Cast, client: Redis, workers: None, settling: None
) -> None:
    """S2: the slot is free again soon. M6: exactly the tokens that were made are charged, once."""
    run = await start(cast, 3000)
    async with run:
        told = 0
        async for event in run.events():
            told += not isinstance(event, Started)
            if told == 5:
                break
    [end] = await asyncio.to_thread(wait_for, lambda: list_ends(client))
    assert end.finish_reason == "cancelled" and 5 <= end.completion_tokens < 100
    await asyncio.to_thread(wait_for, lambda: sum(worker.running for worker in presence.list_workers()) == 0)
    [record] = await asyncio.to_thread(wait_for, lambda: on_main_database(end.job_id))
    assert (record.prompt_tokens, record.completion_tokens) == (run.prompt_tokens, end.completion_tokens)
    made = record.prompt_tokens * record.prompt_nanousd_per_token
    assert record.cost_nanousd == made + record.completion_tokens * record.completion_nanousd_per_token


def on_main_database(job_id: str) -> list[UsageRecord]:
    from django.db import connection

    try:
        return list(UsageRecord.objects.filter(job_id=job_id))
    finally:
        connection.close()


async def test_a_killed_worker_takes_nothing_with_it(
    cast: Cast, client: Redis, workers: None, processes: list[subprocess.Popen[bytes]], redis_url: str
) -> None:
    runs = [await start(cast, 60) for _ in range(14)]
    await asyncio.to_thread(wait_for, lambda: count_running(client, runs) == WORKERS * SLOTS)
    os.kill(processes[-1].pid, signal.SIGKILL)
    processes.pop().wait(10)
    ends = [(await read(run))[-1] for run in runs]
    reasons = [(end.finish_reason, end.error_code) for end in ends if isinstance(end, Finished)]
    assert len(reasons) == 14 and set(reasons) <= {("length", None), ("error", "worker_lost")}
    # those it had in hand had begun, and end with an error; all others are whole
    assert reasons.count(("error", "worker_lost")) <= SLOTS
    assert len(list_ends(client)) == 14
    assert client.zcard(keys.LEASES) == 0 and list_lanes(client) == []
