"""Turn the gate's refusals into sentences that say what was wrong and what to do next."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from aiscale.db import format_usd
from aiscale.errors import AiscaleError, Code
from apps.accounts import rates
from apps.spend import periods

RATE_PARTS = 6
"""Members of admit.lua's RATE."""

_WINDOWS = {60: "minute", 3600: "hour", 86_400: "day"}

_IDENTITY = {
    Code.INVALID_API_KEY: "This API key is not valid. Check it, or make a new one on the API keys page.",
    Code.KEY_REVOKED: "This API key was revoked. Make a new one on the API keys page.",
    Code.KEY_EXPIRED: "This API key has expired. Make a new one on the API keys page.",
    Code.ACCOUNT_INACTIVE: "This account is suspended. Write to the administrator of this service.",
}


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Hold what admit.lua said after ``refused``. ``rate`` is empty when the caller is not known; ``facts`` are the check's own.
    ``in_browser``: a person reads it in the chat, where there are no parameters to send. ``makes_text``: an answer is made, whose length
    the caller may bound; else vectors or labels are, and only what was sent counts."""

    code: Code
    rate: Sequence[str]
    facts: Mapping[str, str]
    model: str
    plan: str
    now_ms: int
    in_browser: bool = False
    makes_text: bool = True

    @property
    def plan_name(self) -> str:
        return f"{self.plan[:1].upper()}{self.plan[1:]}"

    def say_duration(self, duration_ms: int) -> str:
        """Write how long to wait: for a person in words, for a program as OpenAI does."""
        if self.in_browser:
            return rates.say_duration(max(-(-duration_ms // 1000), 1))
        return periods.format_duration(duration_ms)


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """Say how one check of the gate went, with its numbers. ``message`` is what a caller who is refused by it would read."""

    code: Code
    passes: bool
    facts: Mapping[str, str]
    message: str = ""


class Exhausted(msgspec.Struct, frozen=True, kw_only=True):
    """Name the budget that a request did not fit into, and its numbers."""

    scope: str
    period: str
    spent_nanousd: int
    held_nanousd: int
    worst_nanousd: int
    limit_nanousd: int
    ends_at_ms: int


def read(
    answer: Sequence[str], model: str, plan: str, now_ms: int, *, in_browser: bool = False, makes_text: bool = True
) -> Refusal:
    """Read a refusal of admit.lua (see its header)."""
    facts = answer[2 + RATE_PARTS :]
    return Refusal(
        code=Code(answer[1]),
        rate=answer[2 : 2 + RATE_PARTS],
        facts=dict(zip(facts[::2], facts[1::2], strict=True)),
        model=model,
        plan=plan,
        now_ms=now_ms,
        in_browser=in_browser,
        makes_text=makes_text,
    )


def read_checks(
    answer: Sequence[Sequence[str]], model: str, plan: str, now_ms: int, *, makes_text: bool = True
) -> list[Check]:
    """Read what admit.lua explained (see its header)."""
    checks = []
    for code, verdict, *facts in answer[1:]:
        refusal = read(["refused", code, *[""] * RATE_PARTS, *facts], model, plan, now_ms, makes_text=makes_text)
        passes = verdict == "pass"
        message = "" if passes else make_error(refusal).message
        checks.append(Check(code=refusal.code, passes=passes, facts=refusal.facts, message=message))
    return checks


def read_exhausted(refusal: Refusal) -> Exhausted:
    return msgspec.convert(dict(refusal.facts), Exhausted, strict=False)


def rate_headers(rate: Sequence[str]) -> dict[str, str]:
    """Name the rate limits' state as OpenAI does; ``rate`` is admit.lua's RATE."""
    headers = {}
    for what, state in (("requests", rate[:3]), ("tokens", rate[3:])):
        if state and state[0]:
            headers[f"x-ratelimit-limit-{what}"] = state[0]
            headers[f"x-ratelimit-remaining-{what}"] = state[1]
            headers[f"x-ratelimit-reset-{what}"] = periods.format_duration(int(state[2]))
    return headers


def make_error(refusal: Refusal) -> AiscaleError:
    """Word a refusal: what was wrong, and what to do next."""
    facts = {**refusal.facts, "model": refusal.model, "plan": refusal.plan}
    if refusal.code in _IDENTITY:
        return AiscaleError(refusal.code, _IDENTITY[refusal.code], facts=facts)
    word = {
        Code.KILLED: _killed,
        Code.MODEL_NOT_ALLOWED: _model_not_allowed,
        Code.RATE_LIMITED: _rate_limited,
        Code.TOO_MANY_IN_FLIGHT: _too_many_in_flight,
        Code.QUEUE_FULL: _queue_full,
        Code.BACKEND_UNAVAILABLE: _unserved,
        Code.BUDGET_EXHAUSTED: _budget_exhausted,
    }[refusal.code]
    message, retry_after_s = word(refusal)
    return AiscaleError(
        refusal.code, message, retry_after_s=retry_after_s, headers=rate_headers(refusal.rate), facts=facts
    )


def describe_kill(scope: str, reason: str, until_at: datetime | None = None) -> str:
    """Tell a caller that ``scope`` is stopped, with the reason that the admin gave, and what to do."""
    kind, _, name = scope.partition(":")
    what = {
        "site": "This service is stopped for now",
        "model": f"The model {name!r} is stopped for now",
        "plan": "The requests of your plan are stopped for now",
        "organization": "Your organization's requests are stopped for now",
        "key": "This API key is stopped for now",
        "provider": f"The provider of this model, {name!r}, is stopped for now",
    }[kind]
    if until_at is not None:
        advice = f"Try again after {say_moment(until_at)}."
    else:
        advice = {
            "site": "Try again later.",
            "model": "Choose another model or try again later.",
            "provider": "Choose another model or try again later.",
        }.get(kind, "Write to the administrator of this service.")
    return f"{what}: {reason.rstrip('.')}. {advice}"


def say_moment(moment: datetime) -> str:
    """Write a moment for people, in UTC, to the second where it has any."""
    moment = moment.astimezone(UTC)
    return f"{moment:%-d %B %Y, %H:%M:%S} UTC" if moment.second else f"{moment:%-d %B %Y, %H:%M} UTC"


def _killed(refusal: Refusal) -> tuple[str, float | None]:
    scope, reason, ends_at = (refusal.facts[name] for name in ("scope", "reason", "ends_at_ms"))
    until_at = periods.to_datetime(int(ends_at)) if ends_at else None
    retry_after_s = max(int(ends_at) - refusal.now_ms, 1000) / 1000 if ends_at else None
    return describe_kill(scope, reason, until_at), retry_after_s


def _model_not_allowed(refusal: Refusal) -> tuple[str, float | None]:
    if refusal.facts["whose"] == "key":
        return f"This API key is not allowed to use the model {refusal.model!r}. Choose another model or key.", None
    return (
        f"The {refusal.plan_name} plan does not include the model {refusal.model!r}. "
        "Choose another model or upgrade your plan."
    ), None


def _rate_limited(refusal: Refusal) -> tuple[str, float | None]:
    facts = refusal.facts
    what, window_s, limit = facts["what"], int(facts["window_s"]), int(facts["limit"])
    of_key = facts["whose"] == "key"
    whose = "for this API key" if of_key else f"on the {refusal.plan_name} plan"
    upgrade = [] if of_key else ["upgrade your plan"]
    if not facts["retry_ms"]:
        shorten = (
            ["shorten your message", "begin a new chat"] if refusal.in_browser else ["shorten it", *_lower(refusal)]
        )
        return (
            f"This request could take {_count(facts['asked'], 'token')}; {limit} a minute are allowed {whose}. "
            f"{_advise(*shorten, *upgrade)}"
        ), None
    window = f"this {_WINDOWS[window_s]}" if window_s in _WINDOWS else f"the last {window_s} seconds"
    retry_ms = int(facts["retry_ms"])
    again = _advise(f"try again in {refusal.say_duration(retry_ms)}", *upgrade)
    if what == "tokens":
        left = max(limit - int(facts["used"]), 0)
        return (
            f"This request could take {_count(facts['asked'], 'token')}, and {left} of the {limit} tokens a minute are left {whose}. "
            f"{again}"
        ), retry_ms / 1000
    used = "the one request" if limit == 1 else f"all {limit} requests"
    return f"You have used {used} of {window} {whose}. {again}", retry_ms / 1000


def _too_many_in_flight(refusal: Refusal) -> tuple[str, float | None]:
    in_flight, limit = _count(refusal.facts["in_flight"], "request"), refusal.facts["limit"]
    if refusal.facts["whose"] == "key":
        return (
            f"This API key has {in_flight} running and is allowed {limit} at a time. "
            "Wait until one has finished, or use another key."
        ), 1.0
    return (
        f"You have {in_flight} running; the {refusal.plan_name} plan allows {limit} at a time. "
        "Wait until one has finished, or upgrade your plan."
    ), 1.0


def make_queue_full(model: str, plan: str, waiting: int, retry_ms: int, *, in_browser: bool) -> AiscaleError:
    """Refuse a request that was admitted and found no place in the queue."""
    facts = {"why": "depth", "waiting": str(waiting), "retry_ms": str(retry_ms)}
    now_ms, code = periods.now_ms(), Code.QUEUE_FULL
    return make_error(
        Refusal(code=code, rate=(), facts=facts, model=model, plan=plan, now_ms=now_ms, in_browser=in_browser)
    )


def _queue_full(refusal: Refusal) -> tuple[str, float | None]:
    facts = refusal.facts
    retry_ms = max(int(facts["retry_ms"]), 1000)
    again = f"Try again in about {refusal.say_duration(retry_ms)}."
    if facts["why"] == "wait":
        wait, longest = (refusal.say_duration(int(facts[name])) for name in ("wait_ms", "longest_ms"))
        return (
            f"The model {refusal.model!r} is busy: your request would wait about {wait}, and the {refusal.plan_name} plan's "
            f"requests wait {longest} at the most. {again}"
        ), retry_ms / 1000
    waiting = "1 request is" if facts["waiting"] == "1" else f"{facts['waiting']} requests are"
    return f"{waiting} waiting for the model {refusal.model!r} already. {again}", retry_ms / 1000


def _unserved(refusal: Refusal) -> tuple[str, float | None]:
    if "unserved_ms" not in refusal.facts:
        return "The service is finding out what was used before it lost its memory. Try again in a few seconds.", 2.0
    if refusal.in_browser:
        return f"The model {refusal.model!r} is not there right now. Try again in a minute, or choose another one.", 5.0
    away = periods.format_duration(int(refusal.facts["unserved_ms"]))
    return f"No worker has served the model {refusal.model!r} for {away}. Try again in a few seconds.", 5.0


def _budget_exhausted(refusal: Refusal) -> tuple[str, float | None]:
    """Name the budget. What is the customer's own is shown in numbers; the service's budgets keep their money to themselves."""
    budget = read_exhausted(refusal)
    kind, _, name = budget.scope.partition(":")
    fits_later = budget.spent_nanousd + budget.worst_nanousd <= budget.limit_nanousd
    ends_at = say_moment(periods.to_datetime(budget.ends_at_ms))
    if kind in ("site", "plan", "model"):
        what = {
            "site": "This service's budget",
            "plan": f"This service's budget for the {refusal.plan_name} plan",
            "model": f"This service's budget for the model {name!r}",
        }[kind]
        if fits_later:
            return f"{what} is held for running requests. {_advise(*_wait(refusal))}", 5.0
        advice = "Choose another model, or try again then." if kind == "model" else "Try again then."
        return f"{what} is used up until {ends_at}. {advice}", _until(budget.ends_at_ms, refusal.now_ms)
    whose = {"organization": "your", "user": "your own", "key": "this API key's"}[kind]
    spent = f"{format_usd(budget.spent_nanousd)} is spent"
    if budget.spent_nanousd < 0:
        # credits are more than what was used
        spent = f"nothing is spent, {format_usd(-budget.spent_nanousd)} of credit comes on top"
    parts = [
        f"This request could cost up to {format_usd(budget.worst_nanousd)}. Of {whose} {budget.period} limit of "
        f"{format_usd(budget.limit_nanousd)}, {spent}"
    ]
    parts.append(
        f" and {format_usd(budget.held_nanousd)} is held for running requests. " if budget.held_nanousd else ". "
    )
    if fits_later:
        # only what is running stands in the way, and most of it will be given back
        return "".join(parts) + _advise(*_wait(refusal)), 5.0
    parts.append(f"The limit starts anew on {ends_at}. ")
    steps = {
        "organization": ("upgrade your plan", "ask for a higher limit"),
        "user": ("ask for a higher limit",),
        "key": ("use another key", "raise this key's limit"),
    }[kind]
    return "".join(parts) + _advise(*_lower(refusal), *steps), None


def _wait(refusal: Refusal) -> tuple[str, ...]:
    """Advise whom only running requests stand in the way."""
    return ("try again when they have finished", *_lower(refusal))


def _lower(refusal: Refusal) -> tuple[str, ...]:
    """Advise what makes a request smaller: of what was sent, where no text of any length is asked for. Nothing in a chat."""
    if refusal.in_browser:
        return ()
    return ("lower max_tokens",) if refusal.makes_text else ("send fewer texts at a time",)


def _count(number: str, noun: str) -> str:
    return f"{number} {noun}" if number == "1" else f"{number} {noun}s"


def _advise(*steps: str) -> str:
    """Make a sentence of what a caller can do: any one of the steps."""
    *first, last = steps
    text = f"{', '.join(first)} or {last}" if first else last
    return f"{text[:1].upper()}{text[1:]}."


def _until(at_ms: int, now_ms: int) -> float:
    return max(at_ms - now_ms, 1000) / 1000
