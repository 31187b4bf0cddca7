"""The 48 symmetries of the cube, applied exactly to bricks and to grid points."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.core.grid import CELL_SIDE
from pipeline.core.schema import Bricks

# Symmetry g is (axes, mirrored). Axis a of the result is axis axes[a] of the original, and its
# index i becomes R - 1 - i where mirrored[a] is true.
SYMMETRIES: tuple[tuple[tuple[int, ...], tuple[bool, ...]], ...] = tuple(
    itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3))
)


def turns_to_face(azimuth_degrees: float) -> int:
    """Return the quarter turns after which a camera lies between the azimuths -45 and 45 degrees.

    Args:
        azimuth_degrees: Azimuth of the camera, see `pipeline.core.cameras.Camera`.
    """
    return math.floor(azimuth_degrees / 90 + 0.5) % 4


def quarter_turn(turns: int, *, mirrored: bool = False) -> int:
    """Return the symmetry that turns a shape about the up axis, which is y.

    Args:
        turns: Number of turns by 90 degrees that move +x to +z, so that what a camera at azimuth 90
            sees is afterwards seen at azimuth 0.
        mirrored: Whether x changes its sign after the turns.
    """
    axes, signs = (
        ((0, 1, 2), (False, False, False)),
        ((2, 1, 0), (True, False, False)),
        ((0, 1, 2), (True, False, True)),
        ((2, 1, 0), (False, False, True)),
    )[turns % 4]
    return SYMMETRIES.index((axes, (signs[0] != mirrored, *signs[1:])))


QUARTER_TURNS = tuple(
    quarter_turn(turns, mirrored=mirrored) for mirrored in (False, True) for turns in range(4)
)  # the symmetries that keep the up axis; the first one is the identity


def turn_directions(directions: NDArray[np.float64], symmetry: int) -> NDArray[np.float64]:
    """Return directions [..., 3] in a shape's frame after a symmetry of SYMMETRIES moved it."""
    axes, mirrored = SYMMETRIES[symmetry]
    return np.where(mirrored, -1.0, 1.0) * directions[..., list(axes)]


def move_bricks(bricks: Bricks, symmetry: int) -> tuple[Bricks, NDArray[np.int64]]:
    """Return the bricks of the transformed shape without copying their values.

    The grid is symmetric about the centre of the cube, so grid points fall on grid points.

    Args:
        bricks: Bricks of a shape.
        symmetry: Number of the symmetry in SYMMETRIES. 0 is the identity.

    Returns:
        The bricks with transformed cells, in the order of the original ones, and int64 [512], the
        stored number of each of the 512 points of a transformed cell, for `BrickBatch.collate`.

    Raises:
        ValueError: If `symmetry` is not in 0..47.
    """
    if not 0 <= symmetry < len(SYMMETRIES):
        raise ValueError(f"symmetry must be in 0..{len(SYMMETRIES) - 1}, got {symmetry}")
    cells = transform_points(bricks.cells, bricks.resolution // CELL_SIDE, symmetry)
    return replace(bricks, cells=cells), _point_order(symmetry)


def transform_points(indices: NDArray, side: int, symmetry: int) -> NDArray:
    """Return where a symmetry moves grid points.

    Args:
        indices: Positions on the grid, any integer type, [N, 3].
        side: Number of grid points along one side.
        symmetry: Number of the symmetry in SYMMETRIES.

    Returns:
        Positions on the grid in the same type, [N, 3].
    """
    axes, mirrored = SYMMETRIES[symmetry]
    moved = indices[:, axes]
    return np.where(mirrored, side - 1 - moved, moved).astype(indices.dtype)


def _point_order(symmetry: int) -> NDArray[np.int64]:
    """Return the number in the original cell of each of the 512 points of a transformed cell."""
    axes, mirrored = SYMMETRIES[symmetry]
    cube = np.arange(CELL_SIDE**3).reshape((CELL_SIDE,) * 3).transpose(axes)
    return np.flip(cube, tuple(axis for axis in range(3) if mirrored[axis])).reshape(-1)
