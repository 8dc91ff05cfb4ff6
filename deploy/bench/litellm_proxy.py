"""Run LiteLLM's proxy beside ours, with a mocked upstream and two workers: it knows one key, and asks nothing and nobody.

Its pins cannot live with ours, so it gets a virtual environment of its own, ``.cache/litellm``.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from deploy.bench.orders import MODEL, Order
from deploy.bench.stack import HOST, ROOT, find_port
from deploy.bench.wrk import WrkResult, run_wrk

PACKAGE = "litellm[proxy]==1.108.7"
PLACE = ROOT / ".cache" / "litellm"
KEY = "sk-bench"
WORKERS = 2
WARM_S = 4
DIMENSIONS = 384
START_TIMEOUT_S = 240


@dataclass
class Rival:
    """Hold the running proxy."""

    port: int
    process: subprocess.Popen[bytes]

    def cpu_time_s(self) -> float:
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return float(sum(sum(each.cpu_times()[:4]) for each in family))


def install() -> Path:
    """Return the program, installing it when it is missing. I/O: the package index, once."""
    program, stamp = PLACE / "bin" / "litellm", PLACE / "installed"
    if not program.exists() or not stamp.exists() or stamp.read_text() != PACKAGE:
        print(f"installing {PACKAGE} into {PLACE.relative_to(ROOT)} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(PLACE)], check=True)
        pip = [str(PLACE / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*pip, PACKAGE], check=False, capture_output=True).returncode:
            raise SystemExit("LiteLLM could not be installed; check the network or pip's settings and try again")
        stamp.write_text(PACKAGE)
    return program


@contextlib.contextmanager
def running() -> Iterator[Rival]:
    """Have the proxy run; it answers embeddings with a vector that its configuration holds."""
    program, port = install(), find_port()
    config = {
        "model_list": [
            {
                "model_name": MODEL,
                "litellm_params": {"model": "openai/mocked", "api_key": "none", "mock_response": [0.05] * DIMENSIONS},
            }
        ],
        "general_settings": {"master_key": KEY},
        "litellm_settings": {"telemetry": False, "drop_params": True},
    }
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "config.yaml"
        # JSON is YAML
        path.write_text(json.dumps(config), encoding="utf-8")
        environ = os.environ | {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_DOCS": "True"}
        command = [str(program), "--config", str(path), "--host", HOST, "--port", str(port)]
        process = subprocess.Popen(
            [*command, "--num_workers", str(WORKERS)], cwd=place, env=environ, stdout=subprocess.DEVNULL
        )
        try:
            _wait(port, process)
            yield Rival(port, process)
        finally:
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for each in (process, *family):
                with contextlib.suppress(psutil.Error, OSError):
                    each.terminate()
            process.wait(30)


def warm(rival: Rival, wrk: str, orders: list[Order], options: argparse.Namespace) -> None:
    """Ask for some seconds, uncounted: its first answers take long."""
    own = [(KEY, path, body) for _, path, body in orders]
    run_wrk(wrk, f"http://{HOST}:{rival.port}", own, clients=options.clients, seconds=WARM_S)


def ask(rival: Rival, wrk: str, orders: list[Order], options: argparse.Namespace) -> WrkResult:
    """Ask for the same texts as fast as they are answered, and print what came out."""
    before = rival.cpu_time_s()
    own = [(KEY, path, body) for _, path, body in orders]
    url = f"http://{HOST}:{rival.port}"
    result = run_wrk(wrk, url, own, clients=options.clients, seconds=options.seconds)
    used_s = rival.cpu_time_s() - before
    each = 1e6 * used_s / max(result.answered, 1)
    print(f"\nLiteLLM's proxy, {WORKERS} workers, mocked upstream")
    print(f"  cores {used_s / result.elapsed_s:.2f}; {each:.0f} microseconds of CPU a request")
    return result


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    ends_at = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < ends_at and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health/liveliness", timeout=5):
                return
        except (OSError, urllib.error.HTTPError):
            time.sleep(0.5)
    raise SystemExit("LiteLLM's proxy did not start")
