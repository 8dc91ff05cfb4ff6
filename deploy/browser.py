"""Make sure that there is a Chromium for the browser tests: one of the system, Playwright's own, or a package that root may install."""

import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DOWNLOAD_TIMEOUT_S = 600


def find_browser() -> str | None:
    """Return a Chromium's path. I/O: looks at PATH and at Playwright's folder."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


def install_browser() -> None:
    """Try the system's packages when we may, then Playwright's download."""
    import os

    if os.geteuid() == 0 and shutil.which("apt-get"):
        print("installing chromium with apt-get ...", flush=True)
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]
        for step in (["apt-get", "update", "-qq"], command):
            subprocess.run(step, check=False, stdout=subprocess.DEVNULL, env=environ, timeout=DOWNLOAD_TIMEOUT_S)
        if find_browser():
            return
    print("fetching Chromium with playwright ...", flush=True)
    command = [sys.executable, "-m", "playwright", "install", "chromium"]
    try:
        subprocess.run(command, check=False, timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        print("the download took too long", flush=True)


def main() -> None:
    if find_browser() is None:
        install_browser()
    if find_browser() is None:
        sys.exit(
            "aiscale: the browser tests need Chromium, which could not be installed; install it and run make test again"
        )


if __name__ == "__main__":
    main()
