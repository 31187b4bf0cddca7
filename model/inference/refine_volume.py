"""Refined volumes: patches through a refiner, put together, and the surface of the whole volume."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import token_order
from model.refiner import VolumeRefiner
from model.sparse_tensor import POINTS, Level
from pipeline.core.grid import CELL_SIDE

OUTSIDE = 1.0  # value of a voxel that was not decoded, which both refiners take as input
FEATURE_ROWS = 1 << 20  # voxels whose features are embedded at once


class _DecodedPoints:
    """Looks up the values of the points of decoded cells in any box of the grid.

    Args:
        level: The cells of one asset.
        side: Points along one side of a cell.
    """

    def __init__(self, level: Level, side: int):
        self.side = side
        cells = level.resolution
        self.rows = torch.full((cells,) * 3, -1, dtype=torch.int32, device=level.device)
        x, y, z = level.coords[:, 1:].long().unbind(1)
        self.rows[x, y, z] = torch.arange(len(level), dtype=torch.int32, device=level.device)

    def rows_in(self, start: tuple[int, int, int], size: int) -> tuple[Tensor, Tensor]:
        """Return for every point of a cube its row among all decoded points, and whether it is one.

        Args:
            start: The cube's first point.
            size: Points along one side of the cube.

        Returns:
            int64 [size, size, size], 0 for points that were not decoded, and bool of that shape.
        """
        axes = [torch.arange(s, s + size, device=self.rows.device) for s in start]
        cells = [axis // self.side for axis in axes]
        x, y, z = (axis % self.side for axis in axes)
        row = self.rows[cells[0][:, None, None], cells[1][:, None], cells[2]].long()
        point = (x[:, None, None] * self.side + y[:, None]) * self.side + z
        return torch.where(row >= 0, row * self.side**3 + point, 0), row >= 0


def _starts(resolution: int, patch: int, overlap: int) -> list[int]:
    """Return the first point of each patch along an axis.

    Raises:
        ValueError: If the patches do not fit the grid.
    """
    stride = patch - overlap
    if resolution < patch or (resolution - patch) % stride:
        raise ValueError(
            f"patches of {patch} points at a distance of {stride} do not fit a grid of {resolution}"
        )
    return list(range(0, resolution - patch + 1, stride))


def _ramps(count: int, patch: int, overlap: int, device: torch.device) -> list[Tensor]:
    """Return the weights of each patch's points along an axis. They add up to 1 where two overlap.

    Where two patches overlap, the weight of the later one rises linearly from 0 to 1.
    """
    rising = torch.linspace(0, 1, overlap, device=device)
    weights = []
    for number in range(count):
        weight = torch.ones(patch, device=device)
        if number and overlap:
            weight[:overlap] = rising
        if number < count - 1 and overlap:
            weight[patch - overlap :] = 1 - rising
        weights.append(weight)
    return weights


@torch.no_grad()
def refined_volume(
    refiner: VolumeRefiner, level: Level, values_MK: Tensor, features_NF: Tensor
) -> Tensor:
    """Refine the decoded bricks of one asset to a complete volume.

    Features are gathered patch by patch, so that no dense volume of them is made.

    Args:
        refiner: Refiner with output "sdf".
        level: The M cells, at resolution R / 8.
        values_MK: [M, 512], the decoded values.
        features_NF: [M * 512, features], the decoder's features in the same order.

    Returns:
        fp32 [R, R, R].

    Raises:
        ValueError: If the refiner's patches do not fit the grid.
    """
    config = refiner.config
    resolution, p = CELL_SIDE * level.resolution, config.patch_size
    starts = _starts(resolution, p, config.overlap)
    ramps = _ramps(len(starts), p, config.overlap, level.device)
    points = _DecodedPoints(level, CELL_SIDE)
    values_N = values_MK.float().flatten()
    embedded_NC = torch.cat(
        [refiner.embed_features(part) for part in features_NF.split(FEATURE_ROWS)]
    )
    empty_C = refiner.embed_features(features_NF.new_zeros(1, features_NF.shape[1]))[0]
    volume = torch.zeros((resolution,) * 3, device=level.device)
    refine_empty = _once(
        lambda: refiner(
            values_N.new_full((1, 1, p, p, p), OUTSIDE),
            empty_C[None, :, None, None, None].expand(1, -1, p, p, p),
        )[0, 0]
    )
    numbers = range(len(starts))
    for i, j, k in itertools.product(numbers, numbers, numbers):
        start = starts[i], starts[j], starts[k]
        rows, decoded = points.rows_in(start, p)
        if decoded.any():
            sdf = torch.where(decoded, values_N[rows], OUTSIDE)
            embedded = torch.where(decoded[..., None], embedded_NC[rows], empty_C)
            patch = refiner(sdf[None, None], embedded.movedim(-1, 0)[None])[0, 0]
        else:
            patch = refine_empty()
        weighted = patch * ramps[i][:, None, None] * ramps[j][:, None] * ramps[k]
        x, y, z = (slice(s, s + p) for s in start)
        volume[x, y, z] += weighted
    return volume


def _once(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a function that computes a value at the first call and keeps it."""
    values: list[Tensor] = []

    def value() -> Tensor:
        if not values:
            values.append(make())
        return values[0]

    return value


def halved_bricks(values_MK: Tensor) -> Tensor:
    """Return the values of cells on the grid of half the resolution.

    Each is the sum of eight decoded values, divided by nine: the published refiner divides by their
    number plus one.

    Args:
        values_MK: [M, 512].

    Returns:
        fp32 [M, 64], at point 16 * x + 4 * y + z of each cell.
    """
    half = CELL_SIDE // 2
    split = values_MK.float().unflatten(1, (half, 2, half, 2, half, 2))
    return split.sum((2, 4, 6)).flatten(1) / 9


@torch.no_grad()
def outside_of(refiner: VolumeRefiner, level: Level, values_MK: Tensor) -> Tensor:
    """Estimate which points lie outside the surface of one asset, at half the resolution.

    Args:
        refiner: Refiner with output "sign".
        level: The M cells, at resolution R / 8.
        values_MK: [M, 512], the decoded values.

    Returns:
        bool [R / 2, R / 2, R / 2]. It holds for two grid points of R along each axis.

    Raises:
        ValueError: If the refiner's patches do not fit the grid.
    """
    config = refiner.config
    side, p = CELL_SIDE // 2 * level.resolution, config.patch_size
    starts = _starts(side, p, config.overlap)
    points = _DecodedPoints(level, CELL_SIDE // 2)
    values_N = halved_bricks(values_MK).flatten()
    outside = torch.zeros((side,) * 3, dtype=torch.bool, device=level.device)
    sign_empty = _once(lambda: refiner(values_N.new_full((1, 1, p, p, p), OUTSIDE))[0, 0] >= 0)
    for start in itertools.product(starts, starts, starts):
        rows, decoded = points.rows_in(start, p)
        if decoded.any():
            sdf = torch.where(decoded, values_N[rows], OUTSIDE)
            sign = refiner(sdf[None, None])[0, 0] >= 0
        else:
            sign = sign_empty()
        x, y, z = (slice(s, s + p) for s in start)
        outside[x, y, z] = sign
    return outside


def crossed_bricks(volume: Tensor, iso_value: float) -> tuple[Level, Tensor]:
    """Return the part of a complete volume that its surface crosses, as bricks.

    Args:
        volume: [R, R, R].
        iso_value: Value of the surface.

    Returns:
        The M cells at resolution R / 8, with the cells of all corners of every crossed cube, and
        their values [M, 512].
    """
    crossed = _crossed_cells(volume < iso_value, CELL_SIDE)
    level = _level(_towards_later_cells(crossed))
    points = (volume.unfold(0, CELL_SIDE, CELL_SIDE).unfold(1, CELL_SIDE, CELL_SIDE)).unfold(
        2, CELL_SIDE, CELL_SIDE
    )
    x, y, z = level.coords[:, 1:].long().unbind(1)
    return level, points[x, y, z].reshape(-1, POINTS)


def signed_bricks(level: Level, values_MK: Tensor, outside: Tensor) -> tuple[Level, Tensor]:
    """Complete decoded bricks by cells of constant sign, where the surface may leave the decoded.

    Args:
        level: The M decoded cells of one asset, at resolution R / 8.
        values_MK: [M, 512], their values.
        outside: bool [R / 2, R / 2, R / 2] of `outside_of`.

    Returns:
        The decoded cells, their neighbours and the cells where the sign changes, and the values
        [M', 512] of all of them. Points that were not decoded are 1 outside and -1 inside.
    """
    cells = level.resolution
    decoded = torch.zeros((cells,) * 3, dtype=torch.bool, device=level.device)
    x, y, z = level.coords[:, 1:].long().unbind(1)
    decoded[x, y, z] = True
    near = F.max_pool3d(decoded[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0
    changes = _towards_later_cells(_crossed_cells(outside, CELL_SIDE // 2))
    complete = _level(near | changes)
    rows = torch.full((cells,) * 3, -1, dtype=torch.int64, device=level.device)
    rows[x, y, z] = torch.arange(len(level), device=level.device)
    cx, cy, cz = complete.coords[:, 1:].long().unbind(1)
    half = CELL_SIDE // 2
    blocks = outside.unfold(0, half, half).unfold(1, half, half).unfold(2, half, half)
    sign = 2.0 * blocks[cx, cy, cz] - 1
    for axis in (1, 2, 3):
        sign = sign.repeat_interleave(2, axis)
    row = rows[cx, cy, cz]
    values = values_MK.float()[row.clamp(min=0)]
    return complete, torch.where(row[:, None] >= 0, values, sign.reshape(-1, POINTS))


def _crossed_cells(inside: Tensor, side: int) -> Tensor:
    """Return the cells with a cube whose corners differ, bool [cells, cells, cells].

    A cube belongs to the cell of its first corner. The cells are taken slab by slab, since a pooled
    copy of the whole volume would take gigabytes.

    Args:
        inside: bool [n, n, n].
        side: Points along one side of a cell.
    """
    slabs = []
    for first in range(0, len(inside), side):
        slab = inside[first : first + side + 1].float()
        ends = torch.stack([slab.amax(0), 1 - slab.amin(0)])[None]  # of any, of not all
        # The last cube of the grid has no later points.
        ends = F.pad(ends, (0, 1, 0, 1), mode="replicate")
        slabs.append((F.max_pool2d(ends, side + 1, stride=side)[0] > 0).all(0))
    return torch.stack(slabs)


def _towards_later_cells(cells: Tensor) -> Tensor:
    """Return cells with the later cells around them, which hold the corners of their cubes."""
    padded = F.pad(cells[None, None].float(), (1, 0, 1, 0, 1, 0))
    return F.max_pool3d(padded, 2, stride=1)[0, 0] > 0


def _level(cells: Tensor) -> Level:
    """Return the level of one asset's cells where a grid is true."""
    coords = F.pad(cells.nonzero(), (1, 0))
    return Level.from_coords(coords[token_order(coords)].int(), len(cells), 1)
