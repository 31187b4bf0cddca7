"""Meshes of decoded bricks by marching cubes, without a dense volume."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from model.sparse_tensor import POINTS, Level
from pipeline.core.grid import CELL_SIDE, check_resolution
from pipeline.core.primitives.marching_cubes import MeshArrays, extract
from pipeline.core.schema import Bricks


def extract_mesh(
    cells_M3: ArrayLike, values_MK: ArrayLike, resolution: int, iso_value: float = 0.0
) -> MeshArrays:
    """Extract the surface of one asset.

    A cube of the grid is marched only if its eight corners lie in given cells, so no surface is
    invented where nothing was decoded.

    Args:
        cells_M3: Integer [M, 3], the indices of the cells, in any order.
        values_MK: Float [M, 512], the value at grid point 64 * lx + 8 * ly + lz of each cell,
            negative inside.
        resolution: Resolution R of the grid.
        iso_value: Value of the surface.

    Returns:
        Vertices float64 [V, 3] in [-0.5, 0.5]^3 and faces int32 [F, 3], counterclockwise seen from
        outside. Both are empty if there is no surface.

    Raises:
        ValueError: If a shape does not fit, a cell lies outside the grid or is repeated, or a value
            is not finite.
    """
    cells, values = np.asarray(cells_M3), np.asarray(values_MK)
    side = check_resolution(resolution) // CELL_SIDE
    if cells.ndim != 2 or cells.shape[1] != 3 or not np.issubdtype(cells.dtype, np.integer):
        raise ValueError(f"cells_M3 must be integer [M, 3], got {cells.dtype} {list(cells.shape)}")
    if values.shape != (len(cells), POINTS):
        raise ValueError(f"values_MK must be [{len(cells)}, {POINTS}], got {list(values.shape)}")
    if len(cells) and (cells.min() < 0 or cells.max() >= side):
        raise ValueError(f"cells_M3 must be in 0..{side - 1}, got {cells.min()}..{cells.max()}")
    if len(np.unique(np.ravel_multi_index(tuple(cells.T), (side,) * 3))) != len(cells):
        raise ValueError("cells_M3 must not repeat a cell")
    if not np.isfinite(values).all():
        raise ValueError(
            f"values_MK must be finite, got {(~np.isfinite(values)).sum()} that are not"
        )
    not_sharp = np.zeros((len(cells), POINTS // 8), np.uint8)
    bricks = Bricks(resolution=resolution, cells=cells, values=values, sharp=not_sharp)
    return extract(bricks, iso_value)


def extract_meshes(cells: Level, values_MK: Tensor, iso_value: float = 0.0) -> list[MeshArrays]:
    """Extract the surface of every asset of a decoded batch, as `extract_mesh` does.

    Args:
        cells: The M cells, at resolution R / 8.
        values_MK: Float [M, 512] on any device.
        iso_value: Value of the surface.

    Returns:
        Vertices and faces of each asset. They are empty if it has no surface.
    """
    coords = cells.coords[:, 1:].cpu().numpy()
    values = values_MK.detach().to("cpu", torch.float32).numpy()
    starts = cells.asset_starts.tolist()
    return [
        extract_mesh(coords[a:b], values[a:b], CELL_SIDE * cells.resolution, iso_value)
        for a, b in itertools.pairwise(starts)
    ]
