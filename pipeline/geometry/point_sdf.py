"""Exact signed distances of a topology at any points, for samples that lie on no grid.

The definition is that of `pipeline.geometry.sdf`: near a solid its closest triangles vote on the
side, elsewhere the sheets and the flood fill decide.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.grid import spacing
from pipeline.core.primitives.surface_distance import TriangleTree
from pipeline.core.primitives.triangles import TIE, distance2, pack
from pipeline.geometry.box_tree import build_box_tree, triangles_in_box
from pipeline.geometry.sdf import FLOOD_VOXELS, flood_reached, flood_sides, is_outside_exact
from pipeline.geometry.topology import BURIED, SHEET, SOLID, Topology

SAME_DIRECTION = 1 - 1e-6  # two unit normals are equal if their cosine exceeds this
MAX_NORMALS = 32  # distinct normals that are averaged at one point


class PointSdf:
    """Signed distances to a topology at points of any position.

    Args:
        topology: The classified triangles.
        sheet_half: Half thickness of the shell around sheets, in cube units.
    """

    def __init__(self, topology: Topology, sheet_half: float):
        self.topology = topology
        self.sheet_half = sheet_half
        self._packed = pack(topology.triangles)
        self._boxes = build_box_tree(self._packed)
        self._solids = _tree(topology.triangles[topology.kinds == SOLID])
        self._sheets = _tree(topology.triangles[topology.kinds == SHEET])

    def at(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the signed distances, negative inside.

        Args:
            points: [N, 3] in cube units. They may lie outside the cube.

        Returns:
            float64 [N]: the smaller of the signed distance to the solids and of the distance to
            the sheets minus their half thickness.
        """
        points = np.ascontiguousarray(points, np.float64)
        to_solid, to_sheet = _distances(self._solids, points), _distances(self._sheets, points)
        trusted = FLOOD_VOXELS * spacing(self.topology.resolution)
        outside = _outside(
            points,
            to_solid,
            to_sheet,
            self._packed,
            self.topology.kinds,
            self._boxes,
            trusted,
            flood_sides(self.topology.flood),
        )
        return np.minimum(np.where(outside, to_solid, -to_solid), to_sheet - self.sheet_half)

    def shells_at(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the distances to the sheets minus their half thickness alone, float64 [N].

        They are infinite if the topology has no sheet.
        """
        points = np.ascontiguousarray(points, np.float64)
        return _distances(self._sheets, points) - self.sheet_half

    def normals_at(
        self, points: NDArray[np.floating], reach: float
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return the mean of the distinct normals of the visible triangles that meet at a point.

        Args:
            points: [N, 3] on the visible triangles.
            reach: Distance in cube units within which a triangle counts as meeting the point.

        Returns:
            normals: float64 [N, 3] unit vectors. They point out of a solid. On a sheet the side is
                that of one of its triangles. 0 where no triangle is within reach.
            is_solid: bool [N], whether a triangle of a solid meets the point. Then only those
                count.
        """
        points = np.ascontiguousarray(points, np.float64)
        return _mean_normals(points, reach, self._packed, self.topology.kinds, self._boxes)


def _tree(triangles: NDArray[np.float64]) -> TriangleTree | None:
    if not len(triangles):
        return None
    return TriangleTree(triangles.reshape(-1, 3), np.arange(3 * len(triangles)).reshape(-1, 3))


def _distances(tree: TriangleTree | None, points: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.full(len(points), np.inf) if tree is None else tree.closest(points)[0]


@njit(cache=True)
def _box_around(x, y, z, reach, box):
    """Write the lowest and the highest corner of a cube around (x, y, z) to `box` [6]."""
    box[0], box[1], box[2] = x - reach, y - reach, z - reach
    box[3], box[4], box[5] = x + reach, y + reach, z + reach


@njit(cache=True)
def _outside(points, to_solid, to_sheet, packed, kinds, tree, trusted, flood):
    """Return whether each point is outside, bool [N]."""
    count = len(points)
    result = np.empty(count, np.bool_)
    near = np.empty(64, np.int32)
    box = np.empty(6)
    for n in range(count):
        x, y, z = points[n]
        if to_solid[n] > trusted:
            # both sides of a sheet are outside, and the flood fill knows the other points
            result[n] = to_sheet[n] <= trusted or flood_reached(flood, x, y, z)
            continue
        # the triangles that can tie for the closest one
        _box_around(x, y, z, to_solid[n] + 4 * TIE, box)
        near, found = triangles_in_box(tree, box, near, 0)
        candidates = near[:found]
        scratch = np.empty(found)
        result[n] = is_outside_exact(packed, kinds, candidates, scratch, x, y, z, trusted, flood)
    return result


@njit(cache=True)
def _same_side(one, other, x, y, z):
    """Return whether the normals of two packed triangles at a point are on one side of a sheet.

    Then either both triangles bend towards the other's normal or both bend away from it. Triangles
    that are nearly coplanar have normals of one direction.
    """
    ax, ay, az = one[12] - x, one[13] - y, one[14] - z
    bx, by, bz = other[12] - x, other[13] - y, other[14] - z
    of_other = one[9] * bx + one[10] * by + one[11] * bz
    of_one = other[9] * ax + other[10] * ay + other[11] * az
    a2, b2 = ax * ax + ay * ay + az * az, bx * bx + by * by + bz * bz
    if of_other * of_other > 1e-6 * b2 and of_one * of_one > 1e-6 * a2:
        return of_other * of_one > 0
    return one[9] * other[9] + one[10] * other[10] + one[11] * other[11] > 0


@njit(cache=True)
def _mean_normals(points, reach, packed, kinds, tree):
    """See `PointSdf.normals_at`."""
    count = len(points)
    normals = np.zeros((count, 3))
    is_solid = np.zeros(count, np.bool_)
    near = np.empty(64, np.int32)
    box = np.empty(6)
    distinct = np.empty((MAX_NORMALS, 3))
    for n in range(count):
        x, y, z = points[n]
        _box_around(x, y, z, reach, box)
        near, found = triangles_in_box(tree, box, near, 0)
        # the visible triangles that meet the point, those of solids first
        met = 0
        for c in range(found):
            t = near[c]
            meets = kinds[t] != BURIED and distance2(packed[t], x, y, z) <= reach * reach
            if meets:
                near[met] = t
                met += 1
                is_solid[n] = is_solid[n] or kinds[t] == SOLID
        # their distinct normals; those of a sheet are turned to the side of the first one
        used = 0
        for c in range(met):
            t = near[c]
            if is_solid[n] and kinds[t] != SOLID:
                continue
            nx, ny, nz = packed[t, 9], packed[t, 10], packed[t, 11]
            if used and not is_solid[n] and not _same_side(packed[near[0]], packed[t], x, y, z):
                nx, ny, nz = -nx, -ny, -nz
            new = used < MAX_NORMALS
            for d in range(used):
                cosine = nx * distinct[d, 0] + ny * distinct[d, 1] + nz * distinct[d, 2]
                new = new and cosine <= SAME_DIRECTION
            if new:
                distinct[used] = nx, ny, nz
                used += 1
        x, y, z = 0.0, 0.0, 0.0
        for d in range(used):
            x, y, z = x + distinct[d, 0], y + distinct[d, 1], z + distinct[d, 2]
        length = np.sqrt(x * x + y * y + z * z)
        if length > 1e-9:
            normals[n] = x / length, y / length, z / length
    return normals, is_solid
