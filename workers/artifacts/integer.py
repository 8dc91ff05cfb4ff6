"""Write matrix products in whole numbers: 8-bit weights, a scale for each output, and activations in two bytes.

A product of whole numbers is exact, so a row's result is the same to the bit whatever shares its batch; and it runs on the CPU's int8
matrix units (AMX, VNNI), several times faster than floats from a few rows on.

An activation is written as base * high + low, two digits of a byte each. Both go through one product as two rows, so that each weight
is read once, and are put together again in floats. Values are ``[tokens, 1, features]``; the middle axis is where the digits lie.
The base is 256, and activations have 16 bits. Without int8 units it is 128, for 14 bits: products of unsigned by signed bytes, the
fastest that AVX2 has, are added in pairs of sixteen bits, and digits below 128 keep those sums exact.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from workers.artifacts.graph import INT32, MICROSOFT, UINT8, GraphWriter
from workers.artifacts.quantize import quantize_rows
from workers.engine.sessions import integers_add_up

Activations = Literal["bounded", "scaled", "coarse"]
"""How activations are rounded. bounded: in two digits of a bound known beforehand; scaled: in two digits of the most that there can be
at the row's own root mean square; coarse: to 8 bits of each row's own largest, which is enough where outliers are mild (measured: the
attention's output)."""

_TINY = 1e-12


def needs_unsigned() -> bool:
    """Say whether this CPU multiplies whole bytes exactly only where both are unsigned (AVX2 without VNNI). I/O: one tiny session."""
    return not integers_add_up()


def store_codes(graph: GraphWriter, name: str, codes: NDArray[np.int8]) -> tuple[str, str]:
    """Store weights ``[in, out]`` as this CPU multiplies whole bytes by them exactly, and return their name and their zero point's.

    Signed bytes without a zero point are what int8 units are made for. Where their sums would overflow, they have 128 added, which
    every CPU multiplies exactly, to the same numbers.
    """
    if not needs_unsigned():
        return graph.constant(f"{name}.codes", codes), ""
    middle = graph.constant("middle_code", np.array(128, np.uint8))
    return graph.constant(f"{name}.codes", (codes.astype(np.int16) + 128).astype(np.uint8)), middle


def integer_matmul(
    graph: GraphWriter,
    name: str,
    weight: NDArray[np.float32],
    value: str,
    activations: Activations,
    bound: float = 0.0,
) -> str:
    """Multiply ``value`` by ``weight`` ``[out, in]``. ``bound``: the largest activation that can be, for ``bounded``."""
    codes, scales = quantize_rows(weight)
    codes = np.ascontiguousarray(codes.T)
    if activations == "coarse":
        return _coarse_matmul(graph, name, codes, scales, value)
    signed = graph.constant(f"{name}.codes", codes), ""
    inputs, base = len(codes), _base()
    if activations == "bounded":
        step = bound / _most(base)
        digits = _split(graph, f"{name}.digits", value, step, base)
        join = graph.constant(f"{name}.join", np.array([[base * step, step]], np.float32))
    else:
        # what has a root mean square of 1 holds no value above the root of its length
        step = float(np.sqrt(inputs)) / _most(base)
        ones = graph.constant(f"ones_{inputs}", np.ones(inputs, np.float32))
        unit, inverse = f"{name}.unit", f"{name}.inverse"
        graph.node("SimplifiedLayerNormalization", [value, ones], [unit, inverse], axis=-1, epsilon=_TINY, stash_type=1)
        digits = _split(graph, f"unit_{inputs}.digits", unit, step, base)
        weights = graph.constant(f"unit_{inputs}.join", np.array([[base * step, step]], np.float32))
        join = graph.node("Div", [weights, inverse])
    product = _multiply(graph, digits, base // 2, signed, graph.constant(f"{name}.scales", scales), 1.0)
    return graph.node("MatMul", [join, product])


def _coarse_matmul(
    graph: GraphWriter, name: str, codes: NDArray[np.int8], scales: NDArray[np.float32], value: str
) -> str:
    last = graph.constant("last_axis", np.array([-1], np.int64))
    largest = graph.node("ReduceMax", [graph.node("Abs", [value]), last], keepdims=1)
    scale = graph.node("Add", [largest, graph.constant("tiny", np.array(_TINY, np.float32))])
    relative = graph.node("Div", [value, scale])
    step = graph.constant("coarse_step", np.array(1 / 127, np.float32))
    rounded = graph.node("QuantizeLinear", [relative, step, graph.constant("middle_code", np.array(128, np.uint8))])
    stored, scales_name = store_codes(graph, name, codes), graph.constant(f"{name}.scales", scales)
    return graph.node("Mul", [_multiply(graph, rounded, 128, stored, scales_name, 1 / 127), scale])


def _base() -> int:
    return 128 if needs_unsigned() else 256


def _most(base: int) -> int:
    """Return the largest activation in two digits, whose middle stands for zero."""
    return (base // 2 - 1) * base


def _split(graph: GraphWriter, name: str, value: str, step: float, base: int) -> str:
    """Return uint8 ``[tokens, 2, features]``: the high and the low digit of ``value / step``, both with half a base added.

    The low digit is what is left when the cast to 8 bits drops the rest. Both see the same rounding, since the first is the second
    divided by a power of two.
    """
    middle = base // 2 * (base + 1) + 0.5  # and a half, since a cast cuts off instead of rounding
    factor = graph.constant(f"{name}.factor", np.array([[1 / step / base], [1 / step]], np.float32))
    shift = graph.constant("digits.shift", np.array([[middle / base], [middle]], np.float32))
    moved = graph.node("Add", [graph.node("Mul", [value, factor]), shift])
    cut = graph.node("Cast", [graph.node("Cast", [moved], to=INT32)], to=UINT8)
    if base == 256:
        return cut
    return graph.node("BitwiseAnd", [cut, graph.constant("digits.mask", np.array(base - 1, np.uint8))])


def _multiply(graph: GraphWriter, rounded: str, middle: int, stored: tuple[str, str], scales: str, step: float) -> str:
    codes, zero = stored
    step_name = graph.constant(f"step_{step:.6g}", np.array(step, np.float32))
    middle_name = graph.constant(f"middle_{middle}", np.array(middle, np.uint8))
    return graph.node("MatMulIntegerToFloat", [rounded, codes, step_name, scales, middle_name, zero], domain=MICROSOFT)
