"""Agree on how both sides use Celery's broker."""

from typing import Any

PRIORITY_STEPS = (0, 3, 6, 9)
"""Kombu's Redis lists for one queue, most urgent first. A plan's priority is one of these."""

BROKER_OPTIONS: dict[str, Any] = {
    "task_serializer": "json",
    "accept_content": ["json"],
    "task_ignore_result": True,
    "broker_connection_retry_on_startup": True,
    "broker_transport_options": {
        "priority_steps": list(PRIORITY_STEPS),
        "queue_order_strategy": "priority",
        # an unacknowledged message comes back after this; claim.lua keeps a job that still runs from running twice
        "visibility_timeout": 60,
        "global_keyprefix": "aiscale:celery:",
        "socket_connect_timeout": 2,
        "health_check_interval": 15,
    },
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "worker_prefetch_multiplier": 1,
}
