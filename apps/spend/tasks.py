"""Run what spend must do from time to time."""

from celery import shared_task

from apps.spend import balance, carryover


@shared_task(name="aiscale.spend.publish_corrected", ignore_result=True)
def publish_corrected() -> None:
    """Bring credits, refunds and adjustments to the gate that a process died with. Idempotent; no retries: the next run comes in ten
    seconds."""
    balance.publish_corrected()


@shared_task(name="aiscale.spend.carry_all", ignore_result=True)
def carry_all() -> None:
    """Carry unused credit into the new month. Idempotent; no retries: the next run comes in ten minutes."""
    carryover.carry_all()
    balance.publish_corrected()
