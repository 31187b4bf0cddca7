"""Sparse voxels of a batch of assets: coordinates with what follows from them, features on top, and SDF bricks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import kernels
from kernels import BlockIndex, token_order
from kernels.runtime.coords import MAX_BATCH, MAX_COORD
from pipeline.core.grid import CELL_SIDE, check_resolution
from pipeline.core.schema import Bricks

POINTS = CELL_SIDE**3  # voxels of a cell
WINDOW, SHIFT = 8, 4  # of window attention, in cells


class Parents(NamedTuple):
    """The level of half the resolution, and who belongs to whom."""

    level: Level
    parent_of: Tensor  # int32 [N] row of each voxel's parent
    children: Tensor  # int32 [P, 8] rows of the children 4 * cx + 2 * cy + cz, -1 where absent


@dataclass(frozen=True, eq=False)
class Level:
    """The occupied voxels of a batch at one resolution, in token order, and lazily what follows from them.

    Every tensor of a level shares its caches. `Level.from_coords` checks; the bare constructor trusts.
    """

    coords: Tensor  # int32 [N, 4] (batch, x, y, z), sorted as kernels.token_order says
    resolution: int  # 0 <= x, y, z < resolution
    batch_size: int
    asset_starts: Tensor  # int32 [A + 1] first row of each asset

    @classmethod
    def from_coords(cls, coords: Tensor, resolution: int, batch_size: int) -> Level:
        """Level of int [N, 4] (batch, x, y, z) in token order, on any device; N = 0 and empty assets are fine.

        One device-to-host copy. ValueError if coords is not sorted as `coords[kernels.token_order(coords)]` is, repeats
        a voxel or leaves 0 <= x, y, z < resolution or 0 <= batch < batch_size.
        """
        for name, value, most in (
            ("resolution", resolution, MAX_COORD),
            ("batch_size", batch_size, MAX_BATCH),
        ):
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} must be an int from 1 to {most}, got {value!r}")
        order = token_order(coords)
        if len(coords):
            _check(coords, order, resolution, batch_size)
        return cls(coords.int(), resolution, batch_size, _starts(coords[:, 0], batch_size))

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def device(self) -> torch.device:
        return self.coords.device

    @cached_property
    def neighbors(self) -> Tensor:
        """int32 [N, 27]: rows of the 3^3 neighbours as `kernels.neighbor_map` has them, -1 where absent."""
        return kernels.neighbor_map(self.coords)

    @cached_property
    def block_index(self) -> BlockIndex:
        """Blocks, and windows of 8^3 voxels, aligned and shifted by 4. One device-to-host copy."""
        return BlockIndex.from_coords(
            self.coords, self.batch_size, window=WINDOW, window_shift=SHIFT
        )

    @cached_property
    def parents(self) -> Parents:
        """The level of half the resolution. One device-to-host copy. ValueError if the resolution is odd."""
        if self.resolution % 2:
            raise ValueError(f"resolution must be even to have parents, got {self.resolution}")
        coords, parent_of, children = kernels.parent_voxels(self.coords)
        starts = _starts(coords[:, 0], self.batch_size)
        level = Level(coords, self.resolution // 2, self.batch_size, starts)
        return Parents(level, parent_of, children)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Level:
        """The same level there, without its caches; itself if it is there."""
        coords, starts = (
            x.to(device, non_blocking=non_blocking) for x in (self.coords, self.asset_starts)
        )
        return self if coords is self.coords else replace(self, coords=coords, asset_starts=starts)


def _starts(batch_N: Tensor, batch_size: int) -> Tensor:
    assets = torch.arange(batch_size + 1, device=batch_N.device, dtype=batch_N.dtype)
    return torch.searchsorted(batch_N.contiguous(), assets).int()


def _check(coords: Tensor, order: Tensor, resolution: int, batch_size: int) -> None:
    batch, xyz = coords[:, 0], coords[:, 1:]
    outside = ((xyz < 0) | (xyz >= resolution)).any(1) | (batch < 0) | (batch >= batch_size)
    unsorted = order != torch.arange(len(order), device=order.device)
    repeated = torch.zeros_like(outside)
    repeated[1:] = (coords[1:] == coords[:-1]).all(1)
    broken = torch.stack([outside, unsorted, repeated])
    rows = broken.int().argmax(1)
    copy = torch.cat(
        [broken.any(1)[:, None], rows[:, None], coords.index_select(0, rows)], 1
    ).tolist()
    rules = (
        f"have 0 <= batch < {batch_size} and 0 <= x, y, z < {resolution}",
        "be sorted as coords[token_order(coords)] is",
        "not repeat a voxel",
    )
    for rule, (found, row, *values) in zip(rules, copy, strict=True):
        if found:
            raise ValueError(f"coords must {rule}; row {row} is {values}")


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """Features of a level's voxels. ValueError if feats is not [N, C] on the level's device."""

    feats: Tensor  # [N, C]
    level: Level

    def __post_init__(self) -> None:
        feats, level = self.feats, self.level
        if feats.ndim != 2 or len(feats) != len(level) or feats.device != level.device:
            found = f"{list(feats.shape)} on {feats.device}"
            raise ValueError(f"feats must be [{len(level)}, C] on {level.device}, got {found}")

    @property
    def coords(self) -> Tensor:
        return self.level.coords

    @property
    def resolution(self) -> int:
        return self.level.resolution

    @property
    def batch_size(self) -> int:
        return self.level.batch_size

    def replace(self, feats: Tensor) -> SparseTensor:
        """Other features on the same voxels, and so with the same caches."""
        return SparseTensor(feats, self.level)


def _local_points() -> Tensor:
    """int64 [512]: the points of a cell, as 64 * x + 8 * y + z, in the order of its voxels in a level."""
    xyz = torch.cartesian_prod(*[torch.arange(CELL_SIDE)] * 3)
    return token_order(torch.cat([torch.zeros(POINTS, 1, dtype=torch.int64), xyz], 1))


_LOCAL = _local_points()


@dataclass(frozen=True, eq=False)
class BrickBatch:
    """The SDF bricks of a batch of assets, concatenated, their cells in token order."""

    cells: Level  # of resolution R / 8
    values: Tensor  # [M, 512] float16 or float32, clamp(sdf / tau, -1, 1) of point 64 * lx + 8 * ly + lz
    sharp: Tensor  # bool [M, 512] in the same order
    resolution: int  # R

    def __post_init__(self) -> None:
        shape = (len(self.cells), POINTS)
        if self.resolution != CELL_SIDE * self.cells.resolution:
            raise ValueError(
                f"resolution must be 8 x the cells' {self.cells.resolution}, got {self.resolution}"
            )
        if self.values.shape != shape or not self.values.dtype.is_floating_point:
            raise ValueError(
                f"values must be float {list(shape)}, got {self.values.dtype} {list(self.values.shape)}"
            )
        if self.sharp.shape != shape or self.sharp.dtype != torch.bool:
            raise ValueError(
                f"sharp must be bool {list(shape)}, got {self.sharp.dtype} {list(self.sharp.shape)}"
            )

    @classmethod
    def collate(cls, bricks: Sequence[Bricks]) -> BrickBatch:
        """One batch, on the CPU, of the bricks of its assets; cells without an active value are dropped.

        Rounding to f16 can hide the only active points of a cell. ValueError if there is no asset or the resolutions
        differ.
        """
        resolutions = sorted({check_resolution(one.resolution) for one in bricks})
        if len(resolutions) != 1:
            raise ValueError(f"bricks must be of one resolution, got {resolutions}")
        kept = [(np.abs(one.values) < 1).any(axis=1) for one in bricks]
        pairs = list(zip(bricks, kept, strict=True))
        batch = np.repeat(np.arange(len(bricks)), [keep.sum() for keep in kept])
        xyz = np.concatenate([one.cells[keep] for one, keep in pairs])
        coords = torch.from_numpy(np.concatenate([batch[:, None], xyz], axis=1).astype(np.int32))
        values = torch.from_numpy(np.concatenate([one.values[keep] for one, keep in pairs]))
        bits = np.concatenate([one.sharp[keep] for one, keep in pairs])
        sharp = torch.from_numpy(np.unpackbits(bits, axis=1, bitorder="little")).bool()
        order = token_order(coords)
        cells = Level.from_coords(coords[order], resolutions[0] // CELL_SIDE, len(bricks))
        return cls(cells, values[order], sharp[order], resolutions[0])

    @property
    def batch_size(self) -> int:
        return self.cells.batch_size

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def active(self) -> Tensor:
        """bool [M, 512]: the points of the encoder's input, |value| < 1."""
        return self.values.abs() < 1

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> BrickBatch:
        """The same batch there."""
        cells = self.cells.to(device, non_blocking=non_blocking)
        values, sharp = (x.to(device, non_blocking=non_blocking) for x in (self.values, self.sharp))
        return replace(self, cells=cells, values=values, sharp=sharp)

    def pin_memory(self) -> BrickBatch:
        """A copy in page-locked memory, for `to(..., non_blocking=True)`."""
        cells = self.cells
        cells = replace(
            cells, coords=cells.coords.pin_memory(), asset_starts=cells.asset_starts.pin_memory()
        )
        return replace(
            self, cells=cells, values=self.values.pin_memory(), sharp=self.sharp.pin_memory()
        )

    def _disk_order(self) -> Tensor:
        """int64 [M] that sorts the cells by (batch, x, y, z): the order on disk, and of blocks among voxels."""
        batch, x, y, z = self.cells.coords.long().unbind(1)
        side = self.cells.resolution
        return torch.argsort(((batch * side + x) * side + y) * side + z)

    def voxels(self) -> SparseTensor:
        """The active points with their values: feats float32 [N, 1] on a level of resolution R, made once.

        One device-to-host copy.
        """
        return self._voxels

    @cached_property
    def _voxels(self) -> SparseTensor:
        order, local = self._disk_order(), _LOCAL.to(self.device)
        rows, points = self.active[order][:, local].nonzero(as_tuple=True)
        rows, points = order[rows], local[points]
        coords = self.cells.coords[rows]
        coords[:, 1:] *= CELL_SIDE
        coords[:, 1:] += torch.stack([points // 64, points // 8 % 8, points % 8], 1).int()
        feats = self.values[rows, points].float()[:, None]
        starts = _starts(coords[:, 0], self.batch_size)
        return SparseTensor(feats, Level(coords, self.resolution, self.batch_size, starts))

    def bricks(self, values: Tensor | None = None) -> list[Bricks]:
        """Back to one `Bricks` an asset, cells in x, y, z order; `values` [M, 512] replaces the batch's own (decoded).

        Values are clamped to [-1, 1] and rounded to f16, as stored. ValueError if values has another shape.
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
