"""Choose the eight-bit codes of a product's input, of which a few channels are ten times as wide as all others.

A channel that the step does not reach is given further columns, each moved by a whole range: codes are cut at their ends, so each
column takes its own part of the value, and their sum is the value and a constant. What the step leaves of the other channels goes
into one more column each, `FINER` times as fine, whose weights are `FINER` times as small. All of it is one product with one scale
(decision 0020). Pure numpy, no I/O.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ZERO_CODE = 128
FINER = 10
"""Finer and the weights of the rest, eight bits as all weights, become too coarse; coarser and the rest does."""
_CODES = 255
_HEADROOM = 1.5
"""How much further than the sample's inputs the codes reach; what lies beyond is cut."""
_STEPS = 400


@dataclass(frozen=True)
class Codes:
    """State how an input ``[rows, channels]`` is written. ``copied`` and ``shifts`` are int64 and float32, ``[copies]``."""

    step: float
    copied: NDArray[np.int64]
    """The channel of each further column."""
    shifts: NDArray[np.float32]
    """What is taken off a channel's value in each further column."""
    excess: NDArray[np.float64]
    """What the columns of a channel sum up to beyond its value, ``[channels]``."""

    def widen(self, codes: NDArray[np.int8]) -> NDArray[np.int8]:
        """Return the weights ``[channels + channels + copies, out]`` of the whole product, given those of the channels."""
        finer = np.rint(codes.astype(np.float32) / FINER).astype(np.int8)
        finer[np.unique(self.copied)] = 0  # their rest is far more than a step
        return np.concatenate([codes, finer, codes[self.copied]])


def choose_codes(lows: NDArray[np.float32], highs: NDArray[np.float32], most_copies: int) -> Codes:
    """Take the smallest step with which ``most_copies`` further columns cover what each channel ranges over.

    None are added where they would not halve the step.
    """
    low, high = np.minimum(lows, 0.0) * _HEADROOM, np.maximum(highs, 1e-6) * _HEADROOM
    widest = max(float(high.max()), float(-low.min()))
    for width in widest * 2 * np.geomspace(1 / _CODES, 1.01, _STEPS):
        step = width / _CODES
        top, bottom = (_CODES - ZERO_CODE) * step, -ZERO_CODE * step
        above = np.maximum(np.ceil((high - top) / width - 1e-9), 0).astype(int)
        below = np.maximum(np.ceil((bottom - low) / width - 1e-9), 0).astype(int)
        if int((above + below).sum()) <= most_copies:
            break
    if width > widest:
        step, width = 2 * widest / _CODES, 2 * widest
        above = below = np.zeros_like(above)
    places = [(at, part) for at in np.nonzero(above + below)[0] for part in range(-below[at], above[at] + 1) if part]
    return Codes(
        step=float(step),
        copied=np.array([at for at, _ in places], np.int64),
        shifts=np.array([part * width for _, part in places], np.float32),
        excess=below * top + above * bottom,
    )
