"""Run the real thing: `manage.py up` with the real models, in a data directory of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
import psycopg
import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from redis import Redis

from aiscale.embedded_urls import embedded_database_url, embedded_redis_url

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "deploy"))
from browser import find_browser

ROOT = Path(__file__).resolve().parents[2]
CHAT_MODEL = "smollm2-135m-instruct"
EMBED_MODEL = "all-minilm-l6-v2"
PROCESSES = ("postgres", "valkey", "worker", "tasks", "settlement", "web")


@dataclass
class Stack:
    """Hold one running `up`."""

    data_dir: Path
    models_dir: Path
    port: int
    process: subprocess.Popen[str] | None = None
    output: str = ""
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environ(self) -> dict[str, str]:
        theirs = {"DATABASE_URL", "REDIS_URL", "SECRET_KEY", "DJANGO_SETTINGS_MODULE", "AISCALE_LOG_LEVEL"}
        kept = {name: value for name, value in os.environ.items() if name not in theirs}
        ours = {
            "AISCALE_DATA_DIR": str(self.data_dir),
            "AISCALE_MODELS_DIR": str(self.models_dir),
            "PORT": str(self.port),
            "WEB_WORKERS": "1",
            "AISCALE_METRICS_TOKEN": "scraper",
        }
        return kept | ours | self.settings

    def start(self) -> None:
        self.output = ""
        self.process = subprocess.Popen(
            [sys.executable, "manage.py", "up"],
            cwd=ROOT,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if line.startswith("Ctrl-C"):
                return
        raise AssertionError(f"up ended with status {self.process.wait()}:\n{self.output}\n{self.read_logs()}")

    def stop(self, number: int = signal.SIGINT) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=60)
        self.output += rest
        return self.process.returncode

    def manage(self, *arguments: str) -> str:
        """Run a management command as an owner would, and return what it printed."""
        command = [sys.executable, "manage.py", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environ, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def make_key(self, plan: str = "enterprise", email: str = "api@example.com") -> str:
        return self.manage("create_api_key", "--email", email, "--plan", plan)

    def find_pid(self, name: str) -> int:
        return int((self.data_dir / "run" / f"{name}.pid").read_text().split()[0])

    def kill(self, name: str) -> int:
        """Kill -9 one process, and return its pid."""

        def strike() -> int:
            pid = self.find_pid(name)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                # it is being started again, after what the last test did
                return 0
            return pid

        return int(wait_until(strike, 30, self.read_logs))

    def get_ready(self) -> tuple[int, dict[str, Any]]:
        try:
            with urllib.request.urlopen(f"{self.base_url}/readyz", timeout=10) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def read_metrics(self) -> str:
        request = urllib.request.Request(f"{self.base_url}/metrics", headers={"Authorization": "Bearer scraper"})
        with urllib.request.urlopen(request, timeout=10) as response:
            return str(response.read().decode())

    def wait_ready(self, timeout_s: float = 60) -> None:
        wait_until(lambda: self.get_ready()[0] == 200, timeout_s, self.read_logs)

    def query(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(embedded_database_url(self.data_dir)) as connection:
            return connection.execute(statement, values).fetchall()  # type: ignore[arg-type]

    def redis(self) -> Redis:
        return Redis.from_url(embedded_redis_url(self.data_dir))

    def list_processes(self) -> list[psutil.Process]:
        """List every process that belongs to this stack, by its data directory."""
        found = []
        for process in psutil.process_iter():
            try:
                text = " ".join(process.cmdline()) + str(process.environ().get("AISCALE_DATA_DIR"))
            except psutil.Error:
                continue
            if str(self.data_dir) in text and process.pid != os.getpid():
                found.append(process)
        return found

    def read_logs(self) -> str:
        logs = sorted((self.data_dir / "logs").glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-2500:]}" for path in logs)


def wait_until(check: Callable[[], Any], timeout_s: float, explain: Callable[[], str] = lambda: "") -> Any:
    """Return what ``check`` gives as soon as that is true; connection errors count as not yet."""
    ends_at, last = time.monotonic() + timeout_s, None
    while time.monotonic() < ends_at:
        try:
            last = check()
            if last:
                return last
        except (OSError, psycopg.Error) as error:
            last = error
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s} s: {last!r}\n{explain()}")


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, served_models_dir: Path) -> Iterator[Stack]:
    """The whole of aiscale, running."""
    stack = Stack(tmp_path_factory.mktemp("stack") / "data", served_models_dir, find_port())
    stack.start()
    yield stack
    stack.stop()
    assert stack.list_processes() == [], "up left processes behind"


@pytest.fixture
def healthy(stack: Stack) -> Stack:
    """The stack, after whatever the last test did to it has healed."""
    stack.wait_ready()
    return stack


@pytest.fixture(scope="session")
def api_key(stack: Stack) -> str:
    return stack.make_key()


@pytest.fixture
def client(healthy: Stack, api_key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{healthy.base_url}/v1", api_key=api_key, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def admin(stack: Stack) -> tuple[str, str]:
    """The administrator's e-mail address and password, as `up` printed them."""
    email = re.search(r"log in as:\s+(\S+)", stack.output)
    password = re.search(r"password:\s+(\S+)", stack.output)
    assert email and password, stack.output
    return email[1], password[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_browser()
    assert path, "make test installs Chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, healthy: Stack, tmp_path: Path) -> Iterator[Page]:
    context = browser.new_context(base_url=healthy.base_url)
    context.set_default_timeout(30_000)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    # a browser reports each refused connection by itself, while a killed server comes back
    assert [text for text in problems if "WebSocket connection" not in text] == []
