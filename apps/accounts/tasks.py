"""Run what accounts must do from time to time, or soon."""

import logging

from celery import shared_task
from kombu.exceptions import OperationalError

from aiscale.redis import UNAVAILABLE
from apps.accounts import mail, mirror

log = logging.getLogger(__name__)


@shared_task(name="aiscale.accounts.publish_all", ignore_result=True)
def publish_all() -> None:
    """Heal the mirror. Idempotent; no retries: the next run comes in ten seconds."""
    mirror.publish_all()


@shared_task(name="aiscale.accounts.send_invitations", ignore_result=True)
def send_invitations() -> None:
    """Send the mails that are due. Idempotent but for a mail that may come twice; no retries: the next run comes in fifteen seconds."""
    mail.send_due()


def send_soon() -> None:
    """Have `send_invitations` run now. Should nobody take the message, the periodic run does it within fifteen seconds. I/O: one Redis
    trip."""
    try:
        send_invitations.apply_async(expires=60)
    except (*UNAVAILABLE, OperationalError):
        log.warning("no broker: invitations are sent within fifteen seconds", exc_info=True)
