"""Cleaning of an extracted surface: holes, floaters and inner bubbles, and fewer faces."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from model.inference.hole_patches import fill_loops
from pipeline.core.errors import UserError
from pipeline.core.primitives.simplification import collapse_edges

Vertices = NDArray[np.float64]  # [V, 3] in the cube [-0.5, 0.5]^3
Faces = NDArray[np.int32]  # [F, 3], counterclockwise seen from outside

LARGE = 200_000  # faces: libigl simplifies so many within about five seconds


@dataclass(frozen=True, kw_only=True)
class CleanedMesh:
    """A cleaned mesh, and what cleaning changed.

    Attributes:
        vertices: [V, 3].
        faces: [F, 3].
        holes: Number of holes that were closed.
        floaters: Number of small separate pieces that were removed.
        bubbles: Number of removed pieces that bounded an enclosed hollow.
    """

    vertices: Vertices
    faces: Faces
    holes: int
    floaters: int
    bubbles: int


def clean_mesh(
    vertices: Vertices,
    faces: Faces,
    min_piece: float = 0.01,
    max_hole: float | None = None,
) -> CleanedMesh:
    """Close holes, then remove small separate pieces and bubbles.

    A bubble is a piece turned inside out: it bounds a hollow that is not visible from outside. The
    training data never contains one. The result is closed, unless `max_hole` keeps a hole, and
    manifold.

    Args:
        vertices: [V, 3].
        faces: [F, 3].
        min_piece: Pieces with less than this share of the largest piece's area are removed.
        max_hole: Largest diameter of a hole that is closed. None closes all holes.

    Raises:
        ValueError: If `min_piece` is not in [0, 1), there is no face, or the mesh has a hole and is
            not oriented or has more than two faces at an edge. Marching cubes makes no such mesh.
    """
    if not 0 <= min_piece < 1:
        raise ValueError(f"min_piece must be in [0, 1), got {min_piece}")
    if not len(faces):
        raise ValueError("the mesh must have a face, got none")
    vertices, faces, holes = close_holes(vertices, faces, max_hole)
    piece_of = label_pieces(len(vertices), faces)[faces[:, 0]]
    area, volume = _measure_pieces(vertices, faces, piece_of, int(piece_of.max()) + 1)
    exists = np.bincount(piece_of, minlength=len(area)) > 0
    bubble = exists & (volume < 0)
    solid = exists & ~bubble
    # A mesh that is inside out as a whole is kept, since an empty result would be worse.
    if not solid.any():
        solid, bubble = bubble, solid
    small = solid & (area < min_piece * area[solid].max())
    vertices, faces = drop_unused_vertices(vertices, faces[(solid & ~small)[piece_of]])
    return CleanedMesh(
        vertices=vertices,
        faces=faces,
        holes=holes,
        floaters=int(small.sum()),
        bubbles=int(bubble.sum()),
    )


def close_holes(
    vertices: Vertices, faces: Faces, max_hole: float | None = None
) -> tuple[Vertices, Faces, int]:
    """Close loops of open edges by patches that continue the surface around them.

    Where parts of the surface touch in a vertex on their border, the vertex is split first, so that
    every loop is simple.

    Args:
        vertices: [V, 3].
        faces: [F, 3].
        max_hole: Largest diameter of a hole that is closed, the greatest distance of its border
            from the centre counted twice. None closes all holes.

    Returns:
        The vertices, the faces and the number of closed holes.
    """
    open_edges = _open_edges(faces)
    if not len(open_edges):
        return vertices, faces, 0
    vertices, faces = _split_vertices(vertices, faces, np.unique(open_edges))
    loops = _loops(_open_edges(faces))
    if max_hole is not None:
        loops = [loop for loop in loops if _diameter(vertices[loop]) <= max_hole]
    return *fill_loops(vertices, faces, loops), len(loops)


def _loops(edges: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the vertices of each loop of directed edges [n, 2], in the order of the edges.

    Raises:
        ValueError: If the edges are no loops, because more than two faces share an edge, or two
            neighbours are oriented differently.
    """
    following = dict(edges.tolist())
    if len(following) < len(edges) or following.keys() != set(following.values()):
        raise ValueError("the mesh must be oriented and have at most two faces at each edge")
    loops = []
    while following:
        first, vertex = following.popitem()
        loop = [first]
        while vertex != first:
            loop.append(vertex)
            vertex = following.pop(vertex)
        loops.append(np.array(loop))
    return loops


def _diameter(points: Vertices) -> float:
    return 2 * float(np.linalg.norm(points - points.mean(0), axis=1).max())


def count_open_edges(faces: Faces) -> int:
    """Count the directed edges that lack their opposite or are repeated.

    Returns:
        0 for a closed, oriented surface.
    """
    start, end = _directed_edges(faces)
    count = int(faces.max(initial=0)) + 1
    forward, backward = np.sort(start * count + end), np.sort(end * count + start)
    # A closed surface is recognised without the slower set operations.
    if np.array_equal(forward, backward) and (forward[1:] > forward[:-1]).all():
        return 0
    unique = np.unique(forward)
    return int(len(forward) - len(unique) + (~np.isin(backward, unique)).sum())


def label_pieces(count: int, faces: Faces) -> NDArray[np.int32]:
    """Return the number of the connected piece of each of `count` vertices, int32 [count].

    Pieces are numbered in the order of their first vertices.
    """
    return _label_pieces(count, np.ascontiguousarray(faces))


@njit(cache=True)
def _label_pieces(count, faces):
    """Join the vertices of each face (union by the smaller root, with path halving).

    A graph of scipy, which must first sort the edges, takes ten times as long.
    """
    root = np.arange(count).astype(np.int32)
    for f in range(len(faces)):
        first = faces[f, 0]
        for side in range(1, 3):
            a, b = first, faces[f, side]
            while root[a] != a:
                root[a] = root[root[a]]
                a = root[a]
            while root[b] != b:
                root[b] = root[root[b]]
                b = root[b]
            root[max(a, b)] = min(a, b)
    pieces = 0
    for vertex in range(count):
        # A root is never larger than its vertex, so it has its number already.
        if root[vertex] == vertex:
            root[vertex] = pieces
            pieces += 1
        else:
            root[vertex] = root[root[vertex]]
    return root


@njit(cache=True)
def _measure_pieces(vertices, faces, piece_of, count):
    """Return area and signed volume of each of `count` pieces, float64 [count] both."""
    area, volume = np.zeros(count), np.zeros(count)
    for f in range(len(faces)):
        a, b, c = vertices[faces[f, 0]], vertices[faces[f, 1]], vertices[faces[f, 2]]
        p0, p1, p2 = b[0] - a[0], b[1] - a[1], b[2] - a[2]
        q0, q1, q2 = c[0] - a[0], c[1] - a[1], c[2] - a[2]
        n0, n1, n2 = p1 * q2 - p2 * q1, p2 * q0 - p0 * q2, p0 * q1 - p1 * q0
        piece = piece_of[f]
        area[piece] += np.sqrt(n0 * n0 + n1 * n1 + n2 * n2) / 2
        volume[piece] += (a[0] * n0 + a[1] * n1 + a[2] * n2) / 6
    return area, volume


def drop_unused_vertices(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
    """Remove the vertices that no face uses, and renumber the faces."""
    used = np.zeros(len(vertices), bool)
    used[faces] = True
    if used.all():
        return vertices, faces
    return vertices[used], (np.cumsum(used) - 1)[faces].astype(np.int32)


def check_simplification() -> None:
    """Check that the libraries that `simplify` needs are installed.

    Raises:
        UserError: If one is not.
    """
    for module, package in (("igl", "libigl"), ("meshoptimizer", "meshoptimizer --pre")):
        try:
            import_module(module)
        except ImportError as error:
            raise UserError(
                f"--faces needs the library {package.split()[0]}: pip install {package}"
            ) from error


def simplify(vertices: Vertices, faces: Faces, target: int) -> tuple[Vertices, Faces]:
    """Reduce a mesh to about `target` faces by quadric edge collapses, which keep sharp edges.

    The topology stays: a closed manifold stays one. More faces are left where fewer would change
    the topology. A mesh with fewer faces is returned unchanged.

    Args:
        vertices: [V, 3].
        faces: [F, 3], with at most two faces at each edge.
        target: Number of faces.

    Raises:
        UserError: If a library is not installed.
        ValueError: If `target` is below 4.
    """
    if target < 4:
        raise ValueError(f"target must be at least 4 faces, got {target}")
    if len(faces) <= target:
        return vertices, faces
    check_simplification()
    import igl  # it belongs to extras

    # meshoptimizer is several times as fast, but can let parts of the surface grow together. It
    # halves large meshes as long as that does not happen.
    while len(faces) > max(LARGE, 4 * target):
        halved = _without_flaps(collapse_edges(vertices, faces, len(faces) // 2))
        if len(halved) > 0.9 * len(faces) or not _is_manifold(vertices, halved):
            break
        vertices, faces = drop_unused_vertices(vertices, halved)
    fewer = igl.qslim(np.asfortranarray(vertices), np.asfortranarray(faces, np.int32), target)
    return np.ascontiguousarray(fewer[0], np.float64), np.ascontiguousarray(fewer[1], np.int32)


def _without_flaps(faces: Faces) -> Faces:
    """Remove pairs of faces with the same vertices and opposite orientation.

    Such a pair encloses nothing, and its edges have four faces. Removing both leaves the surface
    closed.
    """
    order = np.sort(faces, axis=1)
    _, kind, counts = np.unique(order, axis=0, return_inverse=True, return_counts=True)
    return faces[counts[kind.ravel()] != 2]


def _is_manifold(vertices: Vertices, faces: Faces) -> bool:
    """Return whether each edge has at most two faces, and the faces of each vertex are one fan."""
    start, end = _directed_edges(faces)
    edges = np.sort(np.minimum(start, end) * len(vertices) + np.maximum(start, end))
    if (edges[2:] == edges[:-2]).any():
        return False
    return len(_split_vertices(vertices, faces, np.unique(start))[0]) == len(vertices)


def _directed_edges(faces: Faces) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the start and the end of each edge, three for each face, int64 [3 F]."""
    wide = faces.astype(np.int64)
    return wide.ravel(), np.roll(wide, -1, axis=1).ravel()


def _open_edges(faces: Faces) -> NDArray[np.int64]:
    """Return the directed edges that only one face has, int64 [n, 2]."""
    start, end = _directed_edges(faces)
    key = np.minimum(start, end) * (int(faces.max(initial=0)) + 1) + np.maximum(start, end)
    # In a closed mesh the sorted keys come in pairs. Sorting is much cheaper than argsort.
    ordered = np.sort(key)
    if len(key) % 2 == 0 and (ordered[::2] == ordered[1::2]).all():
        return np.empty((0, 2), np.int64)
    order = np.argsort(key, kind="stable")
    same = np.pad(key[order][1:] == key[order][:-1], 1)
    alone = order[~(same[1:] | same[:-1])]
    return np.stack([start[alone], end[alone]], axis=1)


def _split_vertices(
    vertices: Vertices, faces: Faces, which: NDArray[np.int64]
) -> tuple[Vertices, Faces]:
    """Give every fan of faces around each of the vertices `which` a vertex of its own."""
    chosen = np.zeros(len(vertices), bool)
    chosen[which] = True
    start, end = _directed_edges(faces)
    # A corner is an entry of `faces`. `after` is the next corner of the same face.
    corner = np.arange(faces.size)
    after = corner - corner % 3 + (corner + 1) % 3
    # Corners at one vertex belong to one fan where their faces share an edge at the vertex. The two
    # edges of a pair have opposite directions: the start of one is the end of the other.
    key = np.minimum(start, end) * len(vertices) + np.maximum(start, end)
    order = np.argsort(key, kind="stable")
    pair = np.flatnonzero(key[order][1:] == key[order][:-1])
    one = order[pair]
    other = order[pair + 1]
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
    # The first fan of a vertex keeps it. The other fans get copies.
    new = np.ones(len(fans), bool)
    new[np.unique(owner, return_index=True)[1]] = False
    number = owner.copy()
    number[new] = len(vertices) + np.arange(new.sum())
    result = start.copy()
    result[corners] = number[fan]
    return np.concatenate([vertices, vertices[owner[new]]]), result.reshape(-1, 3).astype(np.int32)
