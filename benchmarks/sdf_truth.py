"""Exact signed distances at grid points near a mesh, by brute force.

Nothing here uses the geometry of the pipeline, which is measured against it. Distances are tested
against `tests.pipeline.known_shapes.brute_distance`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.grid import band, spacing
from pipeline.core.schema import Mesh

PROBE = 1e-6  # distance from the surface at which its two sides are probed, in cube units
FAR_RADII = 5.0  # a triangle farther away than this, in its radii, is a dipole in winding numbers
# A side is clear if the winding number is within this of 0 or 1. Beside a sheet it is near 1/2.
CLEAR = 0.3
# Points within this many bands of an open border are left out, because caps are not in the mesh.
RIM_BANDS = 1.5


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Grid points whose signed distance is certain."""

    points: NDArray[np.int32]  # [P, 3] grid indices
    voxels: NDArray[np.floating]  # [P] signed distance in grid spacings, negative inside
    sampled: int  # number of the band's points that were examined


def sample_truth(mesh: Mesh, resolution: int, samples: int, seed: int = 0) -> Truth:
    """Sample grid points of the band |d| < tau and compute their signed distances.

    A point is kept if the winding numbers on both sides of the closest point of the mesh clearly
    separate inside from outside. This excludes points near sheets, near faces inside a solid and
    near the rim of an opening. A cavity is outside if its walls are wound accordingly.

    Args:
        mesh: A mesh in the cube [-0.5, 0.5]^3.
        resolution: Grid points along one side.
        samples: Number of places on the surface, uniform by area. At most one point per place.
        seed: Seed of the places.
    """
    # distances of grid points near the surface
    tau, h = band(resolution), spacing(resolution)
    corners = mesh.vertices[mesh.faces]
    grid = _near_surface(corners, tau, h, resolution, samples, np.random.default_rng(seed))
    points = grid * h - 0.5
    distance, face, foot = closest_on_mesh(points, corners)
    in_band = distance < tau
    sampled = int(in_band.sum())
    # leave out the surroundings of open borders
    rim = open_edges(mesh)
    if len(rim):
        in_band &= closest_on_mesh(points, rim[:, [0, 1, 1]])[0] > RIM_BANDS * tau
    grid = grid[in_band]
    points = points[in_band]
    distance = distance[in_band]
    face = face[in_band]
    foot = foot[in_band]
    # probe both sides of the closest point, moved away from edges, where sides are ambiguous
    inner = foot + 0.01 * (corners[face].mean(axis=1) - foot)
    normal = np.cross(corners[face, 1] - corners[face, 0], corners[face, 2] - corners[face, 0])
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    normal /= np.where(length > 0, length, 1)
    front, back = (winding(inner + side * PROBE * normal, corners) for side in (1, -1))
    sure = (
        (np.minimum(front, back) < CLEAR)
        & (np.maximum(front, back) > 1 - CLEAR)
        & (length[:, 0] > 0)
    )
    sign = np.where(winding(points[sure], corners) > 0.5, -1.0, 1.0)
    return Truth(
        points=grid[sure].astype(np.int32), voxels=sign * distance[sure] / h, sampled=sampled
    )


def _near_surface(
    corners: NDArray[np.float64],
    tau: float,
    h: float,
    resolution: int,
    count: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Return distinct grid points [P, 3] of the band, with a uniform density along the surface."""
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(normal, axis=1)
    face = rng.choice(len(corners), count, p=length / length.sum())
    u, v = rng.random((2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    a, b, c = corners[face].transpose(1, 0, 2)
    on = a + u * (b - a) + v * (c - a)
    off = on + rng.uniform(-tau, tau, (count, 1)) * normal[face] / length[face, None]
    return np.unique(np.clip(np.rint((off + 0.5) / h).astype(np.int64), 0, resolution - 1), axis=0)


def open_edges(mesh: Mesh) -> NDArray[np.float64]:
    """Return the boundary of a mesh: the edges that an odd number of faces use.

    Vertices at the same position count as one.

    Returns:
        float64 [E, 2, 3].
    """
    places, label = np.unique(mesh.vertices, axis=0, return_inverse=True)
    faces = label.ravel()[mesh.faces]
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    edges, uses = np.unique(edges, axis=0, return_counts=True)
    return places[edges[(uses % 2 == 1) & (edges[:, 0] != edges[:, 1])]]


def closest_on_mesh(
    points: NDArray[np.floating], corners: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Find the closest point of a mesh.

    Args:
        points: [P, 3].
        corners: float64 [T, 3, 3] triangles, which may have no area.

    Returns:
        distance: float64 [P].
        face: int64 [P] closest triangle.
        foot: float64 [P, 3] closest point.
    """
    return _closest(np.ascontiguousarray(points), np.ascontiguousarray(corners), *_spheres(corners))


def winding(points: NDArray[np.floating], corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute absolute winding numbers. Triangles that are far away are approximated by dipoles.

    Args:
        points: [P, 3].
        corners: float64 [T, 3, 3].

    Returns:
        float64 [P].
    """
    return np.abs(
        _winding(np.ascontiguousarray(points), np.ascontiguousarray(corners), *_spheres(corners))
    )


def _spheres(corners: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return centres [T, 3] and radii [T] of bounding spheres."""
    centres = corners.mean(axis=1)
    return centres, np.linalg.norm(corners - centres[:, None], axis=2).max(axis=1)


@njit(cache=True)
def _closest(points, corners, centres, radii):
    """See `closest_on_mesh`."""
    distance = np.empty(len(points))
    face = np.zeros(len(points), np.int64)
    foot = np.empty((len(points), 3))
    for i in range(len(points)):
        p = points[i]
        best = np.inf
        for t in range(len(corners)):
            # the bounding sphere excludes most triangles
            dx, dy, dz = p[0] - centres[t, 0], p[1] - centres[t, 1], p[2] - centres[t, 2]
            if dx * dx + dy * dy + dz * dz > (best + radii[t]) ** 2:
                continue
            a, b, c = corners[t, 0], corners[t, 1], corners[t, 2]
            nx = (b[1] - a[1]) * (c[2] - a[2]) - (b[2] - a[2]) * (c[1] - a[1])
            ny = (b[2] - a[2]) * (c[0] - a[0]) - (b[0] - a[0]) * (c[2] - a[2])
            nz = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
            nn = nx * nx + ny * ny + nz * nz
            # each edge, and whether the point lies above the interior
            over = nn > 0.0
            for e in range(3):
                s, d = corners[t, e], corners[t, (e + 1) % 3]
                ex, ey, ez = d[0] - s[0], d[1] - s[1], d[2] - s[2]
                px, py, pz = p[0] - s[0], p[1] - s[1], p[2] - s[2]
                over = (
                    over
                    and (ey * pz - ez * py) * nx
                    + (ez * px - ex * pz) * ny
                    + (ex * py - ey * px) * nz
                    >= 0
                )
                ee = ex * ex + ey * ey + ez * ez
                r = min(1.0, max(0.0, (ex * px + ey * py + ez * pz) / ee)) if ee > 0 else 0.0
                away = np.sqrt((px - r * ex) ** 2 + (py - r * ey) ** 2 + (pz - r * ez) ** 2)
                if away < best:
                    best, face[i] = away, t
                    foot[i, 0], foot[i, 1], foot[i, 2] = s[0] + r * ex, s[1] + r * ey, s[2] + r * ez
            # the interior
            if over:
                height = ((p[0] - a[0]) * nx + (p[1] - a[1]) * ny + (p[2] - a[2]) * nz) / nn
                away = abs(height) * np.sqrt(nn)
                if away < best:
                    best, face[i] = away, t
                    foot[i, 0], foot[i, 1], foot[i, 2] = (
                        p[0] - height * nx,
                        p[1] - height * ny,
                        p[2] - height * nz,
                    )
        distance[i] = best
    return distance, face, foot


@njit(cache=True)
def _winding(points, corners, centres, radii):
    """See `winding`."""
    # area vectors
    normals = np.empty((len(corners), 3))
    for t in range(len(corners)):
        a, b, c = corners[t, 0], corners[t, 1], corners[t, 2]
        normals[t, 0] = ((b[1] - a[1]) * (c[2] - a[2]) - (b[2] - a[2]) * (c[1] - a[1])) / 2
        normals[t, 1] = ((b[2] - a[2]) * (c[0] - a[0]) - (b[0] - a[0]) * (c[2] - a[2])) / 2
        normals[t, 2] = ((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])) / 2
    out = np.empty(len(points))
    for i in range(len(points)):
        x, y, z = points[i, 0], points[i, 1], points[i, 2]
        total = 0.0
        for t in range(len(corners)):
            dx, dy, dz = centres[t, 0] - x, centres[t, 1] - y, centres[t, 2] - z
            d2 = dx * dx + dy * dy + dz * dz
            # a dipole if it is far away
            if d2 > (FAR_RADII * radii[t]) ** 2:
                total += (dx * normals[t, 0] + dy * normals[t, 1] + dz * normals[t, 2]) / (
                    d2 * np.sqrt(d2)
                )
                continue
            # otherwise the exact solid angle (Van Oosterom and Strackee 1983)
            ax, ay, az = corners[t, 0, 0] - x, corners[t, 0, 1] - y, corners[t, 0, 2] - z
            bx, by, bz = corners[t, 1, 0] - x, corners[t, 1, 1] - y, corners[t, 1, 2] - z
            cx, cy, cz = corners[t, 2, 0] - x, corners[t, 2, 1] - y, corners[t, 2, 2] - z
            la, lb = np.sqrt(ax * ax + ay * ay + az * az), np.sqrt(bx * bx + by * by + bz * bz)
            lc = np.sqrt(cx * cx + cy * cy + cz * cz)
            det = ax * (by * cz - bz * cy) + ay * (bz * cx - bx * cz) + az * (bx * cy - by * cx)
            ab = ax * bx + ay * by + az * bz
            bc = bx * cx + by * cy + bz * cz
            ca = cx * ax + cy * ay + cz * az
            total += 2 * np.arctan2(det, la * lb * lc + ab * lc + bc * la + ca * lb)
        out[i] = total / (4 * np.pi)
    return out
