"""Surfaces that shapes are built from: grids, surfaces of revolution, sweeps and extrusions."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.sources.shapes.pieces import Piece, Points, Triangles, joined


def surface(points: Points, *, closed_u: bool = False, closed_v: bool = False) -> Piece:
    """Return the sheet through a grid of points.

    Args:
        points: [U, V, 3]. The front shows u to the right and v up.
        closed_u: Connect the last row to the first one. The vertices of the seam are repeated with
            the same bits, because their texture coordinates differ.
        closed_v: Connect the last column to the first one.

    Returns:
        The piece with texture coordinates. Points of a row that coincide (poles) make no degenerate
        faces.
    """
    if closed_u:
        points = np.concatenate([points, points[:1]])
    if closed_v:
        points = np.concatenate([points, points[:, :1]], axis=1)
    nu, nv = points.shape[:2]
    index = np.arange(nu * nv).reshape(nu, nv)
    a, b, c, d = index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]
    faces = np.stack([np.stack([a, b, c], axis=-1), np.stack([a, c, d], axis=-1)], axis=2).reshape(
        -1, 3
    )
    vertices = points.reshape(-1, 3)
    corners = vertices[faces]
    faces = faces[(corners != np.roll(corners, 1, axis=1)).any(axis=2).all(axis=1)]
    u, v = np.meshgrid(np.linspace(0, 1, nu), np.linspace(0, 1, nv), indexing="ij")
    return Piece(vertices=vertices, faces=faces, uv=np.stack([u, v], axis=-1).reshape(-1, 2))


def lathe(profile: ArrayLike, segments: int = 48, *, closed: bool = False) -> Piece:
    """Return the surface of revolution of a profile about the y axis, facing outward.

    The result bounds a solid if the profile begins and ends on the axis, or if it is closed.

    Args:
        profile: [N, 2] = (radius, y), from bottom to top, or counter-clockwise if it is closed.
        segments: Number of steps around the axis.
        closed: Connect the last point of the profile to the first one.
    """
    profile = np.asarray(profile, dtype=np.float64)
    angle = 2 * np.pi * np.arange(segments)[:, None] / segments
    radius = profile[None, :, 0]
    x, z = (np.where(radius == 0, 0.0, radius * wave) for wave in (np.sin(angle), np.cos(angle)))
    return surface(
        np.stack([x, np.broadcast_to(profile[:, 1], x.shape), z], axis=-1),
        closed_u=True,
        closed_v=closed,
    )


def sweep(path: Points, section: Points, *, closed: bool = False) -> Piece:
    """Return the solid that a section sweeps along a path without twisting.

    Args:
        path: [N, 3].
        section: [M, 2], counter-clockwise.
        closed: Connect the end of the path to its start. Otherwise both ends are capped.
    """
    # Tangents, and normals that turn as little as possible from point to point.
    n = len(path)
    ahead, behind = np.roll(path, -1, axis=0), np.roll(path, 1, axis=0)
    if not closed:
        ahead[-1] = path[-1]
        behind[0] = path[0]
    tangent = ahead - behind
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    normal = np.empty_like(path)
    start = np.eye(3)[np.abs(tangent[0]).argmin()]
    normal[0] = _orthogonal(start, tangent[0])
    for i in range(1, n):
        normal[i] = _orthogonal(normal[i - 1], tangent[i])
    if closed:  # distribute the remaining angle between end and start along the path
        last = _orthogonal(normal[-1], tangent[0])
        rest = np.arctan2(np.dot(np.cross(last, normal[0]), tangent[0]), np.dot(last, normal[0]))
        angle = (rest * np.arange(n) / n)[:, None]
        normal = normal * np.cos(angle) + np.cross(tangent, normal) * np.sin(angle)
    # The section in the frame of each point.
    binormal = np.cross(tangent, normal)
    points = (
        path[:, None]
        + section[None, :, :1] * normal[:, None]
        + section[None, :, 1:] * binormal[:, None]
    )
    tube = surface(np.swapaxes(points, 0, 1), closed_u=True, closed_v=closed)
    if closed:
        return tube
    m = len(section)
    fan = np.stack([np.full(m - 2, 0), np.arange(1, m - 1), np.arange(2, m)], axis=1)
    caps = [Piece(vertices=points[0], faces=fan[:, ::-1]), Piece(vertices=points[-1], faces=fan)]
    return joined([tube, *caps])


def _orthogonal(vector: Points, direction: Points) -> Points:
    """Return the part of a vector orthogonal to a unit direction, scaled to length 1."""
    vector = vector - direction * np.dot(vector, direction)
    return vector / np.linalg.norm(vector)


def extrude(outline: ArrayLike, depth: float) -> Piece:
    """Return the solid of a simple polygon from z = -depth/2 to depth/2.

    Args:
        outline: [N, 2] in the xy plane, counter-clockwise.
        depth: Extent along z.

    Raises:
        ValueError: If the polygon is not simple or not counter-clockwise.
    """
    outline = np.asarray(outline, dtype=np.float64)
    n = len(outline)
    caps = triangulate(outline)
    back, front = (np.column_stack([outline, np.full(n, z)]) for z in (-depth / 2, depth / 2))
    i = np.arange(n)
    j = (i + 1) % n
    walls = np.concatenate([np.stack([i, j, j + n], axis=1), np.stack([i, j + n, i + n], axis=1)])
    return Piece(
        vertices=np.concatenate([back, front]),
        faces=np.concatenate([caps[:, ::-1], caps + n, walls]),
    )


def ring(outer: Points, inner: Points, depth: float) -> Piece:
    """Return the solid between two outlines from z = -depth/2 to depth/2.

    Args:
        outer: [N, 2] in the xy plane, counter-clockwise.
        inner: [N, 2] inside `outer`, counter-clockwise.
        depth: Extent along z.
    """
    sides = [(outer, -1), (outer, 1), (inner, 1), (inner, -1)]
    points = [
        np.column_stack([outline, np.full(len(outline), sign * depth / 2)])
        for outline, sign in sides
    ]
    return surface(np.stack(points, axis=1), closed_u=True, closed_v=True)


def triangulate(outline: Points) -> Triangles:
    """Triangulate a polygon by cutting off ears.

    Args:
        outline: [N, 2], simple and counter-clockwise.

    Returns:
        [N - 2, 3] indices of the corners.

    Raises:
        ValueError: If the polygon is not simple or not counter-clockwise.
    """
    remaining = list(range(len(outline)))
    faces = []
    while len(remaining) >= 3:
        for k in range(len(remaining)):
            a, b, c = remaining[k - 1], remaining[k], remaining[(k + 1) % len(remaining)]
            others = outline[[i for i in remaining if i not in (a, b, c)]]
            if (
                _turn(outline[a], outline[b], outline[c]) > 1e-12
                and not _inside(others, *outline[[a, b, c]]).any()
            ):
                faces.append((a, b, c))
                del remaining[k]
                break
        else:
            raise ValueError(
                "outline must be simple and counter-clockwise, got one that cannot be cut with "
                f"{len(remaining)} corners remaining"
            )
    return np.array(faces, dtype=np.int64)


def _turn(a: Points, b: Points, c: Points) -> Points:
    """Return twice the signed area of triangles, positive if they are counter-clockwise."""
    return (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (
        c[..., 0] - a[..., 0]
    )


def _inside(points: Points, a: Points, b: Points, c: Points) -> NDArray[np.bool_]:
    """Return which points are in the counter-clockwise triangle a, b, c."""
    return (_turn(a, b, points) >= 0) & (_turn(b, c, points) >= 0) & (_turn(c, a, points) >= 0)
