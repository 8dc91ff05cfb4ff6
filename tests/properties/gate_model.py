"""A plain model of the gate: what apps/spend/lua/admit.lua and settle.lua must do, without Redis, running sums or tricks."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from apps.spend import budgets, periods
from apps.spend.budgets import Part
from apps.spend.holds import End
from apps.spend.totals import Total

GRACE_MS = 60_000
TOKEN_UNIT_MS = 1000


@dataclass(frozen=True)
class Plan:
    requests: int
    window_s: int
    tokens: int
    in_flight: int
    limit: int
    models: str = "*"


@dataclass(frozen=True)
class Key:
    key_id: str
    organization: str
    user: str
    requests: int | None = None
    window_s: int | None = None
    tokens: int | None = None
    in_flight: int | None = None
    models: str = "*"
    state: str = "active"


@dataclass(frozen=True)
class Asked:
    """Be a request. ``key`` is None for a browser session."""

    job: str
    organization: str
    user: str
    key: str | None
    model: str
    worst: int
    tokens: int
    deadline_ms: int
    provider: str = "local"


@dataclass
class Window:
    """Hold what was counted, by sixtieth of the window."""

    unit_ms: int = 0
    counts: dict[int, int] = field(default_factory=dict)

    def look(self, now_ms: int, window_s: int) -> tuple[int, int, dict[int, int]]:
        """Return the length of a sixtieth, how many a window has, and the counts that lie in it now."""
        unit = -(-window_s * 1000 // 60)
        units = -(-window_s * 1000 // unit)
        counts = self.counts
        if self.unit_ms and self.unit_ms != unit:
            counts = defaultdict(int)
            for index, amount in self.counts.items():
                counts[min((index + 1) * self.unit_ms - 1, now_ms) // unit] += amount
        return unit, units, {index: amount for index, amount in counts.items() if index >= now_ms // unit - units}

    def count(self, now_ms: int, window_s: int, amount: int) -> None:
        self.unit_ms, _, kept = self.look(now_ms, window_s)
        current = now_ms // self.unit_ms
        self.counts = {**kept, current: kept.get(current, 0) + amount}


@dataclass(frozen=True)
class Limit:
    whose: str
    what: str
    scope: str
    most: int
    window_s: int
    amount: int


@dataclass(frozen=True)
class Copy:
    """Be what Redis was told of a scope: by period its span, what was spent, the revision of that, limit and raise."""

    definition: str
    spent: dict[str, Total]
    parts: dict[str, Part]


class Gate:
    """Know everything: the truth of Postgres, and what Redis was told of it."""

    def __init__(self, now_ms: int) -> None:
        self.now_ms = now_ms
        self.has_epoch = True
        self.plans: dict[str, Plan] = {}
        self.plan_of: dict[str, str] = {}
        self.suspended: set[str] = set()
        self.keys: dict[str, Key] = {}
        self.killed: dict[str, int | None] = {}
        self.budgets: dict[str, dict[str, Part]] = {}
        self.rows: dict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0])
        self.copies: dict[str, Copy] = {}
        self.holds: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        self.in_flight: dict[str, dict[str, int]] = defaultdict(dict)
        self.windows: dict[tuple[str, str], Window] = defaultdict(Window)

    # --- the truth

    def list_scopes(self, asked: Asked) -> tuple[str, ...]:
        return budgets.list_scopes(
            organization_id=asked.organization,
            plan=self.plan_of[asked.organization],
            model=asked.model,
            user_id=asked.user,
            key_id=asked.key,
        )

    def list_parts(self, scope: str) -> dict[str, Part]:
        parts = dict(self.budgets.get(scope, {}))
        if scope.startswith("organization:"):
            parts.setdefault("monthly", Part("monthly", "UTC", "plan", 0, 0))
        return dict(sorted(parts.items()))

    def read_total(self, scope: str, period: str) -> Total:
        span = periods.span_of(period, "UTC", self.now_ms)
        spent, revision = self.rows[scope, period, span.start_ms]
        return Total(scope, period, span, spent, revision)

    def charge(self, scopes: tuple[str, ...], amount: int) -> list[Total]:
        """Commit an amount to all scopes. Returns their totals: what Redis is to be told."""
        for scope in scopes:
            for period in ("daily", "monthly"):
                row = self.rows[scope, period, periods.span_of(period, "UTC", self.now_ms).start_ms]
                row[0] += amount
                row[1] += 1
        return [self.read_total(scope, period) for scope in scopes for period in ("daily", "monthly")]

    # --- what Redis is told

    def is_outdated(self, scope: str) -> bool:
        parts, copy = self.list_parts(scope), self.copies.get(scope)
        if not parts:
            return False
        if copy is None or copy.definition != budgets.write_definition(parts.values()):
            return True
        return any(self.now_ms >= total.span.end_ms for total in copy.spent.values())

    def refill(self, scope: str) -> Copy:
        parts = self.list_parts(scope)
        spent = {period: self.read_total(scope, period) for period in parts}
        self.copies[scope] = Copy(budgets.write_definition(parts.values()), spent, parts)
        return self.copies[scope]

    def settle(self, ends: list[End], totals: list[Total]) -> None:
        for end in ends:
            for scope in end.scopes:
                if scope.partition(":")[0] in ("organization", "key"):
                    self.in_flight[scope].pop(end.job_id, None)
                    if end.job_id in self.holds[scope]:
                        counts = self.windows[scope, "tokens"].counts
                        second = end.admitted_at_ms // TOKEN_UNIT_MS
                        if second in counts:
                            counts[second] -= min(end.unused_tokens, counts[second])
                self.holds[scope].pop(end.job_id, None)
        for total in totals:
            copy = self.copies.get(total.scope)
            known = copy.spent.get(total.period) if copy else None
            if copy and known and known.span == total.span and known.revision < total.revision:
                self.copies[total.scope] = replace(copy, spent={**copy.spent, total.period: total})

    # --- the gate

    def admit(self, asked: Asked) -> list[Any]:
        """Return what the gate must answer: ``admitted`` with the rates, or ``refused``, the code and numbers; counts and holds."""
        refusal = next(self.find_refusals(asked), None)
        if refusal is None or refusal[0] == "again":
            if refusal is None:
                self._hold(asked)
            return ["admitted", *self.rate(asked)]
        return ["refused", *refusal]

    def find_refusals(self, asked: Asked) -> Iterator[tuple[Any, ...]]:
        """Yield what refuses the request, in the gate's order; ('again',) first for one that holds already."""
        if not self.has_epoch:
            yield ("backend_unavailable",)
        key = self.keys[asked.key] if asked.key else None
        plan = self.plans[self.plan_of[asked.organization]]
        if key and key.state != "active":
            yield ("key_revoked",)
        if asked.organization in self.suspended:
            yield ("account_inactive",)
        for scope in (*reversed(self.list_scopes(asked)), f"provider:{asked.provider}"):
            if scope in self.killed:
                until = self.killed[scope]
                if until is None or self.now_ms < until:
                    yield ("killed", scope)
        for whose, models in (("plan", plan.models), ("key", key.models if key else "*")):
            if models != "*" and asked.model not in models.split(","):
                yield ("model_not_allowed", whose)
        held = self.holds[f"organization:{asked.organization}"].get(asked.job)
        if held and held[1] > self.now_ms:
            yield ("again",)
        for limit in self.list_limits(asked):
            used = self.count_used(limit)
            if used + limit.amount > limit.most:
                wait = self.find_wait(limit)
                yield ("rate_limit_exceeded", limit.whose, limit.what, limit.most, used, limit.amount, wait)
        for scope, most in self._list_most_in_flight(asked):
            running = sum(1 for expires in self.in_flight[scope].values() if expires > self.now_ms)
            if most is not None and running >= most:
                yield ("too_many_in_flight", running, most)
        for scope in self.list_scopes(asked):
            for period in ("daily", "monthly") if self.list_parts(scope) else ():
                if period in self.copies[scope].spent:
                    spent, held_now = self.copies[scope].spent[period].spent_nanousd, self.count_held(scope)
                    most = self.find_most(scope, period, plan)
                    if most is not None and spent + held_now + asked.worst > most:
                        yield ("insufficient_quota", scope, period, spent, held_now, asked.worst, most)

    def count_held(self, scope: str) -> int:
        return sum(worst for worst, expires in self.holds[scope].values() if expires > self.now_ms)

    def find_most(self, scope: str, period: str, plan: Plan) -> int | None:
        part = self.list_parts(scope)[period]
        if part.limit == "":
            return None
        most = plan.limit if part.limit == "plan" else int(part.limit)
        return most + part.raise_nanousd if self.now_ms < part.raise_until_ms else most

    def list_limits(self, asked: Asked) -> list[Limit]:
        plan, own = self.plans[self.plan_of[asked.organization]], f"organization:{asked.organization}"
        limits = [
            Limit("organization", "requests", own, plan.requests, plan.window_s, 1),
            Limit("organization", "tokens", own, plan.tokens, 60, asked.tokens),
        ]
        if asked.key:
            key, scope = self.keys[asked.key], f"key:{asked.key}"
            if key.requests is not None and key.window_s is not None:
                limits.append(Limit("key", "requests", scope, key.requests, key.window_s, 1))
            if key.tokens is not None:
                limits.append(Limit("key", "tokens", scope, key.tokens, 60, asked.tokens))
        return limits

    def count_used(self, limit: Limit) -> int:
        return sum(self.windows[limit.scope, limit.what].look(self.now_ms, limit.window_s)[2].values())

    def find_wait(self, limit: Limit) -> int | None:
        """Return the milliseconds until the amount fits, by trying each moment at which a sixtieth leaves the window."""
        if limit.amount > limit.most:
            return None
        unit, units, counts = self.windows[limit.scope, limit.what].look(self.now_ms, limit.window_s)
        for moment in sorted((index + units + 1) * unit for index in counts):
            left = sum(amount for index, amount in counts.items() if index >= moment // unit - units)
            if left + limit.amount <= limit.most:
                return moment - self.now_ms
        raise AssertionError("an empty window has room for what is not more than its limit")

    def rate(self, asked: Asked) -> list[str]:
        """Return limit, what is left and the time until all is, of the tightest window of requests, and the same of tokens."""
        parts = []
        for what in ("requests", "tokens"):
            limits = [limit for limit in self.list_limits(asked) if limit.what == what]
            tightest = min(limits, key=lambda limit: max(limit.most - self.count_used(limit), 0))
            used = self.count_used(tightest)
            unit, units, counts = self.windows[tightest.scope, what].look(self.now_ms, tightest.window_s)
            reset_ms = (max(counts) + units + 1) * unit - self.now_ms if used > 0 else 0
            parts += [tightest.most, max(tightest.most - used, 0), reset_ms]
        return [str(part) for part in parts]

    def _list_most_in_flight(self, asked: Asked) -> list[tuple[str, int | None]]:
        plan = self.plans[self.plan_of[asked.organization]]
        most: list[tuple[str, int | None]] = [(f"organization:{asked.organization}", plan.in_flight)]
        return [*most, (f"key:{asked.key}", self.keys[asked.key].in_flight)] if asked.key else most

    def _hold(self, asked: Asked) -> None:
        expires, own = asked.deadline_ms + GRACE_MS, f"organization:{asked.organization}"
        is_gone = {
            scope: [job for job, (_, until) in self.holds[scope].items() if until <= self.now_ms]
            for scope in self.list_scopes(asked)
        }
        for scope in self.list_scopes(asked):
            if self.list_parts(scope) or is_gone[own]:
                for job in is_gone[scope]:
                    del self.holds[scope][job]
            self.holds[scope][asked.job] = (asked.worst, expires)
        for scope, _ in self._list_most_in_flight(asked):
            self.in_flight[scope][asked.job] = expires
        for limit in self.list_limits(asked):
            self.windows[limit.scope, limit.what].count(self.now_ms, limit.window_s, limit.amount)
