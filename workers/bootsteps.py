"""Load the models before the worker takes its first job, and let them go after its last."""

import logging
import os
import threading
from typing import Any

from celery import bootsteps
from celery.signals import worker_shutting_down

from workers import serving

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""How long running answers may go on after the worker was told to stop."""


class ServingStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Own the process's `Serving`."""

    requires = {"celery.worker.components:Pool"}

    def start(self, worker: Any) -> None:
        serving.open_serving()

    def stop(self, worker: Any) -> None:
        serving.close_serving()


@worker_shutting_down.connect
def _end_what_runs(**_: Any) -> None:
    serving.drain_serving()
    # the pool waits for its tasks: this ends those that take too long
    timer = threading.Timer(GRACE_S, serving.close_serving)
    timer.daemon = True
    timer.start()


def exit_process(status: int = 70) -> None:
    """End the process at once: its supervisor starts another one."""
    log.critical("the worker ends itself: an engine thread is gone")
    os._exit(status)
