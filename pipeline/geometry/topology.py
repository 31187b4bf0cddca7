"""Decide once per asset what is outside: which triangles bound a solid, which are sheets, which opening is closed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.errors import Reject
from pipeline.core.grid import CELL_SIDE, spacing
from pipeline.core.primitives.triangles import pack, segment_hits
from pipeline.core.schema import Mesh
from pipeline.geometry import holes
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.flood_fill import (
    REACH_VOXELS,
    FloodFill,
    bin_triangles,
    connected_region,
    flood_fill,
)
from pipeline.geometry.line_of_sight import BACK, BOTH, HIDDEN
from pipeline.geometry.visibility import classify_triangles, visible_edges


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The surface the exterior touches, ready for distances at any resolution.

    `sign_path` is how the inside came about: "closed" (flood fill alone), "capped" (an opening was closed), "sheet"
    (no inside: everything is a thin shell), joined by "+" where an asset is several of these.
    """

    resolution: int
    triangles: NDArray[np.float64]  # [T, 3, 3]; wound so that a solid's normals point outwards
    kinds: NDArray[np.uint8]  # [T] SOLID, SHEET or BURIED
    sharp_edges: NDArray[np.float64]  # [S, 2, 3] segments
    flood: FloodFill  # the flood's labels: which side is right wherever no surface is near
    sign_path: str
    numbers: dict[str, float]


VIEWS, SAMPLES = (
    96,
    64,
)  # directions, and points of a region, that decide whether an opening is closed
SAME_WAY = 1 - 1e-6  # cosine of two directions that are one
SOLID, SHEET, BURIED = (
    0,
    1,
    2,
)  # bounds a solid; a sheet with exterior on both sides; inside a solid


def build_topology(mesh: Mesh, cfg: TopologyConfig) -> Topology:
    """Sorts the triangles of a normalised mesh into solid, sheet and buried ones, closing openings on evidence.

    Reject: "no_area" if no triangle has any, "not_visible" if the outside touches nothing.
    ValueError if the mesh leaves the cube [-0.5, 0.5]^3.
    """
    if len(mesh.vertices) and np.abs(mesh.vertices).max() > 0.5:
        raise ValueError(
            f"mesh must lie in [-0.5, 0.5]^3, reaches {np.abs(mesh.vertices).max():.4g}: normalize it"
        )
    vertices, faces = holes.weld(mesh.vertices, mesh.faces)
    vertices, faces, cap_of = _add_caps(vertices, faces)
    keep = holes.has_area(
        vertices, faces
    )  # only now: a needle without area still joins its neighbours
    faces, cap_of = faces[keep], cap_of[keep]
    if len(faces) == 0:
        raise Reject("no_area", faces=len(mesh.faces))
    packed = pack(vertices[faces])
    bins = bin_triangles(packed, cfg.resolution)
    own = cap_of < 0
    flood = flood_fill(packed, bins, own)
    opening = 0.0
    if not own.all():
        closed = flood_fill(packed, bins, np.ones(len(faces), np.bool_))
        accepted, opening = _accepted_caps(packed, cap_of, flood, closed, cfg.max_opening)
        use = own | accepted[np.maximum(cap_of, 0)]
        if use.all():
            flood = closed
        else:  # a cap that closes nothing must not stand in the way of anything
            faces, cap_of, packed = faces[use], cap_of[use], packed[use]
            flood = flood_fill(
                packed, bin_triangles(packed, cfg.resolution), np.ones(len(faces), np.bool_)
            )
    pieces, codes, parents, finest = classify_triangles(packed, faces, flood)
    if (codes == HIDDEN).all():
        raise Reject("not_visible", faces=len(mesh.faces))

    pieces[codes == BACK] = pieces[codes == BACK][:, [0, 2, 1]]
    kinds = np.where(codes == BOTH, SHEET, np.where(codes == HIDDEN, BURIED, SOLID)).astype(
        np.uint8
    )
    area = (
        np.linalg.norm(np.cross(pieces[:, 1] - pieces[:, 0], pieces[:, 2] - pieces[:, 0]), axis=1)
        / 2
    )
    capped = cap_of[parents] >= 0
    visible = area[kinds != BURIED].sum()
    path = [
        name
        for name, part in (
            ("closed", (kinds == SOLID) & ~capped),
            ("capped", (kinds == SOLID) & capped),
            ("sheet", kinds == SHEET),
        )
        if area[part].sum() > 1e-3 * visible
    ]
    if "capped" in path and "closed" in path:
        path.remove("closed")  # the closed part is what the cap closed
    return Topology(
        resolution=cfg.resolution,
        triangles=pieces,
        kinds=kinds,
        sharp_edges=_sharp_edges(packed, vertices, faces, flood, cfg.sharp_degrees),
        flood=flood,
        sign_path="+".join(path),
        numbers={
            "visible_area": float(visible),
            "sheet_share": float(area[kinds == SHEET].sum() / visible),
            "buried_area": float(area[kinds == BURIED].sum()),
            "cap_area": float(area[capped & (kinds != BURIED)].sum()),
            "opening": float(opening),
            "seam_voxels": float(finest),
        },
    )


def _add_caps(
    vertices: NDArray[np.float64], faces: NDArray[np.int32]
) -> tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.int32]]:
    """Appends a cap for every boundary loop: vertices, faces, and the cap a face belongs to (-1: the mesh's own)."""
    more, caps, cap_of = holes.cap(vertices, holes.boundary_loops(faces))
    new = ~_contained(
        caps, faces, len(vertices)
    )  # the cap of a lone triangle is the triangle itself
    own = np.full(len(faces), -1, np.int32)
    return more, np.concatenate([faces, caps[new]]), np.concatenate([own, cap_of[new]])


def _contained(some: NDArray[np.int32], faces: NDArray[np.int32], count: int) -> NDArray[np.bool_]:
    """[S] which rows of `some` have the same three vertices as a row of `faces`, which use the first `count` ones."""
    exact = np.flatnonzero((some < count).all(axis=1))  # a fan has a centre that is nobody else's
    found, on_loop = np.zeros(len(some), np.bool_), np.zeros(count, np.bool_)
    on_loop[some[exact]] = True
    near = faces[on_loop[faces].all(axis=1)]
    rows = np.sort(np.concatenate([near, some[exact]]), axis=1).astype(np.int64)
    _, pairs = np.unique(rows[:, 0] << 32 | rows[:, 1], return_inverse=True)
    keys = pairs << 32 | rows[:, 2]
    found[exact] = np.isin(keys[len(near) :], keys[: len(near)])
    return found


@njit(cache=True)
def _escape_share(packed, use, bin_of, offsets, triangles, h, points, directions):
    """Share of rays from the points, one in each direction, that leave the cube without meeting a triangle in use."""
    size, escaped = len(bin_of), 0
    step = REACH_VOXELS * 2 * h  # what a piece meets is within reach of one of its ends
    for p in range(len(points)):
        for d in range(len(directions)):
            x, y, z = points[p, 0], points[p, 1], points[p, 2]
            dx, dy, dz = directions[d, 0] * step, directions[d, 1] * step, directions[d, 2] * step
            blocked = False
            while not blocked and max(abs(x), abs(y), abs(z)) < 0.5:
                previous = -1
                for end in range(2):
                    i = int((x + end * dx + 0.5) / h) // CELL_SIDE
                    j = int((y + end * dy + 0.5) / h) // CELL_SIDE
                    k = int((z + end * dz + 0.5) / h) // CELL_SIDE
                    if min(i, j, k) < 0 or max(i, j, k) >= size:
                        continue
                    m = bin_of[i, j, k]
                    if m < 0 or m == previous:
                        continue
                    previous = m
                    for e in range(offsets[m], offsets[m + 1]):
                        t = triangles[e]
                        if use[t] and segment_hits(packed[t], x, y, z, x + dx, y + dy, z + dz):
                            blocked = True
                            break
                    if blocked:
                        break
                x, y, z = x + dx, y + dy, z + dz
            escaped += not blocked
    return escaped / (len(points) * len(directions))


def _sphere_directions(count: int) -> NDArray[np.float64]:
    """[count, 3] unit vectors spread evenly over the sphere (Fibonacci spiral)."""
    z = 1 - (2 * np.arange(count) + 1) / count
    angle = np.pi * (3 - np.sqrt(5)) * np.arange(count)
    radius = np.sqrt(1 - z * z)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)


def _points_beside(packed: NDArray[np.float64], h: float) -> NDArray[np.int64]:
    """[T, 8, 3] grid points two voxels off each triangle, on both sides of four of its points."""
    shares = np.array([[0.05, 0.05], [0.9, 0.05], [0.05, 0.9], [1 / 3, 1 / 3]])
    on = (
        packed[:, None, 0:3]
        + shares[:, :1] * packed[:, None, 3:6]
        + shares[:, 1:] * packed[:, None, 6:9]
    )
    off = 2 * h * packed[:, None, 9:12]
    return np.rint((np.concatenate([on - off, on + off], axis=1) + 0.5) / h).astype(np.int64)


def _bits(space: FloodFill, points: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which grid points [..., 3] are `outside` in space; False off the grid."""
    size = space.bins.resolution
    inside_grid = ((points >= 0) & (points < size)).all(axis=-1)
    x, y, z = np.moveaxis(np.clip(points, 0, size - 1), -1, 0)
    m = space.bins.bin_of[x // CELL_SIDE, y // CELL_SIDE, z // CELL_SIDE]
    if len(space.outside) == 0:
        return inside_grid & space.whole_cells[x // CELL_SIDE, y // CELL_SIDE, z // CELL_SIDE]
    bit = space.outside[m, x % CELL_SIDE] >> (8 * (y % CELL_SIDE) + z % CELL_SIDE).astype(
        np.uint64
    ) & np.uint64(1)
    return inside_grid & np.where(
        m < 0,
        space.whole_cells[x // CELL_SIDE, y // CELL_SIDE, z // CELL_SIDE],
        bit.astype(np.bool_),
    )


def _accepted_caps(
    packed: NDArray[np.float64],
    cap_of: NDArray[np.int32],
    before: FloodFill,
    after: FloodFill,
    max_opening: float,
) -> tuple[NDArray[np.bool_], float]:
    """Which caps close a solid [caps], and the largest opening that was closed, as a share of the sphere.

    The caps cut regions off the exterior. A region is solid if, averaged over its points, less than max_opening of all
    views from outside reach it past the mesh; behind a single opening that share is 1 - |winding number| of the mesh.
    A cap stays if a solid region, or one that never was exterior, lies on one of its sides.
    """
    h = spacing(before.bins.resolution)
    lost = replace(
        before,
        outside=before.outside & ~after.outside & ~after.barrier,
        whole_cells=before.whole_cells & ~after.whole_cells,
    )
    caps = np.flatnonzero(cap_of >= 0)
    beside = _points_beside(packed[caps], h)
    always_inside = replace(
        before,
        outside=~(before.outside | before.barrier | after.barrier),
        whole_cells=~before.whole_cells,
    )
    accepted = np.zeros(cap_of.max() + 1, np.bool_)
    accepted[cap_of[caps[_bits(always_inside, beside).any(axis=1)]]] = True
    largest = 0.0
    directions = _sphere_directions(VIEWS)
    open_sides = _bits(lost, beside)
    while open_sides.any():
        region = connected_region(lost, beside[open_sides][0])
        touches = _bits(region, beside)
        open_sides &= ~touches
        owners = np.unique(cap_of[caps[touches.any(axis=1)]])
        share = _share_seen(packed, cap_of < 0, region, directions)
        if share < max_opening:
            accepted[owners] = True
            largest = max(largest, share)
    return accepted, largest


def _share_seen(
    packed: NDArray[np.float64],
    use: NDArray[np.bool_],
    region: FloodFill,
    directions: NDArray[np.float64],
) -> float:
    """Mean share of the directions in which sampled points of a region see out of the cube."""
    bins, h = region.bins, spacing(region.bins.resolution)
    mixed, cells = np.flatnonzero(region.outside.any(axis=1)), np.argwhere(region.whole_cells)
    counts = np.bitwise_count(region.outside[mixed]).sum(axis=1)
    weights = np.array(
        [counts.sum(), CELL_SIDE**3 * len(cells)]
    )  # a whole cell stands for 512 points
    mixed = mixed[:: len(mixed) // SAMPLES + 1]
    words = region.outside[mixed]
    slab = (words != 0).argmax(axis=1)  # one point of each sampled cell: the first
    word = words[np.arange(len(mixed)), slab]
    bit = np.bitwise_count((word & (~word + np.uint64(1))) - np.uint64(1)).astype(np.int64)
    points = bins.cells[mixed] * CELL_SIDE + np.stack(
        [slab, bit // CELL_SIDE, bit % CELL_SIDE], axis=1
    )
    cells = cells[:: len(cells) // SAMPLES + 1]
    seen = [
        _escape_share(
            packed, use, bins.bin_of, bins.offsets, bins.triangles, h, group * h - 0.5, directions
        )
        if len(group)
        else 0.0
        for group in (points, cells * CELL_SIDE + (CELL_SIDE - 1) / 2)
    ]
    return float(np.dot(weights, seen) / weights.sum())


def _sharp_edges(
    packed: NDArray[np.float64],
    vertices: NDArray[np.float64],
    faces: NDArray[np.int32],
    flood: FloodFill,
    degrees: float,
) -> NDArray[np.float64]:
    """Visible stretches [S, 2, 3] of edges whose faces deviate from flat by more than `degrees`."""
    edges, edge_of, counts = holes.edges_of(faces)
    half_edges = np.argsort(edge_of, kind="stable")
    face_of = half_edges // 3
    starts = np.concatenate([[0], np.cumsum(counts)])
    # unit direction from the edge into each of its faces; two faces are flat where these are opposite
    a, b = (vertices[edges[edge_of[half_edges], k]] for k in (0, 1))
    along = (b - a) / np.linalg.norm(b - a, axis=1, keepdims=True)
    inward = packed[face_of, 12:15] - a
    inward -= along * (inward * along).sum(axis=1, keepdims=True)
    inward /= np.linalg.norm(inward, axis=1, keepdims=True)
    rank = np.arange(len(half_edges)) - starts[edge_of[half_edges]]
    new, later = np.ones(len(half_edges), np.bool_), np.flatnonzero(rank)
    for back in range(
        1, counts.max()
    ):  # faces upon each other on one side of an edge are one: they are no fold
        new[later] &= (inward[later] * inward[later - back]).sum(axis=1) <= SAME_WAY
        later = later[rank[later] > back]
    face_of, inward = face_of[new], inward[new]
    counts = np.bincount(edge_of[half_edges[new]])
    starts = np.concatenate([[0], np.cumsum(counts)])
    limit = -np.cos(np.radians(degrees))
    sharp = np.zeros(len(edges), np.bool_)
    pairs = np.flatnonzero(counts == 2)
    sharp[pairs] = (inward[starts[pairs]] * inward[starts[pairs] + 1]).sum(axis=1) > limit
    for e in np.flatnonzero(counts > 2):
        mine = inward[starts[e] : starts[e + 1]]
        sharp[e] = (mine @ mine.T)[np.triu_indices(len(mine), 1)].max() > limit
    keep = np.flatnonzero(sharp)
    members = (
        np.concatenate([face_of[starts[e] : starts[e + 1]] for e in keep])
        if len(keep)
        else face_of[:0]
    )
    offsets = np.concatenate([[0], np.cumsum(counts[keep])])
    return visible_edges(packed, vertices, edges[keep], offsets, members, flood)
