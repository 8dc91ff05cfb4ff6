"""Run what inference must do from time to time."""

from celery import shared_task

from apps.inference import traffic
from apps.inference.cache import generations, lessons
from apps.inference.models import CachedAnswer

EXPIRED_AT_ONCE = 5_000


@shared_task(name="aiscale.inference.publish_traffic", ignore_result=True)
def publish_traffic() -> None:
    """Heal what workers read of the catalog. Idempotent; no retries: the next run comes in ten seconds."""
    traffic.publish()


@shared_task(name="aiscale.inference.watch_canaries", ignore_result=True)
def watch_canaries() -> None:
    """Roll back what fails too often. Idempotent; no retries: the next run comes in five seconds."""
    traffic.watch()


@shared_task(name="aiscale.inference.tidy_cache", ignore_result=True)
def tidy_cache() -> None:
    """Bring Redis's copy of the purges up to date, tidy, and learn. Idempotent; no retries: the next run comes in a minute.

    I/O: SQL, one Redis trip.
    """
    generations.restore()
    while CachedAnswer.objects.delete_expired(EXPIRED_AT_ONCE) == EXPIRED_AT_ONCE:
        pass
    lessons.tidy()
