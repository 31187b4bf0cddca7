"""Coordinates of voxels: limits, checks, the sort key and the token order that all kernels assume.

Coordinates are int32 or int64 [N, 4] = (batch, x, y, z). Tokens are sorted by batch, by block of
select_block^3 voxels, by sub-block of compress_block^3 voxels, and then by x, y, z.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Three coordinates and the batch number together fit one int64 sort key.
MAX_COORD = 1 << 15
MAX_BATCH = 1 << 15


def check_coords(coords: Tensor) -> None:
    """Raise ValueError unless `coords` is int32 or int64 [N, 4]. Values are not checked."""
    if coords.ndim != 2 or coords.shape[1] != 4:
        raise ValueError(f"coords must be [N, 4] = (batch, x, y, z), got {list(coords.shape)}")
    if coords.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"coords must be int32 or int64, got {coords.dtype}")


def check_block_sizes(select_block: int, compress_block: int) -> None:
    """Raise ValueError unless sizes are 1 to 64 voxels and compress_block divides select_block."""
    for name, value in (("select_block", select_block), ("compress_block", compress_block)):
        if not isinstance(value, int) or not 1 <= value <= 64:
            raise ValueError(f"{name} must be an int from 1 to 64, got {value!r}")
    if select_block % compress_block:
        raise ValueError(
            f"compress_block must divide select_block = {select_block}, got {compress_block}"
        )


def _cube_weights(size: int) -> tuple[int, int, int, int]:
    """Weights of batch, x // size, y // size and z // size in a key ordered by (batch, x, y, z)."""
    side = MAX_COORD // size + 2  # + 2: shifted windows and sizes that do not divide MAX_COORD
    return side**3, side**2, side, 1


@functools.cache
def _sort_key_constants(
    device: torch.device, select_block: int, compress_block: int
) -> tuple[Tensor, Tensor]:
    """Divisors and weights [10] of the sort key's terms.

    The terms are batch, x, y, z, then x, y, z divided by compress_block, then x, y, z divided by
    select_block. The position of a voxel in its sub-block is x - compress_block * (x //
    compress_block), so every digit of the key is a difference of terms and the key is one weighted
    sum.
    """
    batch, *blocks = (weight * select_block**3 for weight in _cube_weights(select_block))
    ratio = select_block // compress_block
    side = compress_block
    sub_block = [side**3 * ratio**2, side**3 * ratio, side**3]  # position in its block
    voxel = [side**2, side, 1]  # position in its sub-block
    weights = [batch, *voxel]
    weights += [outer - side * inner for outer, inner in zip(sub_block, voxel, strict=True)]
    weights += [outer - ratio * inner for outer, inner in zip(blocks, sub_block, strict=True)]
    divisors = [1] * 4 + [compress_block] * 3 + [select_block] * 3
    return torch.tensor(divisors).int().to(device), torch.tensor(weights).to(device)


def sort_key(coords: Tensor, select_block: int, compress_block: int) -> Tensor:
    """Key of the token order: int64 [N], different for different voxels.

    Args:
        coords: int [N, 4] = (batch, x, y, z).
        select_block: Side of a block in voxels.
        compress_block: Side of a sub-block in voxels.
    """
    divisors, weights = _sort_key_constants(coords.device, select_block, compress_block)
    xyz = coords[:, 1:]
    terms = torch.cat([coords, xyz, xyz], 1).div_(divisors, rounding_mode="floor")
    return (terms * weights).sum(1)


@functools.cache
def _cube_key_constants(
    device: torch.device, cubes: tuple[tuple[int, int], ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Shifts, divisors and weights [K, 1, 4] of the keys of K cube grids (size, shift)."""
    shifts = torch.tensor([[0, shift, shift, shift] for _, shift in cubes]).int()
    divisors = torch.tensor([[1, size, size, size] for size, _ in cubes]).int()
    weights = torch.tensor([_cube_weights(size) for size, _ in cubes])
    return shifts[:, None].to(device), divisors[:, None].to(device), weights[:, None].to(device)


def cube_keys(coords: Tensor, cubes: tuple[tuple[int, int], ...]) -> Tensor:
    """Keys of the cube that each voxel lies in, for K grids of cubes: int64 [K, N].

    Args:
        coords: int [N, 4] = (batch, x, y, z).
        cubes: (size, shift) of each grid in voxels. The keys of a grid order by
            (batch, (xyz + shift) // size).
    """
    shifts, divisors, weights = _cube_key_constants(coords.device, cubes)
    return ((coords + shifts).div_(divisors, rounding_mode="floor") * weights).sum(2)


def token_order(coords: Tensor, select_block: int = 8, compress_block: int = 4) -> Tensor:
    """Return the permutation that sorts voxels into token order.

    The order is by batch, select_block^3 block, compress_block^3 sub-block, x, y, z. The sort is
    stable. The values of `coords` are not checked here, but in `BlockIndex.from_coords`.

    Args:
        coords: int32 or int64 [N, 4] = (batch, x, y, z).
        select_block: Side of a selection block in voxels, 1 to 64.
        compress_block: Side of a compression block in voxels. It must divide select_block.

    Returns:
        int64 [N]. `coords[order]` is sorted.

    Raises:
        ValueError: If `coords` is not an int tensor [N, 4] or the sizes do not fit.
    """
    check_coords(coords)
    check_block_sizes(select_block, compress_block)
    return torch.argsort(sort_key(coords, select_block, compress_block), stable=True)


def invert_order(order: Tensor) -> Tensor:
    """Return the inverse permutation: `x[order][invert_order(order)]` is x.

    Args:
        order: int64 [N], a permutation, for example from `token_order`.

    Returns:
        int64 [N].
    """
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device, dtype=order.dtype)
    return inverse
