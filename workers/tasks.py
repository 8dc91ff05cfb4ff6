"""Take tickets from Celery: "there is work for this model".

Idempotency: a ticket holds no job; claim.lua gives each waiting job to one asker, and a ticket too many gets none. Late acks: a ticket is
acknowledged when the jobs that it brought have ended; one that comes back finds what waits then. Retries: at most three in all for a
job, by the reaper, and only before the first token; Celery itself retries nothing. Deadline: ``deadline_at_ms`` of each job; 30 s for
encoders, which the web sets.
"""

from celery import shared_task

from aiscale.wire.jobs import ENCODE_TASK, GENERATE_TASK
from workers import intake
from workers.serving import get_serving


@shared_task(name=GENERATE_TASK, acks_late=True, ignore_result=True)
def generate(model: str) -> None:
    """Compute what waits for a model that generates."""
    intake.work(get_serving(), model)


@shared_task(name=ENCODE_TASK, acks_late=True, ignore_result=True)
def encode(model: str) -> None:
    """Compute what waits for an encoder."""
    intake.work(get_serving(), model)
