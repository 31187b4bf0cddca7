"""Weld a triangle soup, find the boundary loops of its openings and close them with caps."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

# Vertices that round to the same point of a lattice with this spacing are merged. Cube units.
WELD = 2.0**-21
# Loops with more vertices are capped by a fan, because the minimal triangulation costs O(n^3).
MAX_EXACT_LOOP = 400


def weld(
    vertices: NDArray[np.float64], faces: NDArray[np.int32]
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Merge equal vertices, and remove faces that collapse or repeat another face.

    Vertices are sorted by position, and faces and their corners by number. The same shape thus
    gives the same arrays, however its faces were ordered, wound or repeated.

    Args:
        vertices: float64 [V, 3] in the cube [-0.5, 0.5]^3.
        faces: int32 [F, 3].

    Returns:
        vertices: float64 [W, 3].
        faces: int32 [G, 3], each row in ascending order.
    """
    # merge vertices by their place on the lattice, 21 bits an axis
    keys = np.round(vertices / WELD).astype(np.int64)
    keys = (keys[:, 0] << 42) + (keys[:, 1] << 21) + keys[:, 2]
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    vertices, faces = vertices[first], inverse.astype(np.int32)[faces]
    # remove collapsed faces, then repeated ones
    faces = np.sort(faces, axis=1)
    faces = faces[(faces[:, 0] < faces[:, 1]) & (faces[:, 1] < faces[:, 2])]
    faces = faces[np.lexsort(faces.T[::-1])]
    new = np.ones(len(faces), np.bool_)
    new[1:] = (faces[1:] != faces[:-1]).any(axis=1)
    return vertices, faces[new]


def has_area(vertices: NDArray[np.float64], faces: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return bool [F]: whether each face has enough area for a reliable normal.

    Twice the area must exceed 1e-7 times the square of the longest edge, or of WELD if that is
    longer.
    """
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    doubled_area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    longest2 = np.maximum.reduce([((p - q) ** 2).sum(axis=1) for p, q in ((a, b), (b, c), (c, a))])
    return doubled_area > 1e-7 * np.maximum(longest2, WELD**2)


def undirected_edges(
    faces: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """List the edges of faces [F, 3].

    Returns:
        edges: int32 [E, 2] vertex numbers in ascending order.
        edge_of: int64 [3 * F] edge of each half-edge: ab, bc and ca of face 0, then of face 1, ...
        counts: int64 [E] number of faces at each edge.
    """
    half = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    keys = half[:, 0].astype(np.int64) << 32 | half[:, 1]
    unique, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return np.stack([unique >> 32, unique & 0xFFFFFFFF], axis=1).astype(np.int32), inverse, counts


@njit(cache=True)
def _walk_loops(edges, neighbour_start, neighbour_edge, order, lengths):
    """Split boundary edges [E, 2] into simple closed loops.

    The edges at vertex v are `neighbour_edge[neighbour_start[v]:neighbour_start[v + 1]]`. The
    vertices of the loops are written to `order`, one loop after another, and their numbers of
    vertices to `lengths`. Returns the number of loops.
    """
    used = np.zeros(len(edges), np.bool_)
    place = np.full(len(neighbour_start) - 1, -1, np.int64)  # index of each vertex in the path
    path = np.empty(len(edges) + 1, np.int64)
    written, loops = 0, 0
    for first in range(len(edges)):
        if used[first]:
            continue
        # begin a path at one end of an unused edge
        path[0] = edges[first, 0]
        place[path[0]] = 0
        count = 1
        while True:
            # choose an unused edge at the end of the path
            end, following = path[count - 1], -1
            for e in neighbour_edge[neighbour_start[end] : neighbour_start[end + 1]]:
                if not used[e]:
                    following = e
                    break
            if following < 0:  # no edge is left: discard the rest of the path
                for i in range(count):
                    place[path[i]] = -1
                break
            used[following] = True
            # extend the path by a new vertex
            vertex = edges[following, 0] + edges[following, 1] - end
            if place[vertex] < 0:
                place[vertex] = count
                path[count] = vertex
                count += 1
                continue
            # a vertex of the path closes a loop, which is cut off the path
            start = place[vertex]
            if count - start >= 3:
                order[written : written + count - start] = path[start:count]
                written += count - start
                lengths[loops] = count - start
                loops += 1
            for i in range(start + 1, count):
                place[path[i]] = -1
            count = start + 1
    return loops


def boundary_loops(faces: NDArray[np.int32]) -> list[NDArray[np.int64]]:
    """Return the closed loops along the boundary, as vertex numbers.

    The boundary are the edges that an odd number of faces use. Every vertex has an even number of
    them, so all loops close, also on surfaces that are not manifold.
    """
    edges, _, counts = undirected_edges(faces)
    edges = edges[counts % 2 == 1].astype(np.int64)
    if len(edges) == 0:
        return []
    # the boundary edges at each vertex
    vertices, local = np.unique(edges, return_inverse=True)
    local = local.reshape(-1, 2)
    ends = np.concatenate([local[:, 0], local[:, 1]])
    by_vertex = np.argsort(ends, kind="stable")
    starts = np.zeros(len(vertices) + 1, np.int64)
    np.cumsum(np.bincount(ends, minlength=len(vertices)), out=starts[1:])
    order, lengths = np.empty(len(edges) + 1, np.int64), np.empty(len(edges) + 1, np.int64)
    number = _walk_loops(local, starts, by_vertex % len(edges), order, lengths)
    if number == 0:
        return []
    return [
        vertices[loop]
        for loop in np.split(order[: lengths[:number].sum()], np.cumsum(lengths[:number])[:-1])
    ]


@njit(cache=True)
def _minimal_area(points):
    """Triangulate a closed polygon [n, 3] with the least total area (Barequet and Sharir 1995).

    Returns int64 [n - 2, 3] indices of its points.
    """
    # cost[i, k]: least area of the part of the polygon from i to k; choice[i, k]: its third corner
    n = len(points)
    cost = np.zeros((n, n))
    choice = np.zeros((n, n), np.int64)
    for gap in range(2, n):
        for i in range(n - gap):
            k = i + gap
            best = np.inf
            x, y, z = points[i]
            ux, uy, uz = points[k, 0] - x, points[k, 1] - y, points[k, 2] - z
            for j in range(i + 1, k):
                # the two parts that remain; reading cost[k, j] keeps both reads in rows
                total = cost[i, j] + cost[k, j]
                if total >= best:
                    continue
                # the triangle (i, j, k)
                vx, vy, vz = points[j, 0] - x, points[j, 1] - y, points[j, 2] - z
                cx, cy, cz = vy * uz - vz * uy, vz * ux - vx * uz, vx * uy - vy * ux
                total += 0.5 * np.sqrt(cx * cx + cy * cy + cz * cz)
                if total < best:
                    best, choice[i, k] = total, j
            cost[i, k] = cost[k, i] = best
    # collect the triangles of the best choice, from the whole polygon down
    triangles = np.empty((n - 2, 3), np.int64)
    stack = np.empty((n, 2), np.int64)
    stack[0, 0], stack[0, 1] = 0, n - 1
    top, count = 1, 0
    while top > 0:
        top -= 1
        i, k = stack[top]
        if k - i < 2:
            continue
        j = choice[i, k]
        triangles[count, 0], triangles[count, 1], triangles[count, 2] = i, j, k
        count += 1
        stack[top, 0], stack[top, 1] = i, j
        stack[top + 1, 0], stack[top + 1, 1] = j, k
        top += 2
    return triangles


def cap_loops(
    vertices: NDArray[np.float64], loops: list[NDArray[np.int64]]
) -> tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.int32]]:
    """Close loops with caps of least area, or with fans around a new vertex if they are long.

    Args:
        vertices: float64 [V, 3].
        loops: Vertex numbers of each loop.

    Returns:
        vertices: float64 [W, 3] the vertices, followed by the centres of the fans.
        faces: int32 [T, 3] the faces of all caps.
        loop_of: int32 [T] the loop that each face closes.
    """
    faces, centres = [np.empty((0, 3), np.int64)], [np.empty((0, 3))]
    for loop in loops:
        if len(loop) <= MAX_EXACT_LOOP:
            faces.append(loop[_minimal_area(vertices[loop])])
            continue
        centre = np.full(len(loop), len(vertices) + len(centres) - 1)
        faces.append(np.stack([loop, np.roll(loop, -1), centre], axis=1))
        centres.append(vertices[loop].mean(axis=0, keepdims=True))
    loop_of = np.repeat(np.arange(len(loops), dtype=np.int32), [len(added) for added in faces[1:]])
    return np.concatenate([vertices, *centres]), np.concatenate(faces).astype(np.int32), loop_of
