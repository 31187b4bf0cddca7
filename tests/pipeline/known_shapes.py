"""Shapes with known distances, and brute-force references that share no code with the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import trimesh
from numba import njit

from pipeline.core.grid import CELL_SIDE, band, spacing
from pipeline.core.schema import Bricks, Mesh


def as_mesh(*parts: trimesh.Trimesh) -> Mesh:
    joined = trimesh.util.concatenate(parts) if len(parts) > 1 else parts[0]
    return Mesh(
        vertices=np.asarray(joined.vertices, np.float64), faces=np.asarray(joined.faces, np.int32)
    )


def rotated(shape: trimesh.Trimesh, seed: int = 0) -> trimesh.Trimesh:
    """Return a randomly rotated copy, which is not aligned with the grid."""
    turned = shape.copy()
    turned.apply_transform(
        trimesh.transformations.random_rotation_matrix(np.random.default_rng(seed).random(3))
    )
    return turned


@dataclass(frozen=True)
class Solid:
    """A closed mesh, and the signed distance to the smooth shape that it approximates.

    The mesh deviates from the smooth shape by at most `sag`.
    """

    mesh: Mesh
    smooth: Callable[[np.ndarray], np.ndarray]
    sag: float

    def scaled(self, scale: float, shift: np.ndarray) -> Solid:
        """Return a scaled and moved copy. Fewer voxels make brute force feasible on fine grids."""
        mesh = replace(self.mesh, vertices=self.mesh.vertices * scale + shift)
        return Solid(mesh, lambda p: scale * self.smooth((p - shift) / scale), scale * self.sag)


def sphere(radius: float = 0.45, centre=(0.0, 0.0, 0.0), subdivisions: int = 2) -> Solid:
    shape = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    sag = _sag(shape, lambda p: np.linalg.norm(p, axis=-1) - radius)
    shape.apply_translation(centre)
    return Solid(
        as_mesh(shape), lambda p: np.linalg.norm(p - np.array(centre), axis=-1) - radius, sag
    )


def box(extents=(0.9, 0.5, 0.37), centre=(0.0, 0.0, 0.0)) -> Solid:
    shape = trimesh.creation.box(extents=extents)
    shape.apply_translation(centre)
    half = np.array(extents) / 2

    def smooth(p):
        q = np.abs(p - np.array(centre)) - half
        return np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(axis=-1), 0)

    return Solid(as_mesh(shape), smooth, 1e-12)


def _sag(shape: trimesh.Trimesh, smooth: Callable[[np.ndarray], np.ndarray]) -> float:
    """Return the largest distance of a mesh from its smooth shape, on a fine subdivision."""
    fine = shape.subdivide().subdivide().subdivide()
    return float(np.abs(smooth(fine.vertices)).max()) * 1.02 + 1e-9


def torus(major: float = 0.31, minor: float = 0.13) -> Solid:
    shape = trimesh.creation.torus(major, minor, major_sections=16, minor_sections=8)

    def smooth(p):
        ring = np.stack([np.linalg.norm(p[..., :2], axis=-1) - major, p[..., 2]], axis=-1)
        return np.linalg.norm(ring, axis=-1) - minor

    return Solid(as_mesh(shape), smooth, _sag(shape, smooth))


def capsule(radius: float = 0.15, height: float = 0.6) -> Solid:
    shape = trimesh.creation.capsule(height=height, radius=radius, count=[8, 8])
    shape.apply_translation(-shape.bounds.mean(axis=0))

    def smooth(p):
        axis = np.clip(p[..., 2], -height / 2, height / 2)
        return np.linalg.norm(p - np.stack([0 * axis, 0 * axis, axis], axis=-1), axis=-1) - radius

    return Solid(as_mesh(shape), smooth, _sag(shape, smooth))


@njit(cache=True)
def _brute_distance(points, a, b, c):
    """Return the distances [P] to the closest triangle: to its plane or its nearest edge."""
    out = np.empty(len(points))
    for p in range(len(points)):
        best = np.inf
        for t in range(len(a)):
            u, v = b[t] - a[t], c[t] - a[t]
            nx, ny, nz = (
                u[1] * v[2] - u[2] * v[1],
                u[2] * v[0] - u[0] * v[2],
                u[0] * v[1] - u[1] * v[0],
            )
            nn = nx * nx + ny * ny + nz * nz
            h = (
                (points[p, 0] - a[t, 0]) * nx
                + (points[p, 1] - a[t, 1]) * ny
                + (points[p, 2] - a[t, 2]) * nz
            )
            if h * h >= best * nn:  # the plane is no closer
                continue
            inside = True
            edge_best = np.inf
            for e in range(3):
                s = a[t] if e == 0 else (b[t] if e == 1 else c[t])
                d = b[t] if e == 0 else (c[t] if e == 1 else a[t])
                ex, ey, ez = d[0] - s[0], d[1] - s[1], d[2] - s[2]
                px, py, pz = points[p, 0] - s[0], points[p, 1] - s[1], points[p, 2] - s[2]
                side = (
                    (ey * pz - ez * py) * nx + (ez * px - ex * pz) * ny + (ex * py - ey * px) * nz
                )
                inside = inside and side >= 0
                r = min(
                    1.0, max(0.0, (ex * px + ey * py + ez * pz) / (ex * ex + ey * ey + ez * ez))
                )
                edge_best = min(
                    edge_best, (px - r * ex) ** 2 + (py - r * ey) ** 2 + (pz - r * ez) ** 2
                )
            best = min(best, h * h / nn if inside else edge_best)
        out[p] = np.sqrt(best)
    return out


def brute_distance(points: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Return exact unsigned distances [P] in float64. All triangles are tried for each point."""
    a, b, c = (np.ascontiguousarray(mesh.vertices[mesh.faces[:, k]]) for k in range(3))
    return _brute_distance(np.ascontiguousarray(points), a, b, c)


def winding_number(points: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Return winding numbers [P]: 1 inside a closed mesh whose normals point outwards."""
    total = np.zeros(len(points))
    for triangle in mesh.vertices[mesh.faces]:
        a, b, c = (corner - points for corner in triangle)
        la, lb, lc = (np.linalg.norm(x, axis=1) for x in (a, b, c))
        det = np.einsum("ij,ij->i", a, np.cross(b, c))
        ab, bc, ca = (np.einsum("ij,ij->i", x, y) for x, y in ((a, b), (b, c), (c, a)))
        total += 2 * np.arctan2(det, la * lb * lc + ab * lc + bc * la + ca * lb)
    return total / (4 * np.pi)


def points_of(bricks: Bricks) -> np.ndarray:
    """Return the positions of all stored points, [M, 512, 3]."""
    local = np.stack(np.unravel_index(np.arange(CELL_SIDE**3), (CELL_SIDE,) * 3), axis=1)
    return (bricks.cells[:, None].astype(np.int64) * CELL_SIDE + local) * spacing(
        bricks.resolution
    ) - 0.5


def distances_of(bricks: Bricks) -> np.ndarray:
    """Return the stored values in voxels, [M, 512]. They are clamped at the band."""
    return bricks.values.astype(np.float64) * band(bricks.resolution) / spacing(bricks.resolution)


def grid_points_where(
    smooth: Callable[[np.ndarray], np.ndarray], limit: float, resolution: int
) -> np.ndarray:
    """Return the indices [P, 3] of all grid points with |smooth| < limit."""
    axis = np.arange(resolution) * spacing(resolution) - 0.5
    found = []
    for i, x in enumerate(axis):
        slab = np.stack(np.meshgrid([x], axis, axis, indexing="ij"), axis=-1)[0]
        jk = np.argwhere(np.abs(smooth(slab)) < limit)
        found.append(np.column_stack([np.full(len(jk), i), jk]))
    return np.concatenate(found)
