"""Polygons of the basic shapes of USD: cube, sphere, cylinder, cone, capsule and plane."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

SIDES = 32  # of a circle
RINGS = 8  # between the equator and a pole

Shape = tuple[NDArray[np.float64], list[list[int]]]  # points [V, 3], corners of each polygon
CUBE_FACES = [
    [0, 2, 3, 1],
    [4, 5, 7, 6],
    [0, 1, 5, 4],
    [2, 6, 7, 3],
    [0, 4, 6, 2],
    [1, 3, 7, 5],
]


def cube(size: float) -> Shape:
    """Return a cube around the origin."""
    points = [[x, y, z] for z in (-1, 1) for y in (-1, 1) for x in (-1, 1)]
    return np.array(points) * size / 2, CUBE_FACES


def plane(width: float, length: float, axis: str) -> Shape:
    """Return a rectangle around the origin that faces along the axis.

    The width is along x, or along z if x is the axis; the length along y, or along z for y.
    """
    a, b = width / 2, length / 2
    if axis == "X":
        points = [[0, -b, a], [0, -b, -a], [0, b, -a], [0, b, a]]
    elif axis == "Y":
        points = [[-a, 0, b], [a, 0, b], [a, 0, -b], [-a, 0, -b]]
    else:
        points = [[-a, -b, 0], [a, -b, 0], [a, b, 0], [-a, b, 0]]
    return np.array(points, dtype=np.float64), [[0, 1, 2, 3]]


def revolved(profile: list[tuple[float, float]], axis: str) -> Shape:
    """Return the solid that a profile sweeps around an axis.

    Args:
        profile: (radius, height) of each ring from the bottom to the top. A radius of 0 at an end
            is a pole, any other one is closed by a polygon.
        axis: "X", "Y" or "Z".
    """
    angles = 2 * np.pi * np.arange(SIDES) / SIDES
    circle = np.column_stack([np.cos(angles), np.sin(angles)])
    points: list[NDArray[np.float64]] = []
    rings: list[list[int]] = []
    count = 0
    for radius, height in profile:
        number = SIDES if radius else 1
        ring = np.full((number, 3), height, dtype=np.float64)
        ring[:, :2] = circle * radius if radius else 0.0
        points.append(ring)
        rings.append(list(range(count, count + number)))
        count += number
    polygons = []
    if len(rings[0]) > 1:
        polygons.append(rings[0][::-1])
    for low, high in pairwise(rings):
        for k in range(SIDES):
            following = (k + 1) % SIDES
            if len(low) == len(high) == 1:
                continue
            if len(low) == 1:
                polygons.append([low[0], high[following], high[k]])
            elif len(high) == 1:
                polygons.append([low[k], low[following], high[0]])
            else:
                polygons.append([low[k], low[following], high[following], high[k]])
    if len(rings[-1]) > 1:
        polygons.append(rings[-1])
    # A cyclic exchange of the axes keeps the orientation.
    return np.roll(np.concatenate(points), {"X": 1, "Y": 2, "Z": 0}[axis], axis=1), polygons


def sphere(radius: float) -> Shape:
    """Return a sphere around the origin with poles on z."""
    return revolved([*_cap(radius, -1), (radius, 0.0), *_cap(radius, 1)], "Z")


def cylinder(bottom: float, top: float, height: float, axis: str) -> Shape:
    """Return a cylinder around the origin, or a cone if one of the radii is 0."""
    return revolved([(bottom, -height / 2), (top, height / 2)], axis)


def capsule(bottom: float, top: float, height: float, axis: str) -> Shape:
    """Return a cylinder around the origin with half spheres at its ends."""
    low = [(r, z - height / 2) for r, z in _cap(bottom, -1)]
    high = [(r, z + height / 2) for r, z in _cap(top, 1)]
    return revolved([*low, (bottom, -height / 2), (top, height / 2), *high], axis)


def _cap(radius: float, side: int) -> list[tuple[float, float]]:
    """Return the rings of a half sphere without its equator, upwards."""
    if not radius:
        return []
    angles = np.pi / 2 * np.arange(1, RINGS) / RINGS
    rings = [(radius * float(np.cos(a)), side * radius * float(np.sin(a))) for a in angles]
    rings.append((0.0, side * radius))
    return rings if side > 0 else rings[::-1]
