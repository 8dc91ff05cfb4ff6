"""Show that codes with further columns for wide channels multiply as the values themselves do."""

import numpy as np
from numpy.typing import NDArray

from workers.artifacts.codes import FINER, ZERO_CODE, Codes, choose_codes


def write(plan: Codes, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Write ``x`` as the graph does, as whole numbers with their zero taken off."""

    def quantize(values: NDArray[np.float32], step: float) -> NDArray[np.float64]:
        return np.clip(np.rint(values / step) + ZERO_CODE, 0, 255) - ZERO_CODE

    first = quantize(x, plan.step)
    rest = quantize((x - first * plan.step).astype(np.float32), plan.step / FINER)
    return np.concatenate([first, rest, quantize(x[:, plan.copied] - plan.shifts, plan.step)], axis=1)


def test_wide_channels_get_columns_and_products_stay_near() -> None:
    order = np.random.default_rng(3)
    x = order.normal(size=(500, 256)).astype(np.float32)
    x[:, 7] += 30.0
    x[:, 20] *= 10.0
    plan = choose_codes(x.min(axis=0), x.max(axis=0), 24)
    assert {7, 20} <= set(plan.copied.tolist()) and len(plan.copied) <= 24
    plain = choose_codes(x.min(axis=0), x.max(axis=0), 0)
    assert plan.step < plain.step / 3
    weights = order.integers(-127, 128, (256, 32)).astype(np.int8)
    exact = x @ weights
    errors = {}
    for name, codes in (("copies", plan), ("none", plain)):
        found = (write(codes, x) @ codes.widen(weights) - (codes.excess @ weights) / codes.step) * codes.step
        errors[name] = float(np.abs(found - exact).mean() / np.abs(exact - exact.mean(axis=0)).mean())
    assert errors["copies"] < 0.004 and errors["copies"] < errors["none"] / 2, errors


def test_values_beyond_the_sample_are_cut_and_add_nothing_else() -> None:
    lows, highs = np.full(4, -1.0, np.float32), np.array([1.0, 1.0, 1.0, 40.0], np.float32)
    plan = choose_codes(lows, highs, 24)
    ones = np.ones((4, 1), np.int8)
    x = np.array([[0.0, 0.0, 0.0, value] for value in (-1.0, 0.3, 5.0, 21.0, 40.0, 1000.0)], np.float32)
    finer = plan.widen(ones)
    found = ((write(plan, x) @ finer - (plan.excess @ ones) / plan.step) * plan.step).ravel()
    np.testing.assert_allclose(found[:-1], x[:-1, 3], atol=plan.step)
    assert 60.0 <= found[-1] < 70.0, "cut at one and a half times the sample's largest"


def test_even_channels_get_no_columns() -> None:
    plan = choose_codes(np.full(64, -2.0, np.float32), np.full(64, 2.0, np.float32), 24)
    assert not len(plan.copied) and not plan.excess.any()
