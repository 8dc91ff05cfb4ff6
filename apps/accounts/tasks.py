"""Run what accounts must do from time to time."""

from celery import shared_task

from apps.accounts import mirror


@shared_task(name="aiscale.accounts.publish_all", ignore_result=True)
def publish_all() -> None:
    """Heal the mirror. Idempotent; no retries: the next run comes in ten seconds."""
    mirror.publish_all()
