"""Make the workers' Celery app: `celery -A workers.celery worker -P threads`."""

from typing import Any

from celery import Celery
from celery.signals import setup_logging
from kombu import Exchange, Queue

from aiscale.observability import configure_logging
from aiscale.wire.broker import BROKER_OPTIONS
from aiscale.wire.keys import celery_queue
from workers.bootsteps import ServingStep
from workers.config import ENV, REDIS_URL, list_served

app = Celery(
    "workers",
    broker=REDIS_URL.replace("unix://", "redis+socket://"),
    include=["workers.tasks"],
    # Celery's own would load Django wherever DJANGO_SETTINGS_MODULE is set
    fixups=set(),
)
app.conf.update(
    **BROKER_OPTIONS,
    worker_concurrency=ENV.worker_concurrency,
    worker_enable_remote_control=False,
    task_create_missing_queues=False,
    task_queues=[
        Queue(name, Exchange(name), routing_key=name)
        for name in (celery_queue(manifest.name) for _, manifest in list_served())
    ],
)
app.steps["worker"].add(ServingStep)


@setup_logging.connect
def _configure_logging(**_: Any) -> None:
    configure_logging(ENV.log_level)
