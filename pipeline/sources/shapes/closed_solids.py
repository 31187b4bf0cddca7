"""Closed solids of a few parameters: box, cylinder, sphere, torus, capsule and others."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pipeline.sources.shapes.pieces import Piece, Points
from pipeline.sources.shapes.primitives import lathe, surface, sweep


def box(x: float, y: float, z: float) -> Piece:
    """Return an axis-aligned box around the origin. Each side shows the whole texture."""
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=np.float64)
    vertices, faces = [], []
    for axis in range(3):
        for sign in (1.0, -1.0):
            side = np.empty((4, 3))
            side[:, axis] = sign
            right, up = ((2, 1), (0, 2), (0, 1))[axis]
            side[:, right] = corners[:, 0] * (-sign if axis != 2 else sign)
            side[:, up] = corners[:, 1]
            faces.append(np.array([[0, 1, 2], [0, 2, 3]]) + 4 * len(faces))
            vertices.append(side)
    return Piece(
        vertices=np.concatenate(vertices) * np.array([x, y, z]) / 2,
        faces=np.concatenate(faces),
        uv=np.tile((corners + 1) / 2, (6, 1)),
    )


def cylinder(radius: float, height: float, segments: int = 40, top: float | None = None) -> Piece:
    """Return a centred cylinder along y. `top` is the upper radius; 0 makes a cone."""
    top = radius if top is None else top
    profile = [(0.0, -height / 2), (radius, -height / 2), (top, height / 2), (0.0, height / 2)]
    return lathe(profile if top > 0 else profile[:3], segments)


def sphere(radius: float, segments: int = 48, rings: int = 24) -> Piece:
    """Return a sphere around the origin with poles on the y axis."""
    angle = np.pi * (np.arange(rings + 1) / rings - 0.5)
    profile = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    profile[[0, -1], 0] = 0.0
    return lathe(profile, segments)


def torus(ring: float, tube: float, segments: int = 64, sides: int = 24) -> Piece:
    """Return a torus around the y axis with the radii `ring` and `tube`."""
    angle = 2 * np.pi * np.arange(sides) / sides
    return lathe(
        np.stack([ring + tube * np.cos(angle), tube * np.sin(angle)], axis=1), segments, closed=True
    )


def capsule(radius: float, length: float, segments: int = 40, rings: int = 10) -> Piece:
    """Return a centred capsule along y. The half spheres' centres are `length` apart."""
    angle = np.pi / 2 * np.arange(rings + 1) / rings
    cap = np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=1)
    half = np.array([0.0, length / 2])
    low, high = cap * np.array([1.0, -1.0]) - half, cap[::-1] + half
    return lathe(np.concatenate([low, high]), segments)


def rod(radius: float, segments: int = 12) -> Piece:
    """Return a rod along y from 0 to 1, to be used with `placed_between`."""
    return lathe([(0.0, 0.0), (radius, 0.0), (radius, 1.0), (0.0, 1.0)], segments)


def circle(radius: float, sides: int) -> Points:
    """Return the corners [sides, 2] of a regular polygon, counter-clockwise."""
    angle = 2 * np.pi * np.arange(sides) / sides
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def tube(path: ArrayLike, radius: float, sides: int = 12, *, closed: bool = False) -> Piece:
    """Return a round wire along a path [N, 3]."""
    return sweep(np.asarray(path, dtype=np.float64), circle(radius, sides), closed=closed)


def patch(points: Points) -> Piece:
    """Return the closed surface of a grid [U, V, 3], closed in u, with poles at both ends of v."""
    return surface(points, closed_u=True)


def supershape(
    m: tuple[int, int], n: tuple[float, float, float], segments: int = 96, rings: int = 48
) -> Piece:
    """Return a surface of Gielis' superformula.

    Args:
        m: Symmetry along longitude and along latitude.
        n: Three positive exponents.
        segments: Steps of longitude.
        rings: Steps of latitude.
    """
    u = 2 * np.pi * np.arange(segments) / segments - np.pi
    v = np.pi * (np.arange(rings + 1) / rings - 0.5)
    r1, r2 = _superformula(u, m[0], n), _superformula(v, m[1], n)
    level = r2 * np.cos(v)
    level[[0, -1]] = 0.0
    x, z = (r1[:, None] * wave[:, None] * level[None] for wave in (np.sin(u), np.cos(u)))
    points = np.stack([x, np.broadcast_to(r2 * np.sin(v), x.shape), z], axis=-1)
    return surface(points, closed_u=True)


def _superformula(angle: Points, m: int, n: tuple[float, float, float]) -> Points:
    a, b = np.abs(np.cos(m * angle / 4)), np.abs(np.sin(m * angle / 4))
    return (a ** n[1] + b ** n[2]) ** (-1 / n[0])


def polyhedron(name: str) -> Piece:
    """Return a regular polyhedron with corners on the unit sphere.

    Raises:
        ValueError: If `name` is not "tetrahedron", "octahedron" or "icosahedron".
    """
    golden = (1 + 5**0.5) / 2
    if name == "tetrahedron":
        points = [(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]
    elif name == "octahedron":
        points = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    elif name == "icosahedron":
        points = [(0, s, t * golden) for s in (1, -1) for t in (1, -1)]
        points += [(p[1], p[2], p[0]) for p in points] + [(p[2], p[0], p[1]) for p in points]
    else:
        raise ValueError(f"name must be tetrahedron, octahedron or icosahedron, got {name!r}")
    return hull(np.array(points, dtype=np.float64) / np.linalg.norm(points[0]))


def hull(points: Points) -> Piece:
    """Return the convex hull of points [N, 3], facing outward."""
    from scipy.spatial import ConvexHull

    convex = ConvexHull(points)
    faces = convex.simplices.astype(np.int64)
    corners = points[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    inward = (normals * convex.equations[:, :3]).sum(axis=1) < 0
    faces[inward] = faces[inward][:, ::-1]
    return Piece(vertices=points, faces=faces, crease_degrees=10.0)
