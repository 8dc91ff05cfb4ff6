"""Show the one arithmetic of prices."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiscale.db import NANOUSD_PER_USD
from aiscale.errors import AiscaleError, Code
from apps.spend import periods, pricing, usage
from tests.apps.spend.cast import make_finished

counts = st.integers(0, 1_000_000)
prices = st.integers(0, 1_000_000)


@given(counts, counts, counts, prices, prices)
def test_m5_what_was_made_never_costs_more_than_what_was_held(prompt, most, made, prompt_price, completion_price):
    prices_of_tag = {"prompt_nanousd_per_token": prompt_price, "completion_nanousd_per_token": completion_price}
    worst = pricing.cost_nanousd(prompt, max(most, made), **prices_of_tag)
    event = make_finished("org_1", prompt_tokens=prompt, completion_tokens=min(most, made), **prices_of_tag)
    assert usage.cost_of(event) == prompt * prompt_price + min(most, made) * completion_price <= worst


def test_an_error_costs_nothing_and_every_other_end_what_was_made():
    reasons = ("stop", "length", "cancelled", "killed", "deadline", "error")
    costs = {reason: usage.cost_of(make_finished("org_1", finish_reason=reason)) for reason in reasons}
    assert costs == {"stop": 65, "length": 65, "cancelled": 65, "killed": 65, "deadline": 65, "error": 0}


@pytest.mark.parametrize("numbers", [(-1, 0, 1, 1), (0, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1)])
def test_m10_a_negative_price_or_count_never_makes_a_balance_grow(numbers):
    prompt, completion, prompt_price, completion_price = numbers
    with pytest.raises(AiscaleError) as refusal:
        pricing.cost_nanousd(
            prompt,
            completion,
            prompt_nanousd_per_token=prompt_price,
            completion_nanousd_per_token=completion_price,
        )
    assert refusal.value.code is Code.BACKEND_UNAVAILABLE
    assert "price" in refusal.value.message


def test_an_impossible_price_is_refused():
    with pytest.raises(AiscaleError):
        pricing.cost_nanousd(
            1_000_000,
            1_000_000,
            prompt_nanousd_per_token=NANOUSD_PER_USD * 1000,
            completion_nanousd_per_token=0,
        )


@pytest.mark.parametrize(
    ("duration_ms", "text"),
    [(0, "0s"), (20, "20ms"), (1000, "1s"), (1001, "2s"), (150_000, "2m30s"), (360_000, "6m0s"), (3_660_000, "1h1m0s")],
)
def test_durations_read_as_openais(duration_ms, text):
    assert periods.format_duration(duration_ms) == text


def test_months_are_utc_and_roll_over_at_the_turn_of_the_year():
    first, after = periods.bounds("2026-12")
    assert (first.isoformat(), after.isoformat()) == ("2026-12-01T00:00:00+00:00", "2027-01-01T00:00:00+00:00")
    assert periods.month_of(int(after.timestamp() * 1000) - 1) == "2026-12"
    assert periods.month_of(int(after.timestamp() * 1000)) == "2027-01"
