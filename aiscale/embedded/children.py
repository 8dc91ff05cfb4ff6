"""Keep child processes running: start, watch, start again with back-off, stop in order."""

import contextlib
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from aiscale.embedded.privileges import make_preparation

LOG_LIMIT_BYTES = 10 << 20
FIRST_BACK_OFF_S, LAST_BACK_OFF_S = 0.5, 10.0
CALM_S = 60.0
"""A child that ran for so long starts anew without back-off."""


@dataclass
class Child:
    """Hold one program that must run."""

    name: str
    argv: Sequence[str]
    log_path: Path
    pid_path: Path
    environ: Mapping[str, str]
    cwd: Path
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout_s: float = 10.0
    death_signal: signal.Signals | None = None
    """What it gets when `up` is killed; ``stop_signal`` if None."""
    servant: pwd.struct_passwd | None = None
    niceness: int = 0
    """How far it stands back behind `up` and the others where all want a core, 0 to 19."""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    back_off_s: float = FIRST_BACK_OFF_S
    started_at: float = 0.0
    due_at: float = 0.0

    def start(self) -> None:
        """I/O: ends what an earlier `up` left behind, starts the program. Raises: OSError."""
        end_stale(self.pid_path)
        _rotate(self.log_path)
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environ),
                cwd=self.cwd,
                # a group of its own: Ctrl-C reaches `up` alone, and what a dead child leaves behind can be found. No session of its own:
                # Linux gives each session the same share of the cores (autogroup), however many threads of it have work and whatever
                # their niceness, and the web would wait for its core behind all others
                process_group=0,
                preexec_fn=make_preparation(self.death_signal or self.stop_signal, self.servant),
            )
        if self.niceness:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                # it has a single thread yet: those that it starts inherit this
                os.setpriority(os.PRIO_PROCESS, self.process.pid, os.getpriority(os.PRIO_PROCESS, 0) + self.niceness)
        self.started_at = time.monotonic()
        with contextlib.suppress(psutil.Error):
            created = psutil.Process(self.process.pid).create_time()
            self.pid_path.write_text(f"{self.process.pid} {created}\n", encoding="utf-8")

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal_group(self, number: int) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    def stop(self) -> bool:
        """Ask it to end, then make it. False when it had to be made."""
        if self.process is None:
            return True
        polite = True
        if self.process.poll() is None:
            self.process.send_signal(self.stop_signal)
            try:
                self.process.wait(self.stop_timeout_s)
            except subprocess.TimeoutExpired:
                polite = False
        self.signal_group(signal.SIGKILL)
        self.process.wait()
        self.pid_path.unlink(missing_ok=True)
        return polite

    def read_log_tail(self, lines: int = 8) -> str:
        """Return the end of its log, for a person."""
        try:
            with open(self.log_path, "rb") as log:
                log.seek(max(self.log_path.stat().st_size - 8_192, 0))
                return "\n".join(log.read().decode("utf-8", "replace").splitlines()[-lines:])
        except OSError:
            return ""


class Supervisor:
    """Watch children in the order in which they were started."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.children: list[Child] = []
        self._say = say

    def add(self, child: Child) -> Child:
        child.start()
        self.children.append(child)
        return child

    def watch(self) -> None:
        """Look once at every child; start again what died and whose time has come."""
        for child in self.children:
            if child.is_alive:
                continue
            now = time.monotonic()
            if not child.due_at:
                self._plan(child, now)
            elif now >= child.due_at:
                child.due_at = 0.0
                try:
                    child.start()
                except OSError as error:
                    self._say(f"{child.name} cannot be started: {error}")
                    self._plan(child, now)

    def stop_all(self, order: Sequence[str]) -> None:
        """Stop children by name in ``order``, then whatever is left."""
        names = [*order, *(child.name for child in reversed(self.children) if child.name not in order)]
        for name in names:
            for child in self.children:
                if child.name == name and not child.stop():
                    self._say(f"{name} did not stop within {child.stop_timeout_s:g} s and was ended")

    def _plan(self, child: Child, now: float) -> None:
        child.signal_group(signal.SIGKILL)
        if now - child.started_at > CALM_S:
            child.back_off_s = FIRST_BACK_OFF_S
        code: Any = child.process.returncode if child.process else "?"
        how = f"was ended by signal {-code}" if isinstance(code, int) and code < 0 else f"ended with status {code}"
        self._say(f"{child.name} {how}; it starts again in {child.back_off_s:g} s (log: {child.log_path})")
        child.due_at = now + child.back_off_s
        child.back_off_s = min(child.back_off_s * 2, LAST_BACK_OFF_S)


def end_stale(pid_path: Path) -> None:
    """End the process group that a killed `up` left behind, if it is still the one that was noted."""
    try:
        pid, created = pid_path.read_text(encoding="utf-8").split()
        process = psutil.Process(int(pid))
        if abs(process.create_time() - float(created)) > 0.01:
            return
        group = [process, *process.children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(group, timeout=8)
        for left in alive:
            left.kill()
        psutil.wait_procs(alive, timeout=2)
    except (OSError, ValueError, psutil.Error):
        return
    finally:
        pid_path.unlink(missing_ok=True)


def _rotate(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_LIMIT_BYTES:
            path.replace(path.with_suffix(".log.1"))
