"""A thread that fails takes nobody with it in silence: its requests end with a reason and cost nothing, and its worker starts anew."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from aiscale.wire.events import Delta, Finished
from apps.accounts.callers import on_thread
from apps.inference import presence, reaper
from tests.apps.conftest import ROOT, Cast, run_worker
from tests.apps.inference.test_workers import CHAT, start, wait_for, widen

WORKER = """\
import os, sys, time
from workers import bootsteps
from workers.engine.engine import Engine

step = Engine.step

def break_when_told(self):
    if os.path.exists(os.environ["BREAK"]) and self.counts()[0]:
        raise MemoryError("the test breaks the engine's thread")
    return step(self)

exit_process = bootsteps.exit_process

def exit_when_told(status=70):
    while not os.path.exists(os.environ["EXIT"]):
        time.sleep(0.02)
    exit_process(status)

Engine.step = break_when_told
bootsteps.exit_process = exit_when_told
from workers.celery import app
app.worker_main(sys.argv[1:])
"""


async def collect(run: Any) -> list[Any]:
    return [event async for event in run.events()]


async def test_a_failed_thread_ends_its_requests_and_its_process(
    cast: Cast, redis_url: str, served_models_dir: Path, tmp_path: Path
) -> None:
    """What came between its failure and its process's end was not begun, and another worker answers it."""
    await on_thread(lambda: widen(cast))
    stop = threading.Event()
    settings = {"AISCALE_ENGINE_RUNNER": "fake", "AISCALE_FAKE_STEP_MS": "20", "BREAK": str(tmp_path / "break")}
    settings["EXIT"] = str(tmp_path / "exit")
    options = ["worker", "-P", "threads", "-c", "4", "-Q", f"model.{CHAT}", "--loglevel", "critical"]
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, *options, "--without-gossip", "--without-mingle"],
        cwd=ROOT,
        env={**os.environ, **settings, "REDIS_URL": redis_url},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        await on_thread(lambda: wait_for(presence.list_workers, 60))
        runs = [await start(cast, 500) for _ in range(3)]
        begun, ends = [asyncio.Event() for _ in runs], list[Finished]()

        async def listen(number: int) -> None:
            event: Any
            async for event in runs[number].events():
                if isinstance(event, Delta):
                    begun[number].set()
                if isinstance(event, Finished):
                    ends.append(event)

        listening = [asyncio.create_task(listen(number)) for number in range(len(runs))]
        async with asyncio.timeout(60):
            for each in begun:
                await each.wait()
            (tmp_path / "break").touch()
            await asyncio.gather(*listening)
        assert [end.finish_reason for end in ends] == ["error"] * 3
        assert all("worker stopped" in (end.error_message or "") for end in ends), ends
        threading.Thread(target=reaper.run, args=(stop,), daemon=True).start()
        late = [await start(cast, 5) for _ in range(3)]
        await asyncio.sleep(0.5)  # they are claimed by then
        with run_worker(redis_url):
            (tmp_path / "exit").touch()
            async with asyncio.timeout(60):
                answers = await asyncio.gather(*(collect(run) for run in late))
        assert [answer[-1].finish_reason for answer in answers] == ["length"] * 3, answers
        assert await on_thread(lambda: process.wait(30)) == 70, "its supervisor starts another one"
    finally:
        stop.set()
        process.kill()
        process.wait()
        presence.forget()
