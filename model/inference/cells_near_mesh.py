"""Which cells of a finer grid lie near a mesh: the tokens of the next stage, found from the mesh of the last."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.grid import CELL_SIDE, band, check_resolution, spacing


@njit(cache=True)
def _squared_distance(p, a, b, c):
    """From a point to a triangle [3] each; a triangle without area is the segment or point that it is."""
    ab0, ab1, ab2 = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    ac0, ac1, ac2 = c[0] - a[0], c[1] - a[1], c[2] - a[2]
    ap0, ap1, ap2 = p[0] - a[0], p[1] - a[1], p[2] - a[2]
    aa = ab0 * ab0 + ab1 * ab1 + ab2 * ab2
    bb = ac0 * ac0 + ac1 * ac1 + ac2 * ac2
    cross = ab0 * ac0 + ab1 * ac1 + ab2 * ac2
    d1 = ab0 * ap0 + ab1 * ap1 + ab2 * ap2
    d2 = ac0 * ap0 + ac1 * ap1 + ac2 * ap2
    area = aa * bb - cross * cross
    if area > 1e-12 * aa * bb:
        v, w = (bb * d1 - cross * d2) / area, (aa * d2 - cross * d1) / area
        if v >= 0 and w >= 0 and v + w <= 1:
            x, y, z = ap0 - v * ab0 - w * ac0, ap1 - v * ab1 - w * ac1, ap2 - v * ab2 - w * ac2
            return x * x + y * y + z * z
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
    """Marks the cells of grid points closer than `reach` to a face; vertices and reach in grid steps.

    A cell that is marked is not looked at again, so most faces cost a look-up; the point of the cell closest to the
    face's middle is tried first, since it nearly always decides.
    """
    side = near.shape[0]
    last = 8 * side - 1
    limit = reach * reach
    p = np.empty(3)
    low, high, middle = np.empty(3, np.int64), np.empty(3, np.int64), np.empty(3)
    for f in range(len(faces)):
        a, b, c = vertices[faces[f, 0]], vertices[faces[f, 1]], vertices[faces[f, 2]]
        for d in range(3):
            low[d] = max(np.int64(np.ceil(min(a[d], b[d], c[d]) - reach)), 0)
            high[d] = min(np.int64(np.floor(max(a[d], b[d], c[d]) + reach)), last)
            middle[d] = (a[d] + b[d] + c[d]) / 3
        for i in range(low[0] // 8, high[0] // 8 + 1):
            for j in range(low[1] // 8, high[1] // 8 + 1):
                for k in range(low[2] // 8, high[2] // 8 + 1):
                    if near[i, j, k]:
                        continue
                    cell = (i, j, k)
                    for d in range(3):
                        first, end = max(low[d], 8 * cell[d]), min(high[d], 8 * cell[d] + 7)
                        p[d] = min(max(np.round(middle[d]), first), end)
                    if _squared_distance(p, a, b, c) < limit:
                        near[i, j, k] = True
                        continue
                    near[i, j, k] = _any_within(low, high, i, j, k, a, b, c, limit, p)


@njit(cache=True)
def _any_within(low, high, i, j, k, a, b, c, limit, p):
    for x in range(max(low[0], 8 * i), min(high[0], 8 * i + 7) + 1):
        for y in range(max(low[1], 8 * j), min(high[1], 8 * j + 7) + 1):
            for z in range(max(low[2], 8 * k), min(high[2], 8 * k + 7) + 1):
                p[0], p[1], p[2] = x, y, z
                if _squared_distance(p, a, b, c) < limit:
                    return True
    return False


def cells_near(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], resolution: int
) -> NDArray[np.int16]:
    """The cells [M, 3] in x, y, z order that hold a grid point with |udf| < tau(resolution) of the mesh, exactly.

    vertices [V, 3] in the cube [-0.5, 0.5]^3, faces [F, 3]. A mesh's own cells at its next resolution, as stored data
    has them, without re-normalising it. ValueError if the resolution is not a multiple of 8 or a vertex not finite.
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
        band(resolution) / step,
        near,
    )
    return np.argwhere(near).astype(np.int16)
