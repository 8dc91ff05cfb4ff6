"""Kill processes in the middle of the work: whoever waits gets an end, and the ledger is right afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.e2e.conftest import CHAT_MODEL, PROCESSES, ROOT, Stack, wait_until

pytestmark = pytest.mark.stack
LONG = [{"role": "user", "content": "Write a long story about a dragon, with many chapters."}]


def open_stream(client: OpenAI, max_tokens: int = 600) -> Any:
    return client.chat.completions.create(
        model=CHAT_MODEL,
        messages=LONG,
        stream=True,
        max_tokens=max_tokens,
        seed=1,
        temperature=0.9,
        extra_headers={"cache-control": "no-cache, no-store"},
    )


def read_rest(stream: Any) -> tuple[int, Exception | None]:
    """Read a stream to its end; return how many chunks there were, and the error that it ended with."""
    count = 0
    try:
        for _ in stream:
            count += 1
    except (openai.APIError, httpx.HTTPError) as error:
        return count, error
    return count, None


def count_open_holds(stack: Stack) -> int:
    client = stack.redis()
    return sum(client.zcard(key) for key in client.scan_iter("aiscale:holds:*"))


def check_ledger(stack: Stack) -> None:
    """Each job once, the sums zero, and every charge equal to its tokens at its prices."""
    wait_until(lambda: count_open_holds(stack) == 0, 60, stack.read_logs)
    [(rows, jobs)] = stack.query("SELECT count(*), count(DISTINCT job_id) FROM spend_usagerecord")
    assert rows == jobs
    [(total,)] = stack.query("SELECT coalesce(sum(amount_nanousd), 0) FROM spend_ledgerentry")
    assert total == 0
    wrong = stack.query(
        """SELECT job_id FROM spend_usagerecord WHERE cost_nanousd <> CASE WHEN finish_reason = 'error' THEN 0 ELSE
           prompt_tokens * prompt_nanousd_per_token + completion_tokens * completion_nanousd_per_token END"""
    )
    assert wrong == []
    [(unposted,)] = stack.query(
        """SELECT count(*) FROM spend_usagerecord u WHERE u.cost_nanousd > 0 AND NOT EXISTS
           (SELECT 1 FROM spend_ledgertransaction t WHERE t.kind = 'usage' AND t.reference = u.job_id)"""
    )
    assert unposted == 0


def test_a_killed_worker_ends_its_streams_clearly_and_comes_back(client: OpenAI, healthy: Stack) -> None:
    stream = open_stream(client)
    for _ in range(5):
        next(stream)
    healthy.kill("worker")
    _, error = read_rest(stream)
    assert error is None or "worker" in str(error).lower(), error
    healthy.wait_ready()
    answer = client.chat.completions.create(model=CHAT_MODEL, messages=LONG, max_tokens=5)
    assert answer.choices[0].message.content
    check_ledger(healthy)


def test_a_job_whose_worker_died_before_the_first_token_is_tried_again(client: OpenAI, healthy: Stack) -> None:
    # a stopped worker claims nothing more, and is killed with whatever it holds
    os.kill(healthy.find_pid("worker"), signal.SIGSTOP)
    answers: list[Any] = []
    asking = threading.Thread(
        target=lambda: answers.append(client.chat.completions.create(model=CHAT_MODEL, messages=LONG, max_tokens=4))
    )
    asking.start()
    wait_until(lambda: list(healthy.redis().scan_iter("aiscale:job:*")), 10)
    time.sleep(0.5)
    healthy.kill("worker")
    asking.join(60)
    assert answers and answers[0].choices[0].message.content
    check_ledger(healthy)


def test_a_killed_web_process_comes_back_and_its_jobs_are_settled(client: OpenAI, healthy: Stack) -> None:
    stream = open_stream(client, 80)
    for _ in range(5):
        next(stream)
    healthy.kill("web")
    _, error = read_rest(stream)
    assert error is not None
    healthy.wait_ready()
    check_ledger(healthy)


@pytest.mark.parametrize("name", ["settlement", "postgres", "valkey", "tasks"])
def test_a_killed_server_costs_no_answer_and_no_charge(client: OpenAI, healthy: Stack, name: str) -> None:
    [(before,)] = healthy.query("SELECT count(*) FROM spend_usagerecord")
    stream = open_stream(client, 60)
    next(stream)
    healthy.kill(name)
    count, error = read_rest(stream)
    assert error is None and count > 10, (count, error, healthy.read_logs())
    healthy.wait_ready()
    wait_until(
        lambda: healthy.query("SELECT count(*) FROM spend_usagerecord")[0][0] == before + 1, 60, healthy.read_logs
    )
    check_ledger(healthy)


@pytest.mark.quiet
def test_the_global_kill_switch_ends_a_running_stream(client: OpenAI, healthy: Stack) -> None:
    stream = open_stream(client, 900)
    next(stream)
    tripping = subprocess.Popen(
        [sys.executable, "manage.py", "killswitch", "trip", "site", "--reason", "drill"],
        cwd=ROOT,
        env=healthy.environ,
        stdout=subprocess.DEVNULL,
    )
    try:
        _, error = read_rest(stream)
        assert tripping.wait(20) == 0
        assert isinstance(error, openai.APIError) and "drill" in str(error), error
        with pytest.raises(openai.InternalServerError) as refused:
            client.chat.completions.create(model=CHAT_MODEL, messages=LONG, max_tokens=2)
        assert refused.value.code == "killed" and "drill" in refused.value.message
    finally:
        tripping.wait(20)
        healthy.manage("killswitch", "release", "site")
    assert client.chat.completions.create(model=CHAT_MODEL, messages=LONG, max_tokens=2).choices
    # that it takes less than a second is asked of a hundred streams (tests/apps/gateway/test_kill.py)
    [(was_after,)] = healthy.query(
        """SELECT u.occurred_at > k.tripped_at FROM spend_killswitch k, spend_usagerecord u
           WHERE u.finish_reason = 'killed' ORDER BY k.tripped_at DESC, u.occurred_at DESC LIMIT 1"""
    )
    assert was_after
    check_ledger(healthy)


def test_a_client_that_leaves_cancels_its_job(client: OpenAI, healthy: Stack) -> None:
    stream = open_stream(client, 900)
    next(stream)
    stream.close()

    def find() -> list[tuple[Any, ...]]:
        return healthy.query(
            "SELECT completion_tokens FROM spend_usagerecord WHERE finish_reason = 'cancelled' ORDER BY id DESC LIMIT 1"
        )

    [(tokens,)] = wait_until(find, 20, healthy.read_logs)
    assert tokens < 900
    check_ledger(healthy)


def test_ready_names_what_is_missing(healthy: Stack) -> None:
    os.kill(healthy.find_pid("worker"), signal.SIGSTOP)
    try:
        _, answer = wait_until(lambda: (r := healthy.get_ready())[0] == 503 and r, 20)
        assert answer["ready"] is False
        assert answer["checks"]["worker"] != "ok" and answer["checks"]["postgres"] == "ok"
        assert CHAT_MODEL in answer["checks"]["models"]
    finally:
        os.kill(healthy.find_pid("worker"), signal.SIGCONT)
    healthy.wait_ready()


def test_every_process_of_the_stack_is_there(healthy: Stack) -> None:
    assert all(healthy.find_pid(name) for name in PROCESSES)
