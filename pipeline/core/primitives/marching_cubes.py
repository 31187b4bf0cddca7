"""Marching cubes on bricks, limited to cubes whose eight corners are stored."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.core.grid import CELL_SIDE, check_resolution, spacing
from pipeline.core.schema import Bricks, Mesh

# Vertices [V, 3] in the cube [-0.5, 0.5]^3 and faces [F, 3], wound so that normals point outwards.
MeshArrays = tuple[NDArray[np.float64], NDArray[np.int32]]

# A cube has the corners c = 0..7 at (c >> 2, c >> 1 & 1, c & 1). Edge e = 4 * axis + n joins two
# corners that differ along `axis`. n = 2 * u + v counts the positions along the two other axes.
_EDGES = [
    (base, base | 4 >> axis) for axis in range(3) for base in range(8) if not base & 4 >> axis
]


def _case_loops(case: int) -> list[list[int]]:
    """Return the directed polygons, as lists of crossed edges, that enclose the inside corners.

    Bit c of `case` says whether corner c is inside. On each face, crossings are joined so that
    inside corners stay apart. The two cubes at a face see the same four corners, so their polygons
    meet there and the surface has no cracks.
    """
    inside = [case >> c & 1 for c in range(8)]
    edge_number = {frozenset(ends): e for e, ends in enumerate(_EDGES)}
    following: dict[int, int] = {}
    for axis in range(3):
        for side in (0, 1):
            bit, (u, v) = 4 >> axis, [4 >> a for a in range(3) if a != axis]
            start = bit * side
            ring = [start, start | u, start | u | v, start | v]
            # walk around the face counterclockwise, as seen from outside the cube
            if (side == 1) != (axis != 1):
                ring = ring[::-1]
            # a directed segment around each run of inside corners
            for n in range(4):
                corner, following_corner = ring[n], ring[(n + 1) % 4]
                if not inside[corner] and inside[following_corner]:
                    m = n + 1
                    while inside[ring[(m + 1) % 4]]:
                        m += 1
                    leave = edge_number[frozenset((ring[m % 4], ring[(m + 1) % 4]))]
                    following[edge_number[frozenset((corner, following_corner))]] = leave
    # join the segments to polygons
    loops = []
    while following:
        first = min(following)
        loop, edge = [], first
        while edge in following:
            loop.append(edge)
            edge = following.pop(edge)
        loops.append(loop)
    return loops


def _same_face(e: int, f: int) -> bool:
    """Return whether two edges lie on the same face of the cube."""
    corners = [*_EDGES[e], *_EDGES[f]]
    return any(len({c >> k & 1 for c in corners}) == 1 for k in range(3))


def _triangulate(loop: list[int]) -> list[tuple[int, int, int]]:
    """Cut a polygon into triangles, without diagonals in a face of the cube.

    The neighbouring cube could have the same diagonal.
    """
    if len(loop) == 3:
        return [(loop[0], loop[1], loop[2])]
    count = len(loop)
    for i, j in combinations(range(count), 2):
        if j - i in (1, count - 1) or _same_face(loop[i], loop[j]):
            continue
        try:
            return _triangulate(loop[i : j + 1]) + _triangulate(loop[j:] + loop[: i + 1])
        except LookupError:
            continue
    raise LookupError(f"no diagonal inside the cube for {loop}")


def _build_tables() -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Return the number of triangles of each case [256] and their edges [256, most, 3]."""
    triangles = [
        [t for loop in _case_loops(case) for t in _triangulate(loop)] for case in range(256)
    ]
    counts = np.array([len(t) for t in triangles], np.int8)
    table = np.full((256, counts.max(), 3), -1, np.int8)
    for case, rows in enumerate(triangles):
        if rows:
            table[case, : len(rows)] = rows
    return counts, table


_TRIANGLES, _TABLE = _build_tables()
_EDGE_CORNERS = np.array(_EDGES, np.int64)


@njit(cache=True)
def _gather(m, cells, slots, values, corner):
    """Write a cell's values and the first layer of its neighbours' to `corner` [9, 9, 9].

    NaN where no cell is stored.
    """
    size = len(slots)
    for a in range(2):
        for b in range(2):
            for c in range(2):
                x, y, z = cells[m, 0] + a, cells[m, 1] + b, cells[m, 2] + c
                n = slots[x, y, z] if max(x, y, z) < size else -1
                for i in range(8 * a, 9 if a else 8):
                    for j in range(8 * b, 9 if b else 8):
                        for k in range(8 * c, 9 if c else 8):
                            corner[i, j, k] = (
                                values[n, 64 * (i % 8) + 8 * (j % 8) + k % 8] if n >= 0 else np.nan
                            )


@njit(cache=True)
def _crossings(cells, slots, values, level):
    """Find the grid edges that the surface crosses. Each has one vertex, owned by its first point.

    Returns:
        mask: uint8 [M, 512]. Bit a is set if the edge from the point along +axis a is crossed.
        first: uint16 [M, 512] number of crossed edges of earlier points in the same cell.
        offsets: int64 [M + 1] number of crossed edges of earlier cells.
    """
    mask = np.zeros((len(cells), 512), np.uint8)
    first = np.zeros((len(cells), 512), np.uint16)
    offsets = np.zeros(len(cells) + 1, np.int64)
    corner = np.empty((9, 9, 9), np.float32)
    for m in range(len(cells)):
        _gather(m, cells, slots, values, corner)
        count = 0
        for p in range(512):
            i, j, k = p // 64, p // 8 % 8, p % 8
            first[m, p] = count
            value = corner[i, j, k]
            for axis in range(3):
                neighbour = corner[i + (axis == 0), j + (axis == 1), k + (axis == 2)]
                if not np.isnan(neighbour) and (value < level) != (neighbour < level):
                    mask[m, p] |= 1 << axis
                    count += 1
        offsets[m + 1] = offsets[m] + count
    return mask, first, offsets


@njit(cache=True)
def _march(cells, slots, values, level, mask, first, offsets, counts, table, edge_corners):
    """Return vertices [V, 3] in grid units and faces [F, 3]. `mask` to `offsets`: `_crossings`."""
    vertices = np.empty((offsets[-1], 3))
    faces = np.empty((max(2 * offsets[-1], 16), 3), np.int64)
    written = 0
    corner = np.empty((9, 9, 9), np.float32)
    for m in range(len(cells)):
        _gather(m, cells, slots, values, corner)
        number = offsets[m]
        for p in range(512):
            i, j, k = p // 64, p // 8 % 8, p % 8
            # the vertices that this point owns, interpolated along their edges
            for axis in range(3):
                if mask[m, p] >> axis & 1:
                    value = np.float64(corner[i, j, k]) - level
                    neighbour = (
                        np.float64(corner[i + (axis == 0), j + (axis == 1), k + (axis == 2)])
                        - level
                    )
                    vertices[number, 0] = 8 * cells[m, 0] + i
                    vertices[number, 1] = 8 * cells[m, 1] + j
                    vertices[number, 2] = 8 * cells[m, 2] + k
                    vertices[number, axis] += value / (value - neighbour)
                    number += 1
            # the case of the cube at this point
            known, case = True, 0
            for c in range(8):
                corner_value = corner[i + (c >> 2), j + (c >> 1 & 1), k + (c & 1)]
                if np.isnan(corner_value):
                    known = False
                    break
                if corner_value < level:
                    case |= 1 << c
            if not known or case == 0 or case == 255:
                continue
            if written + 5 > len(faces):
                more = np.empty((2 * len(faces), 3), np.int64)
                more[:written] = faces[:written]
                faces = more
            # its triangles; the number of a vertex follows from the point that owns its edge
            for t in range(counts[case]):
                for d in range(3):
                    e = table[case, t, d]
                    c = edge_corners[e, 0]
                    x, y, z = i + (c >> 2), j + (c >> 1 & 1), k + (c & 1)
                    n = slots[cells[m, 0] + x // 8, cells[m, 1] + y // 8, cells[m, 2] + z // 8]
                    q = 64 * (x % 8) + 8 * (y % 8) + z % 8
                    rank = 0
                    for lower in range(e // 4):
                        rank += mask[n, q] >> lower & 1
                    faces[written, d] = offsets[n] + first[n, q] + rank
                written += 1
    return vertices, faces[:written]


def extract(bricks: Bricks, level: float = 0.0) -> MeshArrays:
    """Extract the surface on which the bricks have the value `level`.

    Values below the level are inside. Cubes with a corner that is not stored give no surface. The
    surface is closed if every change of sign lies between stored grid points.

    Args:
        bricks: The bricks of one asset. `values` may have any float dtype and is compared in
            float32.
        level: The value, in units of tau.

    Returns:
        vertices: float64 [V, 3] in the cube [-0.5, 0.5]^3, one per crossed grid edge.
        faces: int32 [F, 3], with normals that point outwards.
    """
    size = check_resolution(bricks.resolution) // CELL_SIDE
    cells = bricks.cells.astype(np.int64)
    slots = np.full((size, size, size), -1, np.int32)
    slots[tuple(cells.T)] = np.arange(len(cells), dtype=np.int32)
    values = np.ascontiguousarray(bricks.values, dtype=np.float32)
    mask, first, offsets = _crossings(cells, slots, values, np.float32(level))
    vertices, faces = _march(
        cells,
        slots,
        values,
        np.float32(level),
        mask,
        first,
        offsets,
        _TRIANGLES,
        _TABLE,
        _EDGE_CORNERS,
    )
    # remove vertices that no marched cube uses
    used = np.zeros(len(vertices), np.bool_)
    used[faces] = True
    if not used.all():
        faces = (np.cumsum(used) - 1)[faces]
        vertices = vertices[used]
    return vertices * spacing(bricks.resolution) - 0.5, faces.astype(np.int32)


def watertight_mesh(bricks: Bricks) -> Mesh:
    """Return the zero level set of an asset's bricks as a closed, consistently wound mesh.

    A part that is thinner than a voxel and holds no grid point leaves no surface.

    Raises:
        Reject: "no_surface" if no stored value is negative.
    """
    vertices, faces = extract(bricks)
    if len(faces) == 0:
        raise Reject("no_surface", resolution=bricks.resolution, cells=len(bricks.cells))
    return Mesh(vertices=vertices, faces=faces)
