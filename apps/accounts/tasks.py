"""Run what accounts must do from time to time."""

from celery import shared_task

from apps.accounts import mail, mirror


@shared_task(name="aiscale.accounts.publish_all", ignore_result=True)
def publish_all() -> None:
    """Heal the mirror. Idempotent; no retries: the next run comes in ten seconds."""
    mirror.publish_all()


@shared_task(name="aiscale.accounts.send_invitations", ignore_result=True)
def send_invitations() -> None:
    """Send the mails that are due. Idempotent but for a mail that may come twice; no retries: the next run comes in fifteen seconds."""
    mail.send_due()
