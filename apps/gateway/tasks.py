"""Run the gateway's periodic work. All of it may run twice, or at once with itself, without harm; none is retried: the next
round comes anyway.
"""

from celery import shared_task

from apps.gateway.files import upkeep as files
from apps.gateway.responses import upkeep as responses


@shared_task(name="aiscale.gateway.finish_lost", ignore_result=True)
def finish_lost() -> None:
    """Write the end of stored responses whose web process is gone."""
    responses.finish_lost()


@shared_task(name="aiscale.gateway.forget_expired", ignore_result=True)
def forget_expired() -> None:
    """Delete what has expired."""
    responses.forget_expired()
    files.tidy()
