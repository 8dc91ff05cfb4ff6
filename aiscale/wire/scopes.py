"""Say what a kill switch covers, and read and write its order in `keys.KILLED`, alike on both sides.

Scopes: ``site``, ``model:<slug>``, ``plan:<slug>``, ``organization:<id>``, ``key:<id>`` and ``provider:<name>``. An order is written as
``<epoch ms at which it ends by itself, or nothing>|<reason>``; lua/admit.lua reads the same.
"""

from collections.abc import Mapping
from typing import NamedTuple

from aiscale.wire import keys
from aiscale.wire.jobs import EncodeJob, GenerateJob

SITE = "site"


class Order(NamedTuple):
    """Stop a scope, until somebody releases it or ``until_ms`` has come."""

    reason: str
    until_ms: int | None = None

    def is_over(self, now_ms: int) -> bool:
        return self.until_ms is not None and self.until_ms <= now_ms


def write_order(order: Order) -> str:
    return f"{order.until_ms or ''}|{order.reason}"


def read_order(text: str) -> Order:
    until, bar, reason = text.partition("|")
    if not bar or (until and not until.isdecimal()):
        return Order(text)
    return Order(reason, int(until) if until else None)


def read_orders(fields: Mapping[bytes, bytes], now_ms: int) -> dict[str, Order]:
    """Return what is in force by scope; ``fields`` is the whole of `keys.KILLED`."""
    orders = {
        scope.decode(): read_order(text.decode())
        for scope, text in fields.items()
        if scope.decode() != keys.KILLED_LOADED
    }
    return {scope: order for scope, order in orders.items() if not order.is_over(now_ms)}


def list_scopes(job: GenerateJob | EncodeJob) -> list[str]:
    """List every scope that a job lies in, the widest first."""
    tag = job.billing
    scopes = [SITE, f"model:{job.model}", f"plan:{tag.plan}", f"organization:{tag.organization_id}"]
    if tag.key_id:
        scopes.append(f"key:{tag.key_id}")
    return [*scopes, f"provider:{tag.provider}"]


def find_order(orders: Mapping[str, Order], scopes: list[str], now_ms: int) -> Order | None:
    """Return the first order that covers one of ``scopes``."""
    found = (orders[scope] for scope in scopes if scope in orders)
    return next((order for order in found if not order.is_over(now_ms)), None)
