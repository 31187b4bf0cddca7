"""From an extracted surface to a mesh worth keeping: holes closed, floaters and inner bubbles gone, fewer faces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from pipeline.core.errors import UserError

Vertices = NDArray[np.float64]  # [V, 3] cube units
Faces = NDArray[np.int32]  # [F, 3] seen from outside


@dataclass(frozen=True, kw_only=True)
class CleanedMesh:
    """A closed mesh, and what cleaning did to come there."""

    vertices: Vertices
    faces: Faces
    holes: int  # loops of open edges that were capped
    floaters: int  # small separate pieces that were dropped
    bubbles: int  # surfaces that bound an enclosed hollow, dropped


def clean(vertices: Vertices, faces: Faces, min_piece: float = 0.01) -> CleanedMesh:
    """Cap holes, then drop pieces with less than `min_piece` of the largest one's area, and bubbles inside.

    The result is closed and, where the input's edges had at most two faces as `pipeline.core.primitives.marching_cubes` makes them,
    manifold. A bubble is a piece turned inside out: a hollow that nothing outside can see, which the data never holds.
    ValueError if min_piece is not in [0, 1) or there is no face.
    """
    if not 0 <= min_piece < 1:
        raise ValueError(f"min_piece must be in [0, 1), got {min_piece}")
    if not len(faces):
        raise ValueError("the mesh must have a face, got none")
    vertices, faces, holes = close_holes(vertices, faces)
    piece_of = pieces(len(vertices), faces)[faces[:, 0]]
    corners = vertices[faces]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    count = piece_of.max() + 1
    area = np.bincount(piece_of, np.linalg.norm(cross, axis=1) / 2, count)
    volume = np.bincount(piece_of, (corners[:, 0] * cross).sum(1) / 6, count)
    exists = np.bincount(piece_of, minlength=count) > 0
    bubble = exists & (volume < 0)
    solid = exists & ~bubble
    if not solid.any():  # inside out as a whole: keep what there is rather than nothing
        solid, bubble = bubble, solid
    small = solid & (area < min_piece * area[solid].max())
    vertices, faces = used_only(vertices, faces[(solid & ~small)[piece_of]])
    return CleanedMesh(
        vertices=vertices,
        faces=faces,
        holes=holes,
        floaters=int(small.sum()),
        bubbles=int(bubble.sum()),
    )


def close_holes(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces, int]:
    """Every loop of open edges gets a fan of triangles around its centre. Returns the number of loops.

    Where pieces of surface touch in a vertex on the border, the vertex is split first, so that each loop is simple.
    """
    open_edges = _open_edges(faces)
    if not len(open_edges):
        return vertices, faces, 0
    vertices, faces = _split_vertices(vertices, faces, np.unique(open_edges))
    start, end = _open_edges(faces).T
    count = len(vertices)
    graph = coo_matrix((np.ones(len(start), np.int8), (start, end)), shape=(count, count))
    loop_of = connected_components(graph, directed=False)[1][start]
    loops, loop_of = np.unique(loop_of, return_inverse=True)
    sizes = np.bincount(loop_of)
    centres = np.stack([np.bincount(loop_of, vertices[start, d]) / sizes for d in range(3)], axis=1)
    fans = np.stack([end, start, count + loop_of], axis=1)
    return (
        np.concatenate([vertices, centres]),
        np.concatenate([faces, fans]).astype(np.int32),
        len(loops),
    )


def count_open_edges(faces: Faces) -> int:
    """How many directed edges lack their opposite, or come more than once: 0 for a closed, oriented surface."""
    start, end = _directed(faces)
    count = int(faces.max(initial=0)) + 1
    forward, backward = np.sort(start * count + end), np.sort(end * count + start)
    if np.array_equal(forward, backward) and (forward[1:] > forward[:-1]).all():
        return 0
    unique = np.unique(forward)
    return int(len(forward) - len(unique) + (~np.isin(backward, unique)).sum())


def pieces(count: int, faces: Faces) -> NDArray[np.int32]:
    """The connected piece [V] of each of `count` vertices."""
    start, end = _directed(faces)
    graph = coo_matrix((np.ones(len(start), np.int8), (start, end)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def used_only(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
    """Without the vertices that no face has."""
    used = np.zeros(len(vertices), bool)
    used[faces] = True
    return vertices[used], (np.cumsum(used) - 1)[faces].astype(np.int32)


def check_simplification() -> None:
    """UserError unless the library that `simplify` takes is installed."""
    try:
        import fast_simplification  # noqa: F401
    except ImportError as error:
        raise UserError(
            "fewer faces need the library fast-simplification: pip install fast-simplification"
        ) from error


def simplify(vertices: Vertices, faces: Faces, target: int) -> tuple[Vertices, Faces]:
    """About `target` faces by quadric edge collapses, through the fast_simplification library.

    UserError if it is not installed. ValueError for a target below 4. A mesh with fewer faces is returned as it is.
    """
    if target < 4:
        raise ValueError(f"target must be at least 4 faces, got {target}")
    if len(faces) <= target:
        return vertices, faces
    check_simplification()
    import fast_simplification

    points = np.ascontiguousarray(vertices, np.float64)
    result = fast_simplification.simplify(points, np.ascontiguousarray(faces), target_count=target)
    return result[0], result[1].astype(np.int32)


def _directed(faces: Faces) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    wide = faces.astype(np.int64)
    return wide.ravel(), np.roll(wide, -1, axis=1).ravel()


def _open_edges(faces: Faces) -> NDArray[np.int64]:
    """The directed edges [n, 2] that one face alone has."""
    start, end = _directed(faces)
    key = np.minimum(start, end) * (int(faces.max(initial=0)) + 1) + np.maximum(start, end)
    ordered = np.sort(key)
    if (
        len(key) % 2 == 0 and (ordered[::2] == ordered[1::2]).all()
    ):  # sorting alone is far cheaper than an order
        return np.empty((0, 2), np.int64)
    order = np.argsort(key, kind="stable")
    same = np.pad(key[order][1:] == key[order][:-1], 1)
    alone = order[~(same[1:] | same[:-1])]
    return np.stack([start[alone], end[alone]], axis=1)


def _split_vertices(
    vertices: Vertices, faces: Faces, which: NDArray[np.int64]
) -> tuple[Vertices, Faces]:
    """Gives every fan of faces around each of the vertices `which` a vertex of its own."""
    chosen = np.zeros(len(vertices), bool)
    chosen[which] = True
    start, end = _directed(faces)
    corner = np.arange(faces.size)
    after = corner - corner % 3 + (corner + 1) % 3  # of the edge's end in the same face
    # Corners at one vertex belong together where their faces share an edge there.
    key = np.minimum(start, end) * len(vertices) + np.maximum(start, end)
    order = np.argsort(key, kind="stable")
    pair = np.flatnonzero(key[order][1:] == key[order][:-1])
    one, other = (
        order[pair],
        order[pair + 1],
    )  # opposite directions: start of one is end of the other
    left = np.concatenate([one, after[one]])
    right = np.concatenate([after[other], other])
    keep = chosen[start[left]]
    graph = coo_matrix(
        (np.ones(keep.sum(), np.int8), (left[keep], right[keep])), shape=(faces.size,) * 2
    )
    fan_of = connected_components(graph, directed=False)[1]
    corners = np.flatnonzero(chosen[start])
    fans, first, fan = np.unique(fan_of[corners], return_index=True, return_inverse=True)
    owner = start[corners[first]]  # the vertex of each fan
    # The first fan of a vertex keeps it, the others get copies.
    new = np.ones(len(fans), bool)
    new[np.unique(owner, return_index=True)[1]] = False
    number = owner.copy()
    number[new] = len(vertices) + np.arange(new.sum())
    result = start.copy()
    result[corners] = number[fan]
    return np.concatenate([vertices, vertices[owner[new]]]), result.reshape(-1, 3).astype(np.int32)
