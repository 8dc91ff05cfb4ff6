"""Turn float weights into the block-quantized tensors of ONNX Runtime's `MatMulNBits`.

A weight matrix is ``[out, in]`` float32; each row is cut into blocks of `BLOCK` inputs, and each block has a scale and,
for 4 bits, a whole zero point: ``weight = (code - zero_point) * scale``. Pure numpy, no I/O.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.artifacts.errors import ConversionError

BLOCK = 32
_ROWS_AT_ONCE = 512
_TINY = np.float32(1e-12)


@dataclass(frozen=True)
class Blocks:
    """Hold one quantized matrix. ``blocks`` is the number of blocks in a row.

    ``codes``: uint8 ``[out, blocks, BLOCK * bits / 8]``, first of two 4-bit codes in the low half of a byte.
    ``scales``: float32 ``[out, blocks]``. ``zero_points``: uint8 ``[out, ceil(blocks / 2)]``, packed like the codes; None
    stands for the middle code (128 of 8 bits).
    """

    bits: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None

    def dequantize(self) -> NDArray[np.float32]:
        """Return float32 ``[out, in]`` as the kernel sees it, up to its own rounding of activations."""
        rows, blocks = self.scales.shape
        if self.bits == 8:
            centred = self.codes.reshape(rows, blocks, BLOCK).astype(np.float32) - 128.0
        else:
            codes = _unpack(self.codes).astype(np.float32)
            assert self.zero_points is not None  # 4-bit matrices are made with zero points alone
            centred = codes - _unpack(self.zero_points)[:, :blocks, None].astype(np.float32)
        return (centred * self.scales[:, :, None]).reshape(rows, blocks * BLOCK).astype(np.float32)


def quantize_int8(weight: NDArray[np.float32]) -> Blocks:
    """Quantize to 8 bits, symmetric. A Q8_0 matrix comes through unchanged but for its largest code, -128."""
    rows, blocks = _shape(weight)
    values = weight.reshape(rows, blocks, BLOCK)
    scales = np.abs(values).max(axis=2) / np.float32(127.0)
    codes = np.rint(values / np.maximum(scales, _TINY)[:, :, None]) + 128.0
    return Blocks(8, np.clip(codes, 0, 255).astype(np.uint8), scales.astype(np.float32), None)


def quantize_rows(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize to 8 bits with one scale a row, symmetric: ``weight = codes * scales[:, None]``."""
    scales = np.maximum(np.abs(weight).max(axis=1), _TINY) / np.float32(127.0)
    codes = np.clip(np.rint(weight / scales[:, None]), -127, 127)
    return codes.astype(np.int8), scales.astype(np.float32)


def quantize_int4(weight: NDArray[np.float32]) -> Blocks:
    """Quantize to 4 bits with the whole zero point and the scale that lose the least of each block (least squares)."""
    rows, blocks = _shape(weight)
    codes = np.empty((rows, blocks, BLOCK), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zero_points = np.empty((rows, blocks), np.uint8)
    for at in range(0, rows, _ROWS_AT_ONCE):
        part = slice(at, at + _ROWS_AT_ONCE)
        values = np.ascontiguousarray(weight[part]).reshape(-1, BLOCK)
        found = _fit_int4(values)
        codes[part], scales[part], zero_points[part] = (
            found[0].reshape(-1, blocks, BLOCK),
            found[1].reshape(-1, blocks),
            found[2].reshape(-1, blocks),
        )
    if blocks % 2:
        zero_points = np.pad(zero_points, ((0, 0), (0, 1)))
    return Blocks(4, _pack(codes), scales, _pack(zero_points))


def _fit_int4(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Search, for each row of ``[n, BLOCK]``, the zero point next to the ideal one and refine its scale by least squares."""
    low = np.minimum(values.min(axis=1), 0.0)
    high = np.maximum(values.max(axis=1), 0.0)
    span = np.maximum(high - low, _TINY)
    ideal = -low / span * 15.0
    best_error = np.full(len(values), np.inf, np.float32)
    best_codes = np.zeros(values.shape, np.uint8)
    best_scale = np.zeros(len(values), np.float32)
    best_zero = np.zeros(len(values), np.uint8)
    for offset in (0.0, 1.0):
        zero = np.clip(np.floor(ideal) + offset, 0, 15).astype(np.float32)
        below = np.divide(-low, zero, out=np.zeros_like(low), where=zero > 0)
        above = np.divide(high, 15 - zero, out=np.zeros_like(high), where=zero < 15)
        for shrink in (1.0, 0.93):
            scale = np.maximum(np.maximum(below, above) * np.float32(shrink), _TINY)
            for _ in range(2):
                centred = np.clip(np.rint(values / scale[:, None]) + zero[:, None], 0, 15) - zero[:, None]
                energy = np.einsum("ij,ij->i", centred, centred)
                fitted = np.einsum("ij,ij->i", centred, values) / np.maximum(energy, 1.0)
                scale = np.where(np.abs(fitted) > _TINY, np.abs(fitted), scale).astype(np.float32)
            error = np.square(values - centred * scale[:, None]).sum(axis=1)
            better = error < best_error
            best_error = np.where(better, error, best_error)
            best_codes[better] = (centred + zero[:, None])[better].astype(np.uint8)
            best_scale[better], best_zero[better] = scale[better], zero[better].astype(np.uint8)
    return best_codes, best_scale, best_zero


def _shape(weight: NDArray[np.float32]) -> tuple[int, int]:
    rows, columns = weight.shape
    if columns % BLOCK:
        raise ConversionError(
            f"a row of {columns} weights cannot be cut into blocks of {BLOCK}; convert it with precision fp32"
        )
    return rows, columns // BLOCK


def _pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def _unpack(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1).astype(np.uint8)
