"""Triangulate polygons: convex ones as a fan, concave ones and those with holes by ear clipping.

A polygon that is not planar is projected to the plane of its area vector (Newell's method), which
is also the plane that decides whether it is convex.
"""

from __future__ import annotations

import mapbox_earcut
import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.scene import Geometry

# Relative tolerance of areas: below it a corner counts as straight, and a triangulation as exact.
STRAIGHT = 1e-9
EXACT = 1e-3


def triangulate(
    geometry: Geometry, warnings: WarningLog
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Triangulate all polygons of a geometry.

    Polygons with corners that do not exist are left out with the warning "index_out_of_range",
    polygons with fewer than three distinct corners with "degenerate_polygon". A polygon whose
    triangles do not have the area of its outline gives "polygon_not_simple".

    Args:
        geometry: The polygons.
        warnings: Receives the warnings.

    Returns:
        (triangles, polygon_of): int64 [F, 3], rows of `geometry.corners`, with the orientation of
        the polygons and in their order; int64 [F], the polygon of each triangle.
    """
    contours = np.asarray(geometry.contours, dtype=np.int64)
    count = geometry.num_polygons
    polygons = np.arange(count + 1) if geometry.polygons is None else geometry.polygons
    first = contours[polygons[:-1]]
    sizes = contours[polygons[1:]] - first
    has_holes = np.diff(polygons) > 1

    # Polygons that cannot be drawn.
    is_outside = (geometry.corners < 0) | (geometry.corners >= len(geometry.positions))
    usable = np.ones(count, dtype=bool)
    if is_outside.any():
        counts = np.concatenate([[0], np.cumsum(is_outside)])
        usable = counts[first + sizes] == counts[first]
        warnings.add("index_out_of_range", geometry.name, int((~usable).sum()))
    num_degenerate = int((usable & (sizes < 3)).sum())
    usable &= sizes >= 3

    triangles = [np.empty((0, 3), dtype=np.int64)]
    owners = [np.empty(0, dtype=np.int64)]
    simple = usable & ~has_holes
    to_clip = [np.flatnonzero(usable & has_holes)]
    for size in np.unique(sizes[simple]).tolist():
        chosen = np.flatnonzero(simple & (sizes == size))
        corners = first[chosen, None] + np.arange(size)  # [n, size]
        points = geometry.positions[geometry.corners[corners]]
        is_degenerate = _are_degenerate(points)
        if is_degenerate.any():
            num_degenerate += int(is_degenerate.sum())
            chosen, corners = chosen[~is_degenerate], corners[~is_degenerate]
            points = points[~is_degenerate]
        if size > 3:
            is_convex = _are_convex(points)
            to_clip.append(chosen[~is_convex])
            chosen, corners = chosen[is_convex], corners[is_convex]
        triangles.append(corners[:, _fan(size)].reshape(-1, 3))
        owners.append(np.repeat(chosen, size - 2))
    if num_degenerate:
        warnings.add("degenerate_polygon", geometry.name, num_degenerate)
    for polygon in np.concatenate(to_clip).tolist():
        bounds = contours[polygons[polygon] : polygons[polygon + 1] + 1]
        clipped = _ear_clip(geometry, bounds, warnings)
        triangles.append(clipped)
        owners.append(np.full(len(clipped), polygon))
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    return np.concatenate(triangles)[order], owner[order]


def _fan(size: int) -> NDArray[np.int64]:
    """Return the triangles [size - 2, 3] of a polygon that share its first corner."""
    following = np.arange(1, size - 1)
    return np.stack([np.zeros_like(following), following, following + 1], axis=1)


def _are_degenerate(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return whether polygons [n, size, 3] have fewer than three distinct corners."""
    if points.shape[1] == 3:
        a, b, c = points.transpose(1, 0, 2)
        return (a == b).all(axis=1) | (b == c).all(axis=1) | (c == a).all(axis=1)
    is_first = (points == points[:, :1]).all(axis=2)
    other = points[np.arange(len(points)), is_first.argmin(axis=1)]
    return (is_first | (points == other[:, None]).all(axis=2)).all(axis=1)


def _are_convex(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return whether polygons [n, size, 3] turn only to one side, and only once around."""
    with np.errstate(over="ignore", invalid="ignore"):
        centred = points - points.mean(axis=1, keepdims=True)
        following = np.roll(centred, -1, axis=1)
        area = np.cross(centred, following).sum(axis=1)  # twice the area vector
        previous = np.roll(centred, 1, axis=1)
        turns = np.einsum("nki,ni->nk", np.cross(centred - previous, following - centred), area)
        limit = -STRAIGHT * np.einsum("ni,ni->n", area, area)
        turns_one_way = (turns >= limit[:, None]).all(axis=1)
        # A star turns to one side too, but more than once around. Fan triangles of a convex
        # polygon all have the orientation of the polygon.
        fan = np.cross(points[:, 1:-1] - points[:, :1], points[:, 2:] - points[:, :1])
        is_fan = (np.einsum("nki,ni->nk", fan, area) >= limit[:, None]).all(axis=1)
        # Polygons without area or with undefined corners are drawn as fans. If some triangle of
        # the fan has an area, the outline crosses itself, as the figure 8 does.
        has_area = np.einsum("ni,ni->n", area, area) > 0
        crosses_itself = np.isfinite(fan).all(axis=(1, 2)) & (fan != 0).any(axis=(1, 2))
    return np.where(has_area, turns_one_way & is_fan, ~crosses_itself)


def _ear_clip(
    geometry: Geometry, bounds: NDArray[np.int64], warnings: WarningLog
) -> NDArray[np.int64]:
    """Triangulate one polygon with the contours bounds[k] to bounds[k + 1].

    A polygon without holes that ear clipping cannot divide, because it is far from planar or
    crosses itself, is drawn as a fan. Its edges stay those of its neighbours, so no gap opens.

    Returns:
        Rows of `geometry.corners`, [F, 3].
    """
    first = int(bounds[0])
    points = geometry.positions[geometry.corners[first : int(bounds[-1])]]
    outline = points[: int(bounds[1]) - first]
    centre = outline.mean(axis=0)
    normal = np.cross(outline - centre, np.roll(outline, -1, axis=0) - centre).sum(axis=0) / 2
    area = float(np.linalg.norm(normal))
    if not np.isfinite(points).all() or area == 0:
        # Undefined positions are rejected later, for the asset. An outline without area is a fan.
        if np.isfinite(points).all():
            warnings.add("polygon_not_simple", geometry.name)
        return _fan(len(outline)) + first
    plane = _plane_axes(normal / area)
    flat = np.ascontiguousarray((points - centre) @ plane.T)
    ends = (bounds[1:] - first).astype(np.uint32)
    found = mapbox_earcut.triangulate_float64(flat / np.abs(flat).max(), ends)
    found = found.reshape(-1, 3).astype(np.int64)
    a, b, c = (flat[found[:, k]] for k in range(3))
    signed = _cross2(b - a, c - a) / 2
    holes = sum(
        abs(_area2(flat[start:end]))
        for start, end in zip(bounds[1:-1] - first, bounds[2:] - first, strict=True)
    )
    is_exact = abs(np.abs(signed).sum() - (area - holes)) <= EXACT * area
    # Corners that are straight in the plane get no triangle. They must be straight in space, too.
    height = np.abs((outline - centre) @ (normal / area)).max()
    is_whole = len(found) == len(outline) - 2 or height <= EXACT * np.abs(flat).max()
    if len(bounds) == 2 and not (is_exact and is_whole):
        warnings.add("polygon_not_simple", geometry.name)
        return _fan(len(outline)) + first
    if not is_exact:
        warnings.add("polygon_not_simple", geometry.name)
    # Ear clipping gives all triangles one orientation, that of the outline or its opposite.
    return (found[:, ::-1] if signed.sum() < 0 else found) + first


def _plane_axes(normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return two axes [2, 3] so that (axis 0, axis 1, normal) is right-handed."""
    helper = np.eye(3)[np.argmin(np.abs(normal))]
    first = np.cross(helper, normal)
    first /= np.linalg.norm(first)
    return np.stack([first, np.cross(normal, first)])


def _cross2(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _area2(points: NDArray[np.float64]) -> float:
    """Return the signed area of a polygon [n, 2] (shoelace formula)."""
    return float(_cross2(points, np.roll(points, -1, axis=0)).sum() / 2)
