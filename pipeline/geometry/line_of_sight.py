"""Lines of sight from points of the surface to the exterior, exact, past every triangle in the way."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.grid import CELL_SIDE, spacing
from pipeline.core.primitives.triangles import segment_hits
from pipeline.geometry.flood_fill import FloodFill, is_reached

HIDDEN, FRONT, BACK, BOTH = (
    0,
    1,
    2,
    3,
)  # seen from: nowhere, the normal's side, the other side, both
GLIMPSE = 0.2  # of what the other side sees
FARTHEST_VOXELS = (
    4.0  # a line of sight stays this close to its sample along each axis: at most 2.4 + 0.5 + 1
)


class Scene(NamedTuple):
    """What lines of sight run through, as compiled code takes it."""

    packed: NDArray[np.float64]  # [T, 15] of `pack`
    boxes: NDArray[np.float64]  # [T, 6] lowest and highest corner of each triangle
    bin_of: NDArray[np.int32]  # as in Bins
    offsets: NDArray[np.int64]
    triangles: NDArray[np.int32]
    outside: NDArray[np.uint64]  # as in FloodFill
    whole_cells: NDArray[np.bool_]
    h: float  # spacing of the grid
    near: NDArray[np.int32]  # scratch of `_near_sample`: the lists of triangles near one sample
    near_boxes: NDArray[np.float64]  # their boxes
    lists: NDArray[
        np.int64
    ]  # [1 + 8, 2]: how many lists there are; then of each its cell and where in `near` it ends


def make_scene(packed: NDArray[np.float64], flood: FloodFill) -> Scene:
    """The triangles of `pack` among an exterior."""
    bins = flood.bins
    most = 8 * np.diff(bins.offsets).max(initial=0)
    corners = np.stack(
        [packed[:, :3], packed[:, :3] + packed[:, 3:6], packed[:, :3] + packed[:, 6:9]]
    )
    return Scene(
        packed, np.concatenate([corners.min(0), corners.max(0)], axis=1), bins.bin_of, bins.offsets, bins.triangles,
        flood.outside, flood.whole_cells, spacing(bins.resolution),
        np.empty(most, np.int32), np.empty((most, 6)), np.zeros((9, 2), np.int64),
    )  # fmt: skip


@njit(cache=True)
def _near_sample(scene, m, x, y, z):
    """Where in scene.near the triangles of bin m that come near the sample (x, y, z) begin and end.

    Listed once a sample, when a line first asks for the bin: dozens of lines then test a handful of triangles, not
    all of a bin. scene.lists[0, 0] = 0 begins a new sample.
    """
    lists, boxes = scene.lists, scene.boxes
    known = lists[0, 0]
    for n in range(known):
        if lists[n + 1, 0] == m:
            return lists[n, 1], lists[n + 1, 1]
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
def _sees_exterior(scene, sample_x, sample_y, sample_z, nx, ny, nz, every):
    """How many exterior grid points within three voxels on the side of n have a free line of sight to the sample.

    Stops at the first unless `every` one of the 24 tried is asked for.
    """
    seen = 0
    h, packed, bin_of, boxes = scene.h, scene.packed, scene.bin_of, scene.near_boxes
    margin = 1e-3 * h  # more than the rounding of `segment_hits`
    x, y, z = sample_x + 1e-3 * h * nx, sample_y + 1e-3 * h * ny, sample_z + 1e-3 * h * nz
    size = len(bin_of)
    blocker = -1  # what hid the last candidate mostly hides the next one too
    for reach in (1.0, 1.6, 2.4):
        i0 = int(np.floor((x + reach * h * nx + 0.5) / h))
        j0 = int(np.floor((y + reach * h * ny + 0.5) / h))
        k0 = int(np.floor((z + reach * h * nz + 0.5) / h))
        for corner in range(8):
            i, j, k = i0 + (corner >> 2), j0 + (corner >> 1 & 1), k0 + (corner & 1)
            if not is_reached(bin_of, scene.outside, scene.whole_cells, i, j, k, True):
                continue
            qx, qy, qz = i * h - 0.5, j * h - 0.5, k * h - 0.5
            if (qx - x) * nx + (qy - y) * ny + (qz - z) * nz < 0.1 * h:
                continue
            if blocker >= 0 and segment_hits(packed[blocker], x, y, z, qx, qy, qz):
                continue
            low_x, low_y, low_z = min(x, qx) - margin, min(y, qy) - margin, min(z, qz) - margin
            high_x, high_y, high_z = max(x, qx) + margin, max(y, qy) + margin, max(z, qz) + margin
            blocked = False
            previous = -1
            # a triangle in the way is within reach of the cell at one end of the line or the other
            for end in range(2):
                if end == 0:
                    a, b, c = (
                        int((x + 0.5) / h) // CELL_SIDE,
                        int((y + 0.5) / h) // CELL_SIDE,
                        int((z + 0.5) / h) // CELL_SIDE,
                    )
                else:
                    a, b, c = i // CELL_SIDE, j // CELL_SIDE, k // CELL_SIDE
                if min(a, b, c) < 0 or max(a, b, c) >= size:
                    continue
                m = bin_of[a, b, c]
                if m < 0 or m == previous:
                    continue
                previous = m
                first, last = _near_sample(scene, m, sample_x, sample_y, sample_z)
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
                seen += 1
                if not every:
                    return seen
    return seen


@njit(cache=True)
def visible_sides(scene, x, y, z, nx, ny, nz):
    """HIDDEN, FRONT, BACK or BOTH for a point of the surface with unit normal n."""
    scene.lists[0, 0] = 0
    front = _sees_exterior(scene, x, y, z, nx, ny, nz, False)
    back = _sees_exterior(scene, x, y, z, -nx, -ny, -nz, False)
    if front and back:  # a glimpse through a crack does not make a wall a sheet
        front = _sees_exterior(scene, x, y, z, nx, ny, nz, True)
        back = _sees_exterior(scene, x, y, z, -nx, -ny, -nz, True)
        if back < GLIMPSE * front:
            back = 0
        elif front < GLIMPSE * back:
            front = 0
    return (FRONT if front else HIDDEN) | (BACK if back else HIDDEN)
