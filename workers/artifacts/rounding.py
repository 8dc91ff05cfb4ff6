"""Round a matrix to eight bits so that its products change least, given what it is multiplied with.

The method is known as GPTQ: columns are rounded one after the other, and the error that a column leaves is made good by those that
are still to come, as far as their inputs go together. Pure numpy, no I/O.
"""

import numpy as np
from numpy.typing import NDArray

HIGHEST_CODE = 127
_COLUMNS_AT_ONCE = 128
_DAMPING = 0.03
"""Of the mean diagonal: bounds what is trusted to the sample that the moments come from."""


def round_to_int8(
    weight: NDArray[np.float32], moment: NDArray[np.float64]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return codes ``[out, in]`` and a scale for each row, float32 ``[out]``: ``weight`` is about ``codes * scales[:, None]``.

    ``moment`` is the mean of ``x x^T`` over the inputs ``x``, ``[in, in]``.
    """
    damped = moment + np.eye(len(moment)) * (_DAMPING * np.trace(moment) / len(moment) + 1e-12)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left = np.ascontiguousarray(weight.T, np.float64)  # [in, out]: a column of the weight is a row in memory
    scales = np.maximum(np.abs(left).max(axis=0), 1e-12) / HIGHEST_CODE
    codes = np.zeros(left.shape, np.int8)
    for start in range(0, len(left), _COLUMNS_AT_ONCE):
        end = min(start + _COLUMNS_AT_ONCE, len(left))
        errors = np.empty((end - start, left.shape[1]))
        for place in range(start, end):
            code = np.clip(np.rint(left[place] / scales), -HIGHEST_CODE, HIGHEST_CODE)
            codes[place] = code
            error = (left[place] - code * scales) / upper[place, place]
            left[place:end] -= upper[place, place:end, None] * error
            errors[place - start] = error
        left[end:] -= upper[start:end, end:].T @ errors
    return codes.T, scales.astype(np.float32)
