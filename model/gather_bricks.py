"""Gathering the stored bricks of a batch in one pass over memory, outside the interpreter's lock.

Several threads load batches at the same time, so array operations that each copy the batch would
share the memory's bandwidth and wait for the lock between them.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.grid import CELL_SIDE

POINTS = CELL_SIDE**3  # grid points of a cell
# The unsigned integer type of each float type, all bits but the sign, and the bits of 1.
_BITS = {
    np.dtype(np.float16): (np.uint16, 0x7FFF, 0x3C00),
    np.dtype(np.float32): (np.uint32, 0x7FFFFFFF, 0x3F800000),
}


def has_active_point(values_MK: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Return which cells have a value with |value| < 1.

    Args:
        values_MK: float16 or float32 [M, 512].

    Returns:
        bool [M].
    """
    integers, magnitude, one = _BITS[values_MK.dtype]
    bits = np.ascontiguousarray(values_MK).view(integers)
    return _has_active_point(bits, integers(magnitude), integers(one))


@njit(nogil=True, cache=True)
def _has_active_point(bits, magnitude, one):
    found = np.zeros(len(bits), np.bool_)
    for m in range(len(bits)):
        for p in range(bits.shape[1]):
            if bits[m, p] & magnitude < one:
                found[m] = True
                break
    return found


def gather_bricks(
    values_MK: NDArray[np.floating],
    sharp_MB: NDArray[np.uint8],
    rows_N: NDArray[np.int64],
    points_K: NDArray[np.int64],
    values_NK: NDArray[np.floating],
    sharp_NK: NDArray[np.bool_],
) -> None:
    """Copy the cells of one asset into a batch, their grid points in another order.

    Args:
        values_MK: float16 or float32 [M, 512], the stored values.
        sharp_MB: [M, 64], the stored bits of sharp points, the lowest bit of a byte first.
        rows_N: [N], the stored row of each of the batch's cells.
        points_K: [512], the stored number of each of the 512 points.
        values_NK: [N, 512] in the dtype of `values_MK`. It is written.
        sharp_NK: [N, 512]. It is written.
    """
    integers = _BITS[values_MK.dtype][0]
    stored = np.ascontiguousarray(values_MK).view(integers)
    _gather(stored, sharp_MB, rows_N, points_K, values_NK.view(integers), sharp_NK)


@njit(nogil=True, cache=True)
def _gather(stored, sharp_MB, rows_N, points_K, out, sharp_NK):
    for n in range(len(rows_N)):
        m = rows_N[n]
        for p in range(POINTS):
            q = points_K[p]
            out[n, p] = stored[m, q]
            sharp_NK[n, p] = sharp_MB[m, q >> 3] >> (q & 7) & 1
