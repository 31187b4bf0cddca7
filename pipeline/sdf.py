"""Exact sparse signed distances: octree descent to 8^3 blocks near the surface, closest triangles inside each block."""

from __future__ import annotations

import numpy as np
from numba import njit

from pipeline.schema import BLOCK, Bricks, band, check_resolution, spacing
from pipeline.sharp import sharp_bits
from pipeline.topology import BURIED, SOLID, THIN, Topology
from pipeline.triangles import TIE, distance2, pack, side_vote

SHEET_HALF_VOXELS = 0.87  # just above sqrt(3) / 2: a sheet of this half thickness always holds grid points


def compute_bricks(topology: Topology, resolution: int) -> Bricks:
    """Every 8^3 block of the R^3 grid with a point of |sdf| < tau: clamp(sdf / tau), signs everywhere, sharp bits.

    sdf = min(signed distance to the solid surface, distance to the sheets - SHEET_HALF_VOXELS * h): the solids' union
    with a thin shell around each sheet. ValueError if the resolution is not a multiple of 8.
    """
    tau, h = band(check_resolution(resolution)), spacing(resolution)
    half = SHEET_HALF_VOXELS * h
    packed = pack(topology.triangles)
    blocks, distances = _descend(packed, topology.kinds, resolution, tau, half)
    order = np.lexsort(blocks.T[::-1])
    blocks, distances = blocks[order], distances[order]
    return Bricks(
        resolution=resolution,
        blocks=blocks.astype(np.int16),
        values=np.clip(distances / np.float32(tau), -1, 1).astype(np.float16),
        sharp=sharp_bits(blocks, np.abs(distances) < np.float32(tau), topology.sharp_edges, resolution),
    )


@njit(cache=True)
def _narrow(packed, kinds, candidates, x, y, z, radius, kept, scratch):
    """Keeps the candidates that can be closest for some point within radius of (x, y, z).

    A solid surface's own triangles and the buried ones compete with each other for the sign, but only the former set
    the bound; sheets compete among themselves. Count kept, distance to the closest solid, to the closest sheet.
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
        if away > bound + 2 * radius:
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
        bound = sheet if kinds[candidates[c]] == THIN else solid
        if scratch[c] <= bound + 2 * radius + 2 * TIE:
            kept[count] = candidates[c]
            count += 1
    return count, solid, sheet


@njit(cache=True)
def _signed_distance(packed, kinds, candidates, x, y, z, half):
    """Signed distance of a point from the candidate triangles that can be closest to it."""
    solid2, any2, sheet2, votes = np.inf, np.inf, np.inf, 0.0
    for t in candidates:
        row = packed[t]
        if kinds[t] == THIN:
            sheet2 = min(sheet2, distance2(row, x, y, z))
            continue
        height = (x - row[0]) * row[9] + (y - row[1]) * row[10] + (z - row[2]) * row[11]
        if height * height > (np.sqrt(solid2) + TIE) ** 2:  # the plane is farther than the closest triangle so far
            continue
        d2 = distance2(row, x, y, z)
        if kinds[t] == SOLID:
            solid2 = min(solid2, d2)
        nearest = np.sqrt(any2)
        if d2 > (nearest + TIE) ** 2:
            continue
        if np.sqrt(d2) < nearest - TIE:
            votes = 0.0
        any2 = min(any2, d2)
        vote = side_vote(row, x, y, z)
        votes += -abs(vote) if kinds[t] == BURIED else vote
    distance = np.sqrt(solid2) if votes >= 0 else -np.sqrt(solid2)
    return min(distance, np.sqrt(sheet2) - half)


@njit(cache=True)
def _fill_block(packed, kinds, candidates, x0, y0, z0, h, tau, half, buffers, scratch, out):
    """Distances of one block's 512 points; whether any lies inside the band."""
    active = False
    radius4, radius2 = np.sqrt(3) * 1.5 * h, np.sqrt(3) * 0.5 * h
    for sub in range(8):
        i4, j4, k4 = 4 * (sub >> 2), 4 * (sub >> 1 & 1), 4 * (sub & 1)
        x, y, z = x0 + (i4 + 1.5) * h, y0 + (j4 + 1.5) * h, z0 + (k4 + 1.5) * h
        count, solid, sheet = _narrow(packed, kinds, candidates, x, y, z, radius4, buffers[0], scratch)
        mine = buffers[0][:count]
        if min(solid, sheet - half) - radius4 > tau:
            # no surface inside: one sign for all, and the clamp hides the rest
            distance = _signed_distance(packed, kinds, mine, x, y, z, half)
            far = np.inf if distance > 0 else -np.inf
            for i in range(4):
                for j in range(4):
                    for k in range(4):
                        out[64 * (i4 + i) + 8 * (j4 + j) + k4 + k] = far
            continue
        for part in range(8):
            i2, j2, k2 = i4 + 2 * (part >> 2), j4 + 2 * (part >> 1 & 1), k4 + 2 * (part & 1)
            x, y, z = x0 + (i2 + 0.5) * h, y0 + (j2 + 0.5) * h, z0 + (k2 + 0.5) * h
            few, _, _ = _narrow(packed, kinds, mine, x, y, z, radius2, buffers[1], scratch)
            for point in range(8):
                i, j, k = i2 + (point >> 2), j2 + (point >> 1 & 1), k2 + (point & 1)
                distance = _signed_distance(packed, kinds, buffers[1][:few], x0 + i * h, y0 + j * h, z0 + k * h, half)
                out[64 * i + 8 * j + k] = distance
                active = active or abs(np.float32(distance)) < np.float32(tau)
    return active


@njit(cache=True)
def _descend(packed, kinds, resolution, tau, half):
    """Depth-first octree descent from the whole grid to blocks; a cell keeps the triangles that can be closest in it."""
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
    buffers = (np.empty(len(packed), np.int32), np.empty(len(packed), np.int32))
    stack = np.empty((8 * depths, 8), np.int64)  # cell bounds, then the bounds of its list
    stack[0, 0:3], stack[0, 3:6], stack[0, 6], stack[0, 7] = 0, size, 0, len(packed)
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
                packed,
                kinds,
                candidates,
                corner[0],
                corner[1],
                corner[2],
                h,
                tau,
                half,
                buffers,
                scratch,
                values[count],
            ):
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
                radius, kept, scratch,
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
