"""Exact point, segment and triangle predicates on packed triangles, compiled with numba: the ground the SDF stands on.

Packed triangles are rows of 16 float64: a, b - a, c - a, unit normal, bounding-sphere centre, radius.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

TIE = 2e-7  # cube units: triangles this much farther than the closest one still vote on the side
VOTE_ROUNDING = (
    1e-9  # of the votes' absolute sum: a sum this far below zero is zero, rounded, and outside
)


@njit(cache=True)
def pack(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """[T, 3, 3] float64 corners -> [T, 16] packed triangles; no triangle may have zero area."""
    packed = np.empty((len(corners), 16))
    for t in range(len(corners)):
        a, b, c = corners[t, 0], corners[t, 1], corners[t, 2]
        row = packed[t]
        for k in range(3):
            row[k], row[3 + k], row[6 + k] = a[k], b[k] - a[k], c[k] - a[k]
        nx = row[4] * row[8] - row[5] * row[7]
        ny = row[5] * row[6] - row[3] * row[8]
        nz = row[3] * row[7] - row[4] * row[6]
        length = math.sqrt(nx * nx + ny * ny + nz * nz)
        row[9], row[10], row[11] = nx / length, ny / length, nz / length
        radius2 = 0.0
        for k in range(3):
            row[12 + k] = (a[k] + b[k] + c[k]) / 3
        for corner in (a, b, c):
            radius2 = max(
                radius2,
                (corner[0] - row[12]) ** 2
                + (corner[1] - row[13]) ** 2
                + (corner[2] - row[14]) ** 2,
            )
        row[15] = math.sqrt(radius2)
    return packed


@njit(cache=True, inline="always")
def _barycentric(row, x, y, z):
    """Closest point of a triangle as a + v (b - a) + w (c - a) (Ericson, Real-Time Collision Detection, 5.1.5)."""
    px, py, pz = x - row[0], y - row[1], z - row[2]
    d1 = row[3] * px + row[4] * py + row[5] * pz
    d2 = row[6] * px + row[7] * py + row[8] * pz
    if d1 <= 0.0 and d2 <= 0.0:
        return 0.0, 0.0
    ab2 = row[3] * row[3] + row[4] * row[4] + row[5] * row[5]
    abac = row[3] * row[6] + row[4] * row[7] + row[5] * row[8]
    d3, d4 = d1 - ab2, d2 - abac
    if d3 >= 0.0 and d4 <= d3:
        return 1.0, 0.0
    vc = d1 * d4 - d3 * d2
    if vc <= 0.0 and d1 >= 0.0 and d3 <= 0.0:
        return d1 / (d1 - d3), 0.0
    ac2 = row[6] * row[6] + row[7] * row[7] + row[8] * row[8]
    d5, d6 = d1 - abac, d2 - ac2
    if d6 >= 0.0 and d5 <= d6:
        return 0.0, 1.0
    vb = d5 * d2 - d1 * d6
    if vb <= 0.0 and d2 >= 0.0 and d6 <= 0.0:
        return 0.0, d2 / (d2 - d6)
    va = d3 * d6 - d5 * d4
    if va <= 0.0 and d4 - d3 >= 0.0 and d5 - d6 >= 0.0:
        w = (d4 - d3) / ((d4 - d3) + (d5 - d6))
        return 1.0 - w, w
    total = va + vb + vc
    return vb / total, vc / total


@njit(cache=True)
def distance2(row, x, y, z):
    """Squared distance from a point to a packed triangle."""
    v, w = _barycentric(row, x, y, z)
    dx = x - (row[0] + v * row[3] + w * row[6])
    dy = y - (row[1] + v * row[4] + w * row[7])
    dz = z - (row[2] + v * row[5] + w * row[8])
    return dx * dx + dy * dy + dz * dz


@njit(cache=True)
def side_vote(row, x, y, z):
    """How far the point lies on the normal's side, weighted by the angle of the closest feature.

    Summed over all triangles that tie for the closest point this is the dot product with the angle-weighted
    pseudonormal, whose sign is exact (Baerentzen and Aanaes 2005): 2 pi for a face, pi for an edge, the corner's angle.
    """
    v, w = _barycentric(row, x, y, z)
    dx = x - (row[0] + v * row[3] + w * row[6])
    dy = y - (row[1] + v * row[4] + w * row[7])
    dz = z - (row[2] + v * row[5] + w * row[8])
    height = dx * row[9] + dy * row[10] + dz * row[11]
    at_a, at_b, at_c = v == 0.0 and w == 0.0, v == 1.0, w == 1.0
    if at_a or at_b or at_c:
        ux, uy, uz = row[3], row[4], row[5]
        wx, wy, wz = row[6], row[7], row[8]
        if at_b:
            ux, uy, uz, wx, wy, wz = -ux, -uy, -uz, wx - ux, wy - uy, wz - uz
        elif at_c:
            ux, uy, uz, wx, wy, wz = -wx, -wy, -wz, ux - wx, uy - wy, uz - wz
        cosine = (ux * wx + uy * wy + uz * wz) / math.sqrt(
            (ux * ux + uy * uy + uz * uz) * (wx * wx + wy * wy + wz * wz)
        )
        return height * math.acos(min(1.0, max(-1.0, cosine)))
    if v == 0.0 or w == 0.0 or v + w >= 1.0:
        return height * math.pi
    return height * 2 * math.pi


@njit(cache=True)
def segment_hits(row, px, py, pz, qx, qy, qz):
    """Whether the segment p-q meets the packed triangle, edges included (Moeller and Trumbore 1997)."""
    dx, dy, dz = qx - px, qy - py, qz - pz
    hx = dy * row[8] - dz * row[7]
    hy = dz * row[6] - dx * row[8]
    hz = dx * row[7] - dy * row[6]
    det = row[3] * hx + row[4] * hy + row[5] * hz
    size = math.sqrt(
        (dx * dx + dy * dy + dz * dz)
        * (row[3] ** 2 + row[4] ** 2 + row[5] ** 2)
        * (row[6] ** 2 + row[7] ** 2 + row[8] ** 2)
    )
    if abs(det) <= 1e-12 * size:  # parallel: a segment inside the plane does not cross it
        return False
    sx, sy, sz = px - row[0], py - row[1], pz - row[2]
    u = (sx * hx + sy * hy + sz * hz) / det
    if u < -1e-9 or u > 1 + 1e-9:
        return False
    gx = sy * row[5] - sz * row[4]
    gy = sz * row[3] - sx * row[5]
    gz = sx * row[4] - sy * row[3]
    v = (dx * gx + dy * gy + dz * gz) / det
    if v < -1e-9 or u + v > 1 + 1e-9:
        return False
    s = (row[6] * gx + row[7] * gy + row[8] * gz) / det
    return 0.0 <= s <= 1.0


@njit(cache=True)
def triangles_cross(p, q):
    """Whether an edge of one packed triangle passes through the other (coplanar overlap does not count)."""
    for first, second in ((p, q), (q, p)):
        ax, ay, az = first[0], first[1], first[2]
        bx, by, bz = ax + first[3], ay + first[4], az + first[5]
        cx, cy, cz = ax + first[6], ay + first[7], az + first[8]
        if (
            segment_hits(second, ax, ay, az, bx, by, bz)
            or segment_hits(second, bx, by, bz, cx, cy, cz)
            or segment_hits(second, cx, cy, cz, ax, ay, az)
        ):
            return True
    return False
