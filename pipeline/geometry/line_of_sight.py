"""Exact lines of sight from points of a surface to grid points outside it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.grid import CELL_SIDE, spacing
from pipeline.core.primitives.triangles import segment_hits
from pipeline.geometry.flood_fill import FloodFill, bin_at, is_reached

# Sides of a surface that are visible from outside: none, the side of its normal, the other, both.
HIDDEN = 0
FRONT = 1
BACK = 2
BOTH = 3
# If both sides are visible, a side counts only if it has at least this share of the other side's
# free lines of sight. Otherwise a line through a crack would make a wall of a solid a sheet.
MIN_SIGHT_RATIO = 0.2
# Longest extent of a line of sight along one axis, in voxels: 2.4 for the distance, 0.5 and 1 for
# the choice of the grid point.
FARTHEST_VOXELS = 4.0


class Scene(NamedTuple):
    """Triangles and flood fill as the compiled line-of-sight functions take them.

    The fields from `near` on are working memory: lists of the triangles near the current sample.
    """

    packed: NDArray[np.float64]  # [T, 16] packed triangles
    boxes: NDArray[np.float64]  # [T, 6] lowest and highest corner of each triangle
    bin_of: NDArray[np.int32]  # this and the next two: see Bins
    offsets: NDArray[np.int64]
    triangles: NDArray[np.int32]
    outside: NDArray[np.uint64]  # this and the next: see FloodFill
    whole_cells: NDArray[np.bool_]
    h: float  # spacing of the grid
    near: NDArray[np.int32]  # the lists of triangles, one after another
    near_boxes: NDArray[np.float64]  # [len(near), 6] the boxes of these triangles
    lists: NDArray[np.int64]  # [9, 2] row 0: number of lists; row n: bin and end of list n in near


def make_scene(packed: NDArray[np.float64], flood: FloodFill) -> Scene:
    """Return the scene of packed triangles [T, 16] and the flood fill of their outside."""
    bins = flood.bins
    room = 8 * np.diff(bins.offsets).max(initial=0)  # a sample's lines end in at most eight cells
    corners = np.stack(
        [packed[:, :3], packed[:, :3] + packed[:, 3:6], packed[:, :3] + packed[:, 6:9]]
    )
    return Scene(
        packed=packed,
        boxes=np.concatenate([corners.min(0), corners.max(0)], axis=1),
        bin_of=bins.bin_of,
        offsets=bins.offsets,
        triangles=bins.triangles,
        outside=flood.outside,
        whole_cells=flood.whole_cells,
        h=spacing(bins.resolution),
        near=np.empty(room, np.int32),
        near_boxes=np.empty((room, 6)),
        lists=np.zeros((9, 2), np.int64),
    )


@njit(cache=True)
def _triangles_near_sample(scene, m, x, y, z):
    """Return the first and end index in `scene.near` of bin m's triangles near a sample.

    The list is made when the first line of a sample asks for the bin, so that the dozens of lines
    of one sample test a few triangles instead of the whole bin. `scene.lists[0, 0] = 0` begins a
    new sample.
    """
    lists, boxes = scene.lists, scene.boxes
    # the list may exist already
    known = lists[0, 0]
    for n in range(known):
        if lists[n + 1, 0] == m:
            return lists[n, 1], lists[n + 1, 1]
    # otherwise append it
    start = lists[known, 1]
    end, reach = start, FARTHEST_VOXELS * scene.h
    for e in range(scene.offsets[m], scene.offsets[m + 1]):
        t = scene.triangles[e]
        if boxes[t, 0] > x + reach or boxes[t, 3] < x - reach:
            continue
        if boxes[t, 1] > y + reach or boxes[t, 4] < y - reach:
            continue
        if boxes[t, 2] > z + reach or boxes[t, 5] < z - reach:
            continue
        scene.near[end] = t
        scene.near_boxes[end] = boxes[t]
        end += 1
    lists[known + 1, 0], lists[known + 1, 1], lists[0, 0] = m, end, known + 1
    return start, end


@njit(cache=True)
def _count_sights(scene, sample_x, sample_y, sample_z, nx, ny, nz, count_all):
    """Count the outside grid points on the side of n that have a free line of sight to a sample.

    24 grid points within three voxels are tried. Without `count_all` the search stops at the first
    free line and returns 1.
    """
    count = 0
    h, packed, bin_of, boxes = scene.h, scene.packed, scene.bin_of, scene.near_boxes
    margin = 1e-3 * h  # more than the rounding of `segment_hits`
    # lines start just above the surface
    x, y, z = sample_x + 1e-3 * h * nx, sample_y + 1e-3 * h * ny, sample_z + 1e-3 * h * nz
    blocker = -1  # the triangle that blocked the last line often blocks the next one too
    for reach in (1.0, 1.6, 2.4):
        # the eight grid points around a place above the sample
        i0 = int(np.floor((x + reach * h * nx + 0.5) / h))
        j0 = int(np.floor((y + reach * h * ny + 0.5) / h))
        k0 = int(np.floor((z + reach * h * nz + 0.5) / h))
        for corner in range(8):
            # skip grid points that are not outside, lie below the sample or are hidden as before
            i, j, k = i0 + (corner >> 2), j0 + (corner >> 1 & 1), k0 + (corner & 1)
            if not is_reached(bin_of, scene.outside, scene.whole_cells, i, j, k, True):
                continue
            qx, qy, qz = i * h - 0.5, j * h - 0.5, k * h - 0.5
            if (qx - x) * nx + (qy - y) * ny + (qz - z) * nz < 0.1 * h:
                continue
            if blocker >= 0 and segment_hits(packed[blocker], x, y, z, qx, qy, qz):
                continue
            # search for a triangle that blocks the line: it is in the bin of one of the two ends
            low_x, low_y, low_z = min(x, qx) - margin, min(y, qy) - margin, min(z, qz) - margin
            high_x, high_y, high_z = max(x, qx) + margin, max(y, qy) + margin, max(z, qz) + margin
            blocked = False
            previous = -1
            for end in range(2):
                if end == 0:
                    a = int((x + 0.5) / h) // CELL_SIDE
                    b = int((y + 0.5) / h) // CELL_SIDE
                    c = int((z + 0.5) / h) // CELL_SIDE
                else:
                    a, b, c = i // CELL_SIDE, j // CELL_SIDE, k // CELL_SIDE
                m = bin_at(bin_of, a, b, c)
                if m < 0 or m == previous:
                    continue
                previous = m
                first, last = _triangles_near_sample(scene, m, sample_x, sample_y, sample_z)
                for e in range(first, last):
                    if boxes[e, 0] > high_x or boxes[e, 1] > high_y or boxes[e, 2] > high_z:
                        continue
                    if boxes[e, 3] < low_x or boxes[e, 4] < low_y or boxes[e, 5] < low_z:
                        continue
                    if segment_hits(packed[scene.near[e]], x, y, z, qx, qy, qz):
                        blocked = True
                        blocker = scene.near[e]
                        break
                if blocked:
                    break
            if not blocked:
                count += 1
                if not count_all:
                    return count
    return count


@njit(cache=True)
def visible_sides(scene, x, y, z, nx, ny, nz):
    """Return which sides of the surface are visible from outside at a point.

    Args:
        scene: See `make_scene`. Its working memory is overwritten.
        x, y, z: The point on the surface.
        nx, ny, nz: Unit normal of the surface there.

    Returns:
        HIDDEN, FRONT, BACK or BOTH.
    """
    scene.lists[0, 0] = 0
    front = _count_sights(scene, x, y, z, nx, ny, nz, False)
    back = _count_sights(scene, x, y, z, -nx, -ny, -nz, False)
    if front and back:  # compare all lines of sight, see MIN_SIGHT_RATIO
        front = _count_sights(scene, x, y, z, nx, ny, nz, True)
        back = _count_sights(scene, x, y, z, -nx, -ny, -nz, True)
        if back < MIN_SIGHT_RATIO * front:
            back = 0
        elif front < MIN_SIGHT_RATIO * back:
            front = 0
    return (FRONT if front else HIDDEN) | (BACK if back else HIDDEN)
