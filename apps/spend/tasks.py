"""Run what spend must do from time to time."""

import logging

from celery import shared_task
from kombu.exceptions import OperationalError

from aiscale.redis import UNAVAILABLE, get_sync
from apps.spend import alerts, carryover, holds, rerating

log = logging.getLogger(__name__)


@shared_task(name="aiscale.spend.carry_all", ignore_result=True)
def carry_all() -> None:
    """Carry unused credit into the new month. Idempotent; no retries: the next run comes in ten minutes."""
    carryover.carry_all()


@shared_task(name="aiscale.spend.rerate", ignore_result=True)
def rerate() -> None:
    """Carry out the open orders to rate usage again. Idempotent; no retries: the next run comes in a minute."""
    rerating.apply_open()


def apply_soon() -> None:
    """Have `rerate` run now. Should nobody take the message, the periodic run does it within a minute. I/O: one Redis trip."""
    try:
        rerate.delay()
    except (*UNAVAILABLE, OperationalError):
        log.warning("no broker: usage is rated again within a minute", exc_info=True)


@shared_task(name="aiscale.spend.deliver_alerts", ignore_result=True)
def deliver_alerts() -> None:
    """Send the alerts that are due. Idempotent; no retries: the next run comes in ten seconds."""
    alerts.deliver_due()


@shared_task(name="aiscale.spend.sweep_holds", ignore_result=True)
def sweep_holds() -> None:
    """Take out the holds that have expired. Idempotent; no retries: the next run comes in ten minutes."""
    holds.sweep(get_sync())
