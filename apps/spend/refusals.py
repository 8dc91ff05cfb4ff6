"""Turn the gate's refusals into sentences that say what was wrong and what to do next."""

from collections.abc import Sequence
from datetime import UTC, datetime

from aiscale.db import format_usd
from aiscale.errors import AiscaleError, Code
from apps.spend import periods

_WINDOWS = {60: "minute", 3600: "hour", 86_400: "day"}

_IDENTITY = {
    Code.INVALID_API_KEY: "This API key is not valid. Check it, or make a new one on the API keys page.",
    Code.KEY_REVOKED: "This API key was revoked. Make a new one on the API keys page.",
    Code.KEY_EXPIRED: "This API key has expired. Make a new one on the API keys page.",
    Code.ACCOUNT_INACTIVE: "This account is suspended. Write to the administrator of this service.",
}


def rate_headers(state: Sequence[str]) -> dict[str, str]:
    """Name the rate limit's state as OpenAI does; ``state`` is (limit, remaining, milliseconds until all are there again)."""
    limit, remaining, reset_ms = state
    return {
        "x-ratelimit-limit-requests": limit,
        "x-ratelimit-remaining-requests": remaining,
        "x-ratelimit-reset-requests": periods.format_duration(int(reset_ms)),
    }


def make_refusal(answer: Sequence[str], *, model: str, plan: str, worst_nanousd: int, now_ms: int) -> AiscaleError:
    """Word what admit.lua returned after ``refused``: the code, the rate's state, and the code's own numbers."""
    code = Code(answer[0])
    if code in _IDENTITY:
        return AiscaleError(code, _IDENTITY[code])
    state, detail = answer[1:4], answer[4:]
    plan_name = f"{plan[:1].upper()}{plan[1:]}"
    message, retry_after_s = "", None
    if code is Code.KILLED:
        until_at = periods.to_datetime(int(detail[2])) if detail[2] else None
        retry_after_s = max(int(detail[2]) - now_ms, 1000) / 1000 if detail[2] else None
        message = describe_kill(detail[0], detail[1], until_at)
    elif code is Code.MODEL_NOT_ALLOWED:
        message = (
            f"The {plan_name} plan does not include the model {model!r}. Choose another model or upgrade your plan."
        )
    elif code is Code.RATE_LIMITED:
        retry_after_s = int(detail[0]) / 1000
        message = _rate_limited(int(state[0]), int(detail[1]), plan_name, int(detail[0]))
    elif code is Code.TOO_MANY_IN_FLIGHT:
        retry_after_s = 1.0
        message = (
            f"You have {detail[0]} requests running; the {plan_name} plan allows {detail[1]} at a time. "
            "Wait until one has finished, or upgrade your plan."
        )
    elif code is Code.QUEUE_FULL:
        retry_after_s = 5.0
        message = f"{detail[0]} requests are waiting for the model {model!r} already. Try again in a few seconds."
    else:
        message, retry_after_s = _budget_exhausted(
            *(int(n) for n in detail), worst_nanousd=worst_nanousd, now_ms=now_ms
        )
    return AiscaleError(code, message, retry_after_s=retry_after_s, headers=rate_headers(state))


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


def _rate_limited(limit: int, window_s: int, plan_name: str, retry_ms: int) -> str:
    window = f"this {_WINDOWS[window_s]}" if window_s in _WINDOWS else f"the last {window_s} seconds"
    return (
        f"You have used all {limit} requests of {window} on the {plan_name} plan. "
        f"Try again in {periods.format_duration(retry_ms)} or upgrade your plan."
    )


def _budget_exhausted(
    spent: int, held: int, limit: int, *, worst_nanousd: int, now_ms: int
) -> tuple[str, float | None]:
    _, reset_at = periods.bounds(periods.month_of(now_ms))
    parts = [
        f"This request could cost up to {format_usd(worst_nanousd)}. Of your monthly limit of {format_usd(limit)}, "
        f"{format_usd(spent)} is spent"
    ]
    parts.append(f" and {format_usd(held)} is held for running requests. " if held else ". ")
    if spent + worst_nanousd <= limit:
        # only what is running stands in the way, and most of it will be given back
        return "".join(parts) + "Try again when they have finished, or lower max_tokens.", 5.0
    parts.append(f"The limit starts anew on {reset_at:%-d %B %Y} (UTC). ")
    return "".join(parts) + "Lower max_tokens, upgrade your plan, or ask for a higher limit.", None
