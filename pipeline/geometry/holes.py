"""Weld a triangle soup, find the boundary loops of its openings and close each with a minimal-area cap."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

WELD = 2.0**-21  # cube units (5e-7): vertices rounding to the same point of this lattice are one
MAX_EXACT_LOOP = 400  # longer loops are capped by a fan: the exact triangulation costs O(n^3)


def weld(
    vertices: NDArray[np.float64], faces: NDArray[np.int32]
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Joins equal vertices, drops faces that thereby collapse and keeps one of several faces on the same vertices.

    Vertices come out in the order of their positions and faces sorted, corners too: the same shape gives the same
    arrays however its faces were ordered, wound or repeated.
    """
    keys = np.round(vertices / WELD).astype(np.int64)
    keys = (keys[:, 0] << 42) + (keys[:, 1] << 21) + keys[:, 2]
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    vertices, faces = vertices[first], inverse.astype(np.int32)[faces]
    faces = np.sort(faces, axis=1)
    faces = faces[(faces[:, 0] < faces[:, 1]) & (faces[:, 1] < faces[:, 2])]
    faces = faces[np.lexsort(faces.T[::-1])]
    new = np.ones(len(faces), np.bool_)
    new[1:] = (faces[1:] != faces[:-1]).any(axis=1)
    return vertices, faces[new]


def has_area(vertices: NDArray[np.float64], faces: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[F] whether a face is more than a needle: sine of its widest angle above 1e-7, an edge above the weld."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    doubled_area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    longest2 = np.maximum.reduce([((p - q) ** 2).sum(axis=1) for p, q in ((a, b), (b, c), (c, a))])
    return doubled_area > 1e-7 * np.maximum(longest2, WELD**2)


def edges_of(
    faces: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Undirected edges [E, 2], the edge of each of the 3 F half-edges (ab, bc, ca per face), and faces per edge."""
    half = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    keys = half[:, 0].astype(np.int64) << 32 | half[:, 1]
    unique, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return np.stack([unique >> 32, unique & 0xFFFFFFFF], axis=1).astype(np.int32), inverse, counts


@njit(cache=True)
def _walk_loops(edges, neighbour_start, neighbour_edge, order, lengths):
    """Splits boundary edges into closed loops, each simple: a vertex met again closes the loop it began."""
    used = np.zeros(len(edges), np.bool_)
    place = np.full(len(neighbour_start) - 1, -1, np.int64)  # of a vertex on the current path
    path = np.empty(len(edges) + 1, np.int64)
    written, loops = 0, 0
    for first in range(len(edges)):
        if used[first]:
            continue
        path[0] = edges[first, 0]
        place[path[0]] = 0
        count = 1
        while True:
            here, following = path[count - 1], -1
            for e in neighbour_edge[neighbour_start[here] : neighbour_start[here + 1]]:
                if not used[e]:
                    following = e
                    break
            if following < 0:  # a dead end or the end: forget this path
                for i in range(count):
                    place[path[i]] = -1
                break
            used[following] = True
            there = edges[following, 0] + edges[following, 1] - here
            if place[there] < 0:
                place[there] = count
                path[count] = there
                count += 1
                continue
            start = place[there]
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
    """Closed loops of vertex numbers along the boundary: the edges that an odd number of faces use.

    Counting modulo 2 makes every vertex meet an even number of them, so loops always close, fins and all.
    """
    edges, _, counts = edges_of(faces)
    edges = edges[counts % 2 == 1].astype(np.int64)
    if len(edges) == 0:
        return []
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
    """Triangulation of a closed polygon of least total area (Barequet and Sharir 1995): [n - 2, 3] indices."""
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
                total = (
                    cost[i, j] + cost[k, j]
                )  # of both halves; the table is symmetric, so that j runs along its rows
                if total >= best:
                    continue
                vx, vy, vz = points[j, 0] - x, points[j, 1] - y, points[j, 2] - z
                cx, cy, cz = vy * uz - vz * uy, vz * ux - vx * uz, vx * uy - vy * ux
                total += 0.5 * np.sqrt(cx * cx + cy * cy + cz * cz)
                if total < best:
                    best, choice[i, k] = total, j
            cost[i, k] = cost[k, i] = best
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


def cap(
    vertices: NDArray[np.float64], loops: list[NDArray[np.int64]]
) -> tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.int32]]:
    """The vertices with centres added, faces [T, 3] that close the loops, and the loop that each of them closes [T]."""
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
