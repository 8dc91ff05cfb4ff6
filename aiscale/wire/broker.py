"""Agree on how both sides use Celery's broker.

What travels through it is a ticket: "there is work for this model". The jobs wait in Redis (``lua/queue.lua``), and the scripts that put
them there push the ticket in the same step. So a ticket is written here as Celery and kombu write a task's message; tests compare it
with theirs.
"""

import base64
import uuid
from typing import Any

import msgspec

from aiscale.wire.jobs import ENCODE_TASK, GENERATE_TASK
from aiscale.wire.keys import celery_queue

PRIORITY_STEPS = (0, 3, 6, 9)
"""Most urgent first. A plan's priority is one of these."""
BULK_PRIORITY = 12
"""What is asked for in bulk comes after all plans."""
TIERS = (*PRIORITY_STEPS, BULK_PRIORITY)
"""Those of the queue; ``lua/queue.lua`` knows the same."""

BROKER_PREFIX = "aiscale:celery:"

BROKER_OPTIONS: dict[str, Any] = {
    "task_serializer": "json",
    "accept_content": ["json"],
    "task_ignore_result": True,
    "broker_connection_retry_on_startup": True,
    "broker_transport_options": {
        "priority_steps": list(PRIORITY_STEPS),
        "queue_order_strategy": "priority",
        # an unacknowledged message comes back after this: a ticket too many, which finds nothing
        "visibility_timeout": 60,
        "global_keyprefix": BROKER_PREFIX,
        "socket_connect_timeout": 2,
        "health_check_interval": 15,
    },
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "worker_prefetch_multiplier": 1,
}

TASKS = {"generate": GENERATE_TASK, "encode": ENCODE_TASK}


def broker_list(model: str) -> str:
    """Name the Redis list of a model's Celery queue, as kombu does (for its most urgent priority)."""
    return f"{BROKER_PREFIX}{celery_queue(model)}"


def make_ticket(kind: str, model: str) -> bytes:
    """Write the message that calls a worker: task protocol 2, in kombu's envelope for Redis."""
    task_id, queue = str(uuid.uuid4()), celery_queue(model)
    body = [[model], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    return msgspec.json.encode(
        {
            "body": base64.b64encode(msgspec.json.encode(body)).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": TASKS[kind],
                "id": task_id,
                "root_id": task_id,
                "parent_id": None,
                "group": None,
                "group_index": None,
                "shadow": None,
                "eta": None,
                "expires": None,
                "retries": 0,
                "timelimit": [None, None],
                "argsrepr": repr([model]),
                "kwargsrepr": "{}",
                "origin": "aiscale",
                "ignore_result": True,
                "replaced_task_nesting": 0,
                "stamped_headers": None,
                "stamps": {},
            },
            "properties": {
                "correlation_id": task_id,
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    )
