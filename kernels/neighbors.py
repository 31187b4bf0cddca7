"""Who lies beside whom: the 27 neighbours of each voxel, and the parents that 2^3 voxels share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.blocks import MAX_COORD, check_coords, token_order

_SIDE = MAX_COORD + 2  # a border on both sides, so that no neighbour's key is another voxel's


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
    N, device = len(coords_N4), coords_N4.device
    batch, x, y, z = (coords_N4.long() + torch.tensor([0, 1, 1, 1]).to(device)).unbind(1)
    key, order = (((batch * _SIDE + x) * _SIDE + y) * _SIDE + z).sort()
    order = order.int()
    padded_key = torch.cat([key, key.new_full((3,), -1)])  # no voxel's key is negative
    padded_row = torch.cat([order, order.new_full((3,), -1)])
    neighbors = torch.empty(N, 27, dtype=torch.int32, device=device)
    for column in range(9):  # of one column x + dx, y + dy the three voxels follow each other in the order
        wanted = key + ((column // 3 - 1) * _SIDE + column % 3 - 1) * _SIDE - 1
        place = torch.searchsorted(key, wanted)
        for dz in range(3):
            found = padded_key[place] == wanted
            neighbors[:, 3 * column + dz] = torch.where(found, padded_row[place], -1)
            place, wanted = place + found, wanted + 1
    unsorted = torch.empty_like(neighbors)
    unsorted[order.long()] = neighbors
    return unsorted


def parents(coords_N4: Tensor) -> Parents:
    """The distinct voxels coords // 2: int [N, 4] (batch, x, y, z), distinct, any order -> P parents in token order.

    Makes one device-to-host copy (P). ValueError if coords is not int32 or int64 [N, 4].
    """
    check_coords(coords_N4)
    N, device = len(coords_N4), coords_N4.device
    halved = torch.cat([coords_N4[:, :1], coords_N4[:, 1:] // 2], 1)
    order = token_order(halved)
    ordered = halved[order]
    new = torch.ones(N, dtype=torch.bool, device=device)
    new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    run = new.cumsum(0) - 1
    P = int(new.sum())
    parent_of = torch.empty_like(run)
    parent_of[order] = run
    coords_P4 = torch.empty(P, 4, dtype=torch.int32, device=device)
    coords_P4[parent_of] = halved.int()  # siblings write the same values
    cx, cy, cz = (coords_N4[:, 1:].long() % 2).unbind(1)
    children_P8 = torch.full((P, 8), -1, dtype=torch.int32, device=device)
    children_P8[parent_of, 4 * cx + 2 * cy + cz] = torch.arange(N, dtype=torch.int32, device=device)
    return Parents(coords_P4, parent_of.int(), children_P8)
