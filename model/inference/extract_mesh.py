"""Meshes of decoded bricks: marching cubes where all eight corners were decoded, without a dense volume."""

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


def mesh_of(
    blocks_M3: ArrayLike, values_MK: ArrayLike, resolution: int, level: float = 0.0
) -> MeshArrays:
    """The surface of one asset where its bricks pass through `level`.

    blocks integer [M, 3] = index // 8, in any order; values float [M, 512] of points 64 * lx + 8 * ly + lz, negative
    inside. Returns vertices float64 [V, 3] in [-0.5, 0.5]^3 and faces int32 [F, 3]. Nothing is invented where nothing
    was decoded: a cell is marched only if its eight corners are there. ValueError if shapes do not fit, a block lies
    outside the grid or comes twice, or a value is not finite.
    """
    blocks, values = np.asarray(blocks_M3), np.asarray(values_MK)
    side = check_resolution(resolution) // CELL_SIDE
    if blocks.ndim != 2 or blocks.shape[1] != 3 or not np.issubdtype(blocks.dtype, np.integer):
        raise ValueError(
            f"blocks_M3 must be integer [M, 3], got {blocks.dtype} {list(blocks.shape)}"
        )
    if values.shape != (len(blocks), POINTS):
        raise ValueError(f"values_MK must be [{len(blocks)}, {POINTS}], got {list(values.shape)}")
    if len(blocks) and (blocks.min() < 0 or blocks.max() >= side):
        raise ValueError(f"blocks_M3 must be in 0..{side - 1}, got {blocks.min()}..{blocks.max()}")
    if len(np.unique(np.ravel_multi_index(tuple(blocks.T), (side,) * 3))) != len(blocks):
        raise ValueError("blocks_M3 must not repeat a block")
    if not np.isfinite(values).all():
        raise ValueError(
            f"values_MK must be finite, got {(~np.isfinite(values)).sum()} that are not"
        )
    empty = np.zeros((len(blocks), POINTS // 8), np.uint8)
    return extract(Bricks(resolution=resolution, cells=blocks, values=values, sharp=empty), level)


def extract_meshes(cells: Level, values_MK: Tensor, level: float = 0.0) -> list[MeshArrays]:
    """The surface of every asset of a decoded batch, as `mesh_of` has it; empty arrays where there is none.

    cells: the level of the latents, of resolution R / 8; values float [M, 512] on any device.
    """
    blocks = cells.coords[:, 1:].cpu().numpy()
    values = values_MK.detach().to("cpu", torch.float32).numpy()
    starts = cells.asset_starts.tolist()
    return [
        mesh_of(blocks[a:b], values[a:b], CELL_SIDE * cells.resolution, level)
        for a, b in itertools.pairwise(starts)
    ]
