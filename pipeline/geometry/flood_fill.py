"""Which grid points the outside reaches: triangles in cell bins, a barrier around them, a flood from the walls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.grid import CELL_SIDE, spacing
from pipeline.core.primitives.triangles import distance2

# A 6-connected path across a closed surface has an end within h/2 of it; a little more also closes hairline cracks.
BARRIER_VOXELS = 0.6
REACH_VOXELS = 3.0  # triangles this close to a cell are in its bin, enough for every line of sight


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Triangles within reach of each cell: cell -> bin (-1: none) -> run of `triangles`; bins sorted by cell."""

    resolution: int
    bin_of: NDArray[np.int32]  # [B, B, B]
    cells: NDArray[np.int32]  # [M, 3]
    offsets: NDArray[np.int64]  # [M + 1]
    triangles: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class FloodFill:
    """The flood's result. A cell with a bin has one bit a point: word lx, bit 8 * ly + lz; all others are whole."""

    bins: Bins
    barrier: NDArray[np.uint64]  # [M, 8] within BARRIER_VOXELS of a triangle in use
    outside: NDArray[np.uint64]  # [M, 8] reached by the flood
    whole_cells: NDArray[np.bool_]  # [B, B, B] cells without a bin that the flood reached


@njit(cache=True)
def _visit_cells(packed, first, resolution, reach, counts, cursor, out):
    """Octree descent of each triangle to the cells it comes within reach of: count them, or write them at cursor."""
    h = 1.0 / (resolution - 1)
    size = resolution // CELL_SIDE
    stack = np.empty((256, 6), np.int32)
    for t in range(first, len(packed)):
        row = packed[t]
        low, high = np.empty(3, np.int32), np.empty(3, np.int32)
        for k in range(3):
            a, b, c = row[k], row[k] + row[3 + k], row[k] + row[6 + k]
            low[k] = max(0, int(np.floor((min(a, b, c) - reach + 0.5) / h)) // CELL_SIDE)
            high[k] = min(size, int(np.ceil((max(a, b, c) + reach + 0.5) / h)) // CELL_SIDE + 1)
        stack[0, :3], stack[0, 3:] = low, high
        depth = 1
        while depth > 0:
            depth -= 1
            x0, y0, z0, x1, y1, z1 = stack[depth]
            if x0 >= x1 or y0 >= y1 or z0 >= z1:
                continue
            hx = 0.5 * h * (CELL_SIDE * (x1 - x0) - 1)
            hy = 0.5 * h * (CELL_SIDE * (y1 - y0) - 1)
            hz = 0.5 * h * (CELL_SIDE * (z1 - z0) - 1)
            cx, cy, cz = (
                CELL_SIDE * x0 * h - 0.5 + hx,
                CELL_SIDE * y0 * h - 0.5 + hy,
                CELL_SIDE * z0 * h - 0.5 + hz,
            )
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


def bin_triangles(
    packed: NDArray[np.float64], resolution: int, reach_voxels: float = REACH_VOXELS
) -> Bins:
    """Lists, for every 8^3 cell, the packed [T, 16] triangles within reach of it (and a few more), ascending."""
    size = resolution // CELL_SIDE
    reach = reach_voxels * spacing(resolution)
    counts = np.zeros((size, size, size), np.int32)
    none = np.empty((0, 0, 0), np.int64)
    _visit_cells(packed, 0, resolution, reach, counts, none, np.empty(0, np.int32))
    cells = np.argwhere(counts).astype(np.int32)
    bin_of = np.full(counts.shape, -1, np.int32)
    bin_of[tuple(cells.T)] = np.arange(len(cells), dtype=np.int32)
    offsets = np.zeros(len(cells) + 1, np.int64)
    np.cumsum(counts[tuple(cells.T)], out=offsets[1:])
    cursor = np.zeros(counts.shape, np.int64)
    cursor[tuple(cells.T)] = offsets[:-1]
    triangles = np.empty(offsets[-1], np.int32)
    if len(triangles):
        _visit_cells(packed, 0, resolution, reach, counts, cursor, triangles)
    return Bins(
        resolution=resolution, bin_of=bin_of, cells=cells, offsets=offsets, triangles=triangles
    )


@njit(cache=True)
def _mark_barrier(packed, resolution, radius, use, cells, offsets, triangles, barrier):
    h = 1.0 / (resolution - 1)
    radius2 = radius * radius
    one = np.uint64(1)
    low, high = np.empty(3, np.int64), np.empty(3, np.int64)
    for m in range(len(cells)):
        x0, y0, z0 = CELL_SIDE * cells[m, 0], CELL_SIDE * cells[m, 1], CELL_SIDE * cells[m, 2]
        for e in range(offsets[m], offsets[m + 1]):
            t = triangles[e]
            if not use[t]:
                continue
            row = packed[t]
            for k in range(3):
                a, b, c = row[k], row[k] + row[3 + k], row[k] + row[6 + k]
                start = CELL_SIDE * cells[m, k]
                low[k] = max(0, int(np.ceil((min(a, b, c) - radius + 0.5) / h)) - start)
                high[k] = min(
                    CELL_SIDE - 1, int(np.floor((max(a, b, c) + radius + 0.5) / h)) - start
                )
            for i in range(low[0], high[0] + 1):
                x = (x0 + i) * h - 0.5
                for j in range(low[1], high[1] + 1):
                    y = (y0 + j) * h - 0.5
                    for k in range(low[2], high[2] + 1):
                        bit = one << np.uint64(8 * j + k)
                        if barrier[m, i] & bit:
                            continue
                        z = (z0 + k) * h - 0.5
                        height = (
                            (x - row[0]) * row[9] + (y - row[1]) * row[10] + (z - row[2]) * row[11]
                        )
                        if abs(height) <= radius and distance2(row, x, y, z) <= radius2:
                            barrier[m, i] |= bit


_NOT_Z0 = np.uint64(0xFEFEFEFEFEFEFEFE)  # every bit but those with lz = 0
_NOT_Z7 = np.uint64(0x7F7F7F7F7F7F7F7F)


@njit(cache=True)
def _fill_words(reached, free):
    """Spreads the bits of reached [8] through those of free [8], 6-connected, until nothing changes."""
    one, eight = np.uint64(1), np.uint64(8)
    changed = True
    while changed:
        changed = False
        for sweep in range(16):  # forwards, then backwards
            i = sweep if sweep < 8 else 15 - sweep
            word = reached[i]
            if i > 0:
                word |= reached[i - 1]
            if i < 7:
                word |= reached[i + 1]
            word &= free[i]
            while True:
                grown = word | (word << eight) | (word >> eight)
                grown |= ((word << one) & _NOT_Z0) | ((word >> one) & _NOT_Z7)
                grown &= free[i]
                if grown == word:
                    break
                word = grown
            if word != reached[i]:
                reached[i] = word
                changed = True


@njit(cache=True)
def _face(words, axis, side):
    """The 64 points of one face of a cell as bits 8 * u + v of the two other axes in order."""
    if axis == 0:
        return words[7 * side]
    face = np.uint64(0)
    for i in range(8):
        if axis == 1:
            face |= (words[i] >> np.uint64(56 * side) & np.uint64(255)) << np.uint64(8 * i)
        else:
            for j in range(8):
                face |= (words[i] >> np.uint64(8 * j + 7 * side) & np.uint64(1)) << np.uint64(
                    8 * i + j
                )
    return face


@njit(cache=True)
def _seed_face(words, free, axis, side, face):
    """Sets the face's bits where they are free; whether any is new."""
    new = False
    for i in range(8):
        bits = np.uint64(0)
        if axis == 0:
            if i != 7 * side:
                continue
            bits = face
        elif axis == 1:
            bits = (face >> np.uint64(8 * i) & np.uint64(255)) << np.uint64(56 * side)
        else:
            for j in range(8):
                bits |= (face >> np.uint64(8 * i + j) & np.uint64(1)) << np.uint64(8 * j + 7 * side)
        bits &= free[i] & ~words[i]
        if bits:
            words[i] |= bits
            new = True
    return new


@njit(cache=True)
def _spread(bin_of, bin_cells, free, free_whole, reached, whole, queue, queued):
    """6-connected fill cell by cell, from the queued cells' reached points; a cell without a bin is one point.

    `queue` holds cell numbers to start with and has room for all of them; `queued` marks those in it.
    """
    size = len(bin_of)
    room = size**3
    head, waiting = 0, len(queue)
    ring = np.empty(room, np.int64)
    ring[:waiting] = queue
    while waiting > 0:
        b = ring[head]
        head = (head + 1) % room
        waiting -= 1
        queued[b] = False
        bx, by, bz = b // (size * size), b // size % size, b % size
        m = bin_of[bx, by, bz]
        if m >= 0:
            _fill_words(reached[m], free[m])
        for axis in range(3):
            for side in range(2):
                nx = bx + (2 * side - 1) * (axis == 0)
                ny = by + (2 * side - 1) * (axis == 1)
                nz = bz + (2 * side - 1) * (axis == 2)
                if min(nx, ny, nz) < 0 or max(nx, ny, nz) >= size:
                    continue
                face = _face(reached[m], axis, side) if m >= 0 else ~np.uint64(0)
                if not face:
                    continue
                n = bin_of[nx, ny, nz]
                if n >= 0:
                    if not _seed_face(reached[n], free[n], axis, 1 - side, face):
                        continue
                elif whole[nx, ny, nz] or not free_whole[nx, ny, nz]:
                    continue
                else:
                    whole[nx, ny, nz] = True
                to = (nx * size + ny) * size + nz
                if not queued[to]:
                    queued[to] = True
                    ring[(head + waiting) % room] = to
                    waiting += 1


def _fill(
    bins: Bins,
    free: NDArray[np.uint64],
    free_whole: NDArray[np.bool_],
    start: NDArray[np.int64],
    reached: NDArray[np.uint64],
    whole: NDArray[np.bool_],
) -> None:
    """Spreads `reached` and `whole` in place from the cells with the numbers `start`."""
    queued = np.zeros(bins.bin_of.size, np.bool_)
    queued[start] = True
    _spread(bins.bin_of, bins.cells, free, free_whole, reached, whole, start, queued)


def flood_fill(
    packed: NDArray[np.float64],
    bins: Bins,
    use: NDArray[np.bool_],
    barrier_voxels: float = BARRIER_VOXELS,
) -> FloodFill:
    """Fills the outside of the triangles where `use` [T] holds, leaving a barrier of this many voxels around them."""
    barrier = np.zeros((len(bins.cells), CELL_SIDE), np.uint64)
    radius = barrier_voxels * spacing(bins.resolution)
    _mark_barrier(
        packed, bins.resolution, radius, use, bins.cells, bins.offsets, bins.triangles, barrier
    )
    outside, whole = np.zeros_like(barrier), np.zeros(bins.bin_of.shape, np.bool_)
    # the flood starts at all free points of the grid's walls
    size = len(bins.bin_of)
    walls = np.zeros(bins.bin_of.shape, np.bool_)
    for axis in range(3):
        for side in (0, size - 1):
            wall = np.moveaxis(walls, axis, 0)[side]
            wall[...] = True
            bin_numbers = np.moveaxis(bins.bin_of, axis, 0)[side]
            np.moveaxis(whole, axis, 0)[side][bin_numbers < 0] = True
            for m in bin_numbers[bin_numbers >= 0]:
                _seed_face(outside[m], ~barrier[m], axis, int(side > 0), np.uint64(2**64 - 1))
    start = np.flatnonzero(walls)
    _fill(bins, ~barrier, np.ones_like(whole), start, outside, whole)
    return FloodFill(bins=bins, barrier=barrier, outside=outside, whole_cells=whole)


def connected_region(free: FloodFill, start: NDArray[np.int64]) -> FloodFill:
    """The connected region of the points that are `outside` in `free`, from one grid point [3] that is."""
    bins = free.bins
    cell, local = start // CELL_SIDE, start % CELL_SIDE
    reached, whole = np.zeros_like(free.outside), np.zeros_like(free.whole_cells)
    m = bins.bin_of[tuple(cell)]
    if m < 0:
        whole[tuple(cell)] = True
    else:
        reached[m, local[0]] = np.uint64(1) << np.uint64(8 * local[1] + local[2])
    number = np.ravel_multi_index(tuple(cell), bins.bin_of.shape)
    _fill(bins, free.outside, free.whole_cells, np.array([number]), reached, whole)
    return FloodFill(bins=bins, barrier=free.barrier, outside=reached, whole_cells=whole)


@njit(cache=True, inline="always")
def is_reached(bin_of, words, whole, x, y, z, beyond):
    """The bit of the grid point with these indices; `beyond` for a point off the grid."""
    last = len(bin_of) * CELL_SIDE - 1
    if x < 0 or y < 0 or z < 0 or x > last or y > last or z > last:
        return beyond
    m = bin_of[x // 8, y // 8, z // 8]
    if m < 0:
        return whole[x // 8, y // 8, z // 8]
    return (words[m, x % 8] >> np.uint64(8 * (y % 8) + z % 8) & np.uint64(1)) != 0
