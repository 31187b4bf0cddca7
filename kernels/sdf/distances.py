"""Signed distances of 8^3 cells to the triangles near them: the GPU path of `pipeline.geometry.sdf`, which defines it.

Three launches. `_narrow` tells for each of a cell's eight 4^3 sub-cells which candidates can be closest to any of its
points. `_distances` takes the closest of them, in float32 relative to the sub-cell's centre, and the side where that
leaves no doubt. `_votes` decides at all other points in float64, by the operations of `pipeline.geometry.sdf._is_out` one by one
(no fused multiply-adds), so that both paths give every point the same side.
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

SOLID, SHEET, BURIED = (tl.constexpr(kind) for kind in range(3))  # as in pipeline.geometry.topology
CELL_SIDE = 8
MAX_CELLS = 2**22 - 1  # torch finds the points that vote among fewer than 2^31
# Voxels that a float32 distance may be off, generously: triangles this much too far are still tried, and nothing that
# hangs on less than this is decided in float32.
SLACK = tl.constexpr(0.01)
RADIUS = tl.constexpr(1.5 * math.sqrt(3))  # voxels from a sub-cell's centre to its corners
PI = tl.constexpr(math.pi)
VOTE_ROUNDING = tl.constexpr(1e-9)  # as in pipeline.core.primitives.triangles
# Candidates that a program takes at once. At most resolutions a sub-cell has a handful.
NARROW_TILE, DISTANCE_TILE, VOTE_TILE = 32, 8, 4


@dataclass(frozen=True, eq=False, kw_only=True)
class FloodBits:
    """Which points of the topology's T^3 grid the outside reaches; a cell has a bin, one bit a point, or is whole."""

    bin_of: Tensor  # int32 [T/8, T/8, T/8], -1: none
    outside: Tensor  # int64 [bins, 8]: word lx, bit 8 * ly + lz
    whole_cells: Tensor  # bool [T/8, T/8, T/8]


@triton.jit
def _load_triangles(rows_ptr, triangle, ok, cx, cy, cz):
    """float32 rows of triangles [1, C]: corner a relative to the centre, b - a, c - a, unit normal, kind."""
    at = rows_ptr + triangle.to(tl.int64) * 16
    ax = (
        tl.load(at, ok, other=0.0) - cx + tl.load(at + 3, ok, other=0.0)
    )  # leading and trailing half: as exact as
    ay = (
        tl.load(at + 1, ok, other=0.0) - cy + tl.load(at + 4, ok, other=0.0)
    )  # float64 once the centre is gone
    az = tl.load(at + 2, ok, other=0.0) - cz + tl.load(at + 5, ok, other=0.0)
    ux, uy, uz = (
        tl.load(at + 6, ok, other=0.0),
        tl.load(at + 7, ok, other=0.0),
        tl.load(at + 8, ok, other=0.0),
    )
    vx, vy, vz = (
        tl.load(at + 9, ok, other=0.0),
        tl.load(at + 10, ok, other=0.0),
        tl.load(at + 11, ok, other=0.0),
    )
    nx, ny, nz = (
        tl.load(at + 12, ok, other=0.0),
        tl.load(at + 13, ok, other=0.0),
        tl.load(at + 14, ok, other=0.0),
    )
    return (
        ax,
        ay,
        az,
        ux,
        uy,
        uz,
        vx,
        vy,
        vz,
        nx,
        ny,
        nz,
        tl.load(at + 15, ok, other=-1.0).to(tl.int32),
    )


@triton.jit
def _unit(t):
    """Clamped to [0, 1]; a NaN, of an edge whose square underflows, becomes 0."""
    t = tl.where(t > 0, t, 0.0)
    return tl.where(t < 1, t, 1.0)


@triton.jit
def _squared(gx, gy, gz, ax, ay, az, ux, uy, uz, vx, vy, vz, nx, ny, nz):
    """Of points [P, 1] and triangles [1, C]: squared distance, height above the plane, whether the inside is hit."""
    wx, wy, wz = vx - ux, vy - uy, vz - uz
    px, py, pz = gx - ax, gy - ay, gz - az
    qx, qy, qz = px - ux, py - uy, pz - uz
    s = _unit((px * ux + py * uy + pz * uz) * (1.0 / (ux * ux + uy * uy + uz * uz)))
    t = _unit((px * vx + py * vy + pz * vz) * (1.0 / (vx * vx + vy * vy + vz * vz)))
    r = _unit((qx * wx + qy * wy + qz * wz) * (1.0 / (wx * wx + wy * wy + wz * wz)))
    sx, sy, sz = px - s * ux, py - s * uy, pz - s * uz
    tx, ty, tz = px - t * vx, py - t * vy, pz - t * vz
    rx, ry, rz = qx - r * wx, qy - r * wy, qz - r * wz
    edge = tl.minimum(sx * sx + sy * sy + sz * sz, tx * tx + ty * ty + tz * tz)
    edge = tl.minimum(edge, rx * rx + ry * ry + rz * rz)
    height = px * nx + py * ny + pz * nz
    # inward normals of the edges, in the plane
    in_u = px * (ny * uz - nz * uy) + py * (nz * ux - nx * uz) + pz * (nx * uy - ny * ux)
    in_v = px * (vy * nz - vz * ny) + py * (vz * nx - vx * nz) + pz * (vx * ny - vy * nx)
    in_w = qx * (ny * wz - nz * wy) + qy * (nz * wx - nx * wz) + qz * (nx * wy - ny * wx)
    inside = tl.minimum(tl.minimum(in_u, in_v), in_w) > 0
    return tl.where(inside, height * height, edge), height, inside


@triton.jit
def _to_centres(rows_ptr, triangles_ptr, first, count, i, sx, sy, sz, bx, by, bz):
    """Of a cell's candidates first + i [1, C] those that are there, their kinds, their distances to points [8, C]."""
    ok = i < count
    triangle = tl.load(triangles_ptr + first + i, ok, other=0)
    a_u_v_n_kind = _load_triangles(rows_ptr, triangle, ok, bx, by, bz)
    ax, ay, az, ux, uy, uz, vx, vy, vz, nx, ny, nz, kind = a_u_v_n_kind  # pyright: ignore[reportGeneralTypeIssues]
    d2, _, _ = _squared(sx, sy, sz, ax, ay, az, ux, uy, uz, vx, vy, vz, nx, ny, nz)
    return triangle, kind, tl.where(ok, tl.sqrt(d2), float("inf"))


@triton.jit
def _narrow(
    rows_ptr, cells_ptr, offsets_ptr, triangles_ptr, lists_ptr, counts_ptr, far, trusted, half, C: tl.constexpr
):  # fmt: skip
    """Lists the candidates that matter in each sub-cell; none where no surface is near. One program a cell."""
    m = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets_ptr + m)
    count = (tl.load(offsets_ptr + m + 1) - first).to(tl.int32)
    lists = lists_ptr + (first - tl.load(offsets_ptr)) * 8
    bx = tl.load(cells_ptr + 3 * m).to(tl.float32) * 8 + 3.5
    by = tl.load(cells_ptr + 3 * m + 1).to(tl.float32) * 8 + 3.5
    bz = tl.load(cells_ptr + 3 * m + 2).to(tl.float32) * 8 + 3.5
    sub = tl.arange(0, 8)[:, None]
    sx, sy, sz = (
        (sub // 4 * 4 - 2).to(tl.float32),
        (sub // 2 % 2 * 4 - 2).to(tl.float32),
        (sub % 2 * 4 - 2).to(tl.float32),
    )
    lane = tl.arange(0, C)[None, :]
    solid, sheet = (
        tl.full([8, C], float("inf"), tl.float32),
        tl.full([8, C], float("inf"), tl.float32),
    )
    for start in range(0, count, C):
        at_centres = _to_centres(
            rows_ptr, triangles_ptr, first, count, start + lane, sx, sy, sz, bx, by, bz
        )
        _, kind, d = at_centres  # pyright: ignore[reportGeneralTypeIssues]
        solid = tl.where(kind == SOLID, tl.minimum(solid, d), solid)
        sheet = tl.where(kind == SHEET, tl.minimum(sheet, d), sheet)
    nearest_solid, nearest_sheet = tl.min(solid, 1)[:, None], tl.min(sheet, 1)[:, None]
    near = tl.minimum(nearest_solid, nearest_sheet - half) - RADIUS <= far
    # Solids' triangles compete with each other and so do sheets'. A buried one only tells sides near the surface.
    solid_bound, sheet_bound = (
        nearest_solid + (2 * RADIUS + SLACK),
        nearest_sheet + (2 * RADIUS + SLACK),
    )
    buried_bound = tl.minimum(solid_bound, trusted + (RADIUS + SLACK))
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
        tl.store(lists + sub.to(tl.int64) * count + place, tl.broadcast_to(triangle, [8, C]), keep)
        kept += tl.sum(keep.to(tl.int32), 1)
    tl.store(counts_ptr + m * 8 + tl.arange(0, 8), kept)


@triton.jit
def _outside(bin_of_ptr, outside_ptr, whole_ptr, x2, y2, z2, last, flood_last, ok):
    """What the flood says of the grid point of the topology that is nearest to half of (x2, y2, z2) of this grid."""
    side = (flood_last + 1) // 8
    x, y, z = (
        (x2 * flood_last + last) // (2 * last),
        (y2 * flood_last + last) // (2 * last),
        (z2 * flood_last + last) // (2 * last),
    )
    at = ((x // 8).to(tl.int64) * side + y // 8) * side + z // 8
    number = tl.load(bin_of_ptr + at, ok, other=-1)
    whole = tl.load(whole_ptr + at, ok & (number < 0), other=0) != 0
    word = tl.load(outside_ptr + number.to(tl.int64) * 8 + x % 8, ok & (number >= 0), other=0)
    bit = ((word >> (y % 8 * 8 + z % 8).to(tl.int64)) & 1) != 0
    return tl.where(number < 0, whole, bit)


@triton.jit
def _distances(
    rows_ptr, cells_ptr, offsets_ptr, lists_ptr, counts_ptr, bin_of_ptr, outside_ptr, whole_ptr, values_ptr,
    unsure_ptr, last, flood_last, h, trusted, half, tie, C: tl.constexpr,
):  # fmt: skip
    """Distances of one sub-cell's 64 points; those whose side is left open count as outside and are marked.

    By 2 where the flood says inside, by 1 elsewhere.
    """
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
    if count == 0:  # one side for all, and the clamp hides the rest
        whole = _outside(
            bin_of_ptr,
            outside_ptr,
            whole_ptr,
            2 * x0 + 3,
            2 * y0 + 3,
            2 * z0 + 3,
            last,
            flood_last,
            True,
        )
        tl.store(
            values_ptr + at,
            tl.where(whole, float("inf"), float("-inf")) + tl.zeros([64], tl.float32),
        )
        tl.store(unsure_ptr + at, tl.zeros([64], tl.uint8))
    else:
        gx, gy, gz = (i - 1.5)[:, None], (j - 1.5)[:, None], (k - 1.5)[:, None]
        cx, cy, cz = x0.to(tl.float32) + 1.5, y0.to(tl.float32) + 1.5, z0.to(tl.float32) + 1.5
        lane = tl.arange(0, C)[None, :]
        solid, sheet = (
            tl.full([64, C], float("inf"), tl.float32),
            tl.full([64, C], float("inf"), tl.float32),
        )
        not_above, not_below = (
            solid,
            solid,
        )  # of solid and buried ones: those whose inside is not hit from there
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
            not_above = tl.where(
                (kind != SHEET) & ok & ~(hit & (height >= 0)), tl.minimum(not_above, d2), not_above
            )
            not_below = tl.where(
                (kind != SHEET) & ok & ~(hit & (height < 0)), tl.minimum(not_below, d2), not_below
            )
        distance, shell = tl.sqrt(tl.min(solid, 1)), tl.sqrt(tl.min(sheet, 1))
        not_above_d, not_below_d = tl.sqrt(tl.min(not_above, 1)), tl.sqrt(tl.min(not_below, 1))
        closest = tl.minimum(not_above_d, not_below_d)
        is_near, is_far = distance < trusted - SLACK, distance > trusted + SLACK
        # a sheet has the exterior on both sides, but its barrier hides that from the flood
        by_flood = (distance > trusted - SLACK) & (shell > trusted - SLACK)
        x2, y2, z2 = 2 * (x0 + i), 2 * (y0 + j), 2 * (z0 + k)
        out = _outside(bin_of_ptr, outside_ptr, whole_ptr, x2, y2, z2, last, flood_last, by_flood)
        flooded = by_flood & (out == 0)
        clear = (closest > SLACK) & (tl.maximum(not_above_d, not_below_d) > closest + (SLACK + tie))
        unsure = tl.where(is_near, ~clear, ~is_far | (flooded & (shell <= trusted + SLACK)))
        inner = tl.where(is_near, not_below_d > not_above_d, flooded) & ~unsure
        value = tl.minimum(tl.where(inner, -distance, distance), shell - half)
        tl.store(values_ptr + at, value * h)
        tl.store(unsure_ptr + at, tl.where(unsure, tl.where(flooded, 2, 1), 0).to(tl.uint8))


@triton.jit
def _barycentric(d1, d2, uu, uv, vv):
    """Closest point of triangles as a + v (b - a) + w (c - a), Ericson's regions; of two that hold the first wins."""
    d3, d4, d5, d6 = d1 - uu, d2 - uv, d1 - uv, d2 - vv
    va, vb, vc = d3 * d6 - d5 * d4, d5 * d2 - d1 * d6, d1 * d4 - d3 * d2
    v, w = vb / (va + vb + vc), vc / (va + vb + vc)
    r = (d4 - d3) / ((d4 - d3) + (d5 - d6))
    on_bc = (va <= 0) & (d4 - d3 >= 0) & (d5 - d6 >= 0)
    v, w = tl.where(on_bc, 1.0 - r, v), tl.where(on_bc, r, w)
    on_ac = (vb <= 0) & (d2 >= 0) & (d6 <= 0)
    v, w = tl.where(on_ac, 0.0, v), tl.where(on_ac, d2 / (d2 - d6), w)
    at_c = (d6 >= 0) & (d5 <= d6)
    v, w = tl.where(at_c, 0.0, v), tl.where(at_c, 1.0, w)
    on_ab = (vc <= 0) & (d1 >= 0) & (d3 <= 0)
    v, w = tl.where(on_ab, d1 / (d1 - d3), v), tl.where(on_ab, 0.0, w)
    at_b = (d3 >= 0) & (d4 <= d3)
    v, w = tl.where(at_b, 1.0, v), tl.where(at_b, 0.0, w)
    at_a = (d1 <= 0) & (d2 <= 0)
    return tl.where(at_a, 0.0, v), tl.where(at_a, 0.0, w)


@triton.jit
def _to_points(exact_ptr, lists_ptr, lists, lane, count, x, y, z):
    """Of points [P, 1] and candidates [P, C]: rows, kinds, offsets from the closest points, v, w, distances."""
    ok = lane < count
    row = exact_ptr + tl.load(lists_ptr + lists + lane, ok, other=0).to(tl.int64) * 16
    ax, ay, az = (
        tl.load(row, ok, other=0.0),
        tl.load(row + 1, ok, other=0.0),
        tl.load(row + 2, ok, other=0.0),
    )
    ux, uy, uz = (
        tl.load(row + 3, ok, other=0.0),
        tl.load(row + 4, ok, other=0.0),
        tl.load(row + 5, ok, other=0.0),
    )
    vx, vy, vz = (
        tl.load(row + 6, ok, other=0.0),
        tl.load(row + 7, ok, other=0.0),
        tl.load(row + 8, ok, other=0.0),
    )
    px, py, pz = x - ax, y - ay, z - az
    v, w = _barycentric(  # pyright: ignore[reportGeneralTypeIssues]
        ux * px + uy * py + uz * pz, vx * px + vy * py + vz * pz,
        ux * ux + uy * uy + uz * uz, ux * vx + uy * vy + uz * vz, vx * vx + vy * vy + vz * vz,
    )  # fmt: skip
    dx, dy, dz = x - (ax + v * ux + w * vx), y - (ay + v * uy + w * vy), z - (az + v * uz + w * vz)
    kind = tl.load(row + 15, ok, other=0.0).to(tl.int32)
    return (
        row,
        kind,
        dx,
        dy,
        dz,
        v,
        w,
        tl.where(ok, tl.sqrt(dx * dx + dy * dy + dz * dz), float("inf")),
    )


@triton.jit
def _votes(
    exact_ptr, cells_ptr, offsets_ptr, lists_ptr, counts_ptr, points_ptr, unsure_ptr, values_ptr, N, last,
    TRUSTED: tl.constexpr, TIE: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sides of N unsure points in float64: near a solid by the angle-weighted votes of all triangles that tie for the
    closest, elsewhere by the sheets and the flood. Lengths are constants, since an argument would come as float32.
    """
    n = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    known = n < N
    at = tl.load(points_ptr + n, known, other=0)
    m, local = at // 512, (at % 512).to(tl.int32)
    lx, ly, lz = local // 64, local // 8 % 8, local % 8
    sub = lx // 4 * 4 + ly // 4 * 2 + lz // 4
    first = tl.load(offsets_ptr + m)
    lists = ((first - tl.load(offsets_ptr)) * 8 + (tl.load(offsets_ptr + m + 1) - first) * sub)[
        :, None
    ]
    count = tl.load(counts_ptr + m * 8 + sub, known, other=0)
    x = ((tl.load(cells_ptr + 3 * m) * 8 + lx).to(tl.float64) / last.to(tl.float64) - 0.5)[:, None]
    y = ((tl.load(cells_ptr + 3 * m + 1) * 8 + ly).to(tl.float64) / last.to(tl.float64) - 0.5)[
        :, None
    ]
    z = ((tl.load(cells_ptr + 3 * m + 2) * 8 + lz).to(tl.float64) / last.to(tl.float64) - 0.5)[
        :, None
    ]
    lane, most, count_P1 = tl.arange(0, C)[None, :], tl.max(count, 0), count[:, None]
    solid, buried = tl.full([P], float("inf"), tl.float64), tl.full([P], float("inf"), tl.float64)
    sheet = tl.full([P], float("inf"), tl.float64)
    for start in range(0, most, C):
        found = _to_points(exact_ptr, lists_ptr, lists, start + lane, count_P1, x, y, z)
        _, kind, _, _, _, _, _, d = found  # pyright: ignore[reportGeneralTypeIssues]
        solid = tl.minimum(solid, tl.min(tl.where(kind == SOLID, d, float("inf")), 1))
        buried = tl.minimum(buried, tl.min(tl.where(kind == BURIED, d, float("inf")), 1))
        sheet = tl.minimum(sheet, tl.min(tl.where(kind == SHEET, d, float("inf")), 1))
    limit = tl.minimum(solid, buried)[:, None] + TIE
    votes, weights = tl.zeros([P], tl.float64), tl.zeros([P], tl.float64)
    half_turn = tl.full([P, C], PI, tl.float64)
    for start in range(0, most, C):
        found = _to_points(exact_ptr, lists_ptr, lists, start + lane, count_P1, x, y, z)
        row, kind, dx, dy, dz, v, w, d = found  # pyright: ignore[reportGeneralTypeIssues]
        votes_too = (start + lane < count_P1) & (kind != SHEET) & (d <= limit)
        nx, ny = tl.load(row + 9, votes_too, other=0.0), tl.load(row + 10, votes_too, other=0.0)
        height = dx * nx + dy * ny + dz * tl.load(row + 11, votes_too, other=0.0)
        # 2 pi for a face, pi for an edge, the angle for a corner: the sum's sign is the angle-weighted pseudonormal's
        weight = tl.where((v == 0) | (w == 0) | (v + w >= 1), half_turn, 2 * half_turn)
        corner = tl.where(v == 1, 1, tl.where(w == 1, 2, 0))
        at_corner = (v == 1) | (w == 1) | ((v == 0) & (w == 0))
        weight = tl.where(at_corner, tl.load(row + 12 + corner, votes_too, other=0.0), weight)
        vote = tl.where(votes_too, height * weight, 0.0)
        votes += tl.sum(tl.where(kind == BURIED, -tl.abs(vote), vote), 1)
        weights += tl.sum(tl.abs(vote), 1)
    flooded = tl.load(unsure_ptr + at, known, other=0) == 2
    trusted = tl.full([P], TRUSTED, tl.float64)  # a bare constant would be compared in float32
    inner = tl.where(
        solid <= trusted, votes + weights * VOTE_ROUNDING < 0, (sheet > trusted) & flooded
    )
    value = tl.load(values_ptr + at, known, other=0.0)
    tl.store(values_ptr + at, tl.minimum(value, -solid.to(tl.float32)), known & inner)


@dataclass(frozen=True, eq=False, kw_only=True)
class GridTriangles:
    """Triangles as the kernels read them, for one resolution; made by `grid_triangles`."""

    resolution: int
    rows: (
        Tensor  # float32 [T, 16] in voxels: corner a in two halves, b - a, c - a, unit normal, kind
    )
    exact: Tensor  # float64 [T, 16] in cube units: a, b - a, c - a, unit normal, angles at a, b, c, kind


def grid_triangles(packed_T16: Tensor, kinds_T: Tensor, resolution: int) -> GridTriangles:
    """Prepares `pipeline.core.primitives.triangles.pack`'s float64 rows, kinds uint8 (0 solid, 1 sheet, 2 buried), for an R^3 grid.

    Differences of large coordinates are what float32 cannot hold, hence the two halves of a corner.
    ValueError for another shape, dtype or device, or if the resolution is not a multiple of 8.
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
    triangles: GridTriangles, flood: FloodBits, cells_M3: Tensor, offsets_M1: Tensor, candidates_E: Tensor, *,
    tau: float, sheet_half: float, trusted: float, tie: float,
) -> Tensor:  # fmt: skip
    """Signed distances float32 [M, 512] in cube units of int32 cells (x, y, z), point 64 * lx + 8 * ly + lz.

    Cell m's candidates are triangles candidates_E[offsets_M1[m]:offsets_M1[m + 1]] (int32, int64): all that come
    within max(tau + sheet_half, trusted) of it; a part of a longer list will do. Lengths are in cube units: nothing
    beyond `tau` need be exact, solids nearer than `trusted` decide on sides, the flood elsewhere; sheets count as
    distance - sheet_half; triangles `tie` farther than the closest vote, too. Distances are float32's, sides float64's:
    the CPU's at every point. Where no surface is near a value is +-inf. Takes 32 bytes a candidate beside the result,
    and waits for the GPU twice: to count the candidates, and the points that float32 leaves open. A `trusted` or `tie`
    not seen before is compiled for. ValueError for other shapes, dtypes or devices, more than MAX_CELLS cells, and
    grids whose sides' product passes 2^30.
    """
    _check("flood.bin_of", flood.bin_of, (flood.bin_of.shape[0],) * 3, torch.int32, triangles.rows)
    _check(
        "flood.whole_cells",
        flood.whole_cells,
        tuple(flood.bin_of.shape),
        torch.bool,
        triangles.rows,
    )
    _check("flood.outside", flood.outside, (None, CELL_SIDE), torch.int64, triangles.rows)
    _check("cells_M3", cells_M3, (None, 3), torch.int32, triangles.rows)
    _check("offsets_M1", offsets_M1, (len(cells_M3) + 1,), torch.int64, triangles.rows)
    _check("candidates_E", candidates_E, (None,), torch.int32, triangles.rows)
    for name, value in (
        ("tau", tau),
        ("sheet_half", sheet_half),
        ("trusted", trusted),
        ("tie", tie),
    ):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be 0 or more and finite, got {value}")
    if len(cells_M3) > MAX_CELLS:
        raise ValueError(f"cells_M3 must be at most {MAX_CELLS} at once, got {len(cells_M3)}")
    M, last, flood_last = len(cells_M3), triangles.resolution - 1, CELL_SIDE * len(flood.bin_of) - 1
    if last * flood_last >= 2**30:
        raise ValueError(
            f"resolution times the flood's must be at most 2**30, got {last + 1} and {flood_last + 1}"
        )
    values = triangles.rows.new_empty(M, CELL_SIDE**3)
    if M == 0:
        return values
    unsure = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    counts = torch.empty(M, 8, dtype=torch.int32, device=values.device)
    total = int(offsets_M1[-1] - offsets_M1[0])
    lists = torch.empty(8 * total, dtype=torch.int32, device=values.device)
    grid = (cells_M3.contiguous(), offsets_M1.contiguous())
    far, near, half = max(tau, trusted) * last, trusted * last, sheet_half * last  # in voxels
    with on_device(values):
        _narrow[(M,)](
            triangles.rows,
            *grid,
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
            triangles.rows, *grid, lists, counts, flood.bin_of.contiguous(), flood.outside.contiguous(),
            flood.whole_cells.contiguous().view(torch.uint8), values, unsure, last, flood_last, 1 / last, near, half,
            tie * last, C=DISTANCE_TILE, num_warps=2,
        )  # fmt: skip
        points = unsure.view(-1).nonzero().view(-1)
        if len(points):
            _votes[(cdiv(len(points), 64),)](
                triangles.exact, *grid, lists, counts, points, unsure, values,
                len(points), last, TRUSTED=trusted, TIE=tie, P=64, C=VOTE_TILE, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
    return values


def _check(
    name: str, x: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype, like: Tensor
) -> None:
    fits = x.ndim == len(shape) and all(n in (None, size) for n, size in zip(shape, x.shape))
    if not fits or x.dtype != dtype or x.device != like.device:
        wanted = f"{dtype} {['any' if n is None else n for n in shape]} on {like.device}".replace(
            "'", ""
        )
        raise ValueError(f"{name} must be {wanted}, got {x.dtype} {list(x.shape)} on {x.device}")
