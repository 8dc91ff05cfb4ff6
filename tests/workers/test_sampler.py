"""Tokens are drawn as temperature and top_p say."""

import numpy as np
import pytest

from workers.engine.sampler import sample

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def draw(count: int, temperature: float, top_p: float) -> list[float]:
    """Return how often each token came."""
    rng = np.random.default_rng(3)
    drawn = [sample(LOGITS, temperature, top_p, rng) for _ in range(count)]
    return [drawn.count(token) / count for token in range(len(LOGITS))]


def test_zero_takes_the_likeliest() -> None:
    assert draw(50, 0.0, 1.0) == [1, 0, 0, 0]


def test_chances_are_the_models() -> None:
    assert draw(20_000, 1.0, 1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.02)


def test_a_high_temperature_flattens() -> None:
    flat = draw(20_000, 2.0, 1.0)
    roots = np.sqrt([0.5, 0.3, 0.15, 0.05])
    assert flat == pytest.approx((roots / roots.sum()).tolist(), abs=0.02)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.6, 2), (0.9, 3), (0.99, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    assert [share > 0 for share in draw(5_000, 1.0, top_p)] == [n < kept for n in range(4)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_an_error(bad: float) -> None:
    with pytest.raises(FloatingPointError):
        sample(np.array([1.0, bad], np.float32), 1.0, 1.0, np.random.default_rng(0))
