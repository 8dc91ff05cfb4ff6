"""Make the web side's Celery app: it sends jobs to workers' queues, and runs the periodic tasks of Django's apps."""

import os

from celery import Celery
from celery.signals import beat_embedded_init, worker_ready

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "aiscale.settings.base")

from django.conf import settings

from aiscale import heap
from aiscale import redis as redis_clients
from aiscale.embedded.privileges import end_with
from aiscale.wire import metrics
from aiscale.wire.broker import BROKER_OPTIONS

app = Celery("aiscale", broker=settings.REDIS_URL.replace("unix://", "redis+socket://"))
app.conf.update(**BROKER_OPTIONS, task_default_queue="default", timezone="UTC")
app.conf.beat_schedule = {
    # heals the gate's copies of plans, organizations and keys, should a change not have reached Redis
    "publish-identities": {"task": "aiscale.accounts.publish_all", "schedule": 10.0, "options": {"expires": 10}},
    "tidy-cache": {"task": "aiscale.inference.tidy_cache", "schedule": 60.0, "options": {"expires": 60}},
    "start-batches": {"task": "aiscale.gateway.start_batches", "schedule": 2.0, "options": {"expires": 2}},
    "finish-lost-responses": {"task": "aiscale.gateway.finish_lost", "schedule": 15.0, "options": {"expires": 15}},
    "forget-expired": {"task": "aiscale.gateway.forget_expired", "schedule": 300.0, "options": {"expires": 300}},
    "deliver-alerts": {"task": "aiscale.spend.deliver_alerts", "schedule": 10.0, "options": {"expires": 10}},
    "publish-traffic": {"task": "aiscale.inference.publish_traffic", "schedule": 10.0, "options": {"expires": 10}},
    "watch-canaries": {"task": "aiscale.inference.watch_canaries", "schedule": 5.0, "options": {"expires": 5}},
    "rerate": {"task": "aiscale.spend.rerate", "schedule": 60.0, "options": {"expires": 60}},
    "sweep-holds": {"task": "aiscale.spend.sweep_holds", "schedule": 600.0, "options": {"expires": 600}},
    "carry-credits": {"task": "aiscale.spend.carry_all", "schedule": 600.0, "options": {"expires": 600}},
    # the net below invitations' mails, which are sent at once: takes what was not sent because a process or the mail server was away
    "send-invitations": {"task": "aiscale.accounts.send_invitations", "schedule": 15.0, "options": {"expires": 15}},
}
app.autodiscover_tasks(["apps.accounts", "apps.spend", "apps.inference", "apps.gateway", "apps.chat"])


def _begin(**_: object) -> None:
    heap.settle()
    metrics.start_reporting("tasks", redis_clients.get_sync)


def _begin_beat(**_: object) -> None:
    # the worker that started it takes it down, and cannot once it is killed
    end_with(_PID)


_PID = os.getpid()
"""The worker's, in the process of its own that beat is as well."""
worker_ready.connect(_begin)
beat_embedded_init.connect(_begin_beat)
