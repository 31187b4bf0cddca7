"""Shared step of the readers of triangle strips."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def are_drawn(triangles: NDArray[np.int64], positions: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which triangles of strips are meant to be drawn.

    A triangle with two corners at one point only joins two strips.

    Args:
        triangles: [F, 3]. Rows of `positions` that do not exist are drawn, so that they are
            reported.
        positions: [V, 3].
    """
    if not len(positions):
        return np.ones(len(triangles), dtype=bool)
    exists = np.all((triangles >= 0) & (triangles < len(positions)), axis=1)
    a, b, c = positions[triangles * exists[:, None]].transpose(1, 0, 2)
    is_joint = (a == b).all(axis=1) | (b == c).all(axis=1) | (c == a).all(axis=1)
    return ~(is_joint & exists)
