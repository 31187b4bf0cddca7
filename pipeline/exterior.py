"""Which grid points the outside reaches: triangles in block bins, a barrier around them, a flood from the walls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.schema import BLOCK, spacing
from pipeline.triangles import distance2

FREE, BARRIER, EXTERIOR = 0, 1, 2
POINTS = BLOCK**3
# A 6-connected path across a closed surface has an end within h/2 of it; a little more also closes hairline cracks.
BARRIER_VOXELS = 0.6
REACH_VOXELS = 3.0  # triangles this close to a block are in its bin, enough for every line of sight


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Triangles within REACH_VOXELS of each block: block -> bin (-1: none) -> run of `triangles`."""

    resolution: int
    bin_of: NDArray[np.int32]  # [B, B, B]
    blocks: NDArray[np.int32]  # [M, 3]
    offsets: NDArray[np.int64]  # [M + 1]
    triangles: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Exterior:
    """The flood's result: points of blocks with a bin one by one, all other blocks whole."""

    bins: Bins
    points: NDArray[np.uint8]  # [M, 512] FREE (not reached), BARRIER or EXTERIOR
    blocks: NDArray[np.uint8]  # [B, B, B] FREE or EXTERIOR, for blocks without a bin


@njit(cache=True)
def _visit_blocks(packed, first, resolution, reach, counts, cursor, out):
    """Octree descent of each triangle to the blocks it comes within reach of: count them, or write them at cursor."""
    h = 1.0 / (resolution - 1)
    size = resolution // BLOCK
    stack = np.empty((256, 6), np.int32)
    for t in range(first, len(packed)):
        row = packed[t]
        low, high = np.empty(3, np.int32), np.empty(3, np.int32)
        for k in range(3):
            a, b, c = row[k], row[k] + row[3 + k], row[k] + row[6 + k]
            low[k] = max(0, int(np.floor((min(a, b, c) - reach + 0.5) / h)) // BLOCK)
            high[k] = min(size, int(np.ceil((max(a, b, c) + reach + 0.5) / h)) // BLOCK + 1)
        stack[0, :3], stack[0, 3:] = low, high
        depth = 1
        while depth > 0:
            depth -= 1
            x0, y0, z0, x1, y1, z1 = stack[depth]
            if x0 >= x1 or y0 >= y1 or z0 >= z1:
                continue
            hx = 0.5 * h * (BLOCK * (x1 - x0) - 1)
            hy = 0.5 * h * (BLOCK * (y1 - y0) - 1)
            hz = 0.5 * h * (BLOCK * (z1 - z0) - 1)
            cx, cy, cz = BLOCK * x0 * h - 0.5 + hx, BLOCK * y0 * h - 0.5 + hy, BLOCK * z0 * h - 0.5 + hz
            radius = np.sqrt(hx * hx + hy * hy + hz * hz) + reach
            # the plane first: it prunes most cells for less than the full distance
            height = (cx - row[0]) * row[9] + (cy - row[1]) * row[10] + (cz - row[2]) * row[11]
            if abs(height) > abs(row[9]) * hx + abs(row[10]) * hy + abs(row[11]) * hz + reach:
                continue
            if distance2(row, cx, cy, cz) > radius * radius:
                continue
            if x1 - x0 == 1 and y1 - y0 == 1 and z1 - z0 == 1:
                if len(out) == 0:
                    counts[x0, y0, z0] += 1
                else:
                    out[cursor[x0, y0, z0]] = t
                    cursor[x0, y0, z0] += 1
                continue
            mx, my, mz = (x0 + x1 + 1) // 2, (y0 + y1 + 1) // 2, (z0 + z1 + 1) // 2
            for i in range(2):
                for j in range(2):
                    for k in range(2):
                        stack[depth, 0], stack[depth, 3] = (x0, mx) if i == 0 else (mx, x1)
                        stack[depth, 1], stack[depth, 4] = (y0, my) if j == 0 else (my, y1)
                        stack[depth, 2], stack[depth, 5] = (z0, mz) if k == 0 else (mz, z1)
                        depth += 1


def bin_triangles(packed: NDArray[np.float64], resolution: int) -> Bins:
    """Lists, for every 8^3 block, the packed [T, 16] triangles within REACH_VOXELS of it, in ascending order."""
    size = resolution // BLOCK
    reach = REACH_VOXELS * spacing(resolution)
    counts = np.zeros((size, size, size), np.int32)
    none = np.empty((0, 0, 0), np.int64)
    _visit_blocks(packed, 0, resolution, reach, counts, none, np.empty(0, np.int32))
    blocks = np.argwhere(counts).astype(np.int32)
    bin_of = np.full(counts.shape, -1, np.int32)
    bin_of[tuple(blocks.T)] = np.arange(len(blocks), dtype=np.int32)
    offsets = np.zeros(len(blocks) + 1, np.int64)
    np.cumsum(counts[tuple(blocks.T)], out=offsets[1:])
    cursor = np.zeros(counts.shape, np.int64)
    cursor[tuple(blocks.T)] = offsets[:-1]
    triangles = np.empty(offsets[-1], np.int32)
    if len(triangles):
        _visit_blocks(packed, 0, resolution, reach, counts, cursor, triangles)
    return Bins(resolution=resolution, bin_of=bin_of, blocks=blocks, offsets=offsets, triangles=triangles)


@njit(cache=True)
def _mark_barrier(packed, resolution, radius, use, blocks, offsets, triangles, points):
    h = 1.0 / (resolution - 1)
    radius2 = radius * radius
    for m in range(len(blocks)):
        x0, y0, z0 = BLOCK * blocks[m, 0], BLOCK * blocks[m, 1], BLOCK * blocks[m, 2]
        for e in range(offsets[m], offsets[m + 1]):
            t = triangles[e]
            if not use[t]:
                continue
            row = packed[t]
            low, high = np.empty(3, np.int64), np.empty(3, np.int64)
            for k in range(3):
                a, b, c = row[k], row[k] + row[3 + k], row[k] + row[6 + k]
                start = BLOCK * blocks[m, k]
                low[k] = max(0, int(np.ceil((min(a, b, c) - radius + 0.5) / h)) - start)
                high[k] = min(BLOCK - 1, int(np.floor((max(a, b, c) + radius + 0.5) / h)) - start)
            for i in range(low[0], high[0] + 1):
                x = (x0 + i) * h - 0.5
                for j in range(low[1], high[1] + 1):
                    y = (y0 + j) * h - 0.5
                    for k in range(low[2], high[2] + 1):
                        p = 64 * i + 8 * j + k
                        if points[m, p] == BARRIER:
                            continue
                        z = (z0 + k) * h - 0.5
                        height = (x - row[0]) * row[9] + (y - row[1]) * row[10] + (z - row[2]) * row[11]
                        if abs(height) <= radius and distance2(row, x, y, z) <= radius2:
                            points[m, p] = BARRIER


@njit(cache=True)
def _spread(bin_of, bin_blocks, points, whole, stack, top, old, new):
    """6-connected fill from the stack's entries, turning state old into new; a block without a bin is filled as one.

    An entry is 512 * bin + point, or -1 - block number for a whole block; entries are in state new already.
    """
    size = len(bin_of)
    while top > 0:
        top -= 1
        code = stack[top]
        m, p, bx, by, bz = 0, 0, 0, 0, 0
        if code < 0:
            b = -1 - code
            bx, by, bz = b // (size * size), b // size % size, b % size
        else:
            m, p = code // POINTS, code % POINTS
            bx, by, bz = bin_blocks[m, 0], bin_blocks[m, 1], bin_blocks[m, 2]
        for axis in range(3):
            stride = 64 if axis == 0 else (8 if axis == 1 else 1)
            for step in (-1, 1):
                if code >= 0 and 0 <= p // stride % 8 + step < 8:  # most steps stay inside the block
                    q = p + step * stride
                    if points[m, q] == old:
                        points[m, q] = new
                        stack[top] = POINTS * m + q
                        top += 1
                    continue
                nx = bx + step if axis == 0 else bx
                ny = by + step if axis == 1 else by
                nz = bz + step if axis == 2 else bz
                if min(nx, ny, nz) < 0 or max(nx, ny, nz) >= size:
                    continue
                n = bin_of[nx, ny, nz]
                if n < 0:
                    if whole[nx, ny, nz] == old:
                        whole[nx, ny, nz] = new
                        stack[top] = -1 - ((nx * size + ny) * size + nz)
                        top += 1
                elif code >= 0:
                    q = p - step * 7 * stride
                    if points[n, q] == old:
                        points[n, q] = new
                        stack[top] = POINTS * n + q
                        top += 1
                else:
                    face = 0 if step > 0 else 7 * stride
                    other1 = 8 if axis == 0 else 64
                    other2 = 8 if axis == 2 else 1
                    for u in range(8):
                        for v in range(8):
                            q = face + u * other1 + v * other2
                            if points[n, q] == old:
                                points[n, q] = new
                                stack[top] = POINTS * n + q
                                top += 1


@njit(cache=True)
def _flood(bin_of, bin_blocks, points, whole):
    """EXTERIOR spreads from all FREE wall points."""
    size = len(bin_of)
    stack = np.empty(len(points) * POINTS + size**3 + 1, np.int64)
    top = 0
    last = size * BLOCK - 1
    for bx in range(size):
        for by in range(size):
            for bz in range(size):
                if 0 < bx < size - 1 and 0 < by < size - 1 and 0 < bz < size - 1:
                    continue
                m = bin_of[bx, by, bz]
                if m < 0:
                    whole[bx, by, bz] = EXTERIOR
                    stack[top] = -1 - ((bx * size + by) * size + bz)
                    top += 1
                    continue
                for p in range(POINTS):
                    x, y, z = 8 * bx + p // 64, 8 * by + p // 8 % 8, 8 * bz + p % 8
                    wall = x == 0 or y == 0 or z == 0 or x == last or y == last or z == last
                    if wall and points[m, p] == FREE:
                        points[m, p] = EXTERIOR
                        stack[top] = POINTS * m + p
                        top += 1
    _spread(bin_of, bin_blocks, points, whole, stack, top, FREE, EXTERIOR)


@njit(cache=True)
def _label(bin_of, bin_blocks, points, whole, old, first):
    """Numbers the connected regions of state old: first, first + 1, ...; the number after the last."""
    size = len(bin_of)
    stack = np.empty(len(points) * POINTS + size**3 + 1, np.int64)
    number = first
    for m in range(len(points)):
        for p in range(POINTS):
            if points[m, p] == old:
                points[m, p] = number
                stack[0] = POINTS * m + p
                _spread(bin_of, bin_blocks, points, whole, stack, 1, old, number)
                number += 1
    return number


def flood(packed: NDArray[np.float64], bins: Bins, use: NDArray[np.bool_]) -> Exterior:
    """Fills the outside of the triangles where `use` [T] holds, leaving a barrier of BARRIER_VOXELS around them."""
    points = np.zeros((len(bins.blocks), POINTS), np.uint8)
    radius = BARRIER_VOXELS * spacing(bins.resolution)
    _mark_barrier(packed, bins.resolution, radius, use, bins.blocks, bins.offsets, bins.triangles, points)
    whole = np.zeros(bins.bin_of.shape, np.uint8)
    _flood(bins.bin_of, bins.blocks, points, whole)
    return Exterior(bins=bins, points=points, blocks=whole)


def cut_off(before: Exterior, after: Exterior) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
    """Connected regions that were exterior before and are not any more, on the same bins.

    Labels of points [M, 512] and of whole blocks [B, B, B], and the number of regions: 1.. is a region, 0 what was
    already not exterior before (nor barrier after), -1 everything else.
    """
    bins = before.bins
    unset = -2
    points = np.where(after.points == FREE, np.where(before.points == EXTERIOR, unset, 0), -1).astype(np.int32)
    whole = np.where(after.blocks == FREE, np.where(before.blocks == EXTERIOR, unset, 0), -1).astype(np.int32)
    end = _label(bins.bin_of, bins.blocks, points, whole, unset, 1)
    return points, whole, end - 1


@njit(cache=True, inline="always")
def state_at(bin_of, points, whole, x, y, z):
    """FREE, BARRIER or EXTERIOR of the grid point with these indices; beyond the grid is EXTERIOR."""
    last = len(bin_of) * BLOCK - 1
    if x < 0 or y < 0 or z < 0 or x > last or y > last or z > last:
        return EXTERIOR
    m = bin_of[x // 8, y // 8, z // 8]
    if m < 0:
        return whole[x // 8, y // 8, z // 8]
    return points[m, 64 * (x % 8) + 8 * (y % 8) + z % 8]
