"""Mark the active points near sharp edges of the visible surface."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.grid import CELL_SIDE

SHARP_VOXELS = 2.0


@njit(cache=True)
def _mark(slots, segments, resolution, near):
    h = 1.0 / (resolution - 1)
    reach = SHARP_VOXELS * h
    last = resolution - 1
    for s in range(len(segments)):
        a, b = segments[s, 0], segments[s, 1]
        length = np.sqrt(((b - a) ** 2).sum())
        pieces = max(1, int(np.ceil(length / (8 * h))))  # short boxes along a long slanted edge
        for piece in range(pieces):
            px, py, pz = a + (b - a) * (piece / pieces)
            dx, dy, dz = (b - a) / pieces
            square = dx * dx + dy * dy + dz * dz
            low = np.empty(3, np.int64)
            high = np.empty(3, np.int64)
            for k in range(3):
                start, step = a[k] + (b[k] - a[k]) * (piece / pieces), (b[k] - a[k]) / pieces
                low[k] = max(0, int(np.ceil((min(start, start + step) - reach + 0.5) / h)))
                high[k] = min(last, int(np.floor((max(start, start + step) + reach + 0.5) / h)))
            for i in range(low[0], high[0] + 1):
                for j in range(low[1], high[1] + 1):
                    for k in range(low[2], high[2] + 1):
                        m = slots[i // CELL_SIDE, j // CELL_SIDE, k // CELL_SIDE]
                        if m < 0:
                            continue
                        x, y, z = i * h - 0.5 - px, j * h - 0.5 - py, k * h - 0.5 - pz
                        t = (
                            min(1.0, max(0.0, (x * dx + y * dy + z * dz) / square))
                            if square > 0
                            else 0.0
                        )
                        if (x - t * dx) ** 2 + (y - t * dy) ** 2 + (
                            z - t * dz
                        ) ** 2 <= reach * reach:
                            near[m, 64 * (i % 8) + 8 * (j % 8) + k % 8] = True


def sharp_bits(
    cells: NDArray[np.integer],
    active: NDArray[np.bool_],
    segments: NDArray[np.float64],
    resolution: int,
) -> NDArray[np.uint8]:
    """[M, 64] packed bits: the active points [M, 512] within SHARP_VOXELS of a segment [S, 2, 3]."""
    size = resolution // CELL_SIDE
    slots = np.full((size, size, size), -1, np.int32)
    slots[tuple(cells.T)] = np.arange(len(cells), dtype=np.int32)
    near = np.zeros(active.shape, np.bool_)
    _mark(slots, segments, resolution, near)
    return np.packbits(near & active, axis=1, bitorder="little")
