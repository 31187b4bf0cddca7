"""The 48 symmetries of the cube, exactly, on bricks: axes permuted, then some of them reversed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.core.grid import CELL_SIDE
from pipeline.core.schema import Bricks

# Number g is (axes, reversed): axis a of the result is axis axes[a] of the original, i -> R - 1 - i where reversed[a].
SYMMETRIES: tuple[tuple[tuple[int, ...], tuple[bool, ...]], ...] = tuple(
    itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3))
)


def transform_bricks(bricks: Bricks, symmetry: int) -> Bricks:
    """The bricks of the transformed shape, no value recomputed; symmetry 0 is the identity.

    The grid is symmetric about 0, so grid points fall on grid points: mirrored, point i comes from R - 1 - i.
    ValueError for a symmetry outside 0..47.
    """
    if not 0 <= symmetry < len(SYMMETRIES):
        raise ValueError(f"symmetry must be in 0..{len(SYMMETRIES) - 1}, got {symmetry}")
    if symmetry == 0:
        return bricks
    blocks = transform_points(bricks.cells, bricks.resolution // CELL_SIDE, symmetry)
    rows = np.lexsort(blocks.T[::-1])
    points = _point_order(symmetry)
    sharp = np.unpackbits(bricks.sharp, axis=1, bitorder="little")[rows].take(points, axis=1)
    return replace(
        bricks,
        cells=blocks[rows],
        values=bricks.values[rows].take(points, axis=1),
        sharp=np.packbits(sharp, axis=1, bitorder="little"),
    )


def transform_points(indices: NDArray, side: int, symmetry: int) -> NDArray:
    """Where the grid points [n, 3] of a grid of `side` points go: integer indices in, integer indices out."""
    axes, mirrored = SYMMETRIES[symmetry]
    moved = indices[:, axes]
    return np.where(mirrored, side - 1 - moved, moved).astype(indices.dtype)


def _point_order(symmetry: int) -> NDArray[np.int64]:
    """[512]: which point of the original block each point of the transformed one is."""
    axes, mirrored = SYMMETRIES[symmetry]
    cube = np.arange(CELL_SIDE**3).reshape((CELL_SIDE,) * 3).transpose(axes)
    return np.flip(cube, tuple(axis for axis in range(3) if mirrored[axis])).reshape(-1)
