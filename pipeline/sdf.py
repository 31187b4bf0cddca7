"""Exact sparse signed distances: octree descent to 8^3 blocks near the surface, closest triangles inside each block."""

from __future__ import annotations

import numpy as np
from numba import njit

from pipeline.exterior import BARRIER_VOXELS, bit_at
from pipeline.schema import BLOCK, Bricks, band, check_resolution, spacing
from pipeline.sharp import sharp_bits
from pipeline.topology import BURIED, SOLID, THIN, Topology
from pipeline.triangles import TIE, distance2, pack, side_vote

# beyond this distance from all triangles the nearest point of the topology's grid (sqrt(3) / 2) is clear of the barrier
FLOOD_VOXELS = BARRIER_VOXELS + 0.87
SLAB_BLOCKS = 8
SHEET_HALF_VOXELS = 0.87  # just above sqrt(3) / 2: a sheet of this half thickness always holds grid points


def compute_bricks(topology: Topology, resolution: int) -> Bricks:
    """Every 8^3 block of the R^3 grid with a point of |sdf| < tau: clamp(sdf / tau), signs everywhere, sharp bits.

    sdf = min(signed distance to the solid surface, distance to the sheets - SHEET_HALF_VOXELS * h): the solids' union
    with a thin shell around each sheet. ValueError if the resolution is not a multiple of 8.
    """
    tau, h = band(check_resolution(resolution)), spacing(resolution)
    packed = pack(topology.triangles)
    exterior, size = topology.exterior, resolution // BLOCK
    slabs = []
    for first in range(0, size, SLAB_BLOCKS):  # one slab's float32 distances at a time
        blocks, distances = _descend(
            packed, topology.kinds, resolution, first, min(first + SLAB_BLOCKS, size), tau, SHEET_HALF_VOXELS * h,
            spacing(topology.resolution), exterior.bins.bin_of, exterior.outside, exterior.whole,
        )  # fmt: skip
        order = np.lexsort(blocks.T[::-1])
        blocks, distances = blocks[order], distances[order]
        sharp = sharp_bits(blocks, np.abs(distances) < np.float32(tau), topology.sharp_edges, resolution)
        values = np.divide(distances, np.float32(tau), out=distances)
        slabs.append((blocks.astype(np.int16), np.clip(values, -1, 1, out=values).astype(np.float16), sharp))
    blocks, values, sharp = (np.concatenate(parts) for parts in zip(*slabs))
    return Bricks(resolution=resolution, blocks=blocks, values=values, sharp=sharp)


@njit(cache=True)
def _narrow(packed, kinds, candidates, x, y, z, radius, trusted, kept, scratch):
    """Keeps the candidates that can be closest for some point within radius of (x, y, z).

    Solids' triangles compete with each other and so do sheets'. A buried one only tells sides near the surface: it
    matters if it is as close as the closest solid and within `trusted`. Count kept, distance to the closest solid, to
    the closest sheet.
    """
    solid, sheet = np.inf, np.inf
    for c in range(len(candidates)):
        t = candidates[c]
        row = packed[t]
        kind = kinds[t]
        # a lower bound first: most triangles are too far to matter
        dx, dy, dz = x - row[12], y - row[13], z - row[14]
        away = np.sqrt(dx * dx + dy * dy + dz * dz) - row[15]
        bound = sheet if kind == THIN else solid
        if away > bound + 2 * radius or (kind == BURIED and away > trusted + radius):
            scratch[c] = np.inf
            continue
        distance = np.sqrt(distance2(row, x, y, z))
        scratch[c] = distance
        if kind == SOLID:
            solid = min(solid, distance)
        elif kind == THIN:
            sheet = min(sheet, distance)
    count = 0
    for c in range(len(candidates)):
        kind = kinds[candidates[c]]
        bound = (sheet if kind == THIN else solid) + 2 * radius
        if kind == BURIED:
            bound = min(bound, trusted + radius)
        if scratch[c] <= bound + 2 * TIE:
            kept[count] = candidates[c]
            count += 1
    return count, solid, sheet


@njit(cache=True)
def _votes(packed, kinds, candidates, x, y, z):
    """Side of the closest triangles by their votes, in float64: positive outside. For points near edges and corners."""
    nearest, votes = np.inf, 0.0
    for t in candidates:
        if kinds[t] == THIN:
            continue
        row = packed[t]
        height = (x - row[0]) * row[9] + (y - row[1]) * row[10] + (z - row[2]) * row[11]
        if abs(height) > nearest + TIE:  # the plane alone is farther
            continue
        distance = np.sqrt(distance2(row, x, y, z))
        if distance > nearest + TIE:
            continue
        if distance < nearest - TIE:
            votes = 0.0
        nearest = min(nearest, distance)
        vote = side_vote(row, x, y, z)
        votes += -abs(vote) if kinds[t] == BURIED else vote
    return votes


@njit(cache=True, error_model="numpy")
def _closest(row, x, y, z, h, grid, best, height_of_best):
    """Lowers best [64] to the squared distance of 4^3 points to a triangle, in voxels, in float32 without branches.

    height_of_best becomes the height above the triangle where it is the closest and its inside is hit, NaN where an
    edge or a corner is.
    """
    zero, one = np.float32(0), np.float32(1)
    ax, ay, az = np.float32((row[0] - x) / h), np.float32((row[1] - y) / h), np.float32((row[2] - z) / h)
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
        ds, dt, dr = sx * sx + sy * sy + sz * sz, tx * tx + ty * ty + tz * tz, rx * rx + ry * ry + rz * rz
        edge = ds if ds < dt else dt
        edge = edge if edge < dr else dr
        height = px * nx + py * ny + pz * nz
        inside_u = px * mux + py * muy + pz * muz
        inside_v = px * mvx + py * mvy + pz * mvz
        inside_w = qx * mwx + qy * mwy + qz * mwz
        inside = inside_u if inside_u < inside_v else inside_v
        inside = inside if inside < inside_w else inside_w
        d2 = height * height if inside > zero else edge
        height = height if inside > zero else np.float32(np.nan)
        old = best[p]
        height_of_best[p] = height if d2 < old else height_of_best[p]
        best[p] = d2 if d2 < old else old


@njit(cache=True, inline="always")
def _outside(flood_h, bin_of, outside, whole, x, y, z):
    """What the flood says of the topology's grid point nearest to (x, y, z)."""
    i = int(np.round((x + 0.5) / flood_h))
    j = int(np.round((y + 0.5) / flood_h))
    k = int(np.round((z + 0.5) / flood_h))
    return bit_at(bin_of, outside, whole, i, j, k, True)


@njit(cache=True)
def _fill_block(packed, kinds, candidates, corner, h, tau, half, flood_h, bin_of, outside, whole, kept, scratch, out):
    """Distances of one block's 512 points; whether any lies inside the band.

    Near a surface the closest triangle decides the side; farther off, where the nearest grid point of the topology is
    clear of its barrier, the flood does.
    """
    active = False
    radius = np.sqrt(3) * 1.5 * h
    trusted = FLOOD_VOXELS * flood_h
    grid = np.empty((3, 64), np.float32)
    for p in range(64):
        grid[0, p], grid[1, p], grid[2, p] = p // 16 - 1.5, p // 4 % 4 - 1.5, p % 4 - 1.5
    solid2, buried2, sheet2 = np.empty(64, np.float32), np.empty(64, np.float32), np.empty(64, np.float32)
    height, unused = np.empty(64, np.float32), np.empty(64, np.float32)
    for sub in range(8):
        first = 4 * (64 * (sub >> 2) + 8 * (sub >> 1 & 1) + (sub & 1))
        x = corner[0] + (4 * (sub >> 2) + 1.5) * h
        y = corner[1] + (4 * (sub >> 1 & 1) + 1.5) * h
        z = corner[2] + (4 * (sub & 1) + 1.5) * h
        count, solid, sheet = _narrow(packed, kinds, candidates, x, y, z, radius, trusted, kept, scratch)
        if min(solid, sheet - half) - radius > max(tau, trusted):
            # no surface inside: one side for all, and the clamp hides the rest
            far = np.inf if _outside(flood_h, bin_of, outside, whole, x, y, z) else -np.inf
            for p in range(64):
                out[first + 64 * (p // 16) + 8 * (p // 4 % 4) + p % 4] = far
            continue
        solid2[:], buried2[:], sheet2[:], height[:] = np.inf, np.inf, np.inf, np.nan
        for c in range(count):
            t = kept[c]
            if kinds[t] == SOLID:
                _closest(packed[t], x, y, z, h, grid, solid2, height)
            elif kinds[t] == BURIED:
                _closest(packed[t], x, y, z, h, grid, buried2, unused)
            else:
                _closest(packed[t], x, y, z, h, grid, sheet2, unused)
        for p in range(64):
            i, j, k = p // 16, p // 4 % 4, p % 4
            distance = h * np.sqrt(solid2[p])
            if distance < np.inf:
                px, py, pz = x + (i - 1.5) * h, y + (j - 1.5) * h, z + (k - 1.5) * h
                if min(distance, h * np.sqrt(sheet2[p])) > trusted:
                    is_out = _outside(flood_h, bin_of, outside, whole, px, py, pz)
                elif buried2[p] == np.inf and not np.isnan(height[p]):
                    is_out = height[p] >= 0
                else:
                    is_out = _votes(packed, kinds, kept[:count], px, py, pz) >= 0
                if not is_out:
                    distance = -distance
            distance = min(distance, h * np.sqrt(sheet2[p]) - half)
            out[first + 64 * i + 8 * j + k] = distance
            active = active or abs(distance) < tau
    return active


@njit(cache=True)
def _descend(packed, kinds, resolution, x_first, x_end, tau, half, flood_h, bin_of, outside, whole):
    """Octree descent to the blocks with x_first <= x < x_end near the surface, and their distances.

    A cell keeps the triangles that can be closest for one of its points.
    """
    h = 1.0 / (resolution - 1)
    size = resolution // BLOCK
    blocks = np.empty((1024, 3), np.int32)
    values = np.empty((1024, BLOCK**3), np.float32)
    count = 0
    depths = 2 + int(np.ceil(np.log2(size)))
    # the lists of a depth's open cells lie one after another in one growing buffer
    lists = np.empty(max(8 * len(packed), 1024), np.int32)
    scratch = np.empty(len(packed))
    kept = np.empty(len(packed), np.int32)
    stack = np.empty((8 * depths, 8), np.int64)  # cell bounds, then the bounds of its list
    stack[0, 0:3], stack[0, 3:6], stack[0, 6], stack[0, 7] = 0, size, 0, len(packed)
    stack[0, 0], stack[0, 3] = x_first, x_end
    lists[: len(packed)] = np.arange(len(packed))
    depth = 1
    while depth > 0:
        depth -= 1
        x0, y0, z0, x1, y1, z1, start, stop = stack[depth]
        candidates = lists[start:stop].copy()
        if x1 - x0 == 1 and y1 - y0 == 1 and z1 - z0 == 1:
            if count == len(blocks):
                more_blocks, more_values = np.empty((2 * count, 3), np.int32), np.empty((2 * count, 512), np.float32)
                more_blocks[:count], more_values[:count] = blocks, values
                blocks, values = more_blocks, more_values
            corner = (BLOCK * x0 * h - 0.5, BLOCK * y0 * h - 0.5, BLOCK * z0 * h - 0.5)
            if _fill_block(
                packed, kinds, candidates, corner, h, tau, half, flood_h, bin_of, outside, whole,
                kept, scratch, values[count],
            ):  # fmt: skip
                blocks[count, 0], blocks[count, 1], blocks[count, 2] = x0, y0, z0
                count += 1
            continue
        top = start  # the cell's own list is not needed any more
        mx, my, mz = (x0 + x1 + 1) // 2, (y0 + y1 + 1) // 2, (z0 + z1 + 1) // 2
        for child in range(8):
            ax, bx = (x0, mx) if child >> 2 == 0 else (mx, x1)
            ay, by = (y0, my) if child >> 1 & 1 == 0 else (my, y1)
            az, bz = (z0, mz) if child & 1 == 0 else (mz, z1)
            if ax >= bx or ay >= by or az >= bz:
                continue
            hx, hy, hz = (
                (BLOCK * (bx - ax) - 1) * h / 2,
                (BLOCK * (by - ay) - 1) * h / 2,
                (BLOCK * (bz - az) - 1) * h / 2,
            )
            radius = np.sqrt(hx * hx + hy * hy + hz * hz)
            number, solid, sheet = _narrow(
                packed, kinds, candidates,
                BLOCK * ax * h - 0.5 + hx, BLOCK * ay * h - 0.5 + hy, BLOCK * az * h - 0.5 + hz,
                radius, FLOOD_VOXELS * flood_h, kept, scratch,
            )  # fmt: skip
            if min(solid, sheet - half) - radius >= tau:
                continue
            if top + number > len(lists):
                more = np.empty(2 * len(lists) + number, np.int32)
                more[:top] = lists[:top]
                lists = more
            lists[top : top + number] = kept[:number]
            stack[depth, 0], stack[depth, 1], stack[depth, 2] = ax, ay, az
            stack[depth, 3], stack[depth, 4], stack[depth, 5] = bx, by, bz
            stack[depth, 6], stack[depth, 7] = top, top + number
            depth += 1
            top += number
    return blocks[:count].copy(), values[:count].copy()
