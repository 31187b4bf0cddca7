"""Cells of a finer grid near a mesh: the tokens of a stage, from the mesh of the stage before."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.grid import CELL_SIDE, band, check_resolution, spacing

NORMALIZED_SIDE = 0.95  # longest side of a normalised mesh


@njit(cache=True)
def _squared_distance(p, a, b, c):
    """Return the squared distance of a point to the triangle (a, b, c), all of them [3].

    A triangle without area is treated as the segment or point that it is. The distances of the SDF
    (`pipeline.core.primitives.triangles`) are computed on packed triangles instead, which do not
    pay off here, where most triangles are tried against one point.
    """
    ab0, ab1, ab2 = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    ac0, ac1, ac2 = c[0] - a[0], c[1] - a[1], c[2] - a[2]
    ap0, ap1, ap2 = p[0] - a[0], p[1] - a[1], p[2] - a[2]
    aa = ab0 * ab0 + ab1 * ab1 + ab2 * ab2
    bb = ac0 * ac0 + ac1 * ac1 + ac2 * ac2
    cross = ab0 * ac0 + ab1 * ac1 + ab2 * ac2
    d1 = ab0 * ap0 + ab1 * ap1 + ab2 * ap2
    d2 = ac0 * ap0 + ac1 * ap1 + ac2 * ap2
    area = aa * bb - cross * cross
    # The projection on the plane, if it lies inside the triangle.
    if area > 1e-12 * aa * bb:
        v, w = (bb * d1 - cross * d2) / area, (aa * d2 - cross * d1) / area
        if v >= 0 and w >= 0 and v + w <= 1:
            x, y, z = ap0 - v * ab0 - w * ac0, ap1 - v * ab1 - w * ac1, ap2 - v * ab2 - w * ac2
            return x * x + y * y + z * z
    # Otherwise the closest point of the three edges.
    best = np.inf
    for start, end in ((a, b), (b, c), (c, a)):
        e0, e1, e2 = end[0] - start[0], end[1] - start[1], end[2] - start[2]
        q0, q1, q2 = p[0] - start[0], p[1] - start[1], p[2] - start[2]
        length = e0 * e0 + e1 * e1 + e2 * e2
        t = (e0 * q0 + e1 * q1 + e2 * q2) / length if length > 0 else 0.0
        t = min(max(t, 0.0), 1.0)
        x, y, z = q0 - t * e0, q1 - t * e1, q2 - t * e2
        best = min(best, x * x + y * y + z * z)
    return best


@njit(cache=True)
def _mark(vertices, faces, reach, near):
    """Mark the cells that have a grid point closer than `reach` to a face.

    `vertices` and `reach` are in grid steps. `near` is a bool grid of cells, which is changed.
    """
    side = near.shape[0]
    last = CELL_SIDE * side - 1
    limit = reach * reach
    p = np.empty(3)
    low = np.empty(3, np.int64)
    high = np.empty(3, np.int64)
    middle = np.empty(3)
    for f in range(len(faces)):
        a, b, c = vertices[faces[f, 0]], vertices[faces[f, 1]], vertices[faces[f, 2]]
        # The grid points within reach of the face's bounding box, and the face's middle.
        for d in range(3):
            low[d] = max(np.int64(np.ceil(min(a[d], b[d], c[d]) - reach)), 0)
            high[d] = min(np.int64(np.floor(max(a[d], b[d], c[d]) + reach)), last)
            middle[d] = (a[d] + b[d] + c[d]) / 3
        for i in range(low[0] // CELL_SIDE, high[0] // CELL_SIDE + 1):
            for j in range(low[1] // CELL_SIDE, high[1] // CELL_SIDE + 1):
                for k in range(low[2] // CELL_SIDE, high[2] // CELL_SIDE + 1):
                    # A marked cell is not tried again, so most faces cost one look-up.
                    if near[i, j, k]:
                        continue
                    # The cell's point closest to the middle nearly always decides.
                    cell = (i, j, k)
                    for d in range(3):
                        first = max(low[d], CELL_SIDE * cell[d])
                        end = min(high[d], CELL_SIDE * cell[d] + CELL_SIDE - 1)
                        p[d] = min(max(np.round(middle[d]), first), end)
                    if _squared_distance(p, a, b, c) < limit:
                        near[i, j, k] = True
                        continue
                    near[i, j, k] = _any_point_within(low, high, i, j, k, a, b, c, limit, p)


@njit(cache=True)
def _any_point_within(low, high, i, j, k, a, b, c, limit, p):
    """Return whether a grid point of cell (i, j, k) in low..high is close enough to a triangle."""
    for x in range(max(low[0], CELL_SIDE * i), min(high[0], CELL_SIDE * i + CELL_SIDE - 1) + 1):
        for y in range(max(low[1], CELL_SIDE * j), min(high[1], CELL_SIDE * j + CELL_SIDE - 1) + 1):
            for z in range(
                max(low[2], CELL_SIDE * k), min(high[2], CELL_SIDE * k + CELL_SIDE - 1) + 1
            ):
                p[0], p[1], p[2] = x, y, z
                if _squared_distance(p, a, b, c) < limit:
                    return True
    return False


def normalized(vertices: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return vertices with the middle of their box at 0 and its longest side 0.95.

    Args:
        vertices: [V, 3].

    Raises:
        ValueError: If the box is empty or a vertex is not finite.
    """
    points = np.asarray(vertices, np.float64)
    if not len(points) or not np.isfinite(points).all():
        raise ValueError("vertices must be finite and at least one")
    low, high = points.min(0), points.max(0)
    longest = (high - low).max()
    if longest == 0:
        raise ValueError("vertices must not be all at one place")
    return (points - (low + high) / 2) * (NORMALIZED_SIDE / longest)


def cells_near(
    vertices: NDArray[np.floating],
    faces: NDArray[np.integer],
    resolution: int,
    reach: float | None = None,
) -> NDArray[np.int16]:
    """Return the cells that hold a grid point in the narrow band of a mesh.

    They are the cells that a build would store for the mesh at this resolution, if it were not
    normalised again. The result is exact.

    Args:
        vertices: [V, 3] in the cube [-0.5, 0.5]^3.
        faces: [F, 3].
        resolution: Resolution R of the grid.
        reach: Grid points closer than this to the mesh count, in units of the cube's side. None
            takes the width of the narrow band, `pipeline.core.grid.band(R)`.

    Returns:
        int16 [M, 3], the indices of the cells, sorted by x, y, z.

    Raises:
        ValueError: If `resolution` is not a multiple of 8 or a vertex is not finite.
    """
    check_resolution(resolution)
    if not np.isfinite(vertices).all():
        raise ValueError("vertices must be finite")
    step = spacing(resolution)
    near = np.zeros((resolution // CELL_SIDE,) * 3, np.bool_)
    steps = (np.asarray(vertices, np.float64) + 0.5) / step
    _mark(
        np.ascontiguousarray(steps),
        np.ascontiguousarray(faces, np.int64),
        (band(resolution) if reach is None else reach) / step,
        near,
    )
    return np.argwhere(near).astype(np.int16)
