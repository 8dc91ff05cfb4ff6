"""What a refusal advises can be done where it is read: a program sends parameters, a person in the browser chat has none."""

from typing import Any

import pytest

from aiscale.errors import Code
from apps.spend import refusals

NOW_MS = 1_790_000_000_000
BUDGET = {
    "period": "monthly",
    "held_nanousd": "0",
    "worst_nanousd": "9",
    "limit_nanousd": "10",
    "ends_at_ms": str(NOW_MS),
}
RATE = {"whose": "plan", "window_s": "60"}
REFUSED: list[tuple[Code, dict[str, Any], str, str]] = [
    (
        Code.RATE_LIMITED,
        RATE | {"what": "tokens", "limit": "10", "asked": "11", "used": "0", "retry_ms": ""},
        "Shorten it, lower max_tokens or upgrade your plan.",
        "Shorten your message, begin a new chat or upgrade your plan.",
    ),
    (
        Code.RATE_LIMITED,
        RATE | {"what": "tokens", "limit": "10", "asked": "11", "used": "0", "retry_ms": "", "whose": "key"},
        "for this API key. Shorten it or lower max_tokens.",
        "Shorten your message or begin a new chat.",
    ),
    (
        Code.RATE_LIMITED,
        RATE | {"what": "requests", "limit": "1", "retry_ms": "61000"},
        "You have used the one request of this minute on the Pro plan. Try again in 1m1s or upgrade your plan.",
        "You have used the one request of this minute on the Pro plan. Try again in 61 seconds or upgrade your plan.",
    ),
    (
        Code.RATE_LIMITED,
        RATE | {"what": "requests", "limit": "2", "retry_ms": "3000000", "window_s": "3600"},
        "You have used all 2 requests of this hour on the Pro plan. Try again in 50m0s",
        "Try again in 50 minutes or upgrade your plan.",
    ),
    (
        Code.TOO_MANY_IN_FLIGHT,
        {"whose": "plan", "in_flight": "1", "limit": "1"},
        "You have 1 request running; the Pro plan allows 1 at a time.",
        "You have 1 request running; the Pro plan allows 1 at a time.",
    ),
    (
        Code.TOO_MANY_IN_FLIGHT,
        {"whose": "key", "in_flight": "2", "limit": "2"},
        "This API key has 2 requests running and is allowed 2 at a time.",
        "",
    ),
    (
        Code.QUEUE_FULL,
        {"why": "depth", "waiting": "1", "retry_ms": "1"},
        "1 request is waiting for the model 'm' already. Try again in about 1s.",
        "1 request is waiting for the model 'm' already. Try again in about 1 second.",
    ),
    (
        Code.BACKEND_UNAVAILABLE,
        {"unserved_ms": "120000"},
        "No worker has served the model 'm' for 2m0s.",
        "The model 'm' is not there right now.",
    ),
    (
        Code.BUDGET_EXHAUSTED,
        BUDGET | {"scope": "organization:org_1", "spent_nanousd": "5"},
        "Lower max_tokens, upgrade your plan or ask for a higher limit.",
        "Upgrade your plan or ask for a higher limit.",
    ),
    (
        Code.BUDGET_EXHAUSTED,
        BUDGET | {"scope": "user:usr_1", "spent_nanousd": "5"},
        "Lower max_tokens or ask for a higher limit.",
        "UTC. Ask for a higher limit.",
    ),
    (
        Code.BUDGET_EXHAUSTED,
        BUDGET | {"scope": "organization:org_1", "spent_nanousd": "1", "held_nanousd": "5"},
        "Try again when they have finished or lower max_tokens.",
        "is held for running requests. Try again when they have finished.",
    ),
    (
        Code.BUDGET_EXHAUSTED,
        BUDGET | {"scope": "site", "spent_nanousd": "1", "held_nanousd": "5"},
        "Try again when they have finished or lower max_tokens.",
        "Try again when they have finished.",
    ),
]


@pytest.mark.parametrize(("code", "facts", "to_program", "to_person"), REFUSED)
def test_each_reader_is_told_what_they_can_do(
    code: Code, facts: dict[str, str], to_program: str, to_person: str
) -> None:
    told = {}
    for in_browser in (False, True):
        answer = [
            "refused",
            code.value,
            *[""] * refusals.RATE_PARTS,
            *(part for pair in facts.items() for part in pair),
        ]
        refusal = refusals.read(answer, "m", "pro", NOW_MS, in_browser=in_browser)
        told[in_browser] = refusals.make_error(refusal).message
    assert to_program in told[False]
    assert to_person in told[True] and "max_tokens" not in told[True]


@pytest.mark.parametrize(("code", "facts"), [row[:2] for row in REFUSED if "ower max_tokens" in row[2]])
def test_who_asks_for_vectors_is_told_of_no_answer(code: Code, facts: dict[str, str]) -> None:
    answer = ["refused", code.value, *[""] * refusals.RATE_PARTS, *(part for pair in facts.items() for part in pair)]
    told = refusals.make_error(refusals.read(answer, "m", "pro", NOW_MS, makes_text=False)).message
    assert "max_tokens" not in told and "end fewer texts at a time" in told
