"""`manage.py up`, as a newcomer meets it: one clear line for what is wrong, everything kept, nothing left behind."""

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from apps.gateway.doorstep import LOOP_NICENESS
from tests.e2e.conftest import ROOT, Stack, find_port, wait_until

pytestmark = pytest.mark.stack

PROCESSES = ("postgres", "valkey", "worker", "tasks", "settlement", "web")


def run_up(stack: Stack, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "manage.py", "up"]
    environ = stack.environ | settings
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=60)


def get_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that a failed start says."""
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    [line] = done.stderr.strip().splitlines()
    return line


def test_says_in_one_line_what_is_wrong(stack: Stack, tmp_path: Path) -> None:
    fresh = {"AISCALE_DATA_DIR": str(tmp_path / "data")}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port}" in get_line(run_up(stack, PORT=str(port), **fresh))
    assert "PORT is 'eighty'" in get_line(run_up(stack, PORT="eighty", **fresh))
    assert "HOST" in get_line(run_up(stack, HOST="nowhere.invalid", PORT=str(find_port()), **fresh))
    assert "DATABASE_URL" in get_line(run_up(stack, DATABASE_URL="mysql://x", **fresh))
    assert "runs already" in get_line(run_up(stack, PORT=str(find_port())))


def test_ctrl_c_leaves_a_word_and_no_trace(stack: Stack) -> None:
    # before `up` has begun to bring up anything, and in any other command; who runs this suite in the background of a shell, or
    # with nohup, had Python ignore Ctrl-C from its start
    press = "import os, signal as s; s.signal(s.SIGINT, s.default_int_handler); os.kill(os.getpid(), s.SIGINT)"
    command = [sys.executable, "manage.py", "shell", "-c", press]
    done = subprocess.run(command, cwd=ROOT, env=stack.environ, capture_output=True, text=True, check=False, timeout=60)
    assert get_line(done) == "aiscale: stopped"


def test_keeps_everything_and_leaves_nothing_behind(tmp_path: Path, served_models_dir: Path) -> None:
    # a folder that no other user can enter, with a name too long for a socket
    closed = tmp_path / ("closed-" + "x" * 60)
    closed.mkdir(mode=0o700)
    stack = Stack(closed / "data", served_models_dir, find_port())
    stack.start()
    assert "password:" in stack.output and "demo API key:" in stack.output
    assert f"mails are kept in: {stack.data_dir / 'mail'}" in stack.output
    key = stack.output.split("demo API key:")[1].split()[0]
    assert stat.S_IMODE(os.stat(stack.data_dir).st_mode) == 0o700
    # nobody reads on, as when Ctrl-C ended the other side of a pipe first: what is said then, of a start or the end, stops nothing
    assert stack.process is not None and stack.process.stdout is not None
    stack.process.stdout.close()
    killed = stack.kill("tasks")
    wait_until(lambda: stack.find_pid("tasks") != killed, 30)
    stack.process.send_signal(signal.SIGINT)
    assert stack.process.wait(60) == 0
    assert stack.list_processes() == []
    stack.start()
    assert "password:" not in stack.output
    answer = httpx.get(f"{stack.base_url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200
    assert {model["id"] for model in answer.json()["data"]} >= {"smollm2-135m-instruct", "all-minilm-l6-v2"}
    # whoever kills `up` itself kills everything, a web server that listens to no signal any more as well
    os.kill(stack.find_pid("web"), signal.SIGSTOP)
    os.kill(stack.process.pid, signal.SIGKILL)
    stack.process.wait()
    wait_until(lambda: not stack.list_processes(), 30, lambda: str(stack.list_processes()))


@pytest.mark.skipif(
    sys.platform != "linux", reason="sessions share the cores, and threads have a niceness, on Linux alone"
)
def test_the_web_waits_for_no_core_behind_the_others(stack: Stack) -> None:
    assert stack.process is not None
    pids = {name: stack.find_pid(name) for name in PROCESSES}
    # a session of its own would have its own share of the cores, whatever the others' niceness
    assert {os.getsid(pid) for pid in pids.values()} == {os.getsid(stack.process.pid)}
    assert {name: os.getpgid(pid) for name, pid in pids.items()} == pids
    assert httpx.get(f"{stack.base_url}/v1/models").status_code == 401
    usual = os.getpriority(os.PRIO_PROCESS, stack.process.pid)
    behind = {name for name, pid in pids.items() if os.getpriority(os.PRIO_PROCESS, pid) > usual}
    assert behind == {"worker", "tasks", "settlement"}
    [loop] = psutil.Process(pids["web"]).children()
    others = [thread.id for thread in loop.threads() if thread.id != loop.pid]
    assert os.getpriority(os.PRIO_PROCESS, loop.pid) == usual + LOOP_NICENESS
    assert others and usual in {os.getpriority(os.PRIO_PROCESS, thread) for thread in others}
