"""Write into Redis what administrators change, and tell the model the same."""

import os
from dataclasses import replace
from typing import Any

from hypothesis.stateful import RuleBasedStateMachine
from redis import Redis

from aiscale.wire import keys
from apps.spend.budgets import Part, write_definition
from tests.properties.gate_model import Gate, Key, Plan
from tests.servers import empty_redis

START_MS = 1_793_400_000_000
"""30 October 2026, 20:00 UTC: days and a month end soon."""
PLANS = {
    "free": Plan(requests=4, window_s=600, tokens=200, in_flight=4, limit=120),
    "pro": Plan(requests=30, window_s=60, tokens=900, in_flight=20, limit=900, models="m1,m2"),
}
KEYS = {
    "k1": Key("k1", "a", "u1", requests=6, window_s=60, tokens=300, in_flight=3),
    "k2": Key("k2", "a", "u2", models="m1"),
    "k3": Key("k3", "b", "u3"),
}
WHO = [("a", "u1", "k1"), ("a", "u2", "k2"), ("a", "u1", None), ("b", "u3", "k3")]
SCOPES = [
    "site",
    "plan:free",
    "plan:pro",
    "model:m1",
    "organization:a",
    "organization:b",
    "user:u1",
    "key:k1",
    "key:k2",
]
STOPPABLE = [scope for scope in SCOPES if not scope.startswith("user:")] + ["provider:local"]


class GateStage(RuleBasedStateMachine):
    """Hold both: a Redis with the gate's copies, and the model."""

    def __init__(self) -> None:
        super().__init__()
        self.client: Any = Redis.from_url(os.environ["REDIS_URL"])
        empty_redis(self.client)
        self.gate = Gate(START_MS)

    def set_up(self) -> None:
        for slug, plan in PLANS.items():
            self.set_plan(slug, plan)
        self.move("a", "pro")
        self.move("b", "free")
        for key in KEYS.values():
            self.set_key(key)
        self.client.hset(keys.KILLED, "loaded", 1)
        self.client.hset(keys.BUDGETS, "loaded", 1)

    def set_plan(self, slug: str, plan: Plan) -> None:
        self.gate.plans[slug] = plan
        fields = {"requests_per_window": plan.requests, "window_s": plan.window_s, "tokens_per_minute": plan.tokens}
        fields |= {"max_in_flight": plan.in_flight, "monthly_limit_nanousd": plan.limit, "models": plan.models}
        self.client.hset(keys.plan(slug), mapping=fields)

    def move(self, organization: str, slug: str) -> None:
        self.gate.plan_of[organization] = slug
        self.client.hset(keys.organization(organization), mapping={"plan": slug, "state": "active"})

    def set_key(self, key: Key) -> None:
        self.gate.keys[key.key_id] = key
        numbers = {"requests_per_window": key.requests, "window_s": key.window_s, "tokens_per_minute": key.tokens}
        numbers |= {"max_in_flight": key.in_flight}
        fields = {name: "" if number is None else number for name, number in numbers.items()}
        fields |= {"key_id": key.key_id, "organization_id": key.organization, "user_id": key.user}
        fields |= {"state": key.state, "expires_at_ms": "", "models": key.models}
        self.client.hset(keys.api_key(key.key_id), mapping=fields)

    def change_limits(self, slug: str, limit: int, requests: int, window_s: int) -> None:
        plan = replace(self.gate.plans[slug], limit=limit, requests=requests, window_s=window_s)
        self.set_plan(slug, plan)

    def set_budget(self, scope: str, period: str, limit: str, raise_nanousd: int, raised_ms: int) -> None:
        part = Part(period, "UTC", limit, raise_nanousd, self.gate.now_ms + raised_ms)
        self.gate.budgets.setdefault(scope, {})[period] = part
        self._write_budgets(scope)

    def delete_budgets(self, scope: str) -> None:
        self.gate.budgets.pop(scope, None)
        self._write_budgets(scope)
        if not self.gate.list_parts(scope):
            # as `balance.publish` does
            self.lose_a_copy(scope)

    def _write_budgets(self, scope: str) -> None:
        self.client.hdel(keys.BUDGETS, scope)
        if scope in self.gate.budgets:
            self.client.hset(keys.BUDGETS, scope, write_definition(self.gate.list_parts(scope).values()))

    def kill(self, scope: str, life_ms: int | None) -> None:
        until = None if life_ms is None else self.gate.now_ms + life_ms
        self.gate.killed[scope] = until
        self.client.hset(keys.KILLED, scope, f"{'' if until is None else until}|Because")

    def revive_all(self) -> None:
        for scope in self.gate.killed:
            self.client.hdel(keys.KILLED, scope)
        self.gate.killed.clear()

    def lose_a_copy(self, scope: str) -> None:
        self.client.delete(keys.spend(scope))
        self.gate.copies.pop(scope, None)
