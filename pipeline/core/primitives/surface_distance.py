"""Distances between surfaces: area-uniform samples of one, exact closest points on the other, and what follows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

LEAF = 4  # triangles in a leaf of the tree
THRESHOLDS = (0.005, 0.001)  # of F1, in the frame [-1, 1]^3; paper, table 4


@dataclass(frozen=True, kw_only=True)
class SurfaceMetrics:
    """Reconstruction against reference in the frame [-1, 1]^3, distances unsquared."""

    accuracy: float  # mean distance of the reconstruction's samples to the reference
    completeness: float  # mean distance of the reference's samples to the reconstruction
    f1: dict[
        float, float
    ]  # threshold -> harmonic mean of the shares of samples closer than it, both ways
    normal_consistency: (
        float  # mean |cosine| of a sample's normal and that of its closest point, both ways
    )

    @property
    def chamfer(self) -> float:
        """The mean of both directions."""
        return (self.accuracy + self.completeness) / 2


EMPTY_METRICS = SurfaceMetrics(  # what an empty reconstruction comes to
    accuracy=float("inf"),
    completeness=float("inf"),
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
    """A reconstruction against a reference, both in the cube [-0.5, 0.5]^3.

    An empty reconstruction is infinitely far and scores 0. ValueError if the reference is empty or samples < 1.
    """
    if not len(to_faces):
        raise ValueError("to_faces must not be empty, got 0 faces")
    if not len(faces):
        return EMPTY_METRICS
    ours = SampledSurface(vertices, faces, samples=samples, seed=seed)
    return ours.compare(SampledSurface(to_vertices, to_faces, samples=samples, seed=seed + 1))


class SampledSurface:
    """A mesh in the cube [-0.5, 0.5]^3 that others are compared with: samples on it, and a tree over its triangles.

    ValueError if it has no faces or samples < 1.
    """

    def __init__(
        self, vertices: NDArray, faces: NDArray, *, samples: int = 1_000_000, seed: int = 0
    ):
        if not len(faces):
            raise ValueError("faces must not be empty, got 0 faces")
        if samples < 1:
            raise ValueError(f"samples must be 1 or more, got {samples}")
        doubled = 2 * np.asarray(vertices, np.float64)  # the frame [-1, 1]^3
        self.points, self.normals = sample_surface(doubled, faces, samples, seed)
        self.tree = TriangleTree(doubled, faces)

    def compare(self, reference: SampledSurface) -> SurfaceMetrics:
        """This one as the reconstruction of another."""
        there, cosine_there = self._distances(reference)
        back, cosine_back = reference._distances(self)
        f1 = {}
        for threshold in THRESHOLDS:
            precision, recall = (there < threshold).mean(), (back < threshold).mean()
            f1[threshold] = float(2 * precision * recall / max(precision + recall, 1e-12))
        return SurfaceMetrics(
            accuracy=float(there.mean()),
            completeness=float(back.mean()),
            f1=f1,
            normal_consistency=float((cosine_there.mean() + cosine_back.mean()) / 2),
        )

    def _distances(self, other: SampledSurface) -> tuple[NDArray, NDArray]:
        """From samples of this one to the other: distance and |cosine| of the normals, [samples] each."""
        distance, _, normals = other.tree.closest(self.points)
        return distance, np.abs((self.normals * normals).sum(axis=1))


def sample_surface(
    vertices: NDArray, faces: NDArray, count: int, seed: int
) -> tuple[NDArray, NDArray]:
    """Points [count, 3] uniform by area, and the unit normals of their faces [count, 3]."""
    triangles = _triangles(
        np.ascontiguousarray(vertices, np.float64), np.ascontiguousarray(faces, np.int64)
    )
    areas = np.cumsum(_double_areas(triangles))
    rng = np.random.default_rng(seed)
    chosen = np.minimum(
        np.searchsorted(areas, rng.random(count) * areas[-1], side="right"), len(faces) - 1
    )
    u, v = rng.random((2, count))
    return _points(triangles, chosen, u, v), _normals(triangles, chosen)


class TriangleTree:
    """A balanced tree of boxes over a mesh's triangles in Morton order. float64, all cores."""

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
        """Exact distance of each point [n, 3], the closest triangle and its unit normal: [n], [n] and [n, 3]."""
        visit = np.argsort(
            self._keys(points), kind="stable"
        )  # neighbours in turn: the last answer bounds the next
        found, nearest = _closest(
            np.ascontiguousarray(points[visit], np.float64), self.triangles, self.boxes
        )
        distance, triangle, normals = (
            np.empty(len(points)),
            np.empty(len(points), np.int64),
            np.empty((len(points), 3)),
        )
        distance[visit], triangle[visit], normals[visit] = (
            found,
            self.order[nearest],
            _normals(self.triangles, nearest),
        )
        return distance, triangle, normals

    def _keys(self, points: NDArray) -> NDArray[np.uint64]:
        scale = (2**21 - 1) / max(float((self.high - self.low).max()), 1e-30)
        return _morton(np.ascontiguousarray(points, np.float64), self.low, scale)


@njit(cache=True)
def _triangles(vertices, faces):
    triangles = np.empty((len(faces), 3, 3))
    for n in range(len(faces)):
        for corner in range(3):
            triangles[n, corner] = vertices[faces[n, corner]]
    return triangles


@njit(cache=True)
def _cross(t):
    """Of the two edges at the first corner: along the normal, as long as twice the area."""
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
    """Unit normals; 0 for triangles without area."""
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
    """21 bits an axis, interleaved."""
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
    """[2 * leaves, 6]: box n has the children 2n and 2n + 1; leaf l is box leaves + l; leaves is a power of two."""
    count = (len(triangles) + LEAF - 1) // LEAF
    leaves = 1
    while leaves < count:
        leaves *= 2
    boxes = np.empty((2 * leaves, 6))
    boxes[:, :3], boxes[:, 3:] = np.inf, -np.inf
    for leaf in range(count):
        for n in range(leaf * LEAF, min(leaf * LEAF + LEAF, len(triangles))):
            for corner in range(3):
                for axis in range(3):
                    x = triangles[n, corner, axis]
                    boxes[leaves + leaf, axis] = min(boxes[leaves + leaf, axis], x)
                    boxes[leaves + leaf, 3 + axis] = max(boxes[leaves + leaf, 3 + axis], x)
    for node in range(leaves - 1, 0, -1):
        for axis in range(3):
            boxes[node, axis] = min(boxes[2 * node, axis], boxes[2 * node + 1, axis])
            boxes[node, 3 + axis] = max(boxes[2 * node, 3 + axis], boxes[2 * node + 1, 3 + axis])
    return boxes


@njit(cache=True)
def _to_box(px, py, pz, box):
    """Squared distance of a point to a box; infinite for an empty one."""
    x = max(box[0] - px, px - box[3], 0.0)
    y = max(box[1] - py, py - box[4], 0.0)
    z = max(box[2] - pz, pz - box[5], 0.0)
    return x * x + y * y + z * z


@njit(cache=True)
def _to_segment(px, py, pz, a, b):
    """Squared distance of a point to a segment."""
    ux, uy, uz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    x, y, z = px - a[0], py - a[1], pz - a[2]
    length = ux * ux + uy * uy + uz * uz
    t = (ux * x + uy * y + uz * z) / length if length > 0 else 0.0
    t = min(max(t, 0.0), 1.0)
    x, y, z = x - t * ux, y - t * uy, z - t * uz
    return x * x + y * y + z * z


@njit(cache=True)
def _to_triangle(px, py, pz, t):
    """Squared distance of a point to a triangle [3, 3], which may have no area."""
    ux, uy, uz = t[1, 0] - t[0, 0], t[1, 1] - t[0, 1], t[1, 2] - t[0, 2]
    vx, vy, vz = t[2, 0] - t[0, 0], t[2, 1] - t[0, 1], t[2, 2] - t[0, 2]
    nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    wx, wy, wz = px - t[0, 0], py - t[0, 1], pz - t[0, 2]
    square = nx * nx + ny * ny + nz * nz
    if square > 0:  # above the inside: both barycentric coordinates from the normal
        b = (
            nx * (wy * vz - wz * vy) + ny * (wz * vx - wx * vz) + nz * (wx * vy - wy * vx)
        ) / square
        c = (
            nx * (uy * wz - uz * wy) + ny * (uz * wx - ux * wz) + nz * (ux * wy - uy * wx)
        ) / square
        if b >= 0 and c >= 0 and b + c <= 1:
            height = nx * wx + ny * wy + nz * wz
            return height * height / square
    best = _to_segment(px, py, pz, t[0], t[1])
    best = min(best, _to_segment(px, py, pz, t[1], t[2]))
    return min(best, _to_segment(px, py, pz, t[2], t[0]))


@njit(cache=True, parallel=True)
def _closest(points, triangles, boxes):
    count, leaves = len(points), len(boxes) // 2
    distance, nearest = np.empty(count), np.empty(count, np.int64)
    chunk = 1024
    for part in prange((count + chunk - 1) // chunk):
        stack, gaps = np.empty(128, np.int64), np.empty(128)
        best_of_last = 0
        for n in range(part * chunk, min((part + 1) * chunk, count)):
            px, py, pz = points[n]
            found = best_of_last
            best = _to_triangle(px, py, pz, triangles[found])
            stack[0], gaps[0], top = 1, _to_box(px, py, pz, boxes[1]), 1
            while top:
                top -= 1
                node = stack[top]
                if gaps[top] >= best:
                    continue
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
                first = (node - leaves) * LEAF
                for t in range(first, min(first + LEAF, len(triangles))):
                    square = _to_triangle(px, py, pz, triangles[t])
                    if square < best:
                        best, found = square, t
            distance[n], nearest[n] = np.sqrt(best), found
            best_of_last = found
    return distance, nearest
