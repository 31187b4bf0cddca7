"""Find the grid points near sharp edges of the visible surface."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.grid import CELL_SIDE

SHARP_VOXELS = 2.0  # largest distance of a marked grid point from a sharp edge, in voxels


def near_sharp_edges(
    cells: NDArray[np.integer], segments: NDArray[np.float64], resolution: int
) -> NDArray[np.bool_]:
    """Find the grid points within SHARP_VOXELS of a sharp edge.

    Args:
        cells: integer [M, 3], index // 8.
        segments: float64 [S, 2, 3] sharp edges.
        resolution: Grid points along one side.

    Returns:
        bool [M, 512], the grid points of each cell.
    """
    size = resolution // CELL_SIDE
    slots = np.full((size, size, size), -1, np.int32)
    slots[tuple(cells.T)] = np.arange(len(cells), dtype=np.int32)
    near = np.zeros((len(cells), CELL_SIDE**3), np.bool_)
    _mark(slots, segments, resolution, near)
    return near


@njit(cache=True)
def _mark_piece(slots, start, step, resolution, near):
    """Set near [M, 512] where a grid point is within SHARP_VOXELS of a piece of a segment.

    The piece leads from `start` [3] to `start + step`.
    """
    h = 1.0 / (resolution - 1)
    reach = SHARP_VOXELS * h
    # grid points inside the enlarged box of the piece
    low = np.empty(3, np.int64)
    high = np.empty(3, np.int64)
    for k in range(3):
        near_end, far_end = min(start[k], start[k] + step[k]), max(start[k], start[k] + step[k])
        low[k] = max(0, int(np.ceil((near_end - reach + 0.5) / h)))
        high[k] = min(resolution - 1, int(np.floor((far_end + reach + 0.5) / h)))
    # exact distance to the piece
    px, py, pz = start
    dx, dy, dz = step
    square = dx * dx + dy * dy + dz * dz
    for i in range(low[0], high[0] + 1):
        for j in range(low[1], high[1] + 1):
            for k in range(low[2], high[2] + 1):
                m = slots[i // CELL_SIDE, j // CELL_SIDE, k // CELL_SIDE]
                if m < 0:
                    continue
                x, y, z = i * h - 0.5 - px, j * h - 0.5 - py, k * h - 0.5 - pz
                t = 0.0
                if square > 0:
                    t = min(1.0, max(0.0, (x * dx + y * dy + z * dz) / square))
                distance2 = (x - t * dx) ** 2 + (y - t * dy) ** 2 + (z - t * dz) ** 2
                near[m, 64 * (i % 8) + 8 * (j % 8) + k % 8] |= distance2 <= reach * reach


@njit(cache=True)
def _mark(slots, segments, resolution, near):
    """Set near [M, 512] where a grid point is within SHARP_VOXELS of a segment.

    `slots` [B, B, B] is the row of each cell in `near`, -1 if it has none.
    """
    h = 1.0 / (resolution - 1)
    for s in range(len(segments)):
        a, b = segments[s, 0], segments[s, 1]
        length = np.sqrt(((b - a) ** 2).sum())
        # cut long segments, because the box of a long diagonal would hold too many grid points
        pieces = max(1, int(np.ceil(length / (8 * h))))
        for piece in range(pieces):
            start, step = a + (b - a) * (piece / pieces), (b - a) / pieces
            _mark_piece(slots, start, step, resolution, near)
