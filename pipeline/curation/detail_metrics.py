"""What a model can learn from an asset: bends of the surface, colours, one object, no backdrop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.core.color import srgb_to_linear
from pipeline.core.schema import View

GRID = 32  # cells along one side of the grid on which separate objects are found
COLOR_STEP = 12.0  # side of a bin of CIELAB, in units of its just noticeable difference, about 2
LIGHTNESS_STEP = 25.0  # wider, because light and shadow change the lightness of one colour
BASE_SHARE = 0.06  # height of the lowest slab that can be a ground plane, relative to the object's
PLANE_FOOTPRINT = 0.8  # share of the footprint's bounding box that a ground plane fills, at least
SRGB_TO_XYZ = np.array(  # IEC 61966-2-1, for D65
    [
        [0.4124, 0.3576, 0.1805],
        [0.2126, 0.7152, 0.0722],
        [0.0193, 0.1192, 0.9505],
    ]
)
WHITE = SRGB_TO_XYZ.sum(axis=1)


def bend_length(triangles: NDArray[np.float64]) -> tuple[float, float]:
    """Return how much a surface bends, and the length of its sharp bends.

    Both do not depend on how finely a surface is divided: the dihedral angles of a finer division
    are smaller and its edges are more.

    Args:
        triangles: [T, 3, 3] corners of a surface. Edges belong together if their ends are equal.

    Returns:
        The sum over all edges of length times dihedral angle / 2, which is the integral of the
        absolute mean curvature, and the length of the edges that bend by more than 30 degrees.
    """
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    size = np.linalg.norm(normals, axis=1)
    triangles, normals, size = triangles[size > 0], normals[size > 0], size[size > 0]
    if not len(triangles):
        return 0.0, 0.0
    normals = normals / size[:, None]
    _, corner = np.unique(np.round(triangles.reshape(-1, 3), 6) + 0.0, axis=0, return_inverse=True)
    corner = corner.reshape(-1, 3)
    ends = np.concatenate([corner[:, [0, 1]], corner[:, [1, 2]], corner[:, [2, 0]]])
    face = np.tile(np.arange(len(triangles)), 3)
    points = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
    is_forward = ends[:, 0] < ends[:, 1]
    key = np.sort(ends, axis=1)
    order = np.lexsort((key[:, 1], key[:, 0]))
    key, face, points, is_forward = key[order], face[order], points[order], is_forward[order]
    starts = np.flatnonzero(np.concatenate([[True], (key[1:] != key[:-1]).any(axis=1)]))
    counts = np.diff(np.concatenate([starts, [len(key)]]))
    pairs = starts[counts == 2]  # the others are borders, or several surfaces meet in them
    # Two faces of one orientation pass their common edge in opposite directions.
    sign = np.where(is_forward[pairs] == is_forward[pairs + 1], -1.0, 1.0)
    cosine = sign * np.einsum("ed,ed->e", normals[face[pairs]], normals[face[pairs + 1]])
    angle = np.arccos(np.clip(cosine, -1, 1))
    length = np.linalg.norm(points[pairs, 1] - points[pairs, 0], axis=1)
    return float(np.sum(length * angle) / 2), float(np.sum(length[angle > np.radians(30)]))


def colors_seen(views: Iterable[View]) -> float:
    """Return how many colours the views of an object show.

    It is the exponential of the entropy of the colours in CIELAB, so a colour counts by the area
    that it covers. A grey object has between 1 and 3, by its light and shadow.

    Args:
        views: The views. Only pixels that the object covers count.
    """
    pixels = [view.rgba.reshape(-1, 4) for view in views]
    rgba = np.concatenate([np.zeros((0, 4), np.uint8), *pixels])
    rgb = rgba[rgba[:, 3] > 127, :3].astype(np.float64) / 255
    if not len(rgb):
        return 0.0
    ratio = srgb_to_linear(rgb) @ SRGB_TO_XYZ.T / WHITE
    # CIE 15: the function is linear near black.
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    lightness = 116 * f[:, 1] - 16
    a, b = 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])
    bins = np.stack([lightness / LIGHTNESS_STEP, a / COLOR_STEP, b / COLOR_STEP], axis=1)
    _, counts = np.unique(np.floor(bins).astype(np.int64), axis=0, return_counts=True)
    share = counts / counts.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def coarse_cells(triangles: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which cells of a GRID^3 grid over the cube a surface passes, [x, y, z].

    Args:
        triangles: [T, 3, 3] corners in the cube [-0.5, 0.5]^3.
    """
    filled = np.zeros((GRID,) * 3, np.bool_)
    if not len(triangles):
        return filled
    longest = np.linalg.norm(triangles - np.roll(triangles, 1, axis=1), axis=2).max(axis=1)
    # Samples on each triangle lie closer together than half a cell.
    steps = np.maximum(np.ceil(2 * GRID * longest).astype(np.int64), 1)
    for step in np.unique(steps):
        chosen = triangles[steps == step]
        u, v = np.meshgrid(*[np.arange(step + 1) / step] * 2, indexing="ij")
        u, v = u[u + v <= 1 + 1e-9], v[u + v <= 1 + 1e-9]
        weights = np.stack([1 - u - v, u, v], axis=1)
        for start in range(0, len(chosen), 4096):
            points = np.einsum("qk,tkd->tqd", weights, chosen[start : start + 4096])
            cells = np.clip(((points + 0.5) * GRID).astype(np.int64), 0, GRID - 1)
            filled[tuple(cells.reshape(-1, 3).T)] = True
    return filled


def largest_object(cells: NDArray[np.bool_]) -> float:
    """Return the share of the filled cells that belong to the largest object, 0 to 1.

    Args:
        cells: The result of `coarse_cells`. Objects whose cells touch count as one.
    """
    # SciPy's stubs know other results than the ones of these arguments.
    labels, count = cast(Any, ndimage.label(cells, np.ones((3, 3, 3), np.bool_)))
    if not count:
        return 0.0
    sizes = np.bincount(labels[cells], minlength=count + 1)[1:]
    return float(sizes.max() / sizes.sum())


def ground_share(cells: NDArray[np.bool_]) -> float:
    """Return how much of the lowest slab is bare ground, 0 to 1.

    A ground plane or the base of a diorama fills most of its rectangle, and most of it has nothing
    above it. A flat object has nothing else above its slab and counts as 0.

    Args:
        cells: The result of `coarse_cells`.
    """
    heights = np.flatnonzero(cells.any(axis=(0, 2)))
    if not len(heights):
        return 0.0
    low, high = heights[0], heights[-1] + 1
    slab = max(1, int(np.ceil(BASE_SHARE * (high - low))))
    if high - low < 4 * slab:
        return 0.0
    base: NDArray[np.bool_] = np.any(cells[:, low : low + slab], axis=1)
    above = cells[:, low + 2 * slab :].any(axis=1)
    xs, zs = np.flatnonzero(np.any(base, axis=1)), np.flatnonzero(np.any(base, axis=0))
    rectangle = (xs[-1] - xs[0] + 1) * (zs[-1] - zs[0] + 1)
    if np.count_nonzero(base) < PLANE_FOOTPRINT * rectangle:
        return 0.0
    covered: NDArray[np.bool_] = np.asarray(
        ndimage.binary_dilation(above, np.ones((3, 3), np.bool_)), np.bool_
    )
    return float(np.count_nonzero(base & ~covered) / np.count_nonzero(base))
