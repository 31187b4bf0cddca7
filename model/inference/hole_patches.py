"""Patches for holes: rings of triangles, bent so that they continue the surface around the hole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import spsolve

Vertices = NDArray[np.float64]  # [V, 3]
Faces = NDArray[np.int32]  # [F, 3], counterclockwise seen from outside
MIN_RING = 3  # vertices of the innermost ring around the centre of a patch
MAX_PATCH_VERTICES = 20_000  # of one patch; larger holes get wider rings


def fill_loops(
    vertices: Vertices, faces: Faces, loops: Sequence[NDArray[np.int64]]
) -> tuple[Vertices, Faces]:
    """Close holes by patches that continue the surface.

    A patch has about the edge length of its border. Its vertices minimise the sum of the squared
    Laplacians of the patch and its border, as a thin plate that leaves the surface with its slope
    (Botsch and Kobbelt, "An intuitive framework for real-time freeform modeling", 2004).

    Args:
        vertices: [V, 3].
        faces: [F, 3].
        loops: The vertices of the border of each hole, in the direction of the open edges. No
            vertex is in two loops.

    Returns:
        The old vertices followed by those of the patches, and the old faces followed by those of
        the patches.
    """
    points: list[Vertices] = [vertices]
    patches: list[NDArray[np.integer]] = [faces]
    count = len(vertices)
    for loop in loops:
        inner, patch = _flat_patch(vertices[loop], loop, count)
        count += len(inner)
        points.append(inner)
        patches.append(patch)
    all_points, all_faces = np.concatenate(points), np.concatenate(patches).astype(np.int32)
    if loops:
        border = np.concatenate(list(loops))
        all_points[len(vertices) :] = _thin_plate(all_points, all_faces, len(vertices), border)
    return all_points, all_faces


def _flat_patch(
    border: Vertices, loop: NDArray[np.int64], first: int
) -> tuple[Vertices, NDArray[np.int64]]:
    """Return the inner vertices and the faces of a patch of rings that shrink to the centre.

    Args:
        border: [n, 3] positions of the loop.
        loop: [n] numbers of its vertices, in the direction of the open edges.
        first: Number of the first new vertex.
    """
    count = len(loop)
    centre = border.mean(0)
    radius = np.linalg.norm(border - centre, axis=1).mean()
    edge = np.linalg.norm(np.roll(border, -1, axis=0) - border, axis=1).mean()
    rings = max(round(radius / max(edge, 1e-12)), 1)
    rings = min(rings, max(MAX_PATCH_VERTICES // count, 1))
    # The faces of the patch run against the direction of the open edges.
    outer, outer_place = loop[::-1], np.arange(count) / count
    corners, closed = border[::-1], np.arange(count + 1) / count
    wrapped = np.concatenate([corners, corners[:1]])
    points: list[Vertices] = []
    triangles: list[tuple[int, int, int]] = []
    for ring in range(1, rings):
        share = 1 - ring / rings
        size = max(math.ceil(count * share), MIN_RING)
        place = np.arange(size) / size
        at_border = np.stack([np.interp(place, closed, wrapped[:, d]) for d in range(3)], axis=1)
        points.append(centre + share * (at_border - centre))
        inner = first + np.arange(size)
        triangles += _between(outer, outer_place, inner, place)
        first += size
        outer, outer_place = inner, place
    points.append(centre[None])
    size = len(outer)
    triangles += [(int(outer[i]), int(outer[(i + 1) % size]), first) for i in range(size)]
    return np.concatenate(points), np.array(triangles)


def _between(
    outer: NDArray[np.int64],
    outer_place: NDArray[np.float64],
    inner: NDArray[np.int64],
    inner_place: NDArray[np.float64],
) -> list[tuple[int, int, int]]:
    """Return the triangles between two rings, whose vertices have places in [0, 1) around them."""
    triangles = []
    i = j = 0
    while i < len(outer) or j < len(inner):
        next_outer = outer_place[i + 1] if i + 1 < len(outer) else 1.0
        next_inner = inner_place[j + 1] if j + 1 < len(inner) else 1.0
        a, b = int(outer[i % len(outer)]), int(inner[j % len(inner)])
        if j == len(inner) or (i < len(outer) and next_outer <= next_inner):
            i += 1
            triangles.append((a, int(outer[i % len(outer)]), b))
        else:
            j += 1
            triangles.append((a, int(inner[j % len(inner)]), b))
    return triangles


def _thin_plate(points: Vertices, faces: Faces, fixed: int, border: NDArray[np.int64]) -> Vertices:
    """Return the positions of the vertices from number `fixed` on that bend least.

    The graph Laplacians of these vertices and of the border enter the energy, so that the slope of
    the surface around the border counts.
    """
    rows = np.concatenate([border, np.arange(fixed, len(points))])
    taking_part = np.zeros(len(points), bool)
    taking_part[rows] = True
    near = faces[taking_part[faces].any(1)].astype(np.int64)
    laplacian = _graph_laplacian(near, len(points))[rows]
    free = laplacian[:, fixed:].tocsc()
    known = laplacian[:, :fixed] @ points[:fixed]
    return np.asarray(spsolve((free.T @ free).tocsc(), -(free.T @ known))).reshape(-1, 3)


def _graph_laplacian(faces: NDArray[np.int64], count: int) -> Any:
    """Return the sparse matrix that subtracts from each vertex the mean of its neighbours."""
    start = faces.ravel()
    end = np.roll(faces, -1, axis=1).ravel()
    ones = np.ones(2 * len(start))
    pairs = (np.concatenate([start, end]), np.concatenate([end, start]))
    adjacency = coo_matrix((ones, pairs), shape=(count, count)).tocsr()
    adjacency.data[:] = 1.0
    degree = np.asarray(adjacency.sum(1)).ravel()
    return (
        diags((degree > 0).astype(float)) - diags(1 / np.maximum(degree, 1)) @ adjacency
    ).tocsr()
