"""Distances and intersection tests of points, segments and triangles, in float64 with numba.

Packed triangles are rows of 16 float64: corner a, b - a, c - a, unit normal, centre and radius of a
bounding sphere.

`distance2` is the reference of every point-triangle distance of the project. Three others exist for
a reason and are tested: the float32 loop of `pipeline.geometry.sdf`, the GPU kernel
`kernels.sdf.distances`, and `pipeline.core.primitives.surface_distance`, which accepts triangles
without area. `benchmarks.sdf_truth` and the tests have their own, because they check these.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

# Cube units. Triangles whose distance exceeds the smallest by no more than this vote on the side.
TIE = 2e-7
# A sum of votes is still not negative if it is below zero by this share of the absolute sum.
VOTE_ROUNDING = 1e-9
# Cube units. A segment whose ends are this far on one side of a triangle's plane does not meet it.
# The margin is larger than the rounding of any height above a plane.
CLEAR_HEIGHT = 1e-8


@njit(cache=True)
def pack(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pack triangles.

    Args:
        corners: float64 [T, 3, 3]. No triangle may have zero area.

    Returns:
        float64 [T, 16], see the module.
    """
    packed = np.empty((len(corners), 16))
    for t in range(len(corners)):
        write_packed(corners, t, packed, t)
    return packed


@njit(cache=True, _nrt=False)
def write_packed(corners, t, packed, row):
    """Pack triangle t of corners [T, 3, 3] into a row of packed [N, 16], in place."""
    # corner and edges
    for k in range(3):
        a, b, c = corners[t, 0, k], corners[t, 1, k], corners[t, 2, k]
        packed[row, k], packed[row, 3 + k], packed[row, 6 + k] = a, b - a, c - a
        packed[row, 12 + k] = (a + b + c) / 3
    # unit normal
    ux, uy, uz = packed[row, 3], packed[row, 4], packed[row, 5]
    vx, vy, vz = packed[row, 6], packed[row, 7], packed[row, 8]
    nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    length = math.sqrt(nx * nx + ny * ny + nz * nz)
    packed[row, 9], packed[row, 10], packed[row, 11] = nx / length, ny / length, nz / length
    # bounding sphere around the centroid
    radius2 = 0.0
    for corner in range(3):
        dx = corners[t, corner, 0] - packed[row, 12]
        dy = corners[t, corner, 1] - packed[row, 13]
        dz = corners[t, corner, 2] - packed[row, 14]
        radius2 = max(radius2, dx**2 + dy**2 + dz**2)
    packed[row, 15] = math.sqrt(radius2)


@njit(cache=True, inline="always")
def _barycentric(row, x, y, z):
    """Return (v, w) of the closest point a + v (b - a) + w (c - a) of a packed triangle.

    Ericson, Real-Time Collision Detection, section 5.1.5.
    """
    # corner a, corner b, edge ab
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
    # corner c, edge ac
    ac2 = row[6] * row[6] + row[7] * row[7] + row[8] * row[8]
    d5, d6 = d1 - abac, d2 - ac2
    if d6 >= 0.0 and d5 <= d6:
        return 0.0, 1.0
    vb = d5 * d2 - d1 * d6
    if vb <= 0.0 and d2 >= 0.0 and d6 <= 0.0:
        return 0.0, d2 / (d2 - d6)
    # edge bc, interior
    va = d3 * d6 - d5 * d4
    if va <= 0.0 and d4 - d3 >= 0.0 and d5 - d6 >= 0.0:
        w = (d4 - d3) / ((d4 - d3) + (d5 - d6))
        return 1.0 - w, w
    total = va + vb + vc
    return vb / total, vc / total


@njit(cache=True, _nrt=False)
def distance2(row, x, y, z):
    """Return the squared distance from (x, y, z) to a packed triangle."""
    v, w = _barycentric(row, x, y, z)
    dx = x - (row[0] + v * row[3] + w * row[6])
    dy = y - (row[1] + v * row[4] + w * row[7])
    dz = z - (row[2] + v * row[5] + w * row[8])
    return dx * dx + dy * dy + dz * dz


@njit(cache=True, _nrt=False)
def side_vote(row, x, y, z):
    """Return a triangle's vote on the side of a point. Positive: on the side of the normal.

    The vote is the height above the plane, weighted by the angle of the closest feature: 2 pi for
    the interior, pi for an edge, the angle at a corner. The sum over all triangles that tie for the
    closest is the dot product with the angle-weighted pseudonormal, whose sign is exact (Baerentzen
    and Aanaes 2005).
    """
    v, w = _barycentric(row, x, y, z)
    dx = x - (row[0] + v * row[3] + w * row[6])
    dy = y - (row[1] + v * row[4] + w * row[7])
    dz = z - (row[2] + v * row[5] + w * row[8])
    height = dx * row[9] + dy * row[10] + dz * row[11]
    at_a, at_b, at_c = v == 0.0 and w == 0.0, v == 1.0, w == 1.0
    # corner: the angle between its two edges
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
    # edge, interior
    if v == 0.0 or w == 0.0 or v + w >= 1.0:
        return height * math.pi
    return height * 2 * math.pi


@njit(cache=True, inline="always")
def segment_hits(packed, t, px, py, pz, qx, qy, qz):
    """Return whether the segment from p to q meets triangle t of packed [T, 16], edges included.

    Moeller and Trumbore 1997.
    """
    # The row is not made a view: counting references to it would cost as much as the test. For the
    # same reason the function is inlined.
    sx, sy, sz = px - packed[t, 0], py - packed[t, 1], pz - packed[t, 2]
    dx, dy, dz = qx - px, qy - py, qz - pz
    # both ends on one side of the plane: most segments end here
    height = sx * packed[t, 9] + sy * packed[t, 10] + sz * packed[t, 11]
    rise = dx * packed[t, 9] + dy * packed[t, 10] + dz * packed[t, 11]
    if abs(height) > CLEAR_HEIGHT:
        other = height + rise if height > 0 else -(height + rise)
        if other > CLEAR_HEIGHT:
            return False
    ux, uy, uz = packed[t, 3], packed[t, 4], packed[t, 5]
    vx, vy, vz = packed[t, 6], packed[t, 7], packed[t, 8]
    hx = dy * vz - dz * vy
    hy = dz * vx - dx * vz
    hz = dx * vy - dy * vx
    det = ux * hx + uy * hy + uz * hz
    size2 = (dx * dx + dy * dy + dz * dz) * (ux**2 + uy**2 + uz**2) * (vx**2 + vy**2 + vz**2)
    if det * det <= 1e-24 * size2:  # parallel; a segment inside the plane does not cross it
        return False
    # barycentric coordinates of the intersection, with a small tolerance at the edges
    u = (sx * hx + sy * hy + sz * hz) / det
    if u < -1e-9 or u > 1 + 1e-9:
        return False
    gx = sy * uz - sz * uy
    gy = sz * ux - sx * uz
    gz = sx * uy - sy * ux
    v = (dx * gx + dy * gy + dz * gz) / det
    if v < -1e-9 or u + v > 1 + 1e-9:
        return False
    # position along the segment
    s = (vx * gx + vy * gy + vz * gz) / det
    return 0.0 <= s <= 1.0


@njit(cache=True, _nrt=False)
def triangles_cross(packed, i, other, j):
    """Return whether an edge of one triangle passes through the other.

    The triangles are row i of `packed` and row j of `other`. Overlap in one plane does not count.
    """
    return _edges_hit(packed, i, other, j) or _edges_hit(other, j, packed, i)


@njit(cache=True, _nrt=False)
def _edges_hit(packed, i, other, j):
    """Return whether an edge of triangle i of `packed` meets triangle j of `other`."""
    ax, ay, az = packed[i, 0], packed[i, 1], packed[i, 2]
    bx, by, bz = ax + packed[i, 3], ay + packed[i, 4], az + packed[i, 5]
    cx, cy, cz = ax + packed[i, 6], ay + packed[i, 7], az + packed[i, 8]
    return (
        segment_hits(other, j, ax, ay, az, bx, by, bz)
        or segment_hits(other, j, bx, by, bz, cx, cy, cz)
        or segment_hits(other, j, cx, cy, cz, ax, ay, az)
    )
