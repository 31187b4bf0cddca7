"""Exact lines of sight from points of a surface to grid points outside it.

The innermost functions are compiled with two further options. `_nrt=False` leaves out the counts of
references to arrays, which are atomic operations; such a function must not create an array.
`forceinline=True` leaves out the calls: a call passes each array as nine arguments or more. Without
the two, the search for visible pieces takes twice the time.
"""

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
    build_box_tree,
    triangles_in_box,
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
ALL_PLACES = (1 << len(REACHES)) - 1  # bit mask of the places around which they end
# With so many free lines on both sides, neither has less than MIN_SIGHT_RATIO of the other.
ENOUGH = math.ceil(MIN_SIGHT_RATIO * LINES)
START_VOXELS = 1e-3  # height above the surface at which lines start
MIN_RISE_VOXELS = 0.1  # least height of a line's end above its start
# Rounding of `segment_hits`, in voxels, at the borders of boxes.
MARGIN_VOXELS = 1e-3
# A triangle blocks no line from a plane above which it rises by no more than this. It is well below
# the start of the lines.
BLOCKING_VOXELS = 0.5e-3
# Relative error that `blocked_lines` allows for. It exceeds the tolerance of `segment_hits`, times
# the length of any line, plus rounding.
BATCH_MARGIN = 1e-8
# An upper bound of the rounding of float32 coordinates and heights in the cube.
ROUNDING = 1e-6


class Scene(NamedTuple):
    """Triangles and flood fill as the compiled line-of-sight functions take them."""

    packed: NDArray[np.float64]  # [T, 16] packed triangles
    tree: BoxTree  # of the same triangles
    nodes: NDArray[np.float32]  # those of the tree
    outlines: NDArray[np.float32]  # [T, 16], see `_outlines`
    bin_of: NDArray[np.int32]  # see Bins
    outside: NDArray[np.uint64]  # this and the next: see FloodFill
    whole_cells: NDArray[np.bool_]
    h: float  # spacing of the grid


def make_scene(packed: NDArray[np.float64], flood: FloodFill) -> Scene:
    """Return the scene of packed triangles [T, 16] and the flood fill of their outside."""
    tree = build_box_tree(packed)
    return Scene(
        packed=packed,
        tree=tree,
        nodes=_rounded_outwards(tree.nodes),
        outlines=_outlines(packed, tree.boxes),
        bin_of=flood.bins.bin_of,
        outside=flood.outside,
        whole_cells=flood.whole_cells,
        h=spacing(flood.bins.resolution),
    )


def _rounded_outwards(boxes: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return boxes [N, 6] in float32 that contain those in float64."""
    rounded = boxes.astype(np.float32)
    rounded[:, :3] = np.nextafter(rounded[:, :3], np.float32(-np.inf))
    rounded[:, 3:] = np.nextafter(rounded[:, 3:], np.float32(np.inf))
    return rounded


def _outlines(packed: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return what tells whether a triangle is near a place, in one line of the processor's cache.

    Each row [16] holds the lowest and the highest corner of the triangle's box, its unit normal,
    the height of its plane above the origin, its centroid, and three unused numbers.
    """
    outlines = np.zeros((len(packed), 16), np.float32)
    outlines[:, :6] = _rounded_outwards(boxes)
    outlines[:, 6:9] = packed[:, 9:12]
    outlines[:, 9] = (packed[:, :3] * packed[:, 9:12]).sum(axis=1)
    outlines[:, 10:13] = packed[:, 12:15]
    return outlines


@njit(cache=True, _nrt=False)
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


@njit(cache=True, _nrt=False)
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


@njit(cache=True, _nrt=False)
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


@njit(cache=True, _nrt=False, forceinline=True)
def _outline_meets(outlines, t, low_x, low_y, low_z, high_x, high_y, high_z):
    """Return whether the box of row t of `outlines` overlaps another box. All are float32."""
    # without branches, which would not be predicted well
    return (
        (outlines[t, 0] <= high_x)
        & (outlines[t, 1] <= high_y)
        & (outlines[t, 2] <= high_z)
        & (outlines[t, 3] >= low_x)
        & (outlines[t, 4] >= low_y)
        & (outlines[t, 5] >= low_z)
    )


@njit(cache=True, _nrt=False)
def keep_blockers(packed, outlines, box, exact, blockers, first, last, end):
    """Append to `blockers` those of `blockers[first:last]` that come near a smaller box.

    `packed` and `outlines` are those of the scene. With `exact` the distance of a triangle counts,
    and not only its box and its plane. `blockers` must have room for all. For the other arguments
    see `find_blockers`.

    Returns:
        The new number of entries, and the number of triangles that only their distance excluded.
    """
    excluded = 0
    cx, cy, cz = 0.5 * (box[0] + box[3]), 0.5 * (box[1] + box[4]), 0.5 * (box[2] + box[5])
    hx, hy, hz = 0.5 * (box[3] - box[0]), 0.5 * (box[4] - box[1]), 0.5 * (box[5] - box[2])
    radius2 = hx * hx + hy * hy + hz * hz
    low_x, high_x = np.float32(box[0] - ROUNDING), np.float32(box[3] + ROUNDING)
    low_y, high_y = np.float32(box[1] - ROUNDING), np.float32(box[4] + ROUNDING)
    low_z, high_z = np.float32(box[2] - ROUNDING), np.float32(box[5] + ROUNDING)
    x, y, z = np.float32(cx), np.float32(cy), np.float32(cz)
    x_half, y_half, z_half = np.float32(hx), np.float32(hy), np.float32(hz)
    near2, rounding = np.float32(radius2), np.float32(ROUNDING)
    for e in range(first, last):
        t = blockers[e]
        if not _outline_meets(outlines, t, low_x, low_y, low_z, high_x, high_y, high_z):
            continue
        # a triangle much larger than the box may pass by: its plane, and then its distance
        nx, ny, nz = outlines[t, 6], outlines[t, 7], outlines[t, 8]
        height = abs(x * nx + y * ny + z * nz - outlines[t, 9])
        if height > abs(nx) * x_half + abs(ny) * y_half + abs(nz) * z_half + rounding:
            continue
        if exact:
            dx, dy, dz = x - outlines[t, 10], y - outlines[t, 11], z - outlines[t, 12]
            if dx * dx + dy * dy + dz * dz > near2 and distance2(packed[t], cx, cy, cz) > radius2:
                excluded += 1
                continue
        blockers[end] = t
        end += 1
    return end, excluded


@njit(cache=True)
def make_field(scene):
    """Return the members of a scene that `visible_sides` needs, and room for a search in its tree.

    A call costs a count of references for each array of a tuple, so the tuple is made small once.
    """
    return (
        scene.packed,
        scene.outlines,
        scene.nodes,
        scene.tree.order,
        np.empty(64, np.int64),
        scene.bin_of,
        scene.outside,
        scene.whole_cells,
        scene.h,
        np.empty((2, 3, LINES)),  # ends of the lines of sight of a sample, of both sides
    )


@njit(cache=True, _nrt=False, forceinline=True)
def side_state(scene, box):
    """Return whether none, some or all of the grid points in a box are outside."""
    return reached_in_box(scene.bin_of, scene.outside, scene.whole_cells, box)


@njit(cache=True, _nrt=False, forceinline=True)
def _box_of_line(line, margin):
    """Return the box around a line, enlarged on all sides: its low and its high corner, float32."""
    x, y, z, qx, qy, qz = line
    return (
        np.float32(min(x, qx) - margin),
        np.float32(min(y, qy) - margin),
        np.float32(min(z, qz) - margin),
        np.float32(max(x, qx) + margin),
        np.float32(max(y, qy) + margin),
        np.float32(max(z, qz) + margin),
    )


@njit(cache=True, _nrt=False)
def _blocker_in_tree(packed, outlines, nodes, order, stack, margin, line):
    """Return a triangle of the tree that blocks a line of sight, or -1.

    `line` is the start and the end of the line. `stack` is overwritten.
    """
    x, y, z, qx, qy, qz = line
    low_x, low_y, low_z, high_x, high_y, high_z = _box_of_line(line, margin)
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
            if not _outline_meets(outlines, t, low_x, low_y, low_z, high_x, high_y, high_z):
                continue
            if segment_hits(packed, t, x, y, z, qx, qy, qz):
                return t
    return -1


@njit(cache=True, _nrt=False, forceinline=True)
def _find_blocker(field, blockers, first, last, line):
    """Return a triangle that blocks a line of sight, or -1.

    `line` is the start and the end of the line. For the other arguments see `_count_sights`.
    """
    packed, outlines, nodes, order, stack, _, _, _, h, _ = field
    margin = MARGIN_VOXELS * h + ROUNDING
    if first < 0:
        return _blocker_in_tree(packed, outlines, nodes, order, stack, margin, line)
    x, y, z, qx, qy, qz = line
    low_x, low_y, low_z, high_x, high_y, high_z = _box_of_line(line, margin)
    for e in range(first, last):
        t = blockers[e]
        if not _outline_meets(outlines, t, low_x, low_y, low_z, high_x, high_y, high_z):
            continue
        if segment_hits(packed, t, x, y, z, qx, qy, qz):
            return t
    return -1


@njit(cache=True, _nrt=False, forceinline=True)
def blocked_lines(packed, t, start, ends, side, lines):
    """Return which lines of sight from one point triangle t blocks, as a bit mask.

    The results are those of `segment_hits`. All lines are tested at once, without a division. Where
    the line passes so close to a border of the test that rounding matters, `segment_hits` decides.

    Args:
        packed: [T, 16] packed triangles.
        t: The triangle.
        start: x, y, z of the point.
        ends: float64 [2, 3, LINES]. Line p ends at `ends[side, :, p]`.
        side: See `ends`.
        lines: Bit mask of the lines to test.
    """
    x, y, z = start
    sx, sy, sz = x - packed[t, 0], y - packed[t, 1], z - packed[t, 2]
    ux, uy, uz = packed[t, 3], packed[t, 4], packed[t, 5]
    vx, vy, vz = packed[t, 6], packed[t, 7], packed[t, 8]
    # det, u * det, v * det of Moeller and Trumbore are products of the direction with one vector
    # each, and s * det does not depend on it. All are negated if the point lies below the plane.
    gx, gy, gz = sy * uz - sz * uy, sz * ux - sx * uz, sx * uy - sy * ux
    depth = vx * gx + vy * gy + vz * gz
    sign = 1.0 if depth >= 0 else -1.0
    depth *= sign
    gx, gy, gz = sign * gx, sign * gy, sign * gz
    ax, ay, az = (
        sign * (vy * sz - vz * sy),
        sign * (vz * sx - vx * sz),
        sign * (vx * sy - vy * sx),
    )
    nx, ny, nz = (
        sign * (vy * uz - vz * uy),
        sign * (vz * ux - vx * uz),
        sign * (vx * uy - vy * ux),
    )
    # an upper bound of rounding and of the tolerance of `segment_hits`
    size = 2 * packed[t, 15]
    margin = BATCH_MARGIN * size * (size + abs(sx) + abs(sy) + abs(sz))
    sure, unsure = np.int64(0), np.int64(0)
    for p in range(LINES):
        dx, dy, dz = ends[side, 0, p] - x, ends[side, 1, p] - y, ends[side, 2, p] - z
        det = dx * nx + dy * ny + dz * nz
        u = dx * ax + dy * ay + dz * az
        v = dx * gx + dy * gy + dz * gz
        inside = u if u < v else v
        rest = det - u - v
        inside = inside if inside < rest else rest
        ahead = det - depth
        inside = inside if inside < ahead else ahead
        sure |= np.int64(inside > margin) << p
        unsure |= np.int64(inside > -margin) << p
    if depth <= margin:  # the point may lie in the plane, so that the sign is not known
        sure, unsure = 0, lines
    unsure &= lines & ~sure
    line = 0
    while unsure >> line:
        if unsure >> line & 1:
            qx, qy, qz = ends[side, 0, line], ends[side, 1, line], ends[side, 2, line]
            if segment_hits(packed, t, x, y, z, qx, qy, qz):
                sure |= 1 << line
        line += 1
    return sure & lines


@njit(cache=True, _nrt=False, forceinline=True)
def _write_ends(field, sample, side, place):
    """Write the ends of the eight lines of sight of one side of a sample around one place.

    Returns a bit mask of the lines that end at an outside grid point above the sample. `sample` is
    the start of the lines and the unit normal of the side.
    """
    bin_of, outside, whole_cells, h, ends = field[5:]
    x, y, z, nx, ny, nz = sample
    reach = REACHES[place]
    i0 = int(np.floor((x + reach * h * nx + 0.5) / h))
    j0 = int(np.floor((y + reach * h * ny + 0.5) / h))
    k0 = int(np.floor((z + reach * h * nz + 0.5) / h))
    corners = reached_corners(bin_of, outside, whole_cells, i0, j0, k0)
    if corners == 0:
        return 0
    above = 0
    for corner in range(8):
        i, j, k = i0 + (corner >> 2 & 1), j0 + (corner >> 1 & 1), k0 + (corner & 1)
        qx, qy, qz = i * h - 0.5, j * h - 0.5, k * h - 0.5
        rise = (qx - x) * nx + (qy - y) * ny + (qz - z) * nz
        above |= int(rise >= MIN_RISE_VOXELS * h) << corner
        line = 8 * place + corner
        ends[side, 0, line], ends[side, 1, line], ends[side, 2, line] = qx, qy, qz
    return (corners & above) << 8 * place


@njit(cache=True, _nrt=False, forceinline=True)
def _count_sights(field, blockers, first, last, sample, side, progress, most, hints):
    """Count the outside grid points on one side of a sample that have a free line of sight to it.

    LINES grid points within three voxels are tried, until `most` are free. `progress` is a bit mask
    of the places whose lines were not looked up before, a bit mask of further lines that were not
    tried, and the count so far. `blockers[first:last]` are the triangles that can block a line; if
    `first` is negative, they are searched in the tree. `sample` is the point and the unit normal of
    `side` 0. For `field` and `hints` see `visible_sides`.

    Returns the new progress.
    """
    packed, h, ends = field[0], field[8], field[9]
    places, lines, count = progress
    sign = 1.0 - 2.0 * side
    x, y, z, nx, ny, nz = sample
    nx, ny, nz = sign * nx, sign * ny, sign * nz
    # lines start just above the surface
    x, y, z = x + START_VOXELS * h * nx, y + START_VOXELS * h * ny, z + START_VOXELS * h * nz
    line, blocker = hints[side, LINES], -1
    # the place of the line that was free last comes first, and then all others
    wanted = 1 << line // 8 if places == ALL_PLACES else 0
    while count < most:
        for place in range(len(REACHES)):
            if wanted >> place & 1:
                lines |= _write_ends(field, (x, y, z, nx, ny, nz), side, place)
        places &= ~wanted
        # what blocked the last line often blocks other lines, too
        if blocker >= 0 and lines:
            blocked = blocked_lines(packed, blocker, (x, y, z), ends, side, lines)
            lines &= ~blocked
            for other in range(LINES):
                if blocked >> other & 1:
                    hints[side, other] = blocker
            blocker = -1
        if lines == 0:
            if places == 0:
                break
            wanted = places
            continue
        # search for a triangle that blocks the next line, in the likely one first
        while not lines >> line & 1:
            line = line + 1 if line + 1 < LINES else 0
        lines &= ~(1 << line)
        qx, qy, qz = ends[side, 0, line], ends[side, 1, line], ends[side, 2, line]
        blocker, wanted = hints[side, line], 0
        if blocker < 0 or not segment_hits(packed, blocker, x, y, z, qx, qy, qz):
            blocker = _find_blocker(field, blockers, first, last, (x, y, z, qx, qy, qz))
        if blocker < 0:
            hints[side, LINES] = line
            count += 1
        else:
            hints[side, line] = blocker
            wanted = places
    return places, lines, count


@njit(cache=True, _nrt=False, forceinline=True)
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
    ahead = (ALL_PLACES if open_sides & FRONT else 0, 0, 0)
    behind = (ALL_PLACES if open_sides & BACK else 0, 0, 0)
    most, is_last = 1, False
    while True:
        for side in range(2):
            start, end = (middle, last) if side else (first, middle)
            progress = behind if side else ahead
            progress = _count_sights(
                field, blockers, start, end, sample, side, progress, most, hints
            )
            ahead = ahead if side else progress
            behind = progress if side else behind
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


@njit(cache=True, _nrt=False)
def clear_hints(hints):
    """Reset the hints of `visible_sides`, in place."""
    hints[:] = -1
    hints[:, LINES] = 0
