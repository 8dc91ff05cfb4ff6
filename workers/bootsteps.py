"""Load the models before the worker takes its first job, and let them go after its last."""

import logging
import os
import threading
from typing import Any

from celery import bootsteps
from celery.signals import worker_shutting_down

from aiscale import heap
from aiscale.wire.keys import celery_queue
from workers import serving

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""How long running answers may go on after the worker was told to stop."""


_worker: Any = None


class ServingStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Own the process's `Serving`."""

    requires = {"celery.worker.components:Pool"}

    def start(self, worker: Any) -> None:
        global _worker
        _worker = worker
        serving.open_serving()
        heap.settle()

    def stop(self, worker: Any) -> None:
        serving.close_serving()


def take_tickets(model: str) -> None:
    """Have this worker's consumer take the tickets of a model that came while it ran."""
    consumer = getattr(_worker, "consumer", None)
    if consumer is not None:
        name = celery_queue(model)
        consumer.call_soon(consumer.add_task_queue, name, name, "direct", name)


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
