"""Run what spend must do from time to time."""

from celery import shared_task

from apps.spend import carryover


@shared_task(name="aiscale.spend.carry_all", ignore_result=True)
def carry_all() -> None:
    """Carry unused credit into the new month. Idempotent; no retries: the next run comes in ten minutes."""
    carryover.carry_all()
