"""Distances between two surfaces: Chamfer distance, F1 score and normal consistency."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

LEAF = 4  # triangles in a leaf of the tree
CHUNK = 1024  # consecutive points that one thread looks up
# Thresholds of the F1 score in the frame [-1, 1]^3.
# The last two: Direct3D-S2 paper (arXiv 2505.17412), table 4
THRESHOLDS = (0.01, 0.005, 0.001)


@dataclass(frozen=True, kw_only=True)
class SurfaceMetrics:
    """A reconstruction compared with a reference.

    Distances are unsquared and in the frame [-1, 1]^3.
    """

    accuracy: float
    """Mean distance from samples of the reconstruction to the reference."""

    completeness: float
    """Mean distance from samples of the reference to the reconstruction."""

    f1: dict[float, float]
    """For each threshold, the harmonic mean of the shares of samples closer than it, both ways."""

    max_accuracy: float
    """Largest distance from a sample of the reconstruction to the reference."""

    max_completeness: float
    """Largest distance from a sample of the reference to the reconstruction."""

    normal_consistency: float
    """Mean |cosine| between the normals of a sample and of its closest point, both ways."""

    @property
    def chamfer(self) -> float:
        """The mean of `accuracy` and `completeness`."""
        return (self.accuracy + self.completeness) / 2


EMPTY_METRICS = SurfaceMetrics(  # of an empty reconstruction
    accuracy=float("inf"),
    completeness=float("inf"),
    max_accuracy=float("inf"),
    max_completeness=float("inf"),
    f1=dict.fromkeys(THRESHOLDS, 0.0),
    normal_consistency=0.0,
)


def compare_surfaces(
    vertices: NDArray,
    faces: NDArray,
    to_vertices: NDArray,
    to_faces: NDArray,
    *,
    samples: int = 1_000_000,
    seed: int = 0,
) -> SurfaceMetrics:
    """Compare a reconstruction with a reference.

    Args:
        vertices: [V, 3] of the reconstruction, in the cube [-0.5, 0.5]^3.
        faces: integer [F, 3]. If there are none the result is EMPTY_METRICS.
        to_vertices: [W, 3] of the reference, in the same cube.
        to_faces: integer [G, 3].
        samples: Points sampled on each surface.
        seed: Seed of the samples.

    Raises:
        ValueError: If the reference has no faces, or `samples` is less than 1.
    """
    if not len(to_faces):
        raise ValueError("to_faces must not be empty, got 0 faces")
    if not len(faces):
        return EMPTY_METRICS
    reconstruction = SampledSurface(vertices, faces, samples=samples, seed=seed)
    reference = SampledSurface(to_vertices, to_faces, samples=samples, seed=seed + 1)
    return reconstruction.compare(reference)


class SampledSurface:
    """Samples of a mesh and a search tree over its triangles, for several comparisons.

    Args:
        vertices: [V, 3] in the cube [-0.5, 0.5]^3.
        faces: integer [F, 3].
        samples: Number of points sampled on the surface.
        seed: Seed of the samples.

    Raises:
        ValueError: If there are no faces, or `samples` is less than 1.
    """

    def __init__(
        self, vertices: NDArray, faces: NDArray, *, samples: int = 1_000_000, seed: int = 0
    ):
        if not len(faces):
            raise ValueError("faces must not be empty, got 0 faces")
        if samples < 1:
            raise ValueError(f"samples must be 1 or more, got {samples}")
        doubled = 2 * np.asarray(vertices, np.float64)  # the frame [-1, 1]^3
        self.points, self.normals, _ = sample_surface(doubled, faces, samples, seed)
        self.tree = TriangleTree(doubled, faces)

    def compare(self, reference: SampledSurface) -> SurfaceMetrics:
        """Compare this surface, as the reconstruction, with a reference."""
        to_reference, reference_cosines = self._distances(reference)
        from_reference, own_cosines = reference._distances(self)
        f1 = {}
        for threshold in THRESHOLDS:
            precision = (to_reference < threshold).mean()
            recall = (from_reference < threshold).mean()
            f1[threshold] = float(2 * precision * recall / max(precision + recall, 1e-12))
        return SurfaceMetrics(
            accuracy=float(to_reference.mean()),
            completeness=float(from_reference.mean()),
            max_accuracy=float(to_reference.max()),
            max_completeness=float(from_reference.max()),
            f1=f1,
            normal_consistency=float((reference_cosines.mean() + own_cosines.mean()) / 2),
        )

    def _distances(self, other: SampledSurface) -> tuple[NDArray, NDArray]:
        """Return the distance of each sample to the other surface, and |cosine| of the normals."""
        distance, _, normals = other.tree.closest(self.points)
        return distance, np.abs((self.normals * normals).sum(axis=1))


def sample_surface(
    vertices: NDArray, faces: NDArray, count: int, seed: int
) -> tuple[NDArray, NDArray, NDArray]:
    """Sample points uniformly by area.

    Args:
        vertices: [V, 3].
        faces: integer [F, 3].
        count: Number of points.
        seed: Equal seeds give equal points.

    Returns:
        points: float64 [count, 3].
        normals: float64 [count, 3] unit normals of their faces.
        chosen: int64 [count] numbers of their faces.
    """
    triangles = _triangles(
        np.ascontiguousarray(vertices, np.float64), np.ascontiguousarray(faces, np.int64)
    )
    areas = np.cumsum(_double_areas(triangles))
    rng = np.random.default_rng(seed)
    chosen = np.minimum(
        np.searchsorted(areas, rng.random(count) * areas[-1], side="right"), len(faces) - 1
    )
    u, v = rng.random((2, count))
    return _points(triangles, chosen, u, v), _normals(triangles, chosen), chosen


class TriangleTree:
    """A balanced tree of boxes over the triangles of a mesh in Morton order.

    Args:
        vertices: [V, 3].
        faces: integer [F, 3]. Faces may have no area.
    """

    def __init__(self, vertices: NDArray, faces: NDArray):
        triangles = _triangles(
            np.ascontiguousarray(vertices, np.float64), np.ascontiguousarray(faces, np.int64)
        )
        self.low, self.high = vertices.min(axis=0), vertices.max(axis=0)
        self.order = np.argsort(self._keys(_centres(triangles)), kind="stable")
        self.triangles = triangles[self.order]
        self.boxes = _boxes(self.triangles)

    def closest(
        self, points: NDArray
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
        """Find the closest triangle of each point, exactly and on all cores.

        Args:
            points: [N, 3].

        Returns:
            distance: float64 [N].
            triangle: int64 [N] number of the closest face.
            normals: float64 [N, 3] its unit normal, 0 if it has no area.
        """
        # in Morton order, so that the triangle of the last point bounds the distance of the next
        visit = np.argsort(self._keys(points), kind="stable")
        sorted_distance, nearest = _closest(
            np.ascontiguousarray(points[visit], np.float64), self.triangles, self.boxes
        )
        distance = np.empty(len(points))
        triangle = np.empty(len(points), np.int64)
        normals = np.empty((len(points), 3))
        distance[visit] = sorted_distance
        triangle[visit] = self.order[nearest]
        normals[visit] = _normals(self.triangles, nearest)
        return distance, triangle, normals

    def _keys(self, points: NDArray) -> NDArray[np.uint64]:
        scale = (2**21 - 1) / max(float((self.high - self.low).max()), 1e-30)
        return _morton(np.ascontiguousarray(points, np.float64), self.low, scale)


@njit(cache=True)
def _triangles(vertices, faces):
    """Return the corners of each face, [F, 3, 3]."""
    triangles = np.empty((len(faces), 3, 3))
    for n in range(len(faces)):
        for corner in range(3):
            triangles[n, corner] = vertices[faces[n, corner]]
    return triangles


@njit(cache=True)
def _cross(t):
    """Return a vector along the normal of a triangle [3, 3]. Its length is twice the area."""
    ux, uy, uz = t[1, 0] - t[0, 0], t[1, 1] - t[0, 1], t[1, 2] - t[0, 2]
    vx, vy, vz = t[2, 0] - t[0, 0], t[2, 1] - t[0, 1], t[2, 2] - t[0, 2]
    return uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx


@njit(cache=True)
def _double_areas(triangles):
    areas = np.empty(len(triangles))
    for n in range(len(triangles)):
        x, y, z = _cross(triangles[n])
        areas[n] = np.sqrt(x * x + y * y + z * z)
    return areas


@njit(cache=True)
def _points(triangles, chosen, u, v):
    """Return points of the chosen triangles. (u, v) in [0, 1]^2 is folded into the triangle."""
    points = np.empty((len(chosen), 3))
    for n in range(len(chosen)):
        t, a, b = triangles[chosen[n]], u[n], v[n]
        if a + b > 1:
            a, b = 1 - a, 1 - b
        for axis in range(3):
            points[n, axis] = (
                t[0, axis] + a * (t[1, axis] - t[0, axis]) + b * (t[2, axis] - t[0, axis])
            )
    return points


@njit(cache=True)
def _normals(triangles, chosen):
    """Return the unit normals of the chosen triangles, 0 for triangles without area."""
    normals = np.empty((len(chosen), 3))
    for n in range(len(chosen)):
        x, y, z = _cross(triangles[chosen[n]])
        length = np.sqrt(x * x + y * y + z * z)
        scale = 1 / length if length > 0 else 0.0
        normals[n, 0], normals[n, 1], normals[n, 2] = x * scale, y * scale, z * scale
    return normals


@njit(cache=True)
def _centres(triangles):
    centres = np.empty((len(triangles), 3))
    for n in range(len(triangles)):
        for axis in range(3):
            centres[n, axis] = (
                triangles[n, 0, axis] + triangles[n, 1, axis] + triangles[n, 2, axis]
            ) / 3
    return centres


@njit(cache=True)
def _morton(points, low, scale):
    """Return Morton keys of points [N, 3]: 21 bits per axis, interleaved."""
    keys = np.empty(len(points), np.uint64)
    for n in range(len(points)):
        key = np.uint64(0)
        for axis in range(3):
            x = np.uint64(min(max((points[n, axis] - low[axis]) * scale, 0.0), 2097151.0))
            x = (x | (x << np.uint64(32))) & np.uint64(0x1F00000000FFFF)
            x = (x | (x << np.uint64(16))) & np.uint64(0x1F0000FF0000FF)
            x = (x | (x << np.uint64(8))) & np.uint64(0x100F00F00F00F00F)
            x = (x | (x << np.uint64(4))) & np.uint64(0x10C30C30C30C30C3)
            x = (x | (x << np.uint64(2))) & np.uint64(0x1249249249249249)
            key |= x << np.uint64(axis)
        keys[n] = key
    return keys


@njit(cache=True)
def _boxes(triangles):
    """Return the boxes of the tree [2 * leaves, 6], as lowest and highest corner.

    Box n has the children 2 * n and 2 * n + 1. Leaf l is box leaves + l, and `leaves` is a power of
    two. Leaves without triangles have an empty box.
    """
    count = (len(triangles) + LEAF - 1) // LEAF
    leaves = 1
    while leaves < count:
        leaves *= 2
    boxes = np.empty((2 * leaves, 6))
    boxes[:, :3], boxes[:, 3:] = np.inf, -np.inf
    # leaves
    for leaf in range(count):
        for n in range(leaf * LEAF, min(leaf * LEAF + LEAF, len(triangles))):
            for corner in range(3):
                for axis in range(3):
                    x = triangles[n, corner, axis]
                    boxes[leaves + leaf, axis] = min(boxes[leaves + leaf, axis], x)
                    boxes[leaves + leaf, 3 + axis] = max(boxes[leaves + leaf, 3 + axis], x)
    # inner nodes, from the leaves up
    for node in range(leaves - 1, 0, -1):
        for axis in range(3):
            boxes[node, axis] = min(boxes[2 * node, axis], boxes[2 * node + 1, axis])
            boxes[node, 3 + axis] = max(boxes[2 * node, 3 + axis], boxes[2 * node + 1, 3 + axis])
    return boxes


@njit(cache=True)
def _to_box(px, py, pz, box):
    """Return the squared distance of a point to a box [6], infinite for an empty one."""
    x = max(box[0] - px, px - box[3], 0.0)
    y = max(box[1] - py, py - box[4], 0.0)
    z = max(box[2] - pz, pz - box[5], 0.0)
    return x * x + y * y + z * z


@njit(cache=True)
def _to_segment(px, py, pz, a, b):
    """Return the squared distance of a point to the segment from a [3] to b [3]."""
    ux, uy, uz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    x, y, z = px - a[0], py - a[1], pz - a[2]
    length = ux * ux + uy * uy + uz * uz
    t = (ux * x + uy * y + uz * z) / length if length > 0 else 0.0
    t = min(max(t, 0.0), 1.0)
    x, y, z = x - t * ux, y - t * uy, z - t * uz
    return x * x + y * y + z * z


@njit(cache=True)
def _to_triangle(px, py, pz, t):
    """Return the squared distance of a point to a triangle [3, 3], which may have no area.

    It is separate from the reference `pipeline.core.primitives.triangles.distance2`, which needs a
    normal. A test compares the two.
    """
    ux, uy, uz = t[1, 0] - t[0, 0], t[1, 1] - t[0, 1], t[1, 2] - t[0, 2]
    vx, vy, vz = t[2, 0] - t[0, 0], t[2, 1] - t[0, 1], t[2, 2] - t[0, 2]
    nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    wx, wy, wz = px - t[0, 0], py - t[0, 1], pz - t[0, 2]
    square = nx * nx + ny * ny + nz * nz
    # the foot on the plane lies in the interior: barycentric coordinates b and c
    if square > 0:
        b = (
            nx * (wy * vz - wz * vy) + ny * (wz * vx - wx * vz) + nz * (wx * vy - wy * vx)
        ) / square
        c = (
            nx * (uy * wz - uz * wy) + ny * (uz * wx - ux * wz) + nz * (ux * wy - uy * wx)
        ) / square
        if b >= 0 and c >= 0 and b + c <= 1:
            height = nx * wx + ny * wy + nz * wz
            return height * height / square
    # otherwise an edge is closest
    best = _to_segment(px, py, pz, t[0], t[1])
    best = min(best, _to_segment(px, py, pz, t[1], t[2]))
    return min(best, _to_segment(px, py, pz, t[2], t[0]))


@njit(cache=True, parallel=True)
def _closest(points, triangles, boxes):
    """Return distance [N] and closest triangle [N] of sorted points. See `TriangleTree.closest`."""
    count, leaves = len(points), len(boxes) // 2
    distance, nearest = np.empty(count), np.empty(count, np.int64)
    for part in prange((count + CHUNK - 1) // CHUNK):
        stack, gaps = np.empty(128, np.int64), np.empty(128)
        closest = 0
        for n in range(part * CHUNK, min((part + 1) * CHUNK, count)):
            # the last point's triangle gives the first bound
            px, py, pz = points[n]
            best = _to_triangle(px, py, pz, triangles[closest])
            stack[0], gaps[0], top = 1, _to_box(px, py, pz, boxes[1]), 1
            while top:
                top -= 1
                node = stack[top]
                if gaps[top] >= best:
                    continue
                # inner node: visit the closer child first
                if node < leaves:
                    near, far = 2 * node, 2 * node + 1
                    gap, other = _to_box(px, py, pz, boxes[near]), _to_box(px, py, pz, boxes[far])
                    if other < gap:
                        near, far, gap, other = far, near, other, gap
                    if other < best:
                        stack[top], gaps[top] = far, other
                        top += 1
                    if gap < best:
                        stack[top], gaps[top] = near, gap
                        top += 1
                    continue
                # leaf: exact distances
                first = (node - leaves) * LEAF
                for t in range(first, min(first + LEAF, len(triangles))):
                    square = _to_triangle(px, py, pz, triangles[t])
                    if square < best:
                        best, closest = square, t
            distance[n], nearest[n] = np.sqrt(best), closest
    return distance, nearest
