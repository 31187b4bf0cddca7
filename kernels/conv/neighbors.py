"""Neighbour tables: the 27 neighbours of each voxel, and the parent voxel that 2^3 voxels share."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.runtime.coords import MAX_COORD, check_coords, sort_key

# The grid of the keys has a border, so that no neighbour's key is the key of another voxel.
_SIDE = MAX_COORD + 1
# Number of voxels whose neighbours are looked up at a time. It bounds temporary memory to 100 MB.
_ROWS_PER_LOOKUP = 1 << 17


@functools.cache
def _neighbor_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights [4] of batch, x, y, z in a key, and the key offset [27] of each neighbour."""
    weights = (_SIDE**3, _SIDE**2, _SIDE, 1)
    offsets = [
        dx * weights[1] + dy * _SIDE + dz for dx, dy, dz in itertools.product((-1, 0, 1), repeat=3)
    ]
    return torch.tensor(weights).to(device), torch.tensor(offsets).to(device)


@functools.cache
def _halving_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Shifts [4] of batch, x, y, z, and weights [4] of their last bits in a child's number."""
    return torch.tensor([0, 1, 1, 1]).int().to(device), torch.tensor([0, 4, 2, 1]).to(device)


class ParentVoxels(NamedTuple):
    """The voxels of half the resolution that contain a set of N voxels."""

    coords_P4: Tensor
    """int32 [P, 4] = (batch, x, y, z), in token order."""

    parent_of_N: Tensor
    """int32 [N], row of each voxel's parent in `coords_P4`."""

    children_P8: Tensor
    """int32 [P, 8], rows of the children, at 4 * cx + 2 * cy + cz. -1 stands for none."""


def neighbor_map(coords_N4: Tensor) -> Tensor:
    """Return the rows of the 27 voxels around each voxel.

    Column (dx + 1) * 9 + (dy + 1) * 3 + (dz + 1) holds the row of the voxel at +(dx, dy, dz) in the
    same asset. Column 13 is the row itself. No host synchronisation takes place, so the values of
    the coordinates are not checked.

    Args:
        coords_N4: int32 or int64 [N, 4] = (batch, x, y, z), distinct voxels in any order, with
            0 <= batch, x, y, z < 32768.

    Returns:
        int32 [N, 27], -1 where there is no voxel.

    Raises:
        ValueError: If `coords_N4` is not int32 or int64 [N, 4].
    """
    check_coords(coords_N4)
    weights, offsets = _neighbor_constants(coords_N4.device)
    key_N = (coords_N4 * weights).sum(1)
    if len(key_N) == 0:
        return coords_N4.new_empty(0, 27, dtype=torch.int32)
    sorted_key_N, order_N = key_N.sort()
    order_N = order_N.int()
    parts = [
        _find_rows(sorted_key_N, order_N, keys[:, None] + offsets)
        for keys in key_N.split(_ROWS_PER_LOOKUP)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _find_rows(sorted_key_N: Tensor, order_N: Tensor, wanted_K27: Tensor) -> Tensor:
    """Row of each wanted key, -1 where no voxel has that key: int32 [K, 27].

    `order_N` holds the row of each sorted key.
    """
    position_K27 = torch.searchsorted(sorted_key_N, wanted_K27).clamp_(max=len(sorted_key_N) - 1)
    absent_K27 = sorted_key_N.take(position_K27) != wanted_K27
    return order_N.take(position_K27).masked_fill_(absent_K27, -1)


def parent_voxels(coords_N4: Tensor) -> ParentVoxels:
    """Return the distinct voxels coords // 2, and which voxels are the children of each.

    Makes one device-to-host copy, for the number of parents.

    Args:
        coords_N4: int32 or int64 [N, 4] = (batch, x, y, z), distinct voxels in any order.

    Returns:
        The P parents in token order (`token_order` with its default sizes).

    Raises:
        ValueError: If `coords_N4` is not int32 or int64 [N, 4].
    """
    check_coords(coords_N4)
    shifts, bits = _halving_constants(coords_N4.device)
    halved_N4 = (coords_N4 >> shifts).int()

    # Voxels with the same parent are neighbours in the sorted keys: number the runs of equal keys.
    key_N, order_N = sort_key(halved_N4, 8, 4).sort()
    N = len(key_N)
    device = key_N.device
    is_first_N = torch.ones(N, dtype=torch.bool, device=device)
    torch.ne(key_N[1:], key_N[:-1], out=is_first_N[1:])
    run_N = is_first_N.cumsum(0).sub_(1)
    P = int(run_N[-1]) + 1 if N else 0

    # Undo the sort, then scatter each voxel to its parent's row and its child's column.
    parent_of_N = torch.empty_like(run_N).scatter_(0, order_N, run_N)
    coords_P4 = halved_N4.new_empty(P, 4)
    coords_P4.index_copy_(0, parent_of_N, halved_N4)  # siblings write the same values
    slot_N = ((coords_N4 & 1) * bits).sum(1).add_(parent_of_N, alpha=8)
    children_P8 = torch.full((P, 8), -1, dtype=torch.int32, device=device)
    children_P8.view(-1).scatter_(0, slot_N, torch.arange(N, dtype=torch.int32, device=device))
    return ParentVoxels(coords_P4, parent_of_N.int(), children_P8)
