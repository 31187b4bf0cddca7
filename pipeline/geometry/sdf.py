"""Exact sparse signed distances: triangles binned into the 8^3 cells near them, the closest found in each cell."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.grid import CELL_SIDE, band, check_resolution, spacing
from pipeline.core.primitives.triangles import TIE, VOTE_ROUNDING, distance2, pack, side_vote
from pipeline.core.schema import Bricks
from pipeline.geometry import sdf_cuda
from pipeline.geometry.flood_fill import BARRIER_VOXELS, Bins, bin_triangles, is_reached
from pipeline.geometry.sharp_edges import sharp_bits
from pipeline.geometry.topology import BURIED, SHEET, SOLID, Topology

# beyond this distance from all triangles the nearest point of the topology's grid (sqrt(3) / 2) is clear of the barrier
FLOOD_VOXELS = BARRIER_VOXELS + 0.87
CHUNK_CELLS = 4096
DEVICES = ("cpu", "cuda")
SLACK = (
    0.01  # voxels that a float32 distance may be off, generously; the result does not depend on it
)
SHEET_HALF_VOXELS = (
    0.87  # just above sqrt(3) / 2: a sheet of this half thickness always holds grid points
)


def compute_bricks(topology: Topology, resolution: int, device: str = "cpu") -> Bricks:
    """Every 8^3 cell of the R^3 grid with a point of |sdf| < tau: clamp(sdf / tau), signs everywhere, sharp bits.

    sdf = min(signed distance to the solid surface, distance to the sheets - SHEET_HALF_VOXELS * h): the solids' union
    with a thin shell around each sheet. `device` "cuda" takes the distances in Triton, within 1e-3 h of these and with
    the same signs: whatever float32 might decide otherwise, both decide in float64 by the same operations.
    ValueError if the resolution is not a multiple of 8, or for another device.
    """
    if device not in DEVICES:
        raise ValueError(f"device must be one of {DEVICES}, got {device!r}")
    tau, h = band(check_resolution(resolution)), spacing(resolution)
    half, trusted = SHEET_HALF_VOXELS * h, FLOOD_VOXELS * spacing(topology.resolution)
    packed = pack(topology.triangles)
    # farther off than this the clamp hides the distance and the flood knows the side
    bins = bin_triangles(packed, resolution, max(tau + half, trusted) / h)
    if device == "cuda":
        filled = sdf_cuda.fill_cells(
            packed, topology.kinds, bins, topology.flood, tau=tau, half=half, trusted=trusted
        )  # fmt: skip
    else:
        filled = _filled(packed, topology, bins, tau, half)
    parts = []
    for cells, active, values in filled:
        sharp = sharp_bits(cells, active, topology.sharp_edges, resolution)
        parts.append((cells.astype(np.int16), values, sharp))
    cells, values, sharp = (np.concatenate(column) for column in zip(*parts))
    return Bricks(resolution=resolution, cells=cells, values=values, sharp=sharp)


def _filled(
    packed: NDArray[np.float64], topology: Topology, bins: Bins, tau: float, half: float
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.float16]]]:
    """Active cells [m, 3], active points and clamp(sdf / tau) [m, 512]: one chunk's float32 distances at a time."""
    flood = topology.flood
    for first in range(0, len(bins.cells), CHUNK_CELLS):
        chunk = slice(first, first + CHUNK_CELLS)
        values, active = _fill_cells(
            packed, topology.kinds, bins.cells[chunk], bins.offsets[first : first + CHUNK_CELLS + 1], bins.triangles,
            bins.resolution, tau, half, spacing(topology.resolution), flood.bins.bin_of, flood.outside,
            flood.whole_cells,
        )  # fmt: skip
        values = values[active]
        near = np.abs(values) < np.float32(tau)
        np.clip(np.divide(values, np.float32(tau), out=values), -1, 1, out=values)
        yield bins.cells[chunk][active], near, values.astype(np.float16)


@njit(cache=True)
def _narrow(packed, kinds, candidates, x, y, z, radius, trusted, kept, scratch):
    """Keeps the candidates that can be closest for some point within radius of (x, y, z).

    Solids' triangles compete with each other and so do sheets'. A buried one only tells sides near the surface: it
    matters if it is as close as the closest solid and within `trusted`. Count kept, distance to the closest solid and
    to the closest sheet; scratch holds the distance of each one kept.
    """
    solid, sheet = np.inf, np.inf
    for c in range(len(candidates)):
        t = candidates[c]
        kind = kinds[t]
        # a lower bound first: most triangles are too far to matter
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
def _is_out(
    packed, kinds, candidates, distances, x, y, z, trusted, flood_h, bin_of, outside, whole
):
    """The side of a point in float64, which defines it: near a solid by votes, elsewhere by sheets and the flood.

    All solid and buried triangles within TIE of the closest vote, in whichever order they come. The sum must pass what
    rounding leaves of votes that cancel. `kernels.sdf.distances._votes` does these operations, one by one, on the GPU.
    """
    nearest, solid = np.inf, np.inf
    for c in range(len(candidates)):
        kind = kinds[candidates[c]]
        distances[c] = np.inf
        if kind == SHEET:
            continue
        row = packed[candidates[c]]
        height = (x - row[0]) * row[9] + (y - row[1]) * row[10] + (z - row[2]) * row[11]
        if (
            abs(height) > (solid if kind == SOLID else nearest) + 2 * TIE
        ):  # the plane alone is farther
            continue
        distances[c] = np.sqrt(distance2(row, x, y, z))
        nearest = min(nearest, distances[c])
        if kind == SOLID:
            solid = min(solid, distances[c])
    if solid > trusted:
        for t in candidates:
            if kinds[t] == SHEET and np.sqrt(distance2(packed[t], x, y, z)) <= trusted:
                return True
        return _outside(flood_h, bin_of, outside, whole, x, y, z)
    votes, weight = 0.0, 0.0
    for c in range(len(candidates)):
        if distances[c] <= nearest + TIE:
            vote = side_vote(packed[candidates[c]], x, y, z)
            votes += -abs(vote) if kinds[candidates[c]] == BURIED else vote
            weight += abs(vote)
    return votes + weight * VOTE_ROUNDING >= 0


@njit(cache=True, error_model="numpy")
def _closest(row, x, y, z, h, grid, not_above, not_below):
    """Lowers one or both [64] to the squared distance of 4^3 points to a triangle, in voxels, float32, no branches.

    Where the triangle's inside is the closest, from above, not_above stays, and from below not_below does: the lesser
    is the distance, and if that is far below the other all that are as close see the point on one side.
    """
    zero, one, inf = np.float32(0), np.float32(1), np.float32(np.inf)
    ax, ay, az = (
        np.float32((row[0] - x) / h),
        np.float32((row[1] - y) / h),
        np.float32((row[2] - z) / h),
    )
    ux, uy, uz = np.float32(row[3] / h), np.float32(row[4] / h), np.float32(row[5] / h)
    vx, vy, vz = np.float32(row[6] / h), np.float32(row[7] / h), np.float32(row[8] / h)
    nx, ny, nz = np.float32(row[9]), np.float32(row[10]), np.float32(row[11])
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
        s = (px * ux + py * uy + pz * uz) * iu
        t = (px * vx + py * vy + pz * vz) * iv
        r = (qx * wx + qy * wy + qz * wz) * iw
        s = s if s > zero else zero
        t = t if t > zero else zero
        r = r if r > zero else zero
        s = s if s < one else one
        t = t if t < one else one
        r = r if r < one else one
        sx, sy, sz = px - s * ux, py - s * uy, pz - s * uz
        tx, ty, tz = px - t * vx, py - t * vy, pz - t * vz
        rx, ry, rz = qx - r * wx, qy - r * wy, qz - r * wz
        ds, dt, dr = (
            sx * sx + sy * sy + sz * sz,
            tx * tx + ty * ty + tz * tz,
            rx * rx + ry * ry + rz * rz,
        )
        edge = ds if ds < dt else dt
        edge = edge if edge < dr else dr
        height = px * nx + py * ny + pz * nz
        inside_u = px * mux + py * muy + pz * muz
        inside_v = px * mvx + py * mvy + pz * mvz
        inside_w = qx * mwx + qy * mwy + qz * mwz
        inside = inside_u if inside_u < inside_v else inside_v
        inside = inside if inside < inside_w else inside_w
        d2 = height * height if inside > zero else edge
        above = inf if (inside > zero) & (height >= zero) else d2
        below = inf if (inside > zero) & (height < zero) else d2
        not_above[p] = above if above < not_above[p] else not_above[p]
        not_below[p] = below if below < not_below[p] else not_below[p]


@njit(cache=True)
def _largest(not_above, not_below):
    """Of the 64 points' distances."""
    largest = np.float32(0)
    for p in range(64):
        lesser = not_above[p] if not_above[p] < not_below[p] else not_below[p]
        largest = lesser if lesser > largest else largest
    return np.sqrt(largest)


@njit(cache=True, inline="always")
def _outside(flood_h, bin_of, outside, whole, x, y, z):
    """What the flood says of the topology's grid point nearest to (x, y, z)."""
    i = int(np.round((x + 0.5) / flood_h))
    j = int(np.round((y + 0.5) / flood_h))
    k = int(np.round((z + 0.5) / flood_h))
    return is_reached(bin_of, outside, whole, i, j, k, True)


@njit(cache=True)
def _fill_cell(
    packed,
    kinds,
    candidates,
    cell,
    last,
    tau,
    half,
    flood_h,
    bin_of,
    outside,
    whole,
    kept,
    scratch,
    out,
):
    """Distances of one cell's 512 points; whether any lies inside the band.

    Near a surface the closest triangle decides the side; farther off, where the nearest grid point of the topology is
    clear of its barrier, the flood does. Where float32 leaves that open `_is_out` does.
    """
    active = False
    h = 1.0 / last
    radius = np.sqrt(3) * 1.5 * h
    trusted, slack, margin = FLOOD_VOXELS * flood_h, SLACK * h, SLACK * h + TIE
    grid = np.empty((3, 64), np.float32)
    for p in range(64):
        grid[0, p], grid[1, p], grid[2, p] = p // 16 - 1.5, p // 4 % 4 - 1.5, p % 4 - 1.5
    nearest = np.empty(
        (6, 64), np.float32
    )  # to solids not above, not below; to buried triangles; to sheets
    for sub in range(8):
        first = 4 * (64 * (sub >> 2) + 8 * (sub >> 1 & 1) + (sub & 1))
        x0, y0, z0 = (
            CELL_SIDE * cell[0] + 4 * (sub >> 2),
            CELL_SIDE * cell[1] + 4 * (sub >> 1 & 1),
            CELL_SIDE * cell[2] + 4 * (sub & 1),
        )
        x, y, z = (x0 + 1.5) * h - 0.5, (y0 + 1.5) * h - 0.5, (z0 + 1.5) * h - 0.5
        count, solid, sheet = _narrow(
            packed, kinds, candidates, x, y, z, radius, trusted, kept, scratch
        )
        if min(solid, sheet - half) - radius > max(tau, trusted):
            # no surface inside: one side for all, and the clamp hides the rest
            far = np.inf if _outside(flood_h, bin_of, outside, whole, x, y, z) else -np.inf
            for p in range(64):
                out[first + 64 * (p // 16) + 8 * (p // 4 % 4) + p % 4] = far
            continue
        nearest[:] = np.inf
        worst_solid, worst_sheet = np.inf, np.inf
        for turn, c in enumerate(np.argsort(scratch[:count])):
            t = kept[c]
            if (
                turn % 4 == 3
            ):  # what is farther than this from the centre is closest for none of the points
                worst_solid, worst_sheet = (
                    h * _largest(nearest[0], nearest[1]),
                    h * _largest(nearest[4], nearest[5]),
                )
            if scratch[c] - radius - margin > (worst_sheet if kinds[t] == SHEET else worst_solid):
                continue
            if kinds[t] == SOLID:
                _closest(packed[t], x, y, z, h, grid, nearest[0], nearest[1])
            elif kinds[t] == BURIED:
                _closest(packed[t], x, y, z, h, grid, nearest[2], nearest[3])
            else:
                _closest(packed[t], x, y, z, h, grid, nearest[4], nearest[5])
        for p in range(64):
            i, j, k = p // 16, p // 4 % 4, p % 4
            distance = h * np.sqrt(min(nearest[0, p], nearest[1, p]))
            shell = h * np.sqrt(min(nearest[4, p], nearest[5, p]))
            buried = min(nearest[2, p], nearest[3, p])
            not_above, not_below = (
                h * np.sqrt(min(nearest[0, p], buried)),
                h * np.sqrt(min(nearest[1, p], buried)),
            )
            closest = min(not_above, not_below)
            if distance < trusted - slack and closest > slack and not_above > closest + margin:
                is_out = True
            elif distance < trusted - slack and closest > slack and not_below > closest + margin:
                is_out = False
            elif distance > trusted + slack and abs(shell - trusted) > slack:
                # a sheet has the exterior on both sides, but its barrier hides that from the flood
                px, py, pz = x + (i - 1.5) * h, y + (j - 1.5) * h, z + (k - 1.5) * h
                is_out = shell < trusted or _outside(flood_h, bin_of, outside, whole, px, py, pz)
            else:
                px, py, pz = (
                    (x0 + i) / last - 0.5,
                    (y0 + j) / last - 0.5,
                    (z0 + k) / last - 0.5,
                )  # as the GPU has them
                is_out = _is_out(
                    packed, kinds, kept[:count], scratch, px, py, pz, trusted, flood_h, bin_of, outside, whole
                )  # fmt: skip
            distance = min(distance if is_out else -distance, shell - half)
            out[first + 64 * i + 8 * j + k] = distance
            active = active or abs(distance) < tau
    return active


@njit(cache=True)
def _fill_cells(
    packed,
    kinds,
    cells,
    offsets,
    triangles,
    resolution,
    tau,
    half,
    flood_h,
    bin_of,
    outside,
    whole,
):
    """Distances [M, 512] of cells whose candidates are triangles[offsets[m]:offsets[m + 1]], and which are active."""
    last = float(resolution - 1)
    values, active = (
        np.empty((len(cells), CELL_SIDE**3), np.float32),
        np.empty(len(cells), np.bool_),
    )
    longest = (offsets[1:] - offsets[:-1]).max()
    scratch, kept = np.empty(longest), np.empty(longest, np.int32)
    for m in range(len(cells)):
        active[m] = _fill_cell(
            packed, kinds, triangles[offsets[m] : offsets[m + 1]], cells[m], last, tau, half,
            flood_h, bin_of, outside, whole, kept, scratch, values[m],
        )  # fmt: skip
    return values, active
