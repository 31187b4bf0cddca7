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
    for first in range(0, len(bins.cells), CHUNK_CELLS):
        chunk = slice(first, first + CHUNK_CELLS)
        values, active = _fill_cells(
            packed,
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


@njit(cache=True)
def _narrow_candidates(packed, kinds, candidates, x, y, z, radius, trusted, kept, scratch):
    """Keep the candidates that can be closest to some point within `radius` of (x, y, z).

    Triangles of solids compete with each other, and so do sheets. A buried triangle only matters
    for the side of points near the surface: if it is as close as the closest solid and within
    `trusted`.

    Writes the triangles kept to `kept` and their distances to `scratch`. Returns their number, the
    distance to the closest solid and that to the closest sheet.
    """
    # distances, where the bounding sphere does not exclude the candidate
    solid, sheet = np.inf, np.inf
    for c in range(len(candidates)):
        t = candidates[c]
        kind = kinds[t]
        row = packed[t]
        dx, dy, dz = x - row[12], y - row[13], z - row[14]
        away = np.sqrt(dx * dx + dy * dy + dz * dz) - row[15]
        bound = sheet if kind == SHEET else solid
        if away > bound + 2 * radius or (kind == BURIED and away > trusted + radius):
            scratch[c] = np.inf
            continue
        distance = np.sqrt(distance2(row, x, y, z))
        scratch[c] = distance
        if kind == SOLID:
            solid = min(solid, distance)
        elif kind == SHEET:
            sheet = min(sheet, distance)
    # keep what can be closest; 2 * TIE more, because ties have a vote
    count = 0
    for c in range(len(candidates)):
        kind = kinds[candidates[c]]
        bound = (sheet if kind == SHEET else solid) + 2 * radius
        if kind == BURIED:
            bound = min(bound, trusted + radius)
        if scratch[c] <= bound + 2 * TIE:
            kept[count], scratch[count] = candidates[c], scratch[c]
            count += 1
    return count, solid, sheet


@njit(cache=True)
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


@njit(cache=True, error_model="numpy")
def _lower_to_triangle(row, x, y, z, h, grid, not_above, not_below):
    """Lower the squared distances of 4^3 points where a triangle is closer. float32, in voxels.

    `not_above` [64] is the distance to the triangles above whose plane the point does not clearly
    lie, and `not_below` [64] to those below whose plane it does not clearly lie. The smaller of the
    two is the distance. If the other is clearly larger, all closest triangles see the point on the
    same side. A height of at most SLACK is not clear, because of rounding.

    The loop has no branches, so that it is vectorised. It is tested against the float64 reference
    `pipeline.core.primitives.triangles.distance2`.
    """
    # the triangle relative to the centre of the 4^3 points, in voxels: corner a, edges u and v
    zero, one, inf = np.float32(0), np.float32(1), np.float32(np.inf)
    slack = np.float32(SLACK)
    ax = np.float32((row[0] - x) / h)
    ay = np.float32((row[1] - y) / h)
    az = np.float32((row[2] - z) / h)
    ux, uy, uz = np.float32(row[3] / h), np.float32(row[4] / h), np.float32(row[5] / h)
    vx, vy, vz = np.float32(row[6] / h), np.float32(row[7] / h), np.float32(row[8] / h)
    nx, ny, nz = np.float32(row[9]), np.float32(row[10]), np.float32(row[11])
    # the third edge, and the inverse squared lengths of all
    wx, wy, wz = vx - ux, vy - uy, vz - uz
    iu, iv = one / (ux * ux + uy * uy + uz * uz), one / (vx * vx + vy * vy + vz * vz)
    iw = one / (wx * wx + wy * wy + wz * wz)
    # inward normals of the edges, in the plane
    mux, muy, muz = ny * uz - nz * uy, nz * ux - nx * uz, nx * uy - ny * ux
    mvx, mvy, mvz = vy * nz - vz * ny, vz * nx - vx * nz, vx * ny - vy * nx
    mwx, mwy, mwz = ny * wz - nz * wy, nz * wx - nx * wz, nx * wy - ny * wx
    for p in range(64):
        px, py, pz = grid[0, p] - ax, grid[1, p] - ay, grid[2, p] - az
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
        # lower the result; values are loaded first, because stores with a mask are slow
        old_above, old_below = not_above[p], not_below[p]
        d2 = height * height if inside > zero else edge
        above = inf if height > slack else d2
        below = inf if height < -slack else d2
        not_above[p] = above if above < old_above else old_above
        not_below[p] = below if below < old_below else old_below


@njit(cache=True)
def _largest(not_above, not_below):
    """Return the largest of the 64 points' distances."""
    largest = np.float32(0)
    for p in range(64):
        lesser = not_above[p] if not_above[p] < not_below[p] else not_below[p]
        largest = lesser if lesser > largest else largest
    return np.sqrt(largest)


@njit(cache=True, inline="always")
def flood_reached(flood, x, y, z):
    """Return whether the flood fill reached the topology's grid point nearest to (x, y, z)."""
    i = int(np.round((x + 0.5) / flood.h))
    j = int(np.round((y + 0.5) / flood.h))
    k = int(np.round((z + 0.5) / flood.h))
    return is_reached(flood.bin_of, flood.outside, flood.whole_cells, i, j, k, True)


@njit(cache=True)
def _fill_cell(packed, kinds, candidates, cell, last, tau, half, flood, kept, scratch, out):
    """Write the signed distances of one cell's 512 points. Return whether any is inside the band.

    Near a surface the closest triangle decides the side. Farther away the flood fill does, because
    the nearest grid point of the topology is then outside the barrier. Where float32 does not
    suffice, `is_outside_exact` decides.
    """
    active = False
    h = 1.0 / last
    radius = np.sqrt(3) * 1.5 * h  # from the centre of 4^3 points to their corners
    trusted, slack, margin = FLOOD_VOXELS * flood.h, SLACK * h, SLACK * h + TIE
    grid = np.empty((3, 64), np.float32)  # the 4^3 points relative to their centre, in voxels
    for p in range(64):
        grid[0, p], grid[1, p], grid[2, p] = p // 16 - 1.5, p // 4 % 4 - 1.5, p % 4 - 1.5
    # squared distances to solids (not above, not below), buried triangles (same) and sheets (same)
    nearest = np.empty((6, 64), np.float32)
    for sub in range(8):
        # first point of this eighth of the cell in `out`, its grid index and the eighth's centre
        first = 4 * (64 * (sub >> 2) + 8 * (sub >> 1 & 1) + (sub & 1))
        x0 = CELL_SIDE * cell[0] + 4 * (sub >> 2)
        y0 = CELL_SIDE * cell[1] + 4 * (sub >> 1 & 1)
        z0 = CELL_SIDE * cell[2] + 4 * (sub & 1)
        x, y, z = (x0 + 1.5) * h - 0.5, (y0 + 1.5) * h - 0.5, (z0 + 1.5) * h - 0.5
        count, solid, sheet = _narrow_candidates(
            packed, kinds, candidates, x, y, z, radius, trusted, kept, scratch
        )
        # no surface is near: all points have the same side, and the clamp hides their distances
        if min(solid, sheet - half) - radius > max(tau, trusted):
            far = np.inf if flood_reached(flood, x, y, z) else -np.inf
            for p in range(64):
                out[first + 64 * (p // 16) + 8 * (p // 4 % 4) + p % 4] = far
            continue
        # distances in float32, from the closest candidate on
        nearest[:] = np.inf
        worst_solid, worst_sheet = np.inf, np.inf
        for turn, c in enumerate(np.argsort(scratch[:count])):
            t = kept[c]
            # every fourth turn: beyond this distance a candidate is closest to none of the points
            if turn % 4 == 3:
                worst_solid = h * _largest(nearest[0], nearest[1])
                worst_sheet = h * _largest(nearest[4], nearest[5])
            if scratch[c] - radius - margin > (worst_sheet if kinds[t] == SHEET else worst_solid):
                continue
            if kinds[t] == SOLID:
                _lower_to_triangle(packed[t], x, y, z, h, grid, nearest[0], nearest[1])
            elif kinds[t] == BURIED:
                _lower_to_triangle(packed[t], x, y, z, h, grid, nearest[2], nearest[3])
            else:
                _lower_to_triangle(packed[t], x, y, z, h, grid, nearest[4], nearest[5])
        # sides
        for p in range(64):
            i, j, k = p // 16, p // 4 % 4, p % 4
            distance = h * np.sqrt(min(nearest[0, p], nearest[1, p]))
            shell = h * np.sqrt(min(nearest[4, p], nearest[5, p]))
            # a buried triangle votes as if the point were below it, if the height is clear
            unclear = max(nearest[2, p], nearest[3, p])
            not_above = h * np.sqrt(min(nearest[0, p], nearest[2, p], nearest[3, p]))
            not_below = h * np.sqrt(min(nearest[1, p], unclear))
            closest = min(not_above, not_below)
            if distance < trusted - slack and closest > slack and not_above > closest + margin:
                is_outside = True
            elif distance < trusted - slack and closest > slack and not_below > closest + margin:
                is_outside = False
            elif distance > trusted + slack and abs(shell - trusted) > slack:
                # both sides of a sheet are outside, but the flood fill does not enter its barrier
                px, py, pz = x + (i - 1.5) * h, y + (j - 1.5) * h, z + (k - 1.5) * h
                is_outside = shell < trusted or flood_reached(flood, px, py, pz)
            else:
                # the same operations as on the GPU give the same position
                px, py, pz = (x0 + i) / last - 0.5, (y0 + j) / last - 0.5, (z0 + k) / last - 0.5
                is_outside = is_outside_exact(
                    packed, kinds, kept[:count], scratch, px, py, pz, trusted, flood
                )
            distance = min(distance if is_outside else -distance, shell - half)
            out[first + 64 * i + 8 * j + k] = distance
            active = active or abs(distance) < tau
    return active


@njit(cache=True)
def _fill_cells(packed, kinds, cells, offsets, triangles, resolution, tau, half, flood):
    """Return the signed distances of cells and which of them are active: [M, 512] and [M].

    The candidates of cell m are `triangles[offsets[m]:offsets[m + 1]]`.
    """
    last = float(resolution - 1)
    values = np.empty((len(cells), CELL_SIDE**3), np.float32)
    active = np.empty(len(cells), np.bool_)
    longest = (offsets[1:] - offsets[:-1]).max()
    scratch, kept = np.empty(longest), np.empty(longest, np.int32)
    for m in range(len(cells)):
        own = triangles[offsets[m] : offsets[m + 1]]
        active[m] = _fill_cell(
            packed, kinds, own, cells[m], last, tau, half, flood, kept, scratch, values[m]
        )
    return values, active
