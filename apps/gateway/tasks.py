"""Run the gateway's work in the background. All of it may run twice, or at once with itself, without harm; none is retried by Celery:
the next round comes anyway.
"""

import concurrent.futures
from typing import Any

from celery import shared_task
from celery.signals import worker_shutting_down

from apps.gateway import idempotency_records, loops
from apps.gateway.batches import runner
from apps.gateway.batches import upkeep as batches
from apps.gateway.files import upkeep as files
from apps.gateway.responses import upkeep as responses

BATCH_QUEUE = "batches"
LOOK_EACH_S = 0.5


@shared_task(name="aiscale.gateway.finish_lost", ignore_result=True)
def finish_lost() -> None:
    """Write the end of stored responses whose web process is gone."""
    responses.finish_lost()


@shared_task(name="aiscale.gateway.forget_expired", ignore_result=True)
def forget_expired() -> None:
    """Delete what has expired."""
    responses.forget_expired()
    files.tidy()
    batches.forget_old()
    idempotency_records.forget_expired()


@shared_task(name="aiscale.gateway.start_batches", ignore_result=True)
def start_batches() -> None:
    """Have somebody go on with each batch whose time has come."""
    for batch_id in batches.list_due():
        advance_batch.apply_async((batch_id,), queue=BATCH_QUEUE, expires=10)


@shared_task(name="aiscale.gateway.advance_batch", ignore_result=True, acks_late=False)
def advance_batch(batch_id: str) -> None:
    """Go on with one batch. Idempotent: who has no lease does nothing. No deadline but the batch's own."""
    work = loops.begin(runner.advance(batch_id))
    while True:
        try:
            return work.result(timeout=LOOK_EACH_S)
        except concurrent.futures.TimeoutError:
            if work.done():
                raise


@worker_shutting_down.connect  # type: ignore[untyped-decorator,unused-ignore]
def stop_batches(**_: Any) -> None:
    """Start no more lines: this process is about to end."""
    runner.closing.set()
