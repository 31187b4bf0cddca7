"""Signed distances of cells of 8^3 grid points to the triangles near them, on a GPU.

The reference is `pipeline.geometry.sdf`, with which the tests compare. There are three kernels:

`_narrow` lists, for each of a cell's eight groups of 4^3 points, the candidates that can be closest
to one of the points.

`_distances` computes the distances in float32, relative to the centre of the group, and the side of
each point where float32 suffices.

`_votes` decides the side of all other points in float64. It repeats the operations of
`pipeline.geometry.sdf.is_outside_exact` one by one, without fused multiply-adds, so that both
implementations give every point the same side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.runtime.integer_math import cdiv
from kernels.runtime.triton_ops import on_device

CELL_SIDE = 8  # grid points along one side of a cell
# Kinds of triangles. Tests hold that these, SLACK and VOTE_ROUNDING are those of the reference.
SOLID = tl.constexpr(0)
SHEET = tl.constexpr(1)
BURIED = tl.constexpr(2)
MAX_CELLS = 2**22 - 1  # torch.nonzero, which finds the points that vote, takes under 2^31 values
# Assumed error of a float32 distance in voxels, larger than the true error. Triangles that are too
# far by no more than this are still tried, and nothing that depends on less is decided in float32.
SLACK = tl.constexpr(0.01)
# A sum of votes is still not negative if it is below zero by this share of the absolute sum.
VOTE_ROUNDING = tl.constexpr(1e-9)
RADIUS = tl.constexpr(1.5 * math.sqrt(3))  # voxels from the centre of 4^3 points to their corners
PI = tl.constexpr(math.pi)
# Candidates that a program handles at once. A group of 4^3 points usually has a few.
NARROW_TILE = 32
DISTANCE_TILE = 8
VOTE_TILE = 4
VOTE_POINTS = 64  # points per program of `_votes`


@dataclass(frozen=True, eq=False, kw_only=True)
class FloodBits:
    """Result of a flood fill on the T^3 grid of a topology: which grid points are outside.

    A cell with a bin has one bit per grid point. All points of another cell are on the same side.

    Attributes:
        bin_of: int32 [T/8, T/8, T/8] bin of each cell, -1 if it has none.
        outside: int64 [bins, 8] bits of the cells with a bin: word lx, bit 8 * ly + lz.
        whole_cells: bool [T/8, T/8, T/8] sides of the cells without a bin.
    """

    bin_of: Tensor
    outside: Tensor
    whole_cells: Tensor


@triton.jit
def _load3(ptr, ok):
    """Load three consecutive values."""
    x = tl.load(ptr, ok, other=0.0)
    y = tl.load(ptr + 1, ok, other=0.0)
    z = tl.load(ptr + 2, ok, other=0.0)
    return x, y, z


@triton.jit
def _load_triangles(rows_ptr, triangle, ok, cx, cy, cz):
    """Load float32 rows of triangles [1, C].

    Returns corner a relative to the centre (cx, cy, cz), b - a, c - a, unit normal and kind.
    """
    at = rows_ptr + triangle.to(tl.int64) * 16
    # a is stored in two halves: once the centre is subtracted the sum is as precise as float64
    ax = tl.load(at, ok, other=0.0) - cx + tl.load(at + 3, ok, other=0.0)
    ay = tl.load(at + 1, ok, other=0.0) - cy + tl.load(at + 4, ok, other=0.0)
    az = tl.load(at + 2, ok, other=0.0) - cz + tl.load(at + 5, ok, other=0.0)
    ux, uy, uz = _load3(at + 6, ok)  # pyright: ignore[reportGeneralTypeIssues]
    vx, vy, vz = _load3(at + 9, ok)  # pyright: ignore[reportGeneralTypeIssues]
    nx, ny, nz = _load3(at + 12, ok)  # pyright: ignore[reportGeneralTypeIssues]
    kind = tl.load(at + 15, ok, other=-1.0).to(tl.int32)
    return ax, ay, az, ux, uy, uz, vx, vy, vz, nx, ny, nz, kind


@triton.jit
def _unit(t):
    """Clamp to [0, 1]. NaN, which comes of an edge whose square underflows, becomes 0."""
    t = tl.where(t > 0, t, 0.0)
    return tl.where(t < 1, t, 1.0)


@triton.jit
def _squared(gx, gy, gz, ax, ay, az, ux, uy, uz, vx, vy, vz, nx, ny, nz):
    """Compute the squared distances of points [P, 1] to triangles [1, C].

    Returns [P, C]: squared distance, height above the plane, and whether the foot on the plane is
    in the interior. The float64 reference is `pipeline.core.primitives.triangles.distance2`.
    """
    wx, wy, wz = vx - ux, vy - uy, vz - uz
    px, py, pz = gx - ax, gy - ay, gz - az
    qx, qy, qz = px - ux, py - uy, pz - uz
    # closest points on the three edges, and the squared distance to the nearest of them
    s = _unit((px * ux + py * uy + pz * uz) * (1.0 / (ux * ux + uy * uy + uz * uz)))
    t = _unit((px * vx + py * vy + pz * vz) * (1.0 / (vx * vx + vy * vy + vz * vz)))
    r = _unit((qx * wx + qy * wy + qz * wz) * (1.0 / (wx * wx + wy * wy + wz * wz)))
    sx, sy, sz = px - s * ux, py - s * uy, pz - s * uz
    tx, ty, tz = px - t * vx, py - t * vy, pz - t * vz
    rx, ry, rz = qx - r * wx, qy - r * wy, qz - r * wz
    edge = tl.minimum(sx * sx + sy * sy + sz * sz, tx * tx + ty * ty + tz * tz)
    edge = tl.minimum(edge, rx * rx + ry * ry + rz * rz)
    # signed distances to the edges in the plane, positive in the interior
    height = px * nx + py * ny + pz * nz
    in_u = px * (ny * uz - nz * uy) + py * (nz * ux - nx * uz) + pz * (nx * uy - ny * ux)
    in_v = px * (vy * nz - vz * ny) + py * (vz * nx - vx * nz) + pz * (vx * ny - vy * nx)
    in_w = qx * (ny * wz - nz * wy) + qy * (nz * wx - nx * wz) + qz * (nx * wy - ny * wx)
    inside = tl.minimum(tl.minimum(in_u, in_v), in_w) > 0
    return tl.where(inside, height * height, edge), height, inside


@triton.jit
def _to_centres(rows_ptr, triangles_ptr, first, count, i, sx, sy, sz, bx, by, bz):
    """Compute the distances of a cell's candidates [1, C] to the centres of its groups [8, 1].

    Returns triangles and kinds [1, C], and distances [8, C], infinite where `i` is not a candidate.
    """
    ok = i < count
    triangle = tl.load(triangles_ptr + first + i, ok, other=0)
    a_u_v_n_kind = _load_triangles(rows_ptr, triangle, ok, bx, by, bz)
    ax, ay, az, ux, uy, uz, vx, vy, vz, nx, ny, nz, kind = a_u_v_n_kind  # pyright: ignore[reportGeneralTypeIssues]
    d2, _, _ = _squared(sx, sy, sz, ax, ay, az, ux, uy, uz, vx, vy, vz, nx, ny, nz)
    return triangle, kind, tl.where(ok, tl.sqrt(d2), float("inf"))


@triton.jit
def _narrow(
    rows_ptr,
    cells_ptr,
    offsets_ptr,
    triangles_ptr,
    lists_ptr,
    counts_ptr,
    far,
    trusted,
    half,
    C: tl.constexpr,
):
    """List the candidates that can be closest to a point of each group. One program per cell.

    Groups without a surface nearby have no candidates.
    """
    # the cell's candidates, the start of its lists, and its centre
    m = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets_ptr + m)
    count = (tl.load(offsets_ptr + m + 1) - first).to(tl.int32)
    lists = lists_ptr + (first - tl.load(offsets_ptr)) * 8
    bx = tl.load(cells_ptr + 3 * m).to(tl.float32) * 8 + 3.5
    by = tl.load(cells_ptr + 3 * m + 1).to(tl.float32) * 8 + 3.5
    bz = tl.load(cells_ptr + 3 * m + 2).to(tl.float32) * 8 + 3.5
    # centres of the groups relative to the cell's
    group = tl.arange(0, 8)[:, None]
    sx = (group // 4 * 4 - 2).to(tl.float32)
    sy = (group // 2 % 2 * 4 - 2).to(tl.float32)
    sz = (group % 2 * 4 - 2).to(tl.float32)
    # distances to the closest solid and the closest sheet
    lane = tl.arange(0, C)[None, :]
    solid = tl.full([8, C], float("inf"), tl.float32)
    sheet = tl.full([8, C], float("inf"), tl.float32)
    for start in range(0, count, C):
        at_centres = _to_centres(
            rows_ptr, triangles_ptr, first, count, start + lane, sx, sy, sz, bx, by, bz
        )
        _, kind, d = at_centres  # pyright: ignore[reportGeneralTypeIssues]
        solid = tl.where(kind == SOLID, tl.minimum(solid, d), solid)
        sheet = tl.where(kind == SHEET, tl.minimum(sheet, d), sheet)
    nearest_solid, nearest_sheet = tl.min(solid, 1)[:, None], tl.min(sheet, 1)[:, None]
    near = tl.minimum(nearest_solid, nearest_sheet - half) - RADIUS <= far
    # Triangles of solids compete with each other, and so do sheets. A buried triangle only matters
    # for the side of points near the surface.
    solid_bound = nearest_solid + (2 * RADIUS + SLACK)
    sheet_bound = nearest_sheet + (2 * RADIUS + SLACK)
    buried_bound = tl.minimum(solid_bound, trusted + (RADIUS + SLACK))
    # write the lists in the order of the candidates
    kept = tl.zeros([8], tl.int32)
    for start in range(0, count, C):
        triangle, kind, d = _to_centres(
            rows_ptr, triangles_ptr, first, count, start + lane, sx, sy, sz, bx, by, bz
        )
        bound = tl.where(
            kind == SHEET, sheet_bound, tl.where(kind == BURIED, buried_bound, solid_bound)
        )
        keep = near & (start + lane < count) & (d <= bound)
        place = kept[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
        tl.store(
            lists + group.to(tl.int64) * count + place, tl.broadcast_to(triangle, [8, C]), keep
        )
        kept += tl.sum(keep.to(tl.int32), 1)
    tl.store(counts_ptr + m * 8 + tl.arange(0, 8), kept)


@triton.jit
def _outside(bin_of_ptr, outside_ptr, whole_ptr, x2, y2, z2, last, flood_last, ok):
    """Return whether the topology's grid point nearest to half of (x2, y2, z2) is outside.

    The coordinates count grid points of this grid, from 0 to `last`. Doubled coordinates express
    the centres of groups as integers.
    """
    # nearest grid point of the topology, in integer arithmetic
    side = (flood_last + 1) // 8
    x = (x2 * flood_last + last) // (2 * last)
    y = (y2 * flood_last + last) // (2 * last)
    z = (z2 * flood_last + last) // (2 * last)
    # its bit, or that of its whole cell
    at = ((x // 8).to(tl.int64) * side + y // 8) * side + z // 8
    number = tl.load(bin_of_ptr + at, ok, other=-1)
    whole = tl.load(whole_ptr + at, ok & (number < 0), other=0) != 0
    word = tl.load(outside_ptr + number.to(tl.int64) * 8 + x % 8, ok & (number >= 0), other=0)
    bit = ((word >> (y % 8 * 8 + z % 8).to(tl.int64)) & 1) != 0
    return tl.where(number < 0, whole, bit)


@triton.jit
def _distances(
    rows_ptr,
    cells_ptr,
    offsets_ptr,
    lists_ptr,
    counts_ptr,
    bin_of_ptr,
    outside_ptr,
    whole_ptr,
    values_ptr,
    unsure_ptr,
    last,
    flood_last,
    h,
    trusted,
    half,
    tie,
    C: tl.constexpr,
):
    """Compute the signed distances of a group of 4^3 points. One program per group.

    Points whose side float32 does not decide count as outside. They are marked in `unsure`: by 2
    where the flood fill says inside, by 1 elsewhere.
    """
    # the group's list of candidates and its first grid point
    m, sub = tl.program_id(0).to(tl.int64) // 8, tl.program_id(0) % 8
    first = tl.load(offsets_ptr + m)
    lists = (
        lists_ptr
        + (first - tl.load(offsets_ptr)) * 8
        + (tl.load(offsets_ptr + m + 1) - first) * sub
    )
    count = tl.load(counts_ptr + m * 8 + sub)
    x0 = tl.load(cells_ptr + 3 * m) * 8 + sub // 4 * 4
    y0 = tl.load(cells_ptr + 3 * m + 1) * 8 + sub // 2 % 2 * 4
    z0 = tl.load(cells_ptr + 3 * m + 2) * 8 + sub % 2 * 4
    p = tl.arange(0, 64)
    i, j, k = p // 16, p // 4 % 4, p % 4
    at = m * 512 + (sub // 4 * 4 + i) * 64 + (sub // 2 % 2 * 4 + j) * 8 + sub % 2 * 4 + k
    # no surface is near: all points have the side of the centre, and the clamp hides distances
    if count == 0:
        centre_x2, centre_y2, centre_z2 = 2 * x0 + 3, 2 * y0 + 3, 2 * z0 + 3
        whole = _outside(
            bin_of_ptr,
            outside_ptr,
            whole_ptr,
            centre_x2,
            centre_y2,
            centre_z2,
            last,
            flood_last,
            True,
        )
        far = tl.where(whole, float("inf"), float("-inf")) + tl.zeros([64], tl.float32)
        tl.store(values_ptr + at, far)
        tl.store(unsure_ptr + at, tl.zeros([64], tl.uint8))
    else:
        # smallest squared distances per point and lane: to solids, to sheets, and to solid and
        # buried triangles that do not have the point above (below) their interior
        gx, gy, gz = (i - 1.5)[:, None], (j - 1.5)[:, None], (k - 1.5)[:, None]
        cx, cy, cz = x0.to(tl.float32) + 1.5, y0.to(tl.float32) + 1.5, z0.to(tl.float32) + 1.5
        lane = tl.arange(0, C)[None, :]
        solid = tl.full([64, C], float("inf"), tl.float32)
        sheet = tl.full([64, C], float("inf"), tl.float32)
        not_above = solid
        not_below = solid
        for start in range(0, count, C):
            ok = start + lane < count
            triangle = tl.load(lists + start + lane, ok, other=0)
            a_u_v_n_kind = _load_triangles(rows_ptr, triangle, ok, cx, cy, cz)
            ax, ay, az, ux, uy, uz, vx, vy, vz, nx, ny, nz, kind = a_u_v_n_kind  # pyright: ignore[reportGeneralTypeIssues]
            d2, height, inside = _squared(
                gx, gy, gz, ax, ay, az, ux, uy, uz, vx, vy, vz, nx, ny, nz
            )
            solid = tl.where(kind == SOLID, tl.minimum(solid, d2), solid)
            sheet = tl.where(kind == SHEET, tl.minimum(sheet, d2), sheet)
            hit = inside & (kind == SOLID)
            votes = (kind != SHEET) & ok
            is_not_above = votes & ~(hit & (height >= 0))
            is_not_below = votes & ~(hit & (height < 0))
            not_above = tl.where(is_not_above, tl.minimum(not_above, d2), not_above)
            not_below = tl.where(is_not_below, tl.minimum(not_below, d2), not_below)
        # distances per point
        distance, shell = tl.sqrt(tl.min(solid, 1)), tl.sqrt(tl.min(sheet, 1))
        not_above_d, not_below_d = tl.sqrt(tl.min(not_above, 1)), tl.sqrt(tl.min(not_below, 1))
        closest = tl.minimum(not_above_d, not_below_d)
        # far from all triangles the flood fill tells the side; both sides of a sheet are outside,
        # but the flood fill does not enter its barrier
        is_near, is_far = distance < trusted - SLACK, distance > trusted + SLACK
        by_flood = (distance > trusted - SLACK) & (shell > trusted - SLACK)
        x2, y2, z2 = 2 * (x0 + i), 2 * (y0 + j), 2 * (z0 + k)
        out = _outside(bin_of_ptr, outside_ptr, whole_ptr, x2, y2, z2, last, flood_last, by_flood)
        flooded = by_flood & (out == 0)
        # near a solid the closest triangle tells the side, if it is clearly the closest
        clear = (closest > SLACK) & (tl.maximum(not_above_d, not_below_d) > closest + (SLACK + tie))
        unsure = tl.where(is_near, ~clear, ~is_far | (flooded & (shell <= trusted + SLACK)))
        inner = tl.where(is_near, not_below_d > not_above_d, flooded) & ~unsure
        value = tl.minimum(tl.where(inner, -distance, distance), shell - half)
        tl.store(values_ptr + at, value * h)
        tl.store(unsure_ptr + at, tl.where(unsure, tl.where(flooded, 2, 1), 0).to(tl.uint8))


@triton.jit
def _barycentric(d1, d2, uu, uv, vv):
    """Return (v, w) of the closest points a + v (b - a) + w (c - a).

    d1 and d2 are the dot products of b - a and c - a with p - a; uu, uv and vv those of b - a and
    c - a with each other. The regions are tested in reverse order, so that the first one that holds
    wins, as in `pipeline.core.primitives.triangles`.
    """
    # interior, edge bc
    d3, d4, d5, d6 = d1 - uu, d2 - uv, d1 - uv, d2 - vv
    va, vb, vc = d3 * d6 - d5 * d4, d5 * d2 - d1 * d6, d1 * d4 - d3 * d2
    v, w = vb / (va + vb + vc), vc / (va + vb + vc)
    r = (d4 - d3) / ((d4 - d3) + (d5 - d6))
    on_bc = (va <= 0) & (d4 - d3 >= 0) & (d5 - d6 >= 0)
    v, w = tl.where(on_bc, 1.0 - r, v), tl.where(on_bc, r, w)
    # edge ac, corner c
    on_ac = (vb <= 0) & (d2 >= 0) & (d6 <= 0)
    v, w = tl.where(on_ac, 0.0, v), tl.where(on_ac, d2 / (d2 - d6), w)
    at_c = (d6 >= 0) & (d5 <= d6)
    v, w = tl.where(at_c, 0.0, v), tl.where(at_c, 1.0, w)
    # edge ab, corner b, corner a
    on_ab = (vc <= 0) & (d1 >= 0) & (d3 <= 0)
    v, w = tl.where(on_ab, d1 / (d1 - d3), v), tl.where(on_ab, 0.0, w)
    at_b = (d3 >= 0) & (d4 <= d3)
    v, w = tl.where(at_b, 1.0, v), tl.where(at_b, 0.0, w)
    at_a = (d1 <= 0) & (d2 <= 0)
    return tl.where(at_a, 0.0, v), tl.where(at_a, 0.0, w)


@triton.jit
def _to_points(exact_ptr, lists_ptr, lists, lane, count, x, y, z):
    """Compute the closest points of candidates [P, C] to points [P, 1], in float64.

    Returns [P, C]: pointers to the rows, kinds, offsets of the points from the closest points, v, w
    and distances, which are infinite beyond the candidates.
    """
    # load the triangles
    ok = lane < count
    row = exact_ptr + tl.load(lists_ptr + lists + lane, ok, other=0).to(tl.int64) * 16
    ax, ay, az = _load3(row, ok)  # pyright: ignore[reportGeneralTypeIssues]
    ux, uy, uz = _load3(row + 3, ok)  # pyright: ignore[reportGeneralTypeIssues]
    vx, vy, vz = _load3(row + 6, ok)  # pyright: ignore[reportGeneralTypeIssues]
    # closest point of each
    px, py, pz = x - ax, y - ay, z - az
    d1 = ux * px + uy * py + uz * pz
    d2 = vx * px + vy * py + vz * pz
    uu = ux * ux + uy * uy + uz * uz
    uv = ux * vx + uy * vy + uz * vz
    vv = vx * vx + vy * vy + vz * vz
    v, w = _barycentric(d1, d2, uu, uv, vv)  # pyright: ignore[reportGeneralTypeIssues]
    dx, dy, dz = x - (ax + v * ux + w * vx), y - (ay + v * uy + w * vy), z - (az + v * uz + w * vz)
    kind = tl.load(row + 15, ok, other=0.0).to(tl.int32)
    distance = tl.where(ok, tl.sqrt(dx * dx + dy * dy + dz * dz), float("inf"))
    return row, kind, dx, dy, dz, v, w, distance


@triton.jit
def _votes(
    exact_ptr,
    cells_ptr,
    offsets_ptr,
    lists_ptr,
    counts_ptr,
    points_ptr,
    unsure_ptr,
    values_ptr,
    N,
    last,
    TRUSTED: tl.constexpr,
    TIE: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """Decide the sides of N unsure points in float64, like `sdf.is_outside_exact` of the pipeline.

    TRUSTED and TIE are constants, because Triton passes arguments as float32.
    """
    # the points, and the list of candidates of each point's group
    n = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    known = n < N
    at = tl.load(points_ptr + n, known, other=0)
    m, local = at // 512, (at % 512).to(tl.int32)
    lx, ly, lz = local // 64, local // 8 % 8, local % 8
    sub = lx // 4 * 4 + ly // 4 * 2 + lz // 4
    first = tl.load(offsets_ptr + m)
    lists = (first - tl.load(offsets_ptr)) * 8 + (tl.load(offsets_ptr + m + 1) - first) * sub
    lists = lists[:, None]
    count = tl.load(counts_ptr + m * 8 + sub, known, other=0)
    i = (tl.load(cells_ptr + 3 * m) * 8 + lx).to(tl.float64)[:, None]
    j = (tl.load(cells_ptr + 3 * m + 1) * 8 + ly).to(tl.float64)[:, None]
    k = (tl.load(cells_ptr + 3 * m + 2) * 8 + lz).to(tl.float64)[:, None]
    x = i / last.to(tl.float64) - 0.5
    y = j / last.to(tl.float64) - 0.5
    z = k / last.to(tl.float64) - 0.5
    # distances to the closest triangle of each kind
    lane, most, count_P1 = tl.arange(0, C)[None, :], tl.max(count, 0), count[:, None]
    solid, buried = tl.full([P], float("inf"), tl.float64), tl.full([P], float("inf"), tl.float64)
    sheet = tl.full([P], float("inf"), tl.float64)
    for start in range(0, most, C):
        closest = _to_points(exact_ptr, lists_ptr, lists, start + lane, count_P1, x, y, z)
        _, kind, _, _, _, _, _, d = closest  # pyright: ignore[reportGeneralTypeIssues]
        solid = tl.minimum(solid, tl.min(tl.where(kind == SOLID, d, float("inf")), 1))
        buried = tl.minimum(buried, tl.min(tl.where(kind == BURIED, d, float("inf")), 1))
        sheet = tl.minimum(sheet, tl.min(tl.where(kind == SHEET, d, float("inf")), 1))
    # votes of all solid and buried triangles that tie for the closest
    limit = tl.minimum(solid, buried)[:, None] + TIE
    votes, weights = tl.zeros([P], tl.float64), tl.zeros([P], tl.float64)
    half_turn = tl.full([P, C], PI, tl.float64)
    for start in range(0, most, C):
        closest = _to_points(exact_ptr, lists_ptr, lists, start + lane, count_P1, x, y, z)
        row, kind, dx, dy, dz, v, w, d = closest  # pyright: ignore[reportGeneralTypeIssues]
        ties = (start + lane < count_P1) & (kind != SHEET) & (d <= limit)
        nx, ny, nz = _load3(row + 9, ties)  # pyright: ignore[reportGeneralTypeIssues]
        height = dx * nx + dy * ny + dz * nz
        # weights: 2 pi for the interior, pi for an edge, the angle at a corner
        weight = tl.where((v == 0) | (w == 0) | (v + w >= 1), half_turn, 2 * half_turn)
        corner = tl.where(v == 1, 1, tl.where(w == 1, 2, 0))
        at_corner = (v == 1) | (w == 1) | ((v == 0) & (w == 0))
        weight = tl.where(at_corner, tl.load(row + 12 + corner, ties, other=0.0), weight)
        vote = tl.where(ties, height * weight, 0.0)
        votes += tl.sum(tl.where(kind == BURIED, -tl.abs(vote), vote), 1)
        weights += tl.sum(tl.abs(vote), 1)
    # near a solid the votes decide, elsewhere the sheets and the flood fill
    flooded = tl.load(unsure_ptr + at, known, other=0) == 2
    trusted = tl.full([P], TRUSTED, tl.float64)  # a plain constant would be compared in float32
    inner = tl.where(
        solid <= trusted, votes + weights * VOTE_ROUNDING < 0, (sheet > trusted) & flooded
    )
    value = tl.load(values_ptr + at, known, other=0.0)
    tl.store(values_ptr + at, tl.minimum(value, -solid.to(tl.float32)), known & inner)


@dataclass(frozen=True, eq=False, kw_only=True)
class GridTriangles:
    """Triangles in the layout of the kernels, for one resolution. Create it with `grid_triangles`.

    Attributes:
        resolution: Grid points along one side.
        rows: float32 [T, 16] in voxels: leading half and trailing half of corner a, b - a, c - a,
            unit normal, kind.
        exact: float64 [T, 16] in cube units: corner a, b - a, c - a, unit normal, angles at a, b
            and c, kind.
    """

    resolution: int
    rows: Tensor
    exact: Tensor


def grid_triangles(packed_T16: Tensor, kinds_T: Tensor, resolution: int) -> GridTriangles:
    """Prepare triangles for an R^3 grid.

    The float32 rows hold each corner in two halves, because float32 cannot hold the differences of
    large coordinates.

    Args:
        packed_T16: float64 [T, 16] of `pipeline.core.primitives.triangles.pack`.
        kinds_T: uint8 [T] 0 (solid), 1 (sheet) or 2 (buried).
        resolution: Grid points along one side, a multiple of 8.

    Raises:
        ValueError: If a shape, dtype, device or the resolution is not as described.
    """
    _check("packed_T16", packed_T16, (None, 16), torch.float64, packed_T16)
    _check("kinds_T", kinds_T, (len(packed_T16),), torch.uint8, packed_T16)
    if resolution <= 0 or resolution % CELL_SIDE:
        raise ValueError(f"resolution must be a positive multiple of {CELL_SIDE}, got {resolution}")
    a, u, v, normal = packed_T16[:, :12].split(3, 1)
    corner = (a + 0.5) * (resolution - 1)
    kind = kinds_T[:, None]
    edges = packed_T16[:, 3:9] * (resolution - 1)
    rows = torch.cat([corner.float(), corner - corner.float(), edges, normal, kind], 1).float()
    angles = [_angle(u, v), _angle(-u, v - u), _angle(-v, u - v)]
    exact = torch.cat([packed_T16[:, :12], *(angle[:, None] for angle in angles), kind.double()], 1)
    return GridTriangles(resolution=resolution, rows=rows.contiguous(), exact=exact.contiguous())


def _angle(p_T3: Tensor, q_T3: Tensor) -> Tensor:
    cosine = (p_T3 * q_T3).sum(1) / ((p_T3 * p_T3).sum(1) * (q_T3 * q_T3).sum(1)).sqrt()
    return cosine.clamp(-1, 1).arccos()


def cell_distances(
    triangles: GridTriangles,
    flood: FloodBits,
    cells_M3: Tensor,
    offsets_M1: Tensor,
    candidates_E: Tensor,
    *,
    tau: float,
    sheet_half: float,
    trusted: float,
    tie: float,
) -> Tensor:
    """Compute the signed distances of cells to the triangles near them.

    Distances are those of float32. Sides are decided in float64 and equal those of
    `pipeline.geometry.sdf` at every point. The function needs 32 bytes per candidate beside the
    result. It waits for the GPU twice: to count the candidates and to count the points that float32
    does not decide. Kernels are compiled for each new `trusted` or `tie`.

    Args:
        triangles: The triangles.
        flood: Sides of the grid points of the topology's grid.
        cells_M3: int32 [M, 3] cells as index // 8.
        offsets_M1: int64 [M + 1]. The candidates of cell m are
            `candidates_E[offsets_M1[m]:offsets_M1[m + 1]]`. This can be part of a longer list.
        candidates_E: int32 [E] numbers of triangles. They must include all triangles within
            max(tau + sheet_half, trusted) of the cell.
        tau: Distance in cube units beyond which the result need not be exact.
        sheet_half: Half thickness of a sheet in cube units, subtracted from the distance to it.
        trusted: Distance up to which solids decide the side. Beyond it the flood fill does.
        tie: Triangles whose distance exceeds the smallest by no more than this vote on the side.

    Returns:
        float32 [M, 512] in cube units, at grid point 64 * lx + 8 * ly + lz. It is +-inf where no
        surface is near.

    Raises:
        ValueError: If a shape, dtype or device is not as described, there are more than MAX_CELLS
            cells, a length is negative or not finite, or the product of both grids' resolutions
            exceeds 2^30.
    """
    # check the arguments
    _check("flood.bin_of", flood.bin_of, (flood.bin_of.shape[0],) * 3, torch.int32, triangles.rows)
    grid_shape = tuple(flood.bin_of.shape)
    _check("flood.whole_cells", flood.whole_cells, grid_shape, torch.bool, triangles.rows)
    _check("flood.outside", flood.outside, (None, CELL_SIDE), torch.int64, triangles.rows)
    _check("cells_M3", cells_M3, (None, 3), torch.int32, triangles.rows)
    _check("offsets_M1", offsets_M1, (len(cells_M3) + 1,), torch.int64, triangles.rows)
    _check("candidates_E", candidates_E, (None,), torch.int32, triangles.rows)
    lengths = {"tau": tau, "sheet_half": sheet_half, "trusted": trusted, "tie": tie}
    for name, value in lengths.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be 0 or more and finite, got {value}")
    if len(cells_M3) > MAX_CELLS:
        raise ValueError(f"cells_M3 must be at most {MAX_CELLS} at once, got {len(cells_M3)}")
    M, last = len(cells_M3), triangles.resolution - 1
    flood_last = CELL_SIDE * len(flood.bin_of) - 1
    if last * flood_last >= 2**30:
        raise ValueError(
            "resolution times the flood's must be at most 2**30, "
            f"got {last + 1} and {flood_last + 1}"
        )
    # allocate
    values = triangles.rows.new_empty(M, CELL_SIDE**3)
    if M == 0:
        return values
    unsure = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    counts = torch.empty(M, 8, dtype=torch.int32, device=values.device)
    total = int(offsets_M1[-1] - offsets_M1[0])
    lists = torch.empty(8 * total, dtype=torch.int32, device=values.device)
    cells = cells_M3.contiguous()
    offsets = offsets_M1.contiguous()
    # lengths in voxels
    far = max(tau, trusted) * last
    near = trusted * last
    half = sheet_half * last
    with on_device(values):
        _narrow[(M,)](
            triangles.rows,
            cells,
            offsets,
            candidates_E.contiguous(),
            lists,
            counts,
            far,
            near,
            half,
            C=NARROW_TILE,
            num_warps=2,
        )
        _distances[(8 * M,)](
            triangles.rows,
            cells,
            offsets,
            lists,
            counts,
            flood.bin_of.contiguous(),
            flood.outside.contiguous(),
            flood.whole_cells.contiguous().view(torch.uint8),
            values,
            unsure,
            last,
            flood_last,
            1 / last,
            near,
            half,
            tie * last,
            C=DISTANCE_TILE,
            num_warps=2,
        )
        points = unsure.view(-1).nonzero().view(-1)
        if len(points):
            _votes[(cdiv(len(points), VOTE_POINTS),)](
                triangles.exact,
                cells,
                offsets,
                lists,
                counts,
                points,
                unsure,
                values,
                len(points),
                last,
                TRUSTED=trusted,
                TIE=tie,
                P=VOTE_POINTS,
                C=VOTE_TILE,
                num_warps=8,
                enable_fp_fusion=False,
            )
    return values


def _check(
    name: str, x: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype, like: Tensor
) -> None:
    fits = x.ndim == len(shape) and all(n in (None, size) for n, size in zip(shape, x.shape))
    if not fits or x.dtype != dtype or x.device != like.device:
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(
            f"{name} must be {dtype} [{sizes}] on {like.device}, "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )
