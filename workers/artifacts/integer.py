"""Write matrix products in whole numbers: 8-bit weights, a scale for each output, and 16-bit activations.

A product of whole numbers is exact, so a row's result is the same to the bit whatever shares its batch; and it runs on the CPU's int8
matrix units (AMX, VNNI), several times faster than floats from a few rows on.

An activation is written as 256 * high + low, both 8 bits. The two halves go through one product as two rows, so that each weight
is read once, and are put together again in floats. Values are ``[tokens, 1, features]``; the middle axis is where the halves lie.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from workers.artifacts.graph import INT32, MICROSOFT, UINT8, GraphWriter
from workers.artifacts.quantize import quantize_rows
from workers.engine.sessions import integers_add_up

Activations = Literal["bounded", "scaled", "coarse"]
"""How activations are rounded. bounded: to 16 bits of a bound known beforehand; scaled: to 16 bits of each row's own largest; coarse: to
8 bits of each row's own largest, which is enough where outliers are mild (measured: the attention's output)."""

_HALF = 32_512
"""127 * 256: the largest 16-bit activation."""
_SHIFT = 32_896.5
"""128 * 256 + 128: both halves are stored with 128 added; and a half, since a cast cuts off instead of rounding."""
_TINY = 1e-12


def needs_unsigned() -> bool:
    """Say whether this CPU multiplies bytes exactly only where both are unsigned (AVX2 without VNNI). I/O: one tiny session."""
    return not integers_add_up()


def store_codes(graph: GraphWriter, name: str, codes: NDArray[np.int8]) -> tuple[str, str]:
    """Store weights ``[in, out]`` as this CPU multiplies them exactly, and return their name and that of their zero point.

    Signed bytes without a zero point are what int8 units are made for. Where their sums would overflow, they have 128 added, which
    every CPU multiplies exactly, to the same numbers.
    """
    if not needs_unsigned():
        return graph.constant(f"{name}.codes", codes), ""
    middle = graph.constant("middle_code", np.array(128, np.uint8))
    return graph.constant(f"{name}.codes", (codes.astype(np.int16) + 128).astype(np.uint8)), middle


def integer_matmul(
    graph: GraphWriter, name: str, weight: NDArray[np.float32], value: str, activations: Activations, bound: float = 0.0
) -> str:
    """Multiply ``value`` by ``weight`` ``[out, in]``. ``bound``: the largest activation that can be, for ``bounded``."""
    codes, scales = quantize_rows(weight)
    constants = [
        *store_codes(graph, name, np.ascontiguousarray(codes.T)),
        graph.constant(f"{name}.scales", scales),
        graph.constant("middle_code", np.array(128, np.uint8)),
    ]
    if activations == "bounded":
        step = bound / _HALF
        halves = _split(graph, f"{name}.halves", value, 1.0 / step)
        return _join(graph, f"{name}.join", _multiply(graph, halves, constants, 1.0), step)
    largest = graph.node("ReduceMax", [graph.node("Abs", [value])], axes=[-1], keepdims=1)
    scale = graph.node("Add", [largest, graph.constant("tiny", np.array(_TINY, np.float32))])
    relative = graph.node("Div", [value, scale])
    if activations == "scaled":
        halves = _split(graph, "unit.halves", relative, float(_HALF))
        product = _join(graph, "unit.join", _multiply(graph, halves, constants, 1.0), 1.0 / _HALF)
    else:
        step_name = graph.constant("coarse_step", np.array(1 / 127, np.float32))
        rounded = graph.node("QuantizeLinear", [relative, step_name, constants[-1]])
        product = _multiply(graph, rounded, constants, 1 / 127)
    return graph.node("Mul", [product, scale])


def _split(graph: GraphWriter, name: str, value: str, per_step: float) -> str:
    """Return uint8 ``[tokens, 2, features]``: the high and the low half of ``value * per_step``.

    The low half is what is left when the cast to 8 bits drops the rest. Both halves see the same rounding, since the first is the
    second divided by a power of two.
    """
    factor = graph.constant(f"{name}.factor", np.array([[per_step / 256], [per_step]], np.float32))
    shift = graph.constant("halves.shift", np.array([[_SHIFT / 256], [_SHIFT]], np.float32))
    moved = graph.node("Add", [graph.node("Mul", [value, factor]), shift])
    return graph.node("Cast", [graph.node("Cast", [moved], to=INT32)], to=UINT8)


def _multiply(graph: GraphWriter, rounded: str, constants: list[str], step: float) -> str:
    codes, zero, scales, middle = constants
    step_name = graph.constant(f"step_{step:.6g}", np.array(step, np.float32))
    return graph.node("MatMulIntegerToFloat", [rounded, codes, step_name, scales, middle, zero], domain=MICROSOFT)


def _join(graph: GraphWriter, name: str, halves: str, step: float) -> str:
    weights = graph.constant(name, np.array([[256 * step, step]], np.float32))
    return graph.node("MatMul", [weights, halves])
