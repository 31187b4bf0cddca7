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
    f1: dict[float, float]  # threshold -> harmonic mean of the shares of samples closer than it, both ways
    normal_consistency: float  # mean |cosine| of a sample's normal and that of its closest point, both ways

    @property
    def chamfer(self) -> float:
        """The mean of both directions."""
        return (self.accuracy + self.completeness) / 2


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
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, got {samples}")
    if not len(faces):
        infinite = float("inf")
        return SurfaceMetrics(
            accuracy=infinite, completeness=infinite, f1=dict.fromkeys(THRESHOLDS, 0.0), normal_consistency=0.0
        )
    ours, theirs = 2 * np.asarray(vertices, np.float64), 2 * np.asarray(to_vertices, np.float64)
    there, cosine_there = _distances(ours, faces, theirs, to_faces, samples, seed)
    back, cosine_back = _distances(theirs, to_faces, ours, faces, samples, seed + 1)
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


def _distances(
    vertices: NDArray, faces: NDArray, to_vertices: NDArray, to_faces: NDArray, samples: int, seed: int
) -> tuple[NDArray, NDArray]:
    """From samples of one surface to the other: distance and |cosine| of the normals, [samples] each."""
    points, normals = sample_surface(vertices, faces, samples, seed)
    distance, triangle = closest(points, to_vertices, to_faces)
    others = face_normals(to_vertices, to_faces)[triangle]
    return distance, np.abs((normals * others).sum(axis=1))


def sample_surface(vertices: NDArray, faces: NDArray, count: int, seed: int) -> tuple[NDArray, NDArray]:
    """Points [count, 3] uniform by area, and the unit normals of their faces [count, 3]."""
    corners = np.asarray(vertices, np.float64)[faces]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(cross, axis=1)
    rng = np.random.default_rng(seed)
    chosen = np.searchsorted(np.cumsum(area), rng.random(count) * area.sum(), side="right")
    chosen = np.minimum(chosen, len(faces) - 1)
    u, v = rng.random((2, count, 1))
    outside = u + v > 1
    u, v = np.where(outside, 1 - u, u), np.where(outside, 1 - v, v)
    a, b, c = corners[chosen].transpose(1, 0, 2)
    normals = cross[chosen] / np.maximum(area[chosen], 1e-300)[:, None]
    return a + u * (b - a) + v * (c - a), normals


def face_normals(vertices: NDArray, faces: NDArray) -> NDArray:
    """Unit normals [F, 3]; 0 for faces without area."""
    corners = vertices[faces]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(cross, axis=1, keepdims=True)
    return cross / np.where(length > 0, length, 1)


def closest(points: NDArray, vertices: NDArray, faces: NDArray) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Exact distance of each point [n, 3] to a triangle mesh, and the closest triangle: [n] and [n].

    A balanced tree of boxes over the triangles in Morton order; all cores.
    """
    vertices = np.ascontiguousarray(vertices, np.float64)
    corners = vertices[faces]
    low, high = corners.min(axis=(0, 1)), corners.max(axis=(0, 1))
    order = np.argsort(_morton(corners.mean(axis=1), low, high), kind="stable")
    triangles = np.ascontiguousarray(corners[order])
    boxes = _boxes(triangles)
    visit = np.argsort(_morton(points, low, high), kind="stable")  # neighbours in turn: the last answer bounds the next
    distance, nearest = _closest(np.ascontiguousarray(points[visit], np.float64), triangles, boxes)
    result, triangle = np.empty(len(points)), np.empty(len(points), np.int64)
    result[visit], triangle[visit] = distance, order[nearest]
    return result, triangle


def _morton(points: NDArray, low: NDArray, high: NDArray) -> NDArray[np.uint64]:
    """21 bits an axis, interleaved."""
    scale = (2**21 - 1) / max(float((high - low).max()), 1e-30)
    cells = np.clip((points - low) * scale, 0, 2**21 - 1).astype(np.uint64)
    code = np.zeros(len(points), np.uint64)
    for axis in range(3):
        x = cells[:, axis]
        for shift, mask in (
            (32, 0x1F00000000FFFF),
            (16, 0x1F0000FF0000FF),
            (8, 0x100F00F00F00F00F),
            (4, 0x10C30C30C30C30C3),
            (2, 0x1249249249249249),
        ):
            x = (x | (x << np.uint64(shift))) & np.uint64(mask)
        code |= x << np.uint64(axis)
    return code


def _boxes(triangles: NDArray) -> NDArray:
    """[2 * leaves, 6]: box n has the children 2n and 2n + 1; leaf l is box leaves + l; leaves is a power of two."""
    count = -(-len(triangles) // LEAF)
    leaves = 1 << (count - 1).bit_length()
    boxes = np.empty((2 * leaves, 6))
    boxes[:, :3], boxes[:, 3:] = np.inf, -np.inf
    starts = np.arange(0, len(triangles), LEAF)
    boxes[leaves : leaves + count, :3] = np.minimum.reduceat(triangles.min(axis=1), starts)
    boxes[leaves : leaves + count, 3:] = np.maximum.reduceat(triangles.max(axis=1), starts)
    first = leaves
    while first > 1:
        pairs = boxes[first : 2 * first].reshape(-1, 2, 6)
        first //= 2
        boxes[first : 2 * first, :3] = pairs[:, :, :3].min(axis=1)
        boxes[first : 2 * first, 3:] = pairs[:, :, 3:].max(axis=1)
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
        b = (nx * (wy * vz - wz * vy) + ny * (wz * vx - wx * vz) + nz * (wx * vy - wy * vx)) / square
        c = (nx * (uy * wz - uz * wy) + ny * (uz * wx - ux * wz) + nz * (ux * wy - uy * wx)) / square
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
