"""Flood fill of the space outside a surface, on bit masks of 8^3 cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.grid import CELL_SIDE, spacing
from pipeline.core.primitives.triangles import distance2

# A 6-connected path through a closed surface has a grid point within h/2 of the surface. The
# additional 0.1 also closes hairline cracks.
BARRIER_VOXELS = 0.6
# Distance from a cell up to which triangles are in the cell's bin. It suffices for every line of
# sight that starts or ends in the cell.
REACH_VOXELS = 3.0
# Share of the grid points of a box that the flood reached.
NONE_REACHED = 0
SOME_REACHED = 1
ALL_REACHED = 2
MAX_BOX_CELLS = 16384  # larger boxes are not searched


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Lists of the triangles near each cell of a grid.

    Only cells with at least one triangle nearby have a bin. Bin m holds the triangles
    `triangles[offsets[m]:offsets[m + 1]]`, in ascending order. B = resolution / 8.
    """

    resolution: int
    bin_of: NDArray[np.int32]  # [B, B, B] bin of each cell, -1 if it has none
    cells: NDArray[np.int32]  # [M, 3] cell of each bin, sorted by x, y, z
    offsets: NDArray[np.int64]  # [M + 1]
    triangles: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class FloodFill:
    """Result of a flood fill.

    A cell with a bin has one bit per grid point: word lx, bit 8 * ly + lz. A cell without a bin
    contains no barrier, so one value describes all of it.
    """

    bins: Bins
    barrier: NDArray[np.uint64]  # [M, 8] grid points within the barrier distance of a triangle
    outside: NDArray[np.uint64]  # [M, 8] grid points that the flood reached
    whole_cells: NDArray[np.bool_]  # [B, B, B] cells without a bin that the flood reached

    def reached(self, points: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which grid points [..., 3] the flood reached. False beyond the grid."""
        size = self.bins.resolution
        inside_grid = ((points >= 0) & (points < size)).all(axis=-1)
        cells, places = np.divmod(np.clip(points, 0, size - 1), CELL_SIDE)
        cell = tuple(np.moveaxis(cells, -1, 0))
        whole = self.whole_cells[cell]
        if len(self.outside) == 0:
            return inside_grid & whole
        m = self.bins.bin_of[cell]
        x, y, z = np.moveaxis(places, -1, 0)
        bit = self.outside[m, x] >> (8 * y + z).astype(np.uint64) & np.uint64(1)
        return inside_grid & np.where(m < 0, whole, bit.astype(np.bool_))


@njit(cache=True)
def _visit_cells(packed, resolution, reach, counts):
    """Find the cells within reach of each triangle by octree descent.

    Adds the number of triangles of each cell to `counts` [B, B, B].

    Returns the numbers of the cells in the order of the triangles, and how many each triangle has.
    """
    h = 1.0 / (resolution - 1)
    size = resolution // CELL_SIDE
    visited, used = np.empty(4 * len(packed) + 64, np.int32), 0
    visits = np.empty(len(packed), np.int32)
    low, high = np.empty(3, np.int32), np.empty(3, np.int32)
    stack = np.empty((256, 6), np.int32)  # boxes of cells: first cell and end cell
    for t in range(len(packed)):
        before = used
        # start with the cells of the triangle's bounding box
        row = packed[t]
        for k in range(3):
            a, b, c = row[k], row[k] + row[3 + k], row[k] + row[6 + k]
            low[k] = max(0, int(np.floor((min(a, b, c) - reach + 0.5) / h)) // CELL_SIDE)
            high[k] = min(size, int(np.ceil((max(a, b, c) + reach + 0.5) / h)) // CELL_SIDE + 1)
            stack[0, k], stack[0, 3 + k] = low[k], high[k]
        depth = 1
        while depth > 0:
            depth -= 1
            # numbers, because a view of a row would count references
            x0, y0, z0 = stack[depth, 0], stack[depth, 1], stack[depth, 2]
            x1, y1, z1 = stack[depth, 3], stack[depth, 4], stack[depth, 5]
            if x0 >= x1 or y0 >= y1 or z0 >= z1:
                continue
            # centre and half extents of the box, from its first to its last grid point
            hx = 0.5 * h * (CELL_SIDE * (x1 - x0) - 1)
            hy = 0.5 * h * (CELL_SIDE * (y1 - y0) - 1)
            hz = 0.5 * h * (CELL_SIDE * (z1 - z0) - 1)
            cx = CELL_SIDE * x0 * h - 0.5 + hx
            cy = CELL_SIDE * y0 * h - 0.5 + hy
            cz = CELL_SIDE * z0 * h - 0.5 + hz
            radius = np.sqrt(hx * hx + hy * hy + hz * hz) + reach
            # the distance to the plane comes first: it prunes most boxes at a lower cost
            height = (cx - row[0]) * row[9] + (cy - row[1]) * row[10] + (cz - row[2]) * row[11]
            if abs(height) > abs(row[9]) * hx + abs(row[10]) * hy + abs(row[11]) * hz + reach:
                continue
            if distance2(row, cx, cy, cz) > radius * radius:
                continue
            # a single cell
            if x1 - x0 == 1 and y1 - y0 == 1 and z1 - z0 == 1:
                if used == len(visited):
                    longer = np.empty(used + used // 2, np.int32)
                    longer[:used] = visited
                    visited = longer
                visited[used] = (x0 * size + y0) * size + z0
                counts[x0, y0, z0] += 1
                used += 1
                continue
            # several cells: descend into the eight octants
            mx, my, mz = (x0 + x1 + 1) // 2, (y0 + y1 + 1) // 2, (z0 + z1 + 1) // 2
            for i in range(2):
                for j in range(2):
                    for k in range(2):
                        stack[depth, 0], stack[depth, 3] = (x0, mx) if i == 0 else (mx, x1)
                        stack[depth, 1], stack[depth, 4] = (y0, my) if j == 0 else (my, y1)
                        stack[depth, 2], stack[depth, 5] = (z0, mz) if k == 0 else (mz, z1)
                        depth += 1
        visits[t] = used - before
    return visited[:used], visits


@njit(cache=True)
def _list_triangles(visited, visits, cursor):
    """Return the triangles of all cells, those of each cell in ascending order.

    `visited` and `visits` are those of `_visit_cells`. `cursor` [B^3] is the place of each cell's
    first triangle in the result. It is overwritten.
    """
    triangles = np.empty(len(visited), np.int32)
    used = 0
    for t in range(len(visits)):
        for _ in range(visits[t]):
            cell = visited[used]
            triangles[cursor[cell]] = t
            cursor[cell] += 1
            used += 1
    return triangles


def bin_triangles(
    packed: NDArray[np.float64], resolution: int, reach_voxels: float = REACH_VOXELS
) -> Bins:
    """List the triangles near each cell of a grid.

    Args:
        packed: float64 [T, 16] packed triangles, see `pipeline.core.primitives.triangles.pack`.
        resolution: Grid points along one side.
        reach_voxels: A triangle is listed if it is within this distance of the cell, in voxels.
            The test is conservative: a few triangles that are farther away are listed too.
    """
    size = resolution // CELL_SIDE
    reach = reach_voxels * spacing(resolution)
    counts = np.zeros((size, size, size), np.int32)
    visited, visits = _visit_cells(packed, resolution, reach, counts)
    cells = np.argwhere(counts).astype(np.int32)
    bin_of = np.full(counts.shape, -1, np.int32)
    bin_of[tuple(cells.T)] = np.arange(len(cells), dtype=np.int32)
    offsets = np.zeros(len(cells) + 1, np.int64)
    np.cumsum(counts[tuple(cells.T)], out=offsets[1:])
    cursor = np.zeros(counts.shape, np.int64)
    cursor[tuple(cells.T)] = offsets[:-1]
    return Bins(
        resolution=resolution,
        bin_of=bin_of,
        cells=cells,
        offsets=offsets,
        triangles=_list_triangles(visited, visits, cursor.reshape(-1)),
    )


@njit(cache=True, _nrt=False)
def _span_in_cell(packed, t, axis, radius, cell, h):
    """Return the first and the last grid point of a cell inside a triangle's enlarged box.

    They are counted along one axis, from the first grid point of the cell.
    """
    a = packed[t, axis]
    b, c = a + packed[t, 3 + axis], a + packed[t, 6 + axis]
    start = CELL_SIDE * cell
    low = int(np.ceil((min(a, b, c) - radius + 0.5) / h)) - start
    high = int(np.floor((max(a, b, c) + radius + 0.5) / h)) - start
    return max(0, low), min(CELL_SIDE - 1, high)


@njit(cache=True, _nrt=False)
def _mark_barrier(packed, resolution, radius, use, cells, offsets, triangles, barrier):
    """Set the bits of the grid points within `radius` of a triangle for which `use` is true."""
    h = 1.0 / (resolution - 1)
    radius2 = radius * radius
    one = np.uint64(1)
    for m in range(len(cells)):
        x0, y0, z0 = CELL_SIDE * cells[m, 0], CELL_SIDE * cells[m, 1], CELL_SIDE * cells[m, 2]
        for e in range(offsets[m], offsets[m + 1]):
            t = triangles[e]
            if not use[t]:
                continue
            # the cell's grid points inside the triangle's enlarged bounding box
            row = packed[t]
            i0, i1 = _span_in_cell(packed, t, 0, radius, cells[m, 0], h)
            j0, j1 = _span_in_cell(packed, t, 1, radius, cells[m, 1], h)
            k0, k1 = _span_in_cell(packed, t, 2, radius, cells[m, 2], h)
            # the exact distance decides for points that the plane does not exclude
            for i in range(i0, i1 + 1):
                x = (x0 + i) * h - 0.5
                for j in range(j0, j1 + 1):
                    y = (y0 + j) * h - 0.5
                    for k in range(k0, k1 + 1):
                        bit = one << np.uint64(8 * j + k)
                        if barrier[m, i] & bit:
                            continue
                        z = (z0 + k) * h - 0.5
                        height = (
                            (x - row[0]) * row[9] + (y - row[1]) * row[10] + (z - row[2]) * row[11]
                        )
                        if abs(height) <= radius and distance2(row, x, y, z) <= radius2:
                            barrier[m, i] |= bit


_NOT_Z0 = np.uint64(0xFEFEFEFEFEFEFEFE)  # all bits but those with lz = 0
_NOT_Z7 = np.uint64(0x7F7F7F7F7F7F7F7F)  # all bits but those with lz = 7


@njit(cache=True)
def _fill_words(reached, free):
    """Fill one cell: spread the bits of reached [8] through those of free [8], 6-connected."""
    one, eight = np.uint64(1), np.uint64(8)
    changed = True
    while changed:
        changed = False
        for sweep in range(16):  # slabs of constant x, forwards and then backwards
            i = sweep if sweep < 8 else 15 - sweep
            # enter the slab from its two neighbours
            word = reached[i]
            if i > 0:
                word |= reached[i - 1]
            if i < 7:
                word |= reached[i + 1]
            word &= free[i]
            # spread inside the slab along y (shift by 8) and z (shift by 1)
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
def _face_bits(words, axis, side):
    """Return the 64 points of one face of a cell: bit 8 * u + v of the two other axes in order."""
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
def _add_face_bits(words, free, axis, side, face):
    """Set the bits of a face where they are free. Return whether any of them was not set before."""
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
    """Fill cell by cell, 6-connected, until the queue is empty. A cell without a bin is one point.

    `queue` holds the numbers of the first cells. `queued` [B^3] marks the cells in the queue.
    """
    size = len(bin_of)
    room = size**3
    head, waiting = 0, len(queue)
    ring = np.empty(room, np.int64)  # every cell is in the queue at most once
    ring[:waiting] = queue
    while waiting > 0:
        # take the next cell and fill it
        b = ring[head]
        head = (head + 1) % room
        waiting -= 1
        queued[b] = False
        bx, by, bz = b // (size * size), b // size % size, b % size
        m = bin_of[bx, by, bz]
        if m >= 0:
            _fill_words(reached[m], free[m])
        # continue into the six neighbours and queue those that changed
        for axis in range(3):
            for side in range(2):
                nx = bx + (2 * side - 1) * (axis == 0)
                ny = by + (2 * side - 1) * (axis == 1)
                nz = bz + (2 * side - 1) * (axis == 2)
                if min(nx, ny, nz) < 0 or max(nx, ny, nz) >= size:
                    continue
                face = _face_bits(reached[m], axis, side) if m >= 0 else ~np.uint64(0)
                if not face:
                    continue
                n = bin_of[nx, ny, nz]
                if n >= 0:
                    if not _add_face_bits(reached[n], free[n], axis, 1 - side, face):
                        continue
                elif whole[nx, ny, nz] or not free_whole[nx, ny, nz]:
                    continue
                else:
                    whole[nx, ny, nz] = True
                neighbour = (nx * size + ny) * size + nz
                if not queued[neighbour]:
                    queued[neighbour] = True
                    ring[(head + waiting) % room] = neighbour
                    waiting += 1


def _fill(
    bins: Bins,
    free: NDArray[np.uint64],
    free_whole: NDArray[np.bool_],
    start: NDArray[np.int64],
    reached: NDArray[np.uint64],
    whole: NDArray[np.bool_],
) -> None:
    """Spread `reached` and `whole` in place, beginning with the cells numbered `start`."""
    queued = np.zeros(bins.bin_of.size, np.bool_)
    queued[start] = True
    _spread(bins.bin_of, bins.cells, free, free_whole, reached, whole, start, queued)


def flood_fill(
    packed: NDArray[np.float64],
    bins: Bins,
    use: NDArray[np.bool_],
    barrier_voxels: float = BARRIER_VOXELS,
) -> FloodFill:
    """Fill the outside of a surface from the walls of the grid.

    The fill is 6-connected and stops at the barrier: the grid points close to a triangle.

    Args:
        packed: float64 [T, 16] packed triangles.
        bins: The triangles near each cell.
        use: bool [T]. Triangles where it is false are ignored.
        barrier_voxels: Half thickness of the barrier, in voxels.
    """
    barrier = np.zeros((len(bins.cells), CELL_SIDE), np.uint64)
    radius = barrier_voxels * spacing(bins.resolution)
    _mark_barrier(
        packed, bins.resolution, radius, use, bins.cells, bins.offsets, bins.triangles, barrier
    )
    outside, whole = np.zeros_like(barrier), np.zeros(bins.bin_of.shape, np.bool_)
    # all free points of the grid's six walls are outside
    size = len(bins.bin_of)
    walls = np.zeros(bins.bin_of.shape, np.bool_)
    for axis in range(3):
        for side in (0, size - 1):
            wall = np.moveaxis(walls, axis, 0)[side]
            wall[...] = True
            bin_numbers = np.moveaxis(bins.bin_of, axis, 0)[side]
            np.moveaxis(whole, axis, 0)[side][bin_numbers < 0] = True
            for m in bin_numbers[bin_numbers >= 0]:
                _add_face_bits(outside[m], ~barrier[m], axis, int(side > 0), np.uint64(2**64 - 1))
    start = np.flatnonzero(walls)
    _fill(bins, ~barrier, np.ones_like(whole), start, outside, whole)
    return FloodFill(bins=bins, barrier=barrier, outside=outside, whole_cells=whole)


def connected_region(free: FloodFill, start: NDArray[np.int64]) -> FloodFill:
    """Return the 6-connected region around one grid point.

    Args:
        free: The grid points to which the region is limited are its `outside` points.
        start: int64 [3] index of a grid point that is one of them.

    Returns:
        The region as the `outside` points of a flood fill.
    """
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


@njit(cache=True, _nrt=False)
def is_reached(bin_of, words, whole, x, y, z, off_grid):
    """Return whether the flood reached grid point (x, y, z), and `off_grid` beyond the grid.

    Args:
        bin_of: `Bins.bin_of`.
        words: `FloodFill.outside`.
        whole: `FloodFill.whole_cells`.
    """
    last = len(bin_of) * CELL_SIDE - 1
    if x < 0 or y < 0 or z < 0 or x > last or y > last or z > last:
        return off_grid
    m = bin_of[x // 8, y // 8, z // 8]
    if m < 0:
        return whole[x // 8, y // 8, z // 8]
    return (words[m, x % 8] >> np.uint64(8 * (y % 8) + z % 8) & np.uint64(1)) != 0


@njit(cache=True, _nrt=False)
def reached_corners(bin_of, words, whole, x, y, z):
    """Return which of the eight grid points from (x, y, z) to (x + 1, y + 1, z + 1) are reached.

    Bit 4 i + 2 j + k stands for grid point (x + i, y + j, z + k). All points beyond the grid count
    as reached. For the other arguments see `is_reached`.
    """
    last = len(bin_of) * CELL_SIDE - 1
    corners = 0
    if min(x, y, z) >= 0 and max(x, y, z) < last and x % 8 < 7 and y % 8 < 7 and z % 8 < 7:
        # all eight points lie in one cell
        m = bin_of[x // 8, y // 8, z // 8]
        if m < 0:
            return 255 if whole[x // 8, y // 8, z // 8] else 0
        shift = np.uint64(8 * (y % 8) + z % 8)
        for i in range(2):
            word = int(words[m, x % 8 + i] >> shift & np.uint64(0x303))
            corners |= (word & 3 | word >> 6) << (4 * i)
        return corners
    for corner in range(8):
        i, j, k = corner >> 2, corner >> 1 & 1, corner & 1
        if is_reached(bin_of, words, whole, x + i, y + j, z + k, True):
            corners |= 1 << corner
    return corners


@njit(cache=True, _nrt=False)
def reached_in_box(bin_of, words, whole, box):
    """Return whether the flood reached none, some or all of the grid points in a box.

    All points beyond the grid count as reached. SOME_REACHED is also the result for boxes of more
    than MAX_BOX_CELLS cells.

    Args:
        bin_of: `Bins.bin_of`.
        words: `FloodFill.outside`.
        whole: `FloodFill.whole_cells`.
        box: float64 [6] lowest and highest corner.
    """
    size = len(bin_of) * CELL_SIDE
    x0 = int(np.ceil((box[0] + 0.5) * (size - 1)))
    y0 = int(np.ceil((box[1] + 0.5) * (size - 1)))
    z0 = int(np.ceil((box[2] + 0.5) * (size - 1)))
    x1 = int(np.floor((box[3] + 0.5) * (size - 1)))
    y1 = int(np.floor((box[4] + 0.5) * (size - 1)))
    z1 = int(np.floor((box[5] + 0.5) * (size - 1)))
    some = min(x0, y0, z0) < 0 or max(x1, y1, z1) >= size
    all_of_them = True
    x0, y0, z0 = max(x0, 0), max(y0, 0), max(z0, 0)
    x1, y1, z1 = min(x1, size - 1), min(y1, size - 1), min(z1, size - 1)
    a0, b0, c0 = x0 // 8, y0 // 8, z0 // 8
    a1, b1, c1 = x1 // 8 + 1, y1 // 8 + 1, z1 // 8 + 1
    if (a1 - a0) * (b1 - b0) * (c1 - c0) > MAX_BOX_CELLS:
        return SOME_REACHED
    for b in range(b0, b1):
        # one bit at z = 0 of each y in the box
        low, high = max(y0 - 8 * b, 0), min(y1 - 8 * b, 7)
        rows = np.uint64(0x0101010101010101) >> np.uint64(8 * (7 - high + low))
        rows <<= np.uint64(8 * low)
        for c in range(c0, c1):
            low, high = max(z0 - 8 * c, 0), min(z1 - 8 * c, 7)
            mask = rows * np.uint64((1 << high + 1) - (1 << low))
            for a in range(a0, a1):
                m = bin_of[a, b, c]
                if m < 0:
                    if whole[a, b, c]:
                        some = True
                    else:
                        all_of_them = False
                else:
                    for x in range(max(x0 - 8 * a, 0), min(x1 - 8 * a, 7) + 1):
                        word = words[m, x] & mask
                        some = some or word != 0
                        all_of_them = all_of_them and word == mask
                if some and not all_of_them:
                    return SOME_REACHED
    return ALL_REACHED if some else NONE_REACHED


@njit(cache=True, inline="always")
def bin_at(bin_of, a, b, c):
    """Return the bin of cell (a, b, c), and -1 if it has none or lies beyond the grid."""
    size = len(bin_of)
    if a < 0 or b < 0 or c < 0 or a >= size or b >= size or c >= size:
        return -1
    return bin_of[a, b, c]
