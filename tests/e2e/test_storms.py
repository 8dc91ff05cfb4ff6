"""Two hundred streams at once, and something dies in the middle: who was answered pays once, who was not pays nothing, and it heals."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import CHAT_MODEL, Stack, find_port, wait_until
from tests.e2e.test_crash import check_ledger, count_open_holds

pytestmark = pytest.mark.stack
STREAMS, ORGANIZATIONS, TOKENS = 200, 5, 40
BODY = {
    "model": CHAT_MODEL,
    "messages": [{"role": "user", "content": "count"}],
    "stream": True,
    "max_tokens": TOKENS,
    "temperature": 1,
}
MAKE_BUDGETS = f"""
from apps.spend.models import Budget
for scope in ("site", "plan:enterprise", "model:{CHAT_MODEL}"):
    for period in ("daily", "monthly"):
        Budget.objects.create(scope=scope, period=period, limit_nanousd=10**15, thresholds=["80%"])
"""


@dataclass
class Stream:
    """Say what one client saw."""

    request_id: str = ""
    status: int = 0
    chunks: int = 0
    answered: bool = False
    """It saw the whole answer, up to its finish reason."""


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory, served_models_dir: Path) -> Iterator[Stack]:
    """The whole stack, with a model that only counts, at 50 ms a token, and room for 256 sequences."""
    settings = {
        "AISCALE_ENGINE_RUNNER": "fake",
        "AISCALE_FAKE_STEP_MS": "50",
        "AISCALE_ENGINE_SLOTS": "256",
        "AISCALE_WORKER_CONCURRENCY": "256",
        "AISCALE_QUEUE_LIMIT": "1000",
    }
    stack = Stack(tmp_path_factory.mktemp("storm") / "data", served_models_dir, find_port(), settings=settings)
    stack.start()
    yield stack
    stack.stop()


@pytest.fixture(scope="module")
def api_keys(storm: Stack) -> list[str]:
    keys = [storm.make_key(email=f"storm{n}@example.com") for n in range(ORGANIZATIONS)]
    # budgets of wide scopes, which nobody reaches: their totals and copies must come through as well
    storm.manage("shell", "-c", MAKE_BUDGETS)
    return keys


async def read_stream(client: httpx.AsyncClient, key: str, seen: Stream) -> None:
    try:
        headers = {"authorization": f"Bearer {key}"}
        async with client.stream("POST", "/v1/chat/completions", json=BODY, headers=headers) as answer:
            seen.status, seen.request_id = answer.status_code, answer.headers.get("x-request-id", "")
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                seen.chunks += 1
                choices = json.loads(line.removeprefix("data: ")).get("choices") or [{}]
                seen.answered = seen.answered or choices[0].get("finish_reason") is not None
    except httpx.HTTPError:
        return


async def run_storm(stack: Stack, keys: list[str], strike: Callable[[], object]) -> list[Stream]:
    """Open all streams, strike when they have begun, and wait until each has come to an end."""
    streams = [Stream() for _ in range(STREAMS)]
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=stack.base_url, timeout=90, limits=limits) as client:
        reading = [
            asyncio.create_task(read_stream(client, keys[n % len(keys)], stream)) for n, stream in enumerate(streams)
        ]
        ends_at = time.monotonic() + 60
        while sum(stream.chunks > 5 for stream in streams) < STREAMS * 3 // 4 and time.monotonic() < ends_at:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(strike)
        await asyncio.gather(*reading)
    return streams


def kill(stack: Stack, name: str) -> None:
    pid = stack.find_pid(name)
    # a group of its own: granian's and celery's children die with it
    os.killpg(pid, signal.SIGKILL)


STRIKES: dict[str, Callable[[Stack], object]] = {
    "nothing": lambda stack: None,
    "kill -9 of web": lambda stack: kill(stack, "web"),
    "kill -9 of the worker": lambda stack: kill(stack, "worker"),
    "kill -9 of settlement": lambda stack: kill(stack, "settlement"),
    "kill -9 of Valkey": lambda stack: kill(stack, "valkey"),
    "kill -9 of Postgres": lambda stack: kill(stack, "postgres"),
    "FLUSHALL": lambda stack: stack.redis().flushall(),
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", STRIKES)
def test_who_was_answered_pays_once_and_nobody_else_pays(name: str, storm: Stack, api_keys: list[str]) -> None:
    """M2, M6, M8: holds do not leak, and no charge is lost or doubled, whatever dies."""
    storm.wait_ready()
    streams = asyncio.run(run_storm(storm, api_keys, lambda: STRIKES[name](storm)))
    storm.wait_ready(90)
    answered = [stream for stream in streams if stream.answered]
    if name in ("nothing", "kill -9 of settlement"):
        assert len(answered) == STREAMS, [stream for stream in streams if not stream.answered][:5]

    def find_uncharged() -> list[str]:
        rows = storm.query(
            "SELECT request_id FROM spend_usagerecord WHERE cost_nanousd > 0 AND request_id = ANY(%s)",
            [stream.request_id for stream in answered],
        )
        charged = {request_id for (request_id,) in rows}
        return [stream.request_id for stream in answered if stream.request_id not in charged]

    wait_until(lambda: not find_uncharged(), 60, lambda: f"{len(find_uncharged())} answers are not charged")
    wait_until(lambda: count_open_holds(storm) == 0, 90, lambda: f"{count_open_holds(storm)} holds are open")
    check_ledger(storm)
    unanswered = [stream.request_id for stream in streams if not stream.answered]
    wrong = storm.query(
        "SELECT request_id, finish_reason, completion_tokens FROM spend_usagerecord WHERE cost_nanousd > 0 AND request_id = ANY(%s)",
        unanswered,
    )
    assert wrong == [], f"{len(wrong)} of {len(unanswered)} pay for what they did not get, such as {wrong[:3]}"


@pytest.mark.timeout(240)
def test_what_ended_before_redis_was_emptied_is_charged_once_and_the_service_is_back_in_seconds(
    storm: Stack, api_keys: list[str]
) -> None:
    """M1, M2: settlement slept, so Redis alone knew of these answers. Workers say them again, and only then the gate opens."""
    storm.wait_ready()
    body = BODY | {"stream": False, "max_tokens": 3}
    headers = {"authorization": f"Bearer {api_keys[0]}"}
    settlement = storm.find_pid("settlement")
    with httpx.Client(base_url=storm.base_url, timeout=60) as client:
        os.kill(settlement, signal.SIGSTOP)
        try:
            answers = [client.post("/v1/chat/completions", json=body, headers=headers) for _ in range(10)]
            assert [answer.status_code for answer in answers] == [200] * 10
            # the web process says what it took before it hands it on; then Redis forgets all of it
            storm.redis().flushall()
            refused = client.post("/v1/chat/completions", json=body, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "backend_unavailable")
            assert refused.headers["retry-after"] == "2"
        finally:
            os.kill(settlement, signal.SIGCONT)
        ids = [answer.headers["x-request-id"] for answer in answers]

        def is_back() -> bool:
            return client.post("/v1/chat/completions", json=body, headers=headers).status_code == 200

        wait_until(is_back, 30)
    rows = storm.query("SELECT request_id, cost_nanousd FROM spend_usagerecord WHERE request_id = ANY(%s)", ids)
    assert sorted(request_id for request_id, _ in rows) == sorted(ids), "all were settled before the gate opened"
    assert all(cost > 0 for _, cost in rows)
    wait_until(lambda: count_open_holds(storm) == 0, 90)
    check_ledger(storm)
    # and so does all that came through the strikes before
    assert "All agree." in storm.manage("reconcile_budgets", "--check")
