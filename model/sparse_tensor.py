"""Sparse tensors of a batch of assets: voxel sets with cached indices, features, and SDF bricks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import kernels
from kernels import BlockIndex, token_order
from kernels.runtime.coords import MAX_BATCH, MAX_COORD
from model.gather_bricks import POINTS, gather_bricks, has_active_point
from pipeline.core.grid import CELL_SIDE, check_resolution
from pipeline.core.schema import Bricks

WINDOW = 8  # side of an attention window, in tokens
WINDOW_SHIFT = 4  # by which every other transformer block moves its windows, in tokens


class ParentLevel(NamedTuple):
    """The level of half the resolution, and the relation between its voxels and their children.

    Attributes:
        level: The P parents. A voxel has a parent at half its coordinates.
        parent_of: int32 [N], the row of each voxel's parent.
        children: int32 [P, 8], the rows of the children at 4 * cx + 2 * cy + cz, -1 where absent.
    """

    level: Level
    parent_of: Tensor
    children: Tensor


@dataclass(frozen=True, eq=False)
class Level:
    """The occupied voxels of a batch of assets at one resolution, and indices derived from them.

    The indices are computed when they are first used. All tensors on one level share them.
    `Level.from_coords` checks its arguments, the constructor does not.

    Attributes:
        coords: int32 [N, 4] = (batch, x, y, z), sorted as `coords[kernels.token_order(coords)]` is.
        resolution: Coordinates are below it: 0 <= x, y, z < resolution.
        batch_size: Number A of assets.
        asset_starts: int32 [A + 1]. Asset a has the rows asset_starts[a]:asset_starts[a + 1].
    """

    coords: Tensor
    resolution: int
    batch_size: int
    asset_starts: Tensor

    @classmethod
    def from_coords(cls, coords: Tensor, resolution: int, batch_size: int) -> Level:
        """Make a level of voxels. This copies from the device to the host once.

        Args:
            coords: int [N, 4] = (batch, x, y, z) in token order, on any device. N may be 0, and
                assets may be empty.
            resolution: Number of voxels along one side of the grid.
            batch_size: Number of assets.

        Raises:
            ValueError: If `coords` is not sorted as `coords[kernels.token_order(coords)]` is, if it
                repeats a voxel, or if it leaves 0 <= x, y, z < resolution or
                0 <= batch < batch_size.
        """
        limits = {"resolution": (resolution, MAX_COORD), "batch_size": (batch_size, MAX_BATCH)}
        for name, (value, largest) in limits.items():
            if not isinstance(value, int) or not 1 <= value <= largest:
                raise ValueError(f"{name} must be an int from 1 to {largest}, got {value!r}")
        order = token_order(coords)
        if len(coords):
            _check_coords(coords, order, resolution, batch_size)
        return cls(coords.int(), resolution, batch_size, _asset_starts(coords[:, 0], batch_size))

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def device(self) -> torch.device:
        """Device of the coordinates."""
        return self.coords.device

    @cached_property
    def neighbors(self) -> Tensor:
        """Rows of the 3^3 neighbours of each voxel, int32 [N, 27]; see `kernels.neighbor_map`."""
        return kernels.neighbor_map(self.coords)

    @cached_property
    def block_index(self) -> BlockIndex:
        """Index of the attention blocks and of the windows of 8^3 voxels, aligned and shifted by 4.

        Computing it copies from the device to the host once.
        """
        return BlockIndex.from_coords(
            self.coords, self.batch_size, window=WINDOW, window_shift=WINDOW_SHIFT
        )

    @cached_property
    def parents(self) -> ParentLevel:
        """The level of half the resolution. Computing it copies from the device to the host once.

        Raises:
            ValueError: If the resolution is odd.
        """
        if self.resolution % 2:
            raise ValueError(f"resolution must be even to have parents, got {self.resolution}")
        coords, parent_of, children = kernels.parent_voxels(self.coords)
        starts = _asset_starts(coords[:, 0], self.batch_size)
        level = Level(coords, self.resolution // 2, self.batch_size, starts)
        return ParentLevel(level, parent_of, children)

    def twice(self) -> Level:
        """Return a batch of these assets and then the same assets again."""
        moved = self.coords.clone()
        moved[:, 0] += self.batch_size
        starts = torch.cat([self.asset_starts, self.asset_starts[1:] + len(self)])
        coords = torch.cat([self.coords, moved])
        return Level(coords, self.resolution, 2 * self.batch_size, starts)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Level:
        """Return the level on another device, without its cached indices."""
        coords = self.coords.to(device, non_blocking=non_blocking)
        starts = self.asset_starts.to(device, non_blocking=non_blocking)
        return self if coords is self.coords else replace(self, coords=coords, asset_starts=starts)


def _asset_starts(batch_N: Tensor, batch_size: int) -> Tensor:
    """Return the first row of each asset, and the number of rows: int32 [batch_size + 1]."""
    assets = torch.arange(batch_size + 1, device=batch_N.device, dtype=batch_N.dtype)
    return torch.searchsorted(batch_N.contiguous(), assets).int()


def _check_coords(coords: Tensor, order: Tensor, resolution: int, batch_size: int) -> None:
    """Raise ValueError naming the first row that breaks a rule of `Level.from_coords`."""
    batch = coords[:, 0]
    xyz = coords[:, 1:]
    outside = ((xyz < 0) | (xyz >= resolution)).any(1) | (batch < 0) | (batch >= batch_size)
    unsorted = order != torch.arange(len(order), device=order.device)
    repeated = torch.zeros_like(outside)
    repeated[1:] = (coords[1:] == coords[:-1]).all(1)
    # One row per rule: whether it is broken, the first row that breaks it, and that row's values.
    # They are copied to the host together.
    broken = torch.stack([outside, unsorted, repeated])
    rows = broken.int().argmax(1)
    table = torch.cat([broken.any(1)[:, None], rows[:, None], coords.index_select(0, rows)], 1)
    rules = (
        f"have 0 <= batch < {batch_size} and 0 <= x, y, z < {resolution}",
        "be sorted as coords[token_order(coords)] is",
        "not repeat a voxel",
    )
    for rule, (is_broken, row, *values) in zip(rules, table.tolist(), strict=True):
        if is_broken:
            raise ValueError(f"coords must {rule}; row {row} is {values}")


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """Features of the voxels of a level.

    Attributes:
        feats: [N, C], rows as in `level.coords`, on the level's device.
        level: The N voxels.

    Raises:
        ValueError: If `feats` is not [N, C] or lies on another device.
    """

    feats: Tensor
    level: Level

    def __post_init__(self) -> None:
        feats = self.feats
        level = self.level
        if feats.ndim != 2 or len(feats) != len(level) or feats.device != level.device:
            found = f"{list(feats.shape)} on {feats.device}"
            raise ValueError(f"feats must be [{len(level)}, C] on {level.device}, got {found}")

    @property
    def coords(self) -> Tensor:
        """Coordinates of the voxels, int32 [N, 4] = (batch, x, y, z)."""
        return self.level.coords

    @property
    def resolution(self) -> int:
        """Number of voxels along one side of the grid."""
        return self.level.resolution

    @property
    def batch_size(self) -> int:
        """Number of assets."""
        return self.level.batch_size

    def replace(self, feats: Tensor) -> SparseTensor:
        """Return other features on the same level, which keeps its cached indices."""
        return SparseTensor(feats, self.level)


def _take_coords(coords: Tensor, rows: Tensor) -> Tensor:
    """Return int32 coords[rows], [K, 4]. Each row is moved as one number, which is much faster."""
    return coords.contiguous().view(torch.complex128)[rows].view(torch.int32)


def _local_points() -> Tensor:
    """Return the grid points of a cell in the order in which a level sorts them.

    Returns:
        int64 [512] of 64 * x + 8 * y + z.
    """
    xyz = torch.cartesian_prod(*[torch.arange(CELL_SIDE)] * 3)
    return token_order(torch.cat([torch.zeros(POINTS, 1, dtype=torch.int64), xyz], 1))


_LOCAL_POINTS = _local_points()


@dataclass(frozen=True, eq=False)
class BrickBatch:
    """The SDF bricks of a batch of assets, concatenated, their cells in token order.

    Attributes:
        cells: The M cells, at resolution R / 8.
        values: float16 or float32 [M, 512], clamp(sdf / tau, -1, 1) at grid point
            64 * lx + 8 * ly + lz of each cell, negative inside.
        sharp: bool [M, 512] in the same order, true near sharp edges.
        resolution: R.

    Raises:
        ValueError: If a shape, a dtype or the resolution does not fit.
    """

    cells: Level
    values: Tensor
    sharp: Tensor
    resolution: int

    def __post_init__(self) -> None:
        shape = (len(self.cells), POINTS)
        if self.resolution != CELL_SIDE * self.cells.resolution:
            raise ValueError(
                f"resolution must be 8 x the cells' {self.cells.resolution}, got {self.resolution}"
            )
        if self.values.shape != shape or not self.values.dtype.is_floating_point:
            raise ValueError(
                f"values must be float {list(shape)}, "
                f"got {self.values.dtype} {list(self.values.shape)}"
            )
        if self.sharp.shape != shape or self.sharp.dtype != torch.bool:
            raise ValueError(
                f"sharp must be bool {list(shape)}, got {self.sharp.dtype} {list(self.sharp.shape)}"
            )

    @classmethod
    def collate(
        cls, bricks: Sequence[Bricks], points: Sequence[NDArray[np.int64]] | None = None
    ) -> BrickBatch:
        """Concatenate the bricks of several assets on the CPU.

        Cells without an active value are dropped. They exist because rounding to float16 can turn
        the only active values of a cell into 1.

        Args:
            bricks: The bricks of each asset, all of one resolution and dtype, cells in any order.
            points: [512] for each asset, the stored number of each of the 512 points of a cell.
                None keeps their order.

        Raises:
            ValueError: If there is no asset or the resolutions or dtypes differ.
        """
        resolutions = sorted({check_resolution(asset.resolution) for asset in bricks})
        if len(resolutions) != 1:
            raise ValueError(f"bricks must be of one resolution, got {resolutions}")
        dtypes = sorted({str(asset.values.dtype) for asset in bricks})
        if len(dtypes) != 1:
            raise ValueError(f"bricks must have values of one dtype, got {dtypes}")
        points = points or [np.arange(POINTS)] * len(bricks)
        kept = [np.flatnonzero(has_active_point(asset.values)) for asset in bricks]
        counts = [len(rows) for rows in kept]
        batch = np.repeat(np.arange(len(bricks)), counts)
        xyz = np.concatenate([asset.cells[rows] for asset, rows in zip(bricks, kept, strict=True)])
        coords = torch.from_numpy(np.concatenate([batch[:, None], xyz], axis=1).astype(np.int32))
        # The order is by asset first, so each asset has consecutive rows before and after it.
        order = token_order(coords)
        cells = Level.from_coords(coords[order], resolutions[0] // CELL_SIDE, len(bricks))
        rows = np.concatenate(kept)[order.numpy()]
        values = np.empty((len(rows), POINTS), bricks[0].values.dtype)
        sharp = np.empty((len(rows), POINTS), bool)
        end = 0
        for asset, moved, count in zip(bricks, points, counts, strict=True):
            own = slice(end, end := end + count)
            gather_bricks(asset.values, asset.sharp, rows[own], moved, values[own], sharp[own])
        return cls(cells, torch.from_numpy(values), torch.from_numpy(sharp), resolutions[0])

    @property
    def batch_size(self) -> int:
        """Number of assets."""
        return self.cells.batch_size

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.values.device

    @property
    def active(self) -> Tensor:
        """True at the active grid points, which are the encoder's input: bool [M, 512].

        A grid point is active where |value| < 1.
        """
        return self.values.abs() < 1

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> BrickBatch:
        """Return the batch on another device."""
        cells = self.cells.to(device, non_blocking=non_blocking)
        values = self.values.to(device, non_blocking=non_blocking)
        sharp = self.sharp.to(device, non_blocking=non_blocking)
        return replace(self, cells=cells, values=values, sharp=sharp)

    def pin_memory(self) -> BrickBatch:
        """Return a copy in page-locked memory, for `to(..., non_blocking=True)`."""
        cells = self.cells
        cells = replace(
            cells, coords=cells.coords.pin_memory(), asset_starts=cells.asset_starts.pin_memory()
        )
        return replace(
            self, cells=cells, values=self.values.pin_memory(), sharp=self.sharp.pin_memory()
        )

    def _disk_order(self) -> Tensor:
        """Return int64 [M] that sorts the cells by (batch, x, y, z), as they are stored on disk."""
        batch, x, y, z = self.cells.coords.long().unbind(1)
        side = self.cells.resolution
        return torch.argsort(((batch * side + x) * side + y) * side + z)

    def voxels(self) -> SparseTensor:
        """Return the active grid points with their values, float32 [N, 1] at resolution R.

        The first call copies from the device to the host once. Later calls return the same tensor.
        """
        return self._voxels

    @cached_property
    def _voxels(self) -> SparseTensor:
        order = self._disk_order()
        local = _LOCAL_POINTS.to(self.device)
        # Voxels are sorted by cell, then by grid point.
        rows, points = self.active[order][:, local].nonzero(as_tuple=True)
        rows = order[rows]
        corners = self.cells.coords.clone()
        corners[:, 1:] *= CELL_SIDE
        inside = torch.stack([0 * local, local // 64, local // 8 % 8, local % 8], 1).int()
        coords = _take_coords(corners, rows) + _take_coords(inside, points)
        points = local[points]
        feats = self.values[rows, points].float()[:, None]
        starts = _asset_starts(coords[:, 0], self.batch_size)
        return SparseTensor(feats, Level(coords, self.resolution, self.batch_size, starts))

    def bricks(self, values: Tensor | None = None) -> list[Bricks]:
        """Return the bricks of each asset as they are stored, cells sorted by x, y, z.

        Args:
            values: Float [M, 512] instead of the batch's own values, such as decoded ones. They are
                clamped to [-1, 1] and rounded to float16.

        Raises:
            ValueError: If `values` has another shape.
        """
        values = self.values if values is None else values
        if values.shape != self.values.shape:
            raise ValueError(f"values must be {list(self.values.shape)}, got {list(values.shape)}")
        order = self._disk_order()
        blocks = self.cells.coords[order, 1:].cpu().numpy().astype(np.int16)
        stored = values.detach()[order].clamp(-1, 1).half().cpu().numpy()
        sharp = np.packbits(self.sharp[order].cpu().numpy(), axis=1, bitorder="little")
        starts = self.cells.asset_starts.tolist()
        return [
            Bricks(
                resolution=self.resolution, cells=blocks[a:b], values=stored[a:b], sharp=sharp[a:b]
            )
            for a, b in itertools.pairwise(starts)
        ]
