"""Run what the catalog must do from time to time."""

from celery import shared_task

from apps.inference import traffic


@shared_task(name="aiscale.inference.publish_traffic", ignore_result=True)
def publish_traffic() -> None:
    """Heal what workers read of the catalog. Idempotent; no retries: the next run comes in ten seconds."""
    traffic.publish()


@shared_task(name="aiscale.inference.watch_canaries", ignore_result=True)
def watch_canaries() -> None:
    """Roll back what fails too often. Idempotent; no retries: the next run comes in five seconds."""
    traffic.watch()
