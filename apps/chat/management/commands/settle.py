"""Run what must go on whoever dies: settlement, transcripts, the reaper, and what keeps kill switches in force."""

import logging
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from django.core.management.base import BaseCommand

from aiscale import heap
from aiscale import redis as redis_clients
from aiscale.wire import metrics
from apps.chat import departures, transcripts
from apps.inference import reaper, stopping
from apps.spend import refusal_writer, settlement

log = logging.getLogger(__name__)

WORKS: dict[str, Callable[[threading.Event], None]] = {
    "settlement": settlement.run,
    "transcripts": transcripts.run,
    "departures": departures.run,
    "reaper": reaper.run,
    "stopping": stopping.run,
    "refusals": refusal_writer.run,
}
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


class Command(BaseCommand):
    help = "Write finished jobs into the ledger and the conversations, and end jobs whose worker was lost. Runs until stopped."

    def handle(self, *args: Any, **options: Any) -> None:
        stop = threading.Event()
        # waited for, not handled: a handler that is interrupted by its signal again would wait for the event's lock, which it holds
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threads = [
            threading.Thread(target=_keep_up, args=(name, work, stop), name=name) for name, work in WORKS.items()
        ]
        heap.settle()
        metrics.start_reporting("settlement", redis_clients.get_sync)
        for thread in threads:
            thread.start()
        signal.sigwait(STOP_SIGNALS)
        stop.set()
        for thread in threads:
            thread.join()


def _keep_up(name: str, work: Callable[[threading.Event], None], stop: threading.Event) -> None:
    """Run a work until ``stop``, again with back-off when it fails."""
    pause_s = 0.5
    while not stop.is_set():
        started = time.monotonic()
        try:
            work(stop)
        except Exception:  # whatever it was: the others must go on, and this one must come back
            log.exception("%s failed and starts again", name)
            if time.monotonic() - started > 60:
                pause_s = 0.5
            stop.wait(pause_s)
            pause_s = min(pause_s * 2, 10.0)
