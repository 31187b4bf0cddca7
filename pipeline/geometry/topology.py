"""Decide what is outside an asset: which triangles bound a solid and which are sheets.

The decision is made once per asset, on a grid of fixed resolution. It also closes openings.
"""

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
    bin_at,
    bin_triangles,
    connected_region,
    flood_fill,
)
from pipeline.geometry.line_of_sight import BACK, BOTH, HIDDEN
from pipeline.geometry.visibility import classify_triangles, visible_edges

# Kinds of triangles.
SOLID = 0  # bounds a solid
SHEET = 1  # part of an open surface with the outside on both sides
BURIED = 2  # not visible from outside
VIEWS = 96  # directions in which an opening is judged
SAMPLES = 64  # points behind an opening from which it is judged
SAME_DIRECTION = 1 - 1e-6  # two unit vectors are equal if their cosine exceeds this
MIN_PATH_SHARE = 1e-3  # smallest share of the visible area that is named in `Topology.sign_path`


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The visible surface of an asset, ready for distances at any resolution."""

    resolution: int  # of the grid on which the decision was made
    triangles: NDArray[np.float64]  # [T, 3, 3] corners; normals of solid ones point outwards
    kinds: NDArray[np.uint8]  # [T] SOLID, SHEET or BURIED
    openings: NDArray[np.int32]  # [T] the opening that a triangle closes, -1 for those of the mesh
    sharp_edges: NDArray[np.float64]  # [S, 2, 3] segments
    flood: FloodFill  # it tells the side of grid points that are far from any triangle
    # How the inside was found: "closed" by the flood alone, "capped" by closing an opening,
    # "sheet" if there is none. Joined by "+" where several are true of parts of the asset.
    sign_path: str
    numbers: dict[str, float]  # measured values, columns of the manifest


def build_topology(mesh: Mesh, cfg: TopologyConfig) -> Topology:
    """Classify the triangles of a mesh as solid, sheet or buried, and close openings.

    Args:
        mesh: A normalised mesh in the cube [-0.5, 0.5]^3.
        cfg: Options of the decision.

    Raises:
        Reject: "no_area" if no triangle has an area, "not_visible" if no triangle is visible from
            outside.
        ValueError: If the mesh extends beyond the cube.
    """
    if len(mesh.vertices) and np.abs(mesh.vertices).max() > 0.5:
        raise ValueError(
            "mesh must lie in [-0.5, 0.5]^3, but it extends to "
            f"{np.abs(mesh.vertices).max():.4g}: call pipeline.mesh_io.normalize.normalize first"
        )
    # weld the vertices and add a cap for each opening
    vertices, faces = holes.weld(mesh.vertices, mesh.faces)
    vertices, faces, cap_of = _add_caps(vertices, faces)
    # faces without area go only now, because they still connect their neighbours
    keep = holes.has_area(vertices, faces)
    faces, cap_of = faces[keep], cap_of[keep]
    if len(faces) == 0:
        raise Reject("no_area", faces=len(mesh.faces))

    # flood the outside without caps and with all caps, and keep the caps that close a solid
    packed = pack(vertices[faces])
    bins = bin_triangles(packed, cfg.resolution)
    own = cap_of < 0
    flood = flood_fill(packed, bins, own)
    opening = 0.0
    if not own.all():
        closed = flood_fill(packed, bins, np.ones(len(faces), np.bool_))
        accepted, opening = _accepted_caps(packed, cap_of, (flood, closed), cfg.max_opening)
        use = own | accepted[np.maximum(cap_of, 0)]
        if use.all():
            flood = closed
        else:  # remove the other caps entirely, so that they block no line of sight
            faces, cap_of, packed = faces[use], cap_of[use], packed[use]
            flood = flood_fill(
                packed, bin_triangles(packed, cfg.resolution), np.ones(len(faces), np.bool_)
            )

    # classify the triangles by the sides that are visible from outside
    pieces, codes, parents, finest = classify_triangles(packed, faces, flood)
    if (codes == HIDDEN).all():
        raise Reject("not_visible", faces=len(mesh.faces))
    pieces[codes == BACK] = pieces[codes == BACK][:, [0, 2, 1]]  # normals point outwards
    kinds = np.where(codes == BOTH, SHEET, np.where(codes == HIDDEN, BURIED, SOLID)).astype(
        np.uint8
    )

    # measure
    doubled_area = np.cross(pieces[:, 1] - pieces[:, 0], pieces[:, 2] - pieces[:, 0])
    area = np.linalg.norm(doubled_area, axis=1) / 2
    capped = cap_of[parents] >= 0
    visible = area[kinds != BURIED].sum()
    path = [
        name
        for name, part in (
            ("closed", (kinds == SOLID) & ~capped),
            ("capped", (kinds == SOLID) & capped),
            ("sheet", kinds == SHEET),
        )
        if area[part].sum() > MIN_PATH_SHARE * visible
    ]
    if "capped" in path and "closed" in path:
        path.remove("closed")  # the cap is part of the closed surface
    return Topology(
        resolution=cfg.resolution,
        triangles=pieces,
        kinds=kinds,
        openings=cap_of[parents],
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
    """Append a cap for every boundary loop.

    Returns vertices, faces, and the cap of each face, which is -1 for the mesh's own faces.
    """
    all_vertices, caps, cap_of = holes.cap_loops(vertices, holes.boundary_loops(faces))
    new = ~_contained(caps, faces, len(vertices))  # the cap of a lone triangle is that triangle
    own = np.full(len(faces), -1, np.int32)
    return all_vertices, np.concatenate([faces, caps[new]]), np.concatenate([own, cap_of[new]])


def _contained(
    candidates: NDArray[np.int32], faces: NDArray[np.int32], count: int
) -> NDArray[np.bool_]:
    """Return which candidates have the same three vertices as a face.

    Faces use the first `count` vertices. A candidate with a later vertex, the centre of a fan,
    equals no face.
    """
    # limit the comparison to faces whose vertices all belong to candidates
    exact = np.flatnonzero((candidates < count).all(axis=1))
    contained, on_loop = np.zeros(len(candidates), np.bool_), np.zeros(count, np.bool_)
    on_loop[candidates[exact]] = True
    near = faces[on_loop[faces].all(axis=1)]
    # one number per set of three vertices: the first two are renumbered to leave room for the third
    rows = np.sort(np.concatenate([near, candidates[exact]]), axis=1).astype(np.int64)
    _, pairs = np.unique(rows[:, 0] << 32 | rows[:, 1], return_inverse=True)
    keys = pairs << 32 | rows[:, 2]
    contained[exact] = np.isin(keys[len(near) :], keys[: len(near)])
    return contained


@njit(cache=True)
def _escape_share(packed, use, bin_of, offsets, triangles, h, points, directions):
    """Return the share of rays that leave the cube without meeting a triangle in use.

    Rays start at each of the points, in each of the directions.
    """
    escaped = 0
    # a triangle that a step of this length meets is in the bin of one of the step's ends
    step = REACH_VOXELS * 2 * h
    for p in range(len(points)):
        for d in range(len(directions)):
            x, y, z = points[p, 0], points[p, 1], points[p, 2]
            dx, dy, dz = directions[d, 0] * step, directions[d, 1] * step, directions[d, 2] * step
            # follow the ray in steps
            blocked = False
            while not blocked and max(abs(x), abs(y), abs(z)) < 0.5:
                previous = -1
                for end in range(2):
                    i = int((x + end * dx + 0.5) / h) // CELL_SIDE
                    j = int((y + end * dy + 0.5) / h) // CELL_SIDE
                    k = int((z + end * dz + 0.5) / h) // CELL_SIDE
                    m = bin_at(bin_of, i, j, k)
                    if m < 0 or m == previous:
                        continue
                    previous = m
                    for e in range(offsets[m], offsets[m + 1]):
                        t = triangles[e]
                        if use[t] and segment_hits(packed, t, x, y, z, x + dx, y + dy, z + dz):
                            blocked = True
                            break
                    if blocked:
                        break
                x, y, z = x + dx, y + dy, z + dz
            escaped += not blocked
    return escaped / (len(points) * len(directions))


def _sphere_directions(count: int) -> NDArray[np.float64]:
    """Return float64 [count, 3] unit vectors spread evenly over the sphere (Fibonacci spiral)."""
    z = 1 - (2 * np.arange(count) + 1) / count
    angle = np.pi * (3 - np.sqrt(5)) * np.arange(count)
    radius = np.sqrt(1 - z * z)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)


def _points_beside(packed: NDArray[np.float64], h: float) -> NDArray[np.int64]:
    """Return int64 [T, 8, 3] grid points two voxels from each triangle.

    They lie on both sides of four points of the triangle.
    """
    shares = np.array([[0.05, 0.05], [0.9, 0.05], [0.05, 0.9], [1 / 3, 1 / 3]])
    on = (
        packed[:, None, 0:3]
        + shares[:, :1] * packed[:, None, 3:6]
        + shares[:, 1:] * packed[:, None, 6:9]
    )
    off = 2 * h * packed[:, None, 9:12]
    return np.rint((np.concatenate([on - off, on + off], axis=1) + 0.5) / h).astype(np.int64)


def _accepted_caps(
    packed: NDArray[np.float64],
    cap_of: NDArray[np.int32],
    fills: tuple[FloodFill, FloodFill],
    max_opening: float,
) -> tuple[NDArray[np.bool_], float]:
    """Choose the caps that close a solid.

    The caps cut regions off the outside. A region is solid if rays from its points leave the mesh
    without caps in less than `max_opening` of all directions. Behind a single opening this share
    is 1 - |winding number| of the mesh. A cap is accepted if on one of its sides lies a solid
    region, or a region that was inside before.

    Args:
        packed: float64 [T, 16] packed triangles, caps included.
        cap_of: int32 [T] cap of each triangle, -1 for the mesh's own.
        fills: The flood fills without caps and with all caps.
        max_opening: Share of all directions.

    Returns:
        accepted: bool [caps].
        opening: The largest share of directions of a region that was closed.
    """
    before, after = fills
    h = spacing(before.bins.resolution)
    # grid points that the caps cut off the outside
    lost = replace(
        before,
        outside=before.outside & ~after.outside & ~after.barrier,
        whole_cells=before.whole_cells & ~after.whole_cells,
    )
    # accept the caps beside a region that was inside before
    caps = np.flatnonzero(cap_of >= 0)
    beside = _points_beside(packed[caps], h)
    always_inside = replace(
        before,
        outside=~(before.outside | before.barrier | after.barrier),
        whole_cells=~before.whole_cells,
    )
    accepted = np.zeros(cap_of.max() + 1, np.bool_)
    accepted[cap_of[caps[always_inside.reached(beside).any(axis=1)]]] = True
    # judge the regions that were cut off one by one, and accept the caps of those that are solid
    largest = 0.0
    directions = _sphere_directions(VIEWS)
    open_sides = lost.reached(beside)
    while open_sides.any():
        region = connected_region(lost, beside[open_sides][0])
        touches = region.reached(beside)
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
    """Return the mean share of directions in which points of a region see out of the cube."""
    # the region's cells: mixed ones hold some of its points, whole ones lie in it entirely
    bins, h = region.bins, spacing(region.bins.resolution)
    mixed, cells = np.flatnonzero(region.outside.any(axis=1)), np.argwhere(region.whole_cells)
    counts = np.bitwise_count(region.outside[mixed]).sum(axis=1)
    weights = np.array([counts.sum(), CELL_SIDE**3 * len(cells)])  # in grid points
    # the first grid point of some mixed cells
    mixed = mixed[:: len(mixed) // SAMPLES + 1]
    words = region.outside[mixed]
    slab = (words != 0).argmax(axis=1)
    word = words[np.arange(len(mixed)), slab]
    bit = np.bitwise_count((word & (~word + np.uint64(1))) - np.uint64(1)).astype(np.int64)
    points = bins.cells[mixed] * CELL_SIDE + np.stack(
        [slab, bit // CELL_SIDE, bit % CELL_SIDE], axis=1
    )
    # the centre of some whole cells
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
    """Return the visible stretches of sharp edges, float64 [S, 2, 3].

    An edge is sharp if two of its faces deviate from flat by more than `degrees`.
    """
    edges, edge_of, counts = holes.undirected_edges(faces)
    # half-edges sorted by edge, and the face of each
    half_edges = np.argsort(edge_of, kind="stable")
    face_of = half_edges // 3
    starts = np.concatenate([[0], np.cumsum(counts)])
    # unit direction from the edge into each of its faces; opposite directions mean a flat edge
    a, b = (vertices[edges[edge_of[half_edges], k]] for k in (0, 1))
    along = (b - a) / np.linalg.norm(b - a, axis=1, keepdims=True)
    inward = packed[face_of, 12:15] - a
    inward -= along * (inward * along).sum(axis=1, keepdims=True)
    inward /= np.linalg.norm(inward, axis=1, keepdims=True)
    rank = np.arange(len(half_edges)) - starts[edge_of[half_edges]]
    # faces that lie on each other on the same side of an edge count as one
    new, later = np.ones(len(half_edges), np.bool_), np.flatnonzero(rank)
    for back in range(1, counts.max()):
        new[later] &= (inward[later] * inward[later - back]).sum(axis=1) <= SAME_DIRECTION
        later = later[rank[later] > back]
    face_of, inward = face_of[new], inward[new]
    counts = np.bincount(edge_of[half_edges[new]])
    starts = np.concatenate([[0], np.cumsum(counts)])
    # edges with two faces are compared at once, edges with more one by one
    limit = -np.cos(np.radians(degrees))
    sharp = np.zeros(len(edges), np.bool_)
    pairs = np.flatnonzero(counts == 2)
    sharp[pairs] = (inward[starts[pairs]] * inward[starts[pairs] + 1]).sum(axis=1) > limit
    for e in np.flatnonzero(counts > 2):
        directions = inward[starts[e] : starts[e + 1]]
        cosines = (directions @ directions.T)[np.triu_indices(len(directions), 1)]
        sharp[e] = cosines.max() > limit
    # keep the visible parts of the sharp edges
    keep = np.flatnonzero(sharp)
    members = (
        np.concatenate([face_of[starts[e] : starts[e + 1]] for e in keep])
        if len(keep)
        else face_of[:0]
    )
    offsets = np.concatenate([[0], np.cumsum(counts[keep])])
    return visible_edges(packed, vertices, edges[keep], offsets, members, flood)
