"""Exact sparse signed distances of a topology, as bricks.

Triangles are binned into the cells near them, and each cell's grid points look for the closest
triangle in the bin. This module is the reference; `kernels.sdf.distances` does the same on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.grid import CELL_SIDE, band, check_resolution, spacing
from pipeline.core.primitives.triangles import TIE, VOTE_ROUNDING, distance2, pack, side_vote
from pipeline.core.schema import Bricks
from pipeline.geometry import sdf_cuda
from pipeline.geometry.flood_fill import BARRIER_VOXELS, Bins, FloodFill, bin_triangles, is_reached
from pipeline.geometry.sharp_edges import near_sharp_edges
from pipeline.geometry.topology import BURIED, SHEET, SOLID, Topology

# Distance from all triangles, in voxels of the topology's grid, beyond which the flood fill tells
# the side: the nearest grid point, at most sqrt(3) / 2 away, then lies outside the barrier.
FLOOD_VOXELS = BARRIER_VOXELS + 0.87
# Half thickness of a sheet in voxels. Just above sqrt(3) / 2, so that a sheet always contains grid
# points.
SHEET_HALF_VOXELS = 0.87
# Assumed error of a float32 distance in voxels. It is larger than the true error, so the result
# does not depend on it.
SLACK = 0.01
# Voxels more than its distance up to which a triangle is tried for a point. It exceeds the margin
# by which a side has to be clear, plus the error of a float32 distance.
REACH_SLACK = 3 * SLACK
GROUP_VOXELS = 1.5 * np.sqrt(3)  # from the centre of 4^3 points to their corners, in voxels
# Side of a point: known, left to the flood fill, or to be decided in float64.
INSIDE, OUTSIDE, FLOODED, UNSURE = range(4)
ORDER_STEPS = 32  # of the distances by which triangles are ordered
CHUNK_CELLS = 4096  # cells whose float32 distances are in memory at once
DEVICES = ("cpu", "cuda")


class FloodSides(NamedTuple):
    """Sides of the grid points of the topology's grid, as the compiled functions take them."""

    h: float  # spacing of the grid
    bin_of: NDArray[np.int32]  # see Bins
    outside: NDArray[np.uint64]  # this and the next: see FloodFill
    whole_cells: NDArray[np.bool_]


def flood_sides(flood: FloodFill) -> FloodSides:
    """Return the sides of a flood fill for the compiled functions."""
    bins = flood.bins
    return FloodSides(spacing(bins.resolution), bins.bin_of, flood.outside, flood.whole_cells)


def compute_bricks(topology: Topology, resolution: int, device: str = "cpu") -> Bricks:
    """Compute the sparse signed distance field of an asset.

    sdf is the smaller of the signed distance to the solids' surface and of the distance to the
    sheets minus SHEET_HALF_VOXELS * h: the union of the solids with a thin shell around each sheet.
    Every cell with a grid point of |sdf| < tau is stored, with signs at all of its points.

    Args:
        topology: The classified triangles.
        resolution: Grid points along one side.
        device: "cpu", or "cuda" for distances within 1e-3 h of those of the CPU and the same signs.

    Raises:
        ValueError: If `resolution` is not a positive multiple of 8, or `device` is another one.
    """
    if device not in DEVICES:
        raise ValueError(f"device must be one of {DEVICES}, got {device!r}")
    tau, h = band(check_resolution(resolution)), spacing(resolution)
    half, trusted = SHEET_HALF_VOXELS * h, FLOOD_VOXELS * spacing(topology.resolution)
    packed = pack(topology.triangles)
    # beyond this distance values are clamped, and the flood fill tells the side
    bins = bin_triangles(packed, resolution, max(tau + half, trusted) / h)
    if device == "cuda":
        chunks = sdf_cuda.fill_cells(
            packed, topology.kinds, bins, topology.flood, tau=tau, half=half, trusted=trusted
        )
    else:
        chunks = _fill_on_cpu(packed, topology, bins, tau, half)
    parts = []
    for cells, active, values in chunks:
        near = near_sharp_edges(cells, topology.sharp_edges, resolution)
        sharp = np.packbits(near & active, axis=1, bitorder="little")
        parts.append((cells.astype(np.int16), values, sharp))
    cells, values, sharp = (np.concatenate(column) for column in zip(*parts))
    return Bricks(resolution=resolution, cells=cells, values=values, sharp=sharp)


def _fill_on_cpu(
    packed: NDArray[np.float64], topology: Topology, bins: Bins, tau: float, half: float
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.float16]]]:
    """Yield the active cells of one chunk at a time.

    Yields cells [m, 3], whether |sdf| < tau [m, 512], and clamp(sdf / tau, -1, 1) [m, 512].
    """
    shapes = _shapes(packed, 1.0 / float(bins.resolution - 1))
    for first in range(0, len(bins.cells), CHUNK_CELLS):
        chunk = slice(first, first + CHUNK_CELLS)
        values, active = _fill_cells(
            packed,
            shapes,
            topology.kinds,
            bins.cells[chunk],
            bins.offsets[first : first + CHUNK_CELLS + 1],
            bins.triangles,
            bins.resolution,
            tau,
            half,
            flood_sides(topology.flood),
        )
        values = values[active]
        near = np.abs(values) < np.float32(tau)
        np.clip(np.divide(values, np.float32(tau), out=values), -1, 1, out=values)
        yield bins.cells[chunk][active], near, values.astype(np.float16)


@njit(cache=True, error_model="numpy")
def _shapes(packed, h):
    """Return what distances to packed triangles take beside their corner a, float32 in voxels.

    Each row [24] holds the edges u = b - a, v = c - a and w = c - b, their inverse squared lengths,
    the unit normal, and the inward normals of the three edges in the plane.
    """
    one = np.float32(1)
    shapes = np.empty((len(packed), 24), np.float32)
    for t in range(len(packed)):
        ux, uy, uz = (
            np.float32(packed[t, 3] / h),
            np.float32(packed[t, 4] / h),
            np.float32(packed[t, 5] / h),
        )
        vx, vy, vz = (
            np.float32(packed[t, 6] / h),
            np.float32(packed[t, 7] / h),
            np.float32(packed[t, 8] / h),
        )
        nx, ny, nz = np.float32(packed[t, 9]), np.float32(packed[t, 10]), np.float32(packed[t, 11])
        wx, wy, wz = vx - ux, vy - uy, vz - uz
        row = shapes[t]
        row[0], row[1], row[2] = ux, uy, uz
        row[3], row[4], row[5] = vx, vy, vz
        row[6], row[7], row[8] = wx, wy, wz
        row[9] = one / (ux * ux + uy * uy + uz * uz)
        row[10] = one / (vx * vx + vy * vy + vz * vz)
        row[11] = one / (wx * wx + wy * wy + wz * wz)
        row[12], row[13], row[14] = nx, ny, nz
        row[15], row[16], row[17] = ny * uz - nz * uy, nz * ux - nx * uz, nx * uy - ny * ux
        row[18], row[19], row[20] = vy * nz - vz * ny, vz * nx - vx * nz, vx * ny - vy * nx
        row[21], row[22], row[23] = ny * wz - nz * wy, nz * wx - nx * wz, nx * wy - ny * wx
    return shapes


@njit(cache=True, inline="always")
def _height_and_square(px, py, pz, shape):
    """Return height above a triangle's plane and squared distance of a point. float32, in voxels.

    The point is relative to corner a. `shape` is a row of `_shapes` as a tuple. The function has no
    branches, so that a loop around it is vectorised. It is tested against the float64 reference
    `pipeline.core.primitives.triangles.distance2`.
    """
    ux, uy, uz, vx, vy, vz, wx, wy, wz, iu, iv, iw, nx, ny, nz = shape[:15]
    mux, muy, muz, mvx, mvy, mvz, mwx, mwy, mwz = shape[15:]
    zero, one = np.float32(0), np.float32(1)
    qx, qy, qz = px - ux, py - uy, pz - uz
    # closest point on each edge
    s = (px * ux + py * uy + pz * uz) * iu
    t = (px * vx + py * vy + pz * vz) * iv
    r = (qx * wx + qy * wy + qz * wz) * iw
    s = s if s > zero else zero
    t = t if t > zero else zero
    r = r if r > zero else zero
    s = s if s < one else one
    t = t if t < one else one
    r = r if r < one else one
    # squared distance to the closest edge
    sx, sy, sz = px - s * ux, py - s * uy, pz - s * uz
    tx, ty, tz = px - t * vx, py - t * vy, pz - t * vz
    rx, ry, rz = qx - r * wx, qy - r * wy, qz - r * wz
    ds = sx * sx + sy * sy + sz * sz
    dt = tx * tx + ty * ty + tz * tz
    dr = rx * rx + ry * ry + rz * rz
    edge = ds if ds < dt else dt
    edge = edge if edge < dr else dr
    # height above the plane, and whether the foot lies in the interior
    height = px * nx + py * ny + pz * nz
    inside_u = px * mux + py * muy + pz * muz
    inside_v = px * mvx + py * mvy + pz * mvz
    inside_w = qx * mwx + qy * mwy + qz * mwz
    inside = inside_u if inside_u < inside_v else inside_v
    inside = inside if inside < inside_w else inside_w
    return height, (height * height if inside > zero else edge)


@njit(cache=True, inline="always")
def _shape_at(shapes, t):
    """Return row t of shapes [T, 24] as a tuple."""
    return (
        shapes[t, 0],
        shapes[t, 1],
        shapes[t, 2],
        shapes[t, 3],
        shapes[t, 4],
        shapes[t, 5],
        shapes[t, 6],
        shapes[t, 7],
        shapes[t, 8],
        shapes[t, 9],
        shapes[t, 10],
        shapes[t, 11],
        shapes[t, 12],
        shapes[t, 13],
        shapes[t, 14],
        shapes[t, 15],
        shapes[t, 16],
        shapes[t, 17],
        shapes[t, 18],
        shapes[t, 19],
        shapes[t, 20],
        shapes[t, 21],
        shapes[t, 22],
        shapes[t, 23],
    )


@njit(cache=True, _nrt=False)
def _to_centres(packed, shapes, kinds, candidates, x, y, z, h, centres, distances, closest):
    """Write the distances of a cell's candidates to the centres of its eight groups of 4^3 points.

    All are float32 and in voxels. `centres` [3, 8] are relative to the cell's centre (x, y, z).
    Writes the distance of candidate c to `distances[c]` [8], and the least distances of solids and
    sheets to `closest` [2, 8].
    """
    closest[:] = np.inf
    for c in range(len(candidates)):
        t = candidates[c]
        shape = _shape_at(shapes, t)
        ax = np.float32((packed[t, 0] - x) / h)
        ay = np.float32((packed[t, 1] - y) / h)
        az = np.float32((packed[t, 2] - z) / h)
        for s in range(8):
            px, py, pz = centres[0, s] - ax, centres[1, s] - ay, centres[2, s] - az
            distances[c, s] = np.sqrt(_height_and_square(px, py, pz, shape)[1])
        if kinds[t] != BURIED:
            kind = kinds[t]
            for s in range(8):
                old, new = closest[kind, s], distances[c, s]
                closest[kind, s] = new if new < old else old


@njit(cache=True, _nrt=False)
def _keep_candidates(kinds, candidates, s, closest, bounds, distances, kept, scratch):
    """Keep the candidates that can be closest to some point of group s of a cell.

    Triangles of solids compete with each other, and so do sheets. A buried triangle only matters
    for the side of points near the surface: if it is as close as the closest solid and within
    `trusted`, the last of `bounds`. The others are the distances to solids and sheets beyond which
    they make no difference. `distances` and `closest` are those of `_to_centres`.

    Writes the triangles kept to `kept` and their distances to `scratch`. Returns their number.
    """
    # the points are within GROUP_VOXELS of the centre; ties have a vote
    reach = GROUP_VOXELS + REACH_SLACK
    to_solid = min(closest[0, s] + GROUP_VOXELS, bounds[0]) + reach
    to_sheet = min(closest[1, s] + GROUP_VOXELS, bounds[1]) + reach
    to_buried = min(to_solid, bounds[2] + reach)
    count = 0
    for c in range(len(candidates)):
        kind = kinds[candidates[c]]
        bound = to_solid if kind == SOLID else (to_sheet if kind == SHEET else to_buried)
        if distances[c, s] <= bound:
            kept[count], scratch[count] = candidates[c], distances[c, s]
            count += 1
    return count


@njit(cache=True, _nrt=False)
def _write_order(distances, count, order, starts):
    """Write to `order` the numbers 0 to count - 1, roughly by ascending distance.

    The order alters no result. Close triangles come first, because they rule out others. The
    distances are sorted into ORDER_STEPS equal steps. `starts` [ORDER_STEPS + 1] is overwritten.
    """
    low, high = np.float32(np.inf), np.float32(0)
    for c in range(count):
        low, high = min(low, distances[c]), max(high, distances[c])
    scale = np.float32(ORDER_STEPS - 1) / max(high - low, np.float32(SLACK))
    starts[:] = 0
    for c in range(count):
        starts[int((distances[c] - low) * scale) + 1] += 1
    for step in range(ORDER_STEPS):
        starts[step + 1] += starts[step]
    for c in range(count):
        step = int((distances[c] - low) * scale)
        order[starts[step]] = c
        starts[step] += 1


@njit(cache=True, _nrt=False)
def is_outside_exact(packed, kinds, candidates, distances, x, y, z, trusted, flood):
    """Return whether a point is outside, in float64. This definition decides the side.

    Near a solid, all solid and buried triangles within TIE of the closest one vote, and the sum of
    votes may fall below zero by no more than rounding explains. Elsewhere the sheets and the flood
    fill decide. `kernels.sdf.distances._votes` repeats these operations one by one on the GPU.
    """
    # distances to solid and buried triangles whose plane is close enough
    nearest, solid = np.inf, np.inf
    for c in range(len(candidates)):
        kind = kinds[candidates[c]]
        distances[c] = np.inf
        if kind == SHEET:
            continue
        row = packed[candidates[c]]
        height = (x - row[0]) * row[9] + (y - row[1]) * row[10] + (z - row[2]) * row[11]
        if abs(height) > (solid if kind == SOLID else nearest) + 2 * TIE:
            continue
        distances[c] = np.sqrt(distance2(row, x, y, z))
        nearest = min(nearest, distances[c])
        if kind == SOLID:
            solid = min(solid, distances[c])
    # far from solids: points at a sheet are outside, the flood fill knows the others
    if solid > trusted:
        for t in candidates:
            if kinds[t] == SHEET and np.sqrt(distance2(packed[t], x, y, z)) <= trusted:
                return True
        return flood_reached(flood, x, y, z)
    # near a solid: vote
    votes, weight = 0.0, 0.0
    for c in range(len(candidates)):
        if distances[c] <= nearest + TIE:
            vote = side_vote(packed[candidates[c]], x, y, z)
            votes += -abs(vote) if kinds[candidates[c]] == BURIED else vote
            weight += abs(vote)
    return votes + weight * VOTE_ROUNDING >= 0


@njit(cache=True, _nrt=False)
def _near_slabs(shape, ax, ay, az, limits, kind, gaps):
    """Return which slabs of 4^2 points of a group a triangle can be close to, as four bits.

    It can be close to a point whose distance to the triangle's box and whose height above its plane
    do not exceed the square root of `limits[kind, p]`. Corner a is relative to the group's centre,
    and all is float32 and in voxels. `gaps` [2, 16] is overwritten.
    """
    zero = np.float32(0)
    ux, uy, uz, vx, vy, vz = shape[:6]
    nx, ny, nz = shape[12:15]
    low_x, high_x = ax + min(zero, ux, vx), ax + max(zero, ux, vx)
    low_y, high_y = ay + min(zero, uy, vy), ay + max(zero, uy, vy)
    low_z, high_z = az + min(zero, uz, vz), az + max(zero, uz, vz)
    # the parts of y and z in the squared distance to the box and in the height
    base = nx * ax + ny * ay + nz * az
    for j in range(4):
        y = np.float32(j - 1.5)
        gap_y = max(low_y - y, y - high_y, zero)
        for k in range(4):
            z = np.float32(k - 1.5)
            gap_z = max(low_z - z, z - high_z, zero)
            gaps[0, 4 * j + k] = gap_y * gap_y + gap_z * gap_z
            gaps[1, 4 * j + k] = ny * y + nz * z - base
    slabs = 0
    for i in range(4):
        x = np.float32(i - 1.5)
        gap_x = max(low_x - x, x - high_x, zero)
        square_x, height_x = gap_x * gap_x, nx * x
        hits = np.int32(0)
        for p in range(16):
            square, height, limit = gaps[0, p] + square_x, gaps[1, p] + height_x, np.float32(0)
            limit = limits[kind, 16 * i + p]
            height2 = height * height
            hits += np.int32((square if square > height2 else height2) <= limit)
        if hits:
            slabs |= 1 << i
    return slabs


@njit(cache=True, _nrt=False)
def _lower_to_triangle(shape, ax, ay, az, grid, slabs, nearest, row, limits):
    """Lower the squared distances of 4^3 points where a triangle is closer. float32, in voxels.

    `nearest[row]` [64] is the distance to the triangles above whose plane the point does not
    clearly lie, and `nearest[row + 1]` to those below whose plane it does not clearly lie. The
    smaller of the two is the distance. If the other is clearly larger, all closest triangles see
    the point on the same side. A height of at most SLACK is not clear, because of rounding.

    Args:
        shape: A row of `_shapes`.
        ax, ay, az: Corner a relative to the centre of the points.
        grid: [3, 64] the points, relative to the same.
        slabs: The slabs of points to look at, see `_near_slabs`.
        nearest: [6, 64], updated.
        row: 0 for triangles of solids, 2 for buried ones, 4 for sheets.
        limits: [2, 64] squares of the distances of solids and sheets plus REACH_SLACK, updated.
    """
    inf, slack, reach = np.float32(np.inf), np.float32(SLACK), np.float32(REACH_SLACK)
    for slab in range(4):
        if not slabs >> slab & 1:
            continue
        for p in range(16 * slab, 16 * slab + 16):
            px, py, pz = grid[0, p] - ax, grid[1, p] - ay, grid[2, p] - az
            # values are loaded first, because stores with a mask are slow
            old_above, old_below = nearest[row, p], nearest[row + 1, p]
            height, d2 = _height_and_square(px, py, pz, shape)
            above = inf if height > slack else d2
            below = inf if height < -slack else d2
            nearest[row, p] = above if above < old_above else old_above
            nearest[row + 1, p] = below if below < old_below else old_below
        if row != 2:
            for p in range(16 * slab, 16 * slab + 16):
                above, below = nearest[row, p], nearest[row + 1, p]
                limit = np.sqrt(above if above < below else below) + reach
                limits[row // 4, p] = limit * limit


@njit(cache=True, _nrt=False, inline="always")
def flood_reached(flood, x, y, z):
    """Return whether the flood fill reached the topology's grid point nearest to (x, y, z)."""
    i = int(np.round((x + 0.5) / flood.h))
    j = int(np.round((y + 0.5) / flood.h))
    k = int(np.round((z + 0.5) / flood.h))
    return is_reached(flood.bin_of, flood.outside, flood.whole_cells, i, j, k, True)


@njit(cache=True, _nrt=False)
def _find_sides(nearest, h, trusted, distances, shells, sides):
    """Write distances to solids and sheets and the side of each of 4^3 points.

    The side is OUTSIDE or INSIDE where float32 suffices, FLOODED where the flood fill tells it, and
    else UNSURE. `nearest` [6, 64] are the squared distances of `_lower_to_triangle`.
    """
    slack, margin = SLACK * h, SLACK * h + TIE
    for p in range(64):
        distance = h * np.sqrt(min(nearest[0, p], nearest[1, p]))
        shell = h * np.sqrt(min(nearest[4, p], nearest[5, p]))
        # a buried triangle votes as if the point were below it, if the height is clear
        unclear = max(nearest[2, p], nearest[3, p])
        not_above = h * np.sqrt(min(nearest[0, p], nearest[2, p], nearest[3, p]))
        not_below = h * np.sqrt(min(nearest[1, p], unclear))
        closest = min(not_above, not_below)
        # both sides of a sheet are outside, but the flood fill does not enter its barrier
        is_near = (distance < trusted - slack) & (closest > slack)
        is_far = (distance > trusted + slack) & (abs(shell - trusted) > slack)
        far_side = OUTSIDE if shell < trusted else FLOODED
        side = far_side if is_far else UNSURE
        side = INSIDE if is_near & (not_below > closest + margin) else side
        side = OUTSIDE if is_near & (not_above > closest + margin) else side
        distances[p], shells[p], sides[p] = distance, shell, side


@njit(cache=True, _nrt=False)
def _possible_ties(packed, kinds, candidates, x, y, z, distance, trusted, ties):
    """List the candidates on which the side of a point can depend.

    These are the solid and buried triangles that can be as close as `distance`, an upper bound of
    the distance to the solids, and the sheets that can be within `trusted`. Writes them to `ties`
    in their order and returns their number.
    """
    count = 0
    for c in range(len(candidates)):
        t = candidates[c]
        bound = trusted if kinds[t] == SHEET else distance
        dx, dy, dz = x - packed[t, 12], y - packed[t, 13], z - packed[t, 14]
        reach = packed[t, 15] + bound + 4 * TIE
        if dx * dx + dy * dy + dz * dz <= reach * reach:
            ties[count] = t
            count += 1
    return count


@njit(cache=True, _nrt=False)
def _fill_cell(packed, shapes, kinds, candidates, cell, last, tau, half, flood, room, out):
    """Write the signed distances of one cell's 512 points. Return whether any is inside the band.

    Near a surface the closest triangle decides the side. Farther away the flood fill does, because
    the nearest grid point of the topology is then outside the barrier. Where float32 does not
    suffice, `is_outside_exact` decides. `room` is that of `_make_room`.
    """
    kept, ties, scratch, exact, to_centres, closest, nearest, limits, gaps = room[:9]
    grid, centres, distances, shells, sides, order, starts = room[9:]
    active = False
    h = 1.0 / last
    radius = GROUP_VOXELS * h
    trusted, slack = FLOOD_VOXELS * flood.h, SLACK * h
    # Distances in voxels up to which solids, sheets and buried triangles count: the clamp hides
    # larger ones, and the flood fill tells the side of points that are farther than `trusted`.
    bounds = max(tau, trusted) / h, max(tau + half, trusted) / h, trusted / h
    # distances of all candidates to the centres of the eight groups of 4^3 points
    x0, y0, z0 = CELL_SIDE * cell[0], CELL_SIDE * cell[1], CELL_SIDE * cell[2]
    x, y, z = (x0 + 3.5) * h - 0.5, (y0 + 3.5) * h - 0.5, (z0 + 3.5) * h - 0.5
    _to_centres(packed, shapes, kinds, candidates, x, y, z, h, centres, to_centres, closest)
    for sub in range(8):
        # first point of this eighth of the cell in `out`, its grid index and the eighth's centre
        first = 4 * (64 * (sub >> 2) + 8 * (sub >> 1 & 1) + (sub & 1))
        x0 = CELL_SIDE * cell[0] + 4 * (sub >> 2)
        y0 = CELL_SIDE * cell[1] + 4 * (sub >> 1 & 1)
        z0 = CELL_SIDE * cell[2] + 4 * (sub & 1)
        x, y, z = (x0 + 1.5) * h - 0.5, (y0 + 1.5) * h - 0.5, (z0 + 1.5) * h - 0.5
        # no surface is near: all points have the same side, and the clamp hides their distances
        nearest_surface = min(h * closest[0, sub], h * closest[1, sub] - half)
        if nearest_surface - radius - slack > max(tau, trusted):
            far = np.inf if flood_reached(flood, x, y, z) else -np.inf
            for p in range(64):
                out[first + 64 * (p // 16) + 8 * (p // 4 % 4) + p % 4] = far
            continue
        count = _keep_candidates(kinds, candidates, sub, closest, bounds, to_centres, kept, scratch)
        # distances in float32, from the closest candidate on
        nearest[:] = np.inf
        limits[0], limits[1] = (bounds[0] + REACH_SLACK) ** 2, (bounds[1] + REACH_SLACK) ** 2
        _write_order(scratch, count, order, starts)
        for place in range(count):
            t = kept[order[place]]
            kind = kinds[t]
            shape = _shape_at(shapes, t)
            ax = np.float32((packed[t, 0] - x) / h)
            ay = np.float32((packed[t, 1] - y) / h)
            az = np.float32((packed[t, 2] - z) / h)
            slabs = _near_slabs(shape, ax, ay, az, limits, 1 if kind == SHEET else 0, gaps)
            if slabs:
                row = 0 if kind == SOLID else (2 if kind == BURIED else 4)
                _lower_to_triangle(shape, ax, ay, az, grid, slabs, nearest, row, limits)
        # sides
        _find_sides(nearest, h, trusted, distances, shells, sides)
        for p in range(64):
            i, j, k = p // 16, p // 4 % 4, p % 4
            if sides[p] == FLOODED:
                px, py, pz = x + (i - 1.5) * h, y + (j - 1.5) * h, z + (k - 1.5) * h
                sides[p] = OUTSIDE if flood_reached(flood, px, py, pz) else INSIDE
            elif sides[p] == UNSURE:
                # the same operations as on the GPU give the same position
                px, py, pz = (x0 + i) / last - 0.5, (y0 + j) / last - 0.5, (z0 + k) / last - 0.5
                bound = distances[p] + slack
                count_ties = _possible_ties(
                    packed, kinds, kept[:count], px, py, pz, bound, trusted, ties
                )
                is_outside = is_outside_exact(
                    packed, kinds, ties[:count_ties], exact, px, py, pz, trusted, flood
                )
                sides[p] = OUTSIDE if is_outside else INSIDE
        in_band = 0
        for p in range(64):
            signed = distances[p] if sides[p] == OUTSIDE else -distances[p]
            signed = min(signed, shells[p] - half)
            out[first + 64 * (p // 16) + 8 * (p // 4 % 4) + p % 4] = signed
            in_band += abs(signed) < tau
        active = active or in_band > 0
    return active


@njit(cache=True)
def _make_room(longest):
    """Return the arrays that `_fill_cell` overwrites, for up to `longest` candidates."""
    grid = np.empty((3, 64), np.float32)  # the 4^3 points relative to their centre, in voxels
    for p in range(64):
        grid[0, p], grid[1, p], grid[2, p] = p // 16 - 1.5, p // 4 % 4 - 1.5, p % 4 - 1.5
    centres = np.empty((3, 8), np.float32)  # of the groups, relative to that of the cell
    for s in range(8):
        centres[0, s] = 2.0 if s >> 2 else -2.0
        centres[1, s] = 2.0 if s >> 1 & 1 else -2.0
        centres[2, s] = 2.0 if s & 1 else -2.0
    return (
        np.empty(longest, np.int32),  # candidates that are kept
        np.empty(longest, np.int32),  # candidates that can tie
        np.empty(longest, np.float32),  # distances of the kept candidates to the group's centre
        np.empty(longest),  # float64 distances of the candidates that can tie
        np.empty((longest, 8), np.float32),  # see `_to_centres`
        np.empty((2, 8), np.float32),
        # squared distances to solids (not above, not below), buried triangles and sheets (same)
        np.empty((6, 64), np.float32),
        np.empty((2, 64), np.float32),  # see `_lower_to_triangle`
        np.empty((2, 16), np.float32),  # see `_near_slabs`
        grid,
        centres,
        np.empty(64),  # see `_find_sides`
        np.empty(64),
        np.empty(64, np.uint8),
        np.empty(longest, np.int32),  # see `_write_order`
        np.empty(ORDER_STEPS + 1, np.int32),
    )


@njit(cache=True)
def _fill_cells(packed, shapes, kinds, cells, offsets, triangles, resolution, tau, half, flood):
    """Return the signed distances of cells and which of them are active: [M, 512] and [M].

    The candidates of cell m are `triangles[offsets[m]:offsets[m + 1]]`.
    """
    last = float(resolution - 1)
    values = np.empty((len(cells), CELL_SIDE**3), np.float32)
    active = np.empty(len(cells), np.bool_)
    room = _make_room((offsets[1:] - offsets[:-1]).max())
    for m in range(len(cells)):
        own = triangles[offsets[m] : offsets[m + 1]]
        active[m] = _fill_cell(
            packed, shapes, kinds, own, cells[m], last, tau, half, flood, room, values[m]
        )
    return values, active
