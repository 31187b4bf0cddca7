"""Who lies beside whom: the 27 neighbours of each voxel, and the parents that 2^3 voxels share."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention.block_index import MAX_COORD, check_coords, sort_key

_SIDE = MAX_COORD + 1  # a border, so that no neighbour's key is another voxel's
_ROWS = 1 << 17  # whose neighbours are looked up at a time: 100 MB


@functools.cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """What a key counts batch, x, y and z with [4], and the key of each neighbour less the voxel's own [27]."""
    weights = (_SIDE**3, _SIDE**2, _SIDE, 1)
    offsets = [
        dx * weights[1] + dy * _SIDE + dz for dx, dy, dz in itertools.product((-1, 0, 1), repeat=3)
    ]
    return torch.tensor(weights).to(device), torch.tensor(offsets).to(device)


@functools.cache
def _halving(device: torch.device) -> tuple[Tensor, Tensor]:
    """How far batch, x, y and z are shifted [4], and what their last bits count in a child's number [4]."""
    return torch.tensor([0, 1, 1, 1]).int().to(device), torch.tensor([0, 4, 2, 1]).to(device)


class Parents(NamedTuple):
    """The voxels of half the resolution."""

    coords_P4: Tensor  # int32, in token order
    parent_of_N: Tensor  # int32
    children_P8: Tensor  # int32 rows; child 4 * cx + 2 * cy + cz, -1 where absent


def neighbor_map(coords_N4: Tensor) -> Tensor:
    """Rows of the 27 voxels around each voxel: int [N, 4] (batch, x, y, z) -> int32 [N, 27], -1 where there is none.

    Column (dx + 1) * 9 + (dy + 1) * 3 + (dz + 1) is the voxel at +(dx, dy, dz) of the same asset; column 13 the row
    itself. Rows in any order, voxels distinct, 0 <= batch, x, y, z < 32768 (not checked: no host synchronisation).
    ValueError if coords is not int32 or int64 [N, 4].
    """
    check_coords(coords_N4)
    weights, offsets = _constants(coords_N4.device)
    key_N = (coords_N4 * weights).sum(1)
    if len(key_N) == 0:
        return coords_N4.new_empty(0, 27, dtype=torch.int32)
    ordered_N, order_N = key_N.sort()
    order_N = order_N.int()
    parts = [_look_up(ordered_N, order_N, keys[:, None] + offsets) for keys in key_N.split(_ROWS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _look_up(ordered_N: Tensor, order_N: Tensor, wanted_K27: Tensor) -> Tensor:
    """Row of each wanted key, -1 where no voxel has it: int32 [K, 27]. order: the row of each sorted key."""
    place_K27 = torch.searchsorted(ordered_N, wanted_K27).clamp_(max=len(ordered_N) - 1)
    return order_N.take(place_K27).masked_fill_(ordered_N.take(place_K27) != wanted_K27, -1)


def parents(coords_N4: Tensor) -> Parents:
    """The distinct voxels coords // 2: int [N, 4] (batch, x, y, z), distinct, any order -> P parents in token order.

    Makes one device-to-host copy (P). ValueError if coords is not int32 or int64 [N, 4].
    """
    check_coords(coords_N4)
    shifts, bits = _halving(coords_N4.device)
    halved_N4 = (coords_N4 >> shifts).int()
    key_N, order_N = sort_key(halved_N4, 8, 4).sort()
    N, device = len(key_N), key_N.device
    new_N = torch.ones(N, dtype=torch.bool, device=device)
    torch.ne(key_N[1:], key_N[:-1], out=new_N[1:])
    run_N = new_N.cumsum(0).sub_(1)
    P = int(run_N[-1]) + 1 if N else 0
    parent_of_N = torch.empty_like(run_N).scatter_(0, order_N, run_N)
    coords_P4 = halved_N4.new_empty(P, 4)
    coords_P4.index_copy_(0, parent_of_N, halved_N4)  # siblings write the same values
    place_N = ((coords_N4 & 1) * bits).sum(1).add_(parent_of_N, alpha=8)
    children_P8 = torch.full((P, 8), -1, dtype=torch.int32, device=device)
    children_P8.view(-1).scatter_(0, place_N, torch.arange(N, dtype=torch.int32, device=device))
    return Parents(coords_P4, parent_of_N.int(), children_P8)
