"""Show that products in whole numbers are exact at their extremes, on the CPU that runs this."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from workers.artifacts.graph import FLOAT, GraphWriter
from workers.artifacts.integer import Activations, integer_matmul
from workers.engine.providers import CPU
from workers.engine.sessions import integers_add_up, open_session

INPUTS, OUTPUTS, BOUND = 576, 48, 24.0


def multiply(
    folder: Path, weight: NDArray[np.float32], values: NDArray[np.float32], how: Activations
) -> NDArray[np.float32]:
    graph = GraphWriter("product", 18)
    value = graph.input("value", FLOAT, ["tokens", 1, INPUTS])
    graph.output(integer_matmul(graph, "w", weight, value, how, BOUND), FLOAT, ["tokens", 1, OUTPUTS])
    graph.save(folder / "product.onnx")
    session = open_session(folder / "product.onnx", [CPU], 2)
    together = session.run(None, {"value": values})[0]
    for at in range(len(values)):
        [alone] = session.run(None, {"value": values[at : at + 1]})
        np.testing.assert_array_equal(together[at], alone[0])
    found: NDArray[np.float32] = together[:, 0]
    return found


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("how", ["bounded", "scaled", "coarse"])
def test_the_largest_sums_are_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Activations, units: bool
) -> None:
    """Where pairs of products were added in sixteen bits, these sums would be cut to about half of what they are."""
    if units and not integers_add_up():
        pytest.skip("this CPU has no int8 units, and refuses what is made for them")
    monkeypatch.setattr("workers.artifacts.integer.integers_add_up", lambda: units)
    weight = np.ones((OUTPUTS, INPUTS), np.float32)
    weight[1::2] = -1.0
    rows = np.stack([np.full(INPUTS, level, np.float32) for level in (BOUND, -BOUND, BOUND * 0.9922, 1e-3, 0.0)])
    found = multiply(tmp_path, weight, rows[:, None], how)
    # one step of two digits of 7 bits, or of rounding to 8 bits a value that is its row's largest
    step = (BOUND if how == "bounded" else 0.0) / 8064
    np.testing.assert_allclose(found, rows @ weight.T, rtol=3e-4, atol=INPUTS * step)


def test_two_digits_keep_small_values_beside_a_large_one(tmp_path: Path) -> None:
    """As products of floats do, to the rounding of 8-bit weights: these are whole, so that they lose nothing."""
    generator = np.random.default_rng(3)
    weight = generator.integers(-127, 128, (OUTPUTS, INPUTS)).astype(np.float32)
    weight[:, 0] = 127.0
    rows = generator.standard_normal((7, INPUTS)).astype(np.float32)
    rows[:, 5] = 20.0
    rows *= np.sqrt(INPUTS / np.square(rows).sum(axis=1, keepdims=True))
    expected = rows @ weight.T
    for how in ("bounded", "scaled"):
        found = multiply(tmp_path, weight, rows[:, None], how)  # type: ignore[arg-type]
        assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()
