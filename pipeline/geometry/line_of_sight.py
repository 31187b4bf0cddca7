"""Exact lines of sight from points of a surface to grid points outside it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.grid import spacing
from pipeline.core.primitives.triangles import distance2, segment_hits
from pipeline.geometry.box_tree import (
    LEAF,
    BoxTree,
    boxes_meet,
    build_box_tree,
    triangles_in_box,
    with_room,
)
from pipeline.geometry.flood_fill import FloodFill, reached_corners, reached_in_box

# Sides of a surface that are visible from outside: none, the side of its normal, the other, both.
HIDDEN = 0
FRONT = 1
BACK = 2
BOTH = 3
# If both sides are visible, a side counts only if it has at least this share of the other side's
# free lines of sight. Otherwise a line through a crack would make a wall of a solid a sheet.
MIN_SIGHT_RATIO = 0.2
# Lines end at grid points around three places above the sample, at these heights in voxels.
REACHES = (1.0, 1.6, 2.4)
LINES = 8 * len(REACHES)  # lines of sight of one side of a sample
# With so many free lines on both sides, neither has less than MIN_SIGHT_RATIO of the other.
ENOUGH = math.ceil(MIN_SIGHT_RATIO * LINES)
START_VOXELS = 1e-3  # height above the surface at which lines start
MIN_RISE_VOXELS = 0.1  # least height of a line's end above its start
# Rounding of `segment_hits`, in voxels, at the borders of boxes.
MARGIN_VOXELS = 1e-3
# A triangle blocks no line from a plane above which it rises by no more than this. It is well below
# the start of the lines.
BLOCKING_VOXELS = 0.5e-3


class Scene(NamedTuple):
    """Triangles and flood fill as the compiled line-of-sight functions take them."""

    packed: NDArray[np.float64]  # [T, 16] packed triangles
    tree: BoxTree  # of the same triangles
    bin_of: NDArray[np.int32]  # see Bins
    outside: NDArray[np.uint64]  # this and the next: see FloodFill
    whole_cells: NDArray[np.bool_]
    h: float  # spacing of the grid


def make_scene(packed: NDArray[np.float64], flood: FloodFill) -> Scene:
    """Return the scene of packed triangles [T, 16] and the flood fill of their outside."""
    return Scene(
        packed=packed,
        tree=build_box_tree(packed),
        bin_of=flood.bins.bin_of,
        outside=flood.outside,
        whole_cells=flood.whole_cells,
        h=spacing(flood.bins.resolution),
    )


@njit(cache=True)
def write_sight_box(region, sign, packed, t, h, box):
    """Write the box of all lines of sight from samples on one side of triangle t.

    Args:
        region: float64 [6] lowest and highest coordinates of the samples.
        sign: 1.0 for the side of the normal, -1.0 for the other.
        packed: [T, 16] packed triangles.
        t: The triangle.
        h: Spacing of the grid.
        box: float64 [6], overwritten.
    """
    for k in range(3):
        # a line ends at a grid point less than one voxel from a place above the sample
        rise = sign * REACHES[2] * h * packed[t, 9 + k]
        border = (1 + START_VOXELS + 2 * MARGIN_VOXELS) * h
        box[k] = region[k] + min(rise, 0.0) - border
        box[3 + k] = region[3 + k] + max(rise, 0.0) + border


@njit(cache=True)
def write_high_box(region, sign, packed, t, h, box):
    """Write the box of the ends of the longest eight lines from samples on one side of triangle t.

    They rise by more than REACHES[2] - sqrt(3) voxels, so none of them lies below its sample. For
    the arguments see `write_sight_box`.
    """
    for k in range(3):
        rise = sign * REACHES[2] * h * packed[t, 9 + k]
        border = (1 + START_VOXELS + 2 * MARGIN_VOXELS) * h
        box[k] = region[k] + rise - border
        box[3 + k] = region[3 + k] + rise + border


@njit(cache=True)
def _rises_above(packed, j, sign, t, height):
    """Return whether triangle j reaches more than `height` above one side of triangle t's plane."""
    nx, ny, nz = sign * packed[t, 9], sign * packed[t, 10], sign * packed[t, 11]
    a = (
        (packed[j, 0] - packed[t, 0]) * nx
        + (packed[j, 1] - packed[t, 1]) * ny
        + (packed[j, 2] - packed[t, 2]) * nz
    )
    b = packed[j, 3] * nx + packed[j, 4] * ny + packed[j, 5] * nz
    c = packed[j, 6] * nx + packed[j, 7] * ny + packed[j, 8] * nz
    return a + max(0.0, b, c) > height


@njit(cache=True)
def find_blockers(scene, t, sign, box, blockers, end):
    """Append to `blockers` the triangles that can block a line of sight inside a box.

    A triangle that does not rise above triangle t blocks no line that starts on it.

    Args:
        scene: See `make_scene`.
        t: The triangle on which the lines start.
        sign: The side on which they start, see `write_sight_box`.
        box: float64 [6] that contains the lines.
        blockers: int32 array whose first `end` entries are kept.
        end: Number of entries in use.

    Returns:
        The array, a longer copy if it was full, and the new number of entries.
    """
    first = end
    blockers, last = triangles_in_box(scene.tree, box, blockers, end)
    for e in range(first, last):
        if _rises_above(scene.packed, blockers[e], sign, t, BLOCKING_VOXELS * scene.h):
            blockers[end] = blockers[e]
            end += 1
    return blockers, end


@njit(cache=True)
def keep_blockers(packed, boxes, box, exact, blockers, first, last, end):
    """Append to `blockers` those of `blockers[first:last]` that come near a smaller box.

    `packed` and `boxes` are those of the scene. With `exact` the distance of a triangle counts, and
    not only its box and its plane. For the other arguments and the results see `find_blockers`.
    """
    blockers = with_room(blockers, end, last - first)
    cx, cy, cz = 0.5 * (box[0] + box[3]), 0.5 * (box[1] + box[4]), 0.5 * (box[2] + box[5])
    hx, hy, hz = 0.5 * (box[3] - box[0]), 0.5 * (box[4] - box[1]), 0.5 * (box[5] - box[2])
    radius2 = hx * hx + hy * hy + hz * hz
    for e in range(first, last):
        t = blockers[e]
        if not boxes_meet(boxes, t, box):
            continue
        # a triangle much larger than the box may pass by: its plane, and then its distance
        nx, ny, nz = packed[t, 9], packed[t, 10], packed[t, 11]
        height = (cx - packed[t, 0]) * nx + (cy - packed[t, 1]) * ny + (cz - packed[t, 2]) * nz
        if abs(height) > abs(nx) * hx + abs(ny) * hy + abs(nz) * hz:
            continue
        if exact and distance2(packed[t], cx, cy, cz) > radius2:
            continue
        blockers[end] = t
        end += 1
    return blockers, end


@njit(cache=True)
def make_field(scene):
    """Return the members of a scene that `visible_sides` needs, and room for a search in its tree.

    A call costs a count of references for each array of a tuple, so the tuple is made small once.
    """
    return (
        scene.packed,
        scene.tree.boxes,
        scene.tree.nodes,
        scene.tree.order,
        np.empty(64, np.int64),
        scene.bin_of,
        scene.outside,
        scene.whole_cells,
        scene.h,
    )


@njit(cache=True)
def side_state(scene, box):
    """Return whether none, some or all of the grid points in a box are outside."""
    return reached_in_box(scene.bin_of, scene.outside, scene.whole_cells, box)


@njit(cache=True)
def _blocker_in_tree(packed, boxes, nodes, order, stack, margin, line):
    """Return a triangle of the tree that blocks a line of sight, or -1.

    `line` is the start and the end of the line. `stack` is overwritten.
    """
    x, y, z, qx, qy, qz = line
    low_x, low_y, low_z = min(x, qx) - margin, min(y, qy) - margin, min(z, qz) - margin
    high_x, high_y, high_z = max(x, qx) + margin, max(y, qy) + margin, max(z, qz) + margin
    leaves = len(nodes) // 2
    stack[0] = 1
    depth = 1
    while depth > 0:
        depth -= 1
        n = stack[depth]
        if nodes[n, 0] > high_x or nodes[n, 1] > high_y or nodes[n, 2] > high_z:
            continue
        if nodes[n, 3] < low_x or nodes[n, 4] < low_y or nodes[n, 5] < low_z:
            continue
        if n < leaves:
            stack[depth], stack[depth + 1] = 2 * n + 1, 2 * n
            depth += 2
            continue
        for place in range(LEAF * (n - leaves), LEAF * (n - leaves + 1)):
            t = order[place]
            if t < 0:
                continue
            if boxes[t, 0] > high_x or boxes[t, 1] > high_y or boxes[t, 2] > high_z:
                continue
            if boxes[t, 3] < low_x or boxes[t, 4] < low_y or boxes[t, 5] < low_z:
                continue
            if segment_hits(packed, t, x, y, z, qx, qy, qz):
                return t
    return -1


@njit(cache=True)
def _count_sights(field, blockers, first, last, sample, side, progress, most, hints):
    """Count the outside grid points on one side of a sample that have a free line of sight to it.

    LINES grid points within three voxels are tried, until `most` are free. `progress` is the number
    of the first line, the number of lines tried before and the count so far. `blockers[first:last]`
    are the triangles that can block a line; if `first` is negative, they are searched in the tree.
    `sample` is the point and the unit normal of `side` 0. For `field` and `hints` see
    `visible_sides`.

    Returns the new progress.
    """
    packed, boxes, nodes, order, stack, bin_of, outside, whole_cells, h = field
    start, turn, count = progress
    sign = 1.0 - 2.0 * side
    x, y, z, nx, ny, nz = sample
    nx, ny, nz = sign * nx, sign * ny, sign * nz
    margin = MARGIN_VOXELS * h
    # lines start just above the surface
    x, y, z = x + START_VOXELS * h * nx, y + START_VOXELS * h * ny, z + START_VOXELS * h * nz
    blocker = -1  # the triangle that blocked the last line often blocks the next one too
    place, i0, j0, k0, corners = -1, 0, 0, 0, 0
    while turn < LINES and count < most:
        line = start + turn
        if line >= LINES:
            line -= LINES
        # the eight grid points around a place above the sample
        if line // 8 != place:
            place = line // 8
            reach = REACHES[place]
            i0 = int(np.floor((x + reach * h * nx + 0.5) / h))
            j0 = int(np.floor((y + reach * h * ny + 0.5) / h))
            k0 = int(np.floor((z + reach * h * nz + 0.5) / h))
            corners = reached_corners(bin_of, outside, whole_cells, i0, j0, k0)
        # skip grid points that are not outside or lie below the sample
        if corners == 0:
            turn += 8 - line % 8
            continue
        turn += 1
        if not corners >> (line & 7) & 1:
            continue
        i, j, k = i0 + (line >> 2 & 1), j0 + (line >> 1 & 1), k0 + (line & 1)
        qx, qy, qz = i * h - 0.5, j * h - 0.5, k * h - 0.5
        if (qx - x) * nx + (qy - y) * ny + (qz - z) * nz < MIN_RISE_VOXELS * h:
            continue
        # search for a triangle that blocks the line, in the likely ones first
        if blocker >= 0 and segment_hits(packed, blocker, x, y, z, qx, qy, qz):
            hints[side, line] = blocker
            continue
        t = hints[side, line]
        if t >= 0 and t != blocker and segment_hits(packed, t, x, y, z, qx, qy, qz):
            blocker = t
            continue
        found = -1
        if first < 0:
            found = _blocker_in_tree(
                packed, boxes, nodes, order, stack, margin, (x, y, z, qx, qy, qz)
            )
        else:
            low_x, low_y, low_z = min(x, qx) - margin, min(y, qy) - margin, min(z, qz) - margin
            high_x, high_y, high_z = max(x, qx) + margin, max(y, qy) + margin, max(z, qz) + margin
            for e in range(first, last):
                t = blockers[e]
                if boxes[t, 0] > high_x or boxes[t, 1] > high_y or boxes[t, 2] > high_z:
                    continue
                if boxes[t, 3] < low_x or boxes[t, 4] < low_y or boxes[t, 5] < low_z:
                    continue
                if segment_hits(packed, t, x, y, z, qx, qy, qz):
                    found = t
                    break
        if found >= 0:
            blocker = found
            hints[side, line] = found
        else:
            hints[side, LINES] = line
            count += 1
    return start, turn, count


@njit(cache=True)
def visible_sides(field, blockers, first, middle, last, open_sides, point, normal, hints):
    """Return which sides of the surface are visible from outside at a point.

    Args:
        field: See `make_field`.
        blockers: int32 array. `blockers[first:middle]` are the triangles that can block a line on
            the side of the normal, and `blockers[middle:last]` those of the other side. If the
            three numbers are negative, the triangles are searched in the scene's tree.
        first, middle, last: See `blockers`.
        open_sides: FRONT, BACK or BOTH: the sides on which a line can end outside.
        point: x, y, z of the point on the surface.
        normal: Unit normal of the surface there, three numbers.
        hints: int32 [2, LINES + 1] of each side: the triangle that blocked each line of an earlier
            sample or -1, and the line that was free last. They speed up the search and alter no
            result. Fill it by `clear_hints` for each triangle on which samples lie.

    Returns:
        HIDDEN, FRONT, BACK or BOTH.
    """
    sample = (point[0], point[1], point[2], normal[0], normal[1], normal[2])
    ahead = (hints[0, LINES], 0, 0) if open_sides & FRONT else (0, LINES, 0)
    behind = (hints[1, LINES], 0, 0) if open_sides & BACK else (0, LINES, 0)
    most, is_last = 1, False
    while True:
        ahead = _count_sights(field, blockers, first, middle, sample, 0, ahead, most, hints)
        behind = _count_sights(field, blockers, middle, last, sample, 1, behind, most, hints)
        front, back = ahead[2], behind[2]
        # one side alone is visible, or both have lines enough, or the ratio is known
        fewer = min(front, back)
        if fewer == 0 or fewer >= ENOUGH or is_last:
            break
        # All lines of a side with less than ENOUGH are counted by now. The other side's need to be
        # counted only until the ratio is below MIN_SIGHT_RATIO.
        is_last = most == ENOUGH
        most = int(fewer / MIN_SIGHT_RATIO) + 1 if is_last else ENOUGH
    if back < MIN_SIGHT_RATIO * front:
        back = 0
    elif front < MIN_SIGHT_RATIO * back:
        front = 0
    return (FRONT if front else HIDDEN) | (BACK if back else HIDDEN)


@njit(cache=True)
def clear_hints(hints):
    """Reset the hints of `visible_sides`, in place."""
    hints[:] = -1
    hints[:, LINES] = 0
