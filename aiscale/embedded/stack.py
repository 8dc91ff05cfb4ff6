"""Bring everything up, watch it, and take it down again."""

import contextlib
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import IO

from django.core.management import CommandError, call_command
from django.db import Error as DatabaseError
from django.db import connections

from aiscale.embedded.children import Child, Supervisor, end_stale
from aiscale.embedded.servers import CannotStart, prepare_data_dir, start_servers
from aiscale.env import ROOT_DIR, Env

STOP_ORDER = ("web", "worker", "tasks", "settlement", "valkey", "postgres")
READY_TIMEOUT_S = 180.0
BACKLOG = 4096
MAX_CONNECTIONS, FILES_BESIDE = 16_384, 512
"""Connections of a web process, and the files that it has open besides."""
BEHIND_NICENESS = 10
"""On a machine that all share, the web goes first, and what it asks (Valkey, Postgres): no token and no refusal waits for a core. Workers
have what is left, which is most of it but where the web is flooded. The web's own loop has 3 (`apps/gateway/doorstep.py`)."""
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Weights lie in pages of 2 MB: every step reads all of them, and one stream gains 5 to 10 %. Other C libraries than glibc 2.35 and
later, and systems that give no large pages, take no notice."""
ADMIN_EMAIL = "admin@localhost"


class Stopped(BaseException):
    """Somebody asked us to stop."""


def run_stack(env: Env, say: Callable[[str], None]) -> None:
    """Run everything until Ctrl-C or SIGTERM. I/O: processes, files. Raises: CannotStart."""
    prepare_data_dir(env.data_dir)
    with _lock(env.data_dir), _stoppable():
        supervisor = Supervisor(say)
        try:
            # what an `up` that was killed left behind (on systems that do not end it) may still have the port
            for name in STOP_ORDER:
                end_stale(env.data_dir / "run" / f"{name}.pid")
            check_port(env.host, env.port)
            _bring_up(env, supervisor, say)
            while True:
                supervisor.watch()
                time.sleep(0.2)
        except Stopped:
            say("stopping ...")
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            supervisor.stop_all(STOP_ORDER)
            (env.data_dir / "run" / "ready").unlink(missing_ok=True)
        say("stopped; all data is kept in " + str(env.data_dir))


def check_port(host: str, port: int) -> None:
    """Raises: CannotStart when nobody can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise CannotStart(f"HOST={host} is no address of this machine: {error.strerror}") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except PermissionError as error:
            raise CannotStart(f"port {port} needs more rights; choose another one: PORT=8000 make up") from error
        except OSError as error:
            raise CannotStart(
                f"port {port} of {host} is in use or not ours; stop the other program, or: PORT={min(port + 1, 65535)} make up"
            ) from error


def _bring_up(env: Env, supervisor: Supervisor, say: Callable[[str], None]) -> None:
    (env.data_dir / "run" / "ready").unlink(missing_ok=True)
    needs_postgres, needs_valkey = not env.database_url, not env.redis_url
    if needs_postgres or needs_valkey:
        say("starting " + " and ".join(["Postgres"] * needs_postgres + ["Valkey"] * needs_valkey) + " ...")
        start_servers(supervisor, env.data_dir, postgres=needs_postgres, valkey=needs_valkey)
    _prepare_database(say)
    _prepare_models()
    try:
        call_command("seed_catalog", stdout=StringIO())
    finally:
        connections.close_all()
    say("starting worker, tasks, settlement and web ...")
    for child in make_children(env):
        supervisor.add(child)
    _wait_until_ready(env, supervisor)
    (env.data_dir / "run" / "ready").write_text("ready\n", encoding="utf-8")
    _welcome(env, say)


def _prepare_database(say: Callable[[str], None]) -> None:
    try:
        changes = StringIO()
        call_command("migrate", interactive=False, verbosity=1, stdout=changes)
        if "Applying" in changes.getvalue():
            say("the database is migrated")
        call_command("seed_plans", stdout=StringIO())
    except (DatabaseError, CommandError) as error:
        raise CannotStart(f"the database cannot be prepared: {str(error).strip()}") from error


def _prepare_models() -> None:
    """Fetch and convert what is missing, with its progress on our own terminal."""
    answer = subprocess.run([sys.executable, "-m", "workers.artifacts", "ensure"], cwd=ROOT_DIR, check=False)
    if answer.returncode:
        raise CannotStart("the models could not be prepared (see above); mend that and run make up again")


def make_children(env: Env) -> list[Child]:
    """Describe our own processes."""
    python, celery = sys.executable, [sys.executable, "-m", "celery"]
    common = ["--loglevel", env.log_level.lower(), "--without-gossip", "--without-mingle"]
    web = [
        *(
            "--loop",
            "uvloop",
            "--interface",
            "asginl",
            "--host",
            env.host,
            "--port",
            str(env.port),
            "--workers",
            str(env.web_workers),
        ),
        *("--respawn-failed-workers", "--workers-kill-timeout", "5", "--log-level", env.log_level.lower()),
        *("--backlog", str(BACKLOG), "--backpressure", str(count_connections())),
    ]
    worker = ["-P", "threads", "-c", str(env.worker_concurrency), "-n", "inference@%h"]
    tasks = [
        "-B",
        "-s",
        str(env.data_dir / "run" / "beat"),
        "-P",
        "threads",
        "-c",
        "6",
        "-Q",
        "default,batches",
        "-n",
        "tasks@%h",
    ]
    return [
        _make_child(
            env,
            "worker",
            [*celery, "-A", "workers.celery", "worker", *worker, *common],
            stop_timeout_s=15,
            niceness=BEHIND_NICENESS,
            environ=LARGE_PAGES,
        ),
        _make_child(
            env, "tasks", [*celery, "-A", "aiscale.celery", "worker", *tasks, *common], niceness=BEHIND_NICENESS
        ),
        _make_child(env, "settlement", [python, "manage.py", "settle"], niceness=BEHIND_NICENESS),
        _make_child(env, "web", [python, "-m", "granian", *web, "aiscale.asgi:application"]),
    ]


def count_connections() -> int:
    """Return how many connections a web process may have open, browsers' and idle ones included: the next one hangs until one closes.

    Granian's default is 1,024, which as many open tabs would use up. I/O: raises this process's, and its children's, limit of open files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + FILES_BESIDE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(min(MAX_CONNECTIONS, soft - FILES_BESIDE), 256)


def _make_child(
    env: Env,
    name: str,
    argv: list[str],
    stop_timeout_s: float = 10.0,
    niceness: int = 0,
    environ: Mapping[str, str] | None = None,
) -> Child:
    """Describe one process. ``environ``: defaults, which our own environment overrides."""
    return Child(
        name=name,
        argv=argv,
        log_path=env.data_dir / "logs" / f"{name}.log",
        pid_path=env.data_dir / "run" / f"{name}.pid",
        environ={
            **(environ or {}),
            **os.environ,
            "AISCALE_DATA_DIR": str(env.data_dir),
            "PYTHONUNBUFFERED": "1",
        },
        cwd=ROOT_DIR,
        stop_timeout_s=stop_timeout_s,
        # with `up` its Valkey and Postgres end, so nothing can be finished, and not all end when asked then: Celery tries to reach its
        # broker for good, and Granian's handler waits for a lock that it holds when its signal comes twice. What these two start ends
        # with them (`aiscale/asgi.py`, `aiscale/celery.py`)
        death_signal=signal.SIGKILL,
        niceness=niceness,
    )


def _wait_until_ready(env: Env, supervisor: Supervisor) -> None:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(env.host, f"[{env.host}]" if ":" in env.host else env.host)  # noqa: S104
    url, ends_at, answer = f"http://{host}:{env.port}/readyz", time.monotonic() + READY_TIMEOUT_S, "no answer"
    while time.monotonic() < ends_at:
        supervisor.watch()
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return
        except urllib.error.HTTPError as error:
            answer = error.read().decode("utf-8", "replace")
        except OSError:
            pass
        time.sleep(0.1)
    raise CannotStart(f"not ready after {READY_TIMEOUT_S:g} s: {answer}; the logs are in {env.data_dir / 'logs'}")


def _welcome(env: Env, say: Callable[[str], None]) -> None:
    """Tell where it is; at the first start, make the administrator and a key, and show them once."""
    say(f"aiscale is ready:  {env.public_url}/")
    say(f"admin console:     {env.public_url}/admin/")
    output = StringIO()
    try:
        call_command("ensure_admin", email=ADMIN_EMAIL, stdout=output)
        if password := output.getvalue().strip():
            key = StringIO()
            call_command("create_api_key", email=ADMIN_EMAIL, plan="pro", name="demo", stdout=key)
            say(f"log in as:         {ADMIN_EMAIL}")
            say(
                f"password:          {password}   (shown only now; .venv/bin/python manage.py changepassword {ADMIN_EMAIL} makes another)"
            )
            say(f"demo API key:      {key.getvalue().strip()}   (shown only now)")
            say(_make_curl(env.public_url, key.getvalue().strip()))
        else:
            say("another API key:   .venv/bin/python manage.py create_api_key --email you@example.com")
    finally:
        connections.close_all()
    if env.email_url == "":
        say(f"mails are kept in: {env.data_dir / 'mail'}   (EMAIL_URL sends them)")
    say("Ctrl-C stops everything.")


def _make_curl(url: str, key: str) -> str:
    body = '{"model": "smollm2-135m-instruct", "stream": true, "messages": [{"role": "user", "content": "Hello!"}]}'
    return f"try it:\n  curl -N {url}/v1/chat/completions -H 'Authorization: Bearer {key}' -d '{body}'"


@contextlib.contextmanager
def _lock(data_dir: Path) -> Iterator[IO[str]]:
    """Hold the data directory. Raises: CannotStart when another `up` does."""
    with open(data_dir / "run" / "lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CannotStart(f"aiscale runs already with the data directory {data_dir}") from error
        yield file


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Turn the signals that mean "stop" into `Stopped`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    yield
