"""Make .venv and install what pyproject.toml names, at the versions of deploy/constraints.txt. Does nothing when that is done.

Usage: python3 deploy/install.py [extra ...]
"""

import hashlib
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
CONSTRAINTS = os.path.join(ROOT, "deploy", "constraints.txt")
PYPROJECT = os.path.join(ROOT, "pyproject.toml")


def main(extras):
    # this function alone must be readable by any Python 3
    if tuple(sys.version_info) < (3, 11):
        stop(f"Python 3.11 or newer is needed, and this is {python()}; name another one: PYTHON=python3.12 make up")
    make_venv()
    wanted = requirements(extras)
    stamp = os.path.join(VENV, ".aiscale-" + ("-".join(extras) or "run"))
    digest = fingerprint(wanted)
    if read(stamp) == digest:
        return
    print(f"installing {len(wanted)} packages and what they need into .venv ...", flush=True)
    command = [VENV_PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", CONSTRAINTS]
    if subprocess.call(command + wanted, cwd=ROOT) != 0:
        stop("the packages could not be installed (see above); check the network or pip's settings and try again")
    with open(stamp, "w") as file:
        file.write(digest)


def make_venv():
    """Make .venv, or make it again when its Python is gone."""
    if (
        os.path.exists(VENV_PYTHON)
        and subprocess.call([VENV_PYTHON, "-m", "pip", "--version"], stdout=subprocess.DEVNULL) == 0
    ):
        return
    shutil.rmtree(VENV, ignore_errors=True)
    print(f"making .venv with Python {python()} ...", flush=True)
    if subprocess.call([sys.executable, "-m", "venv", VENV]) != 0:
        shutil.rmtree(VENV, ignore_errors=True)
        stop("a virtual environment could not be made; on Debian and Ubuntu: apt install python3-venv")


def requirements(extras):
    """Return the requirements of the project and of the extras."""
    import tomllib

    with open(PYPROJECT, "rb") as file:
        project = tomllib.load(file)["project"]
    known = project["optional-dependencies"]
    unknown = [extra for extra in extras if extra not in known]
    if unknown:
        stop(f"there is no extra {', '.join(unknown)}; there are {', '.join(known)}")
    wanted = list(project["dependencies"])
    if "gpu" in extras:
        # both packages hold the module onnxruntime
        wanted.remove("onnxruntime")
        subprocess.call([VENV_PYTHON, "-m", "pip", "uninstall", "--quiet", "--yes", "onnxruntime"])
    return wanted + [item for extra in extras for item in known[extra]]


def python():
    return ".".join(str(part) for part in sys.version_info[:2])


def fingerprint(wanted):
    text = "\n".join(wanted) + read(CONSTRAINTS) + sys.version
    return hashlib.sha256(text.encode()).hexdigest()


def read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def stop(line):
    sys.stderr.write(f"aiscale: {line}\n")
    raise SystemExit(1)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        stop("stopped; the next time what is missing is installed")
