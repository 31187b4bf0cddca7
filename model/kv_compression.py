"""One key and one value per block of cells: the two ways SSA's compression branch makes them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import BlockIndex, block_mean, group_norm, invert_order, neighbor_map, token_order
from model.config import COMPRESSION_GROUPS, Compression
from model.conv import GroupNormSiLU, SparseConv3d
from model.sparse_tensor import SHIFT, WINDOW, Level


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """What SSA needs of a batch's cells besides their features; made once, shared by all layers.

    Its tokens are the level's in another order if compress_block is not the 4 that levels are sorted by.
    """

    index: BlockIndex
    order: Tensor | None  # int64 [N] token of each row of the layout; None where they agree
    inverse: Tensor | None  # int64 [N] row of the layout of each token
    position_of: Tensor  # int64 [N] place of each row's cell in its block, (x * m + y) * m + z
    compressed: Tensor  # int32 [P, 4] (batch, x, y, z) of the blocks

    @classmethod
    def of(cls, level: Level, compress_block: int) -> TokenLayout:
        """Layout of a level's cells. One device-to-host copy, unless the level already knows its blocks."""
        m, coords = compress_block, level.coords
        index, order, inverse = level.block_index, None, None
        if m != int(index.host[1]):
            order = token_order(coords, compress_block=m)
            inverse = invert_order(order)
            coords = coords[order]
            sizes = {"compress_block": m, "window": WINDOW, "window_shift": SHIFT}
            index = BlockIndex.from_coords(coords, level.batch_size, **sizes)
        x, y, z = (coords[:, 1:].long() % m).unbind(1)
        first = coords[index.compressed_starts[:-1].long()]
        compressed = torch.cat([first[:, :1], first[:, 1:] // m], 1)
        return cls(index, order, inverse, (x * m + y) * m + z, compressed)

    @cached_property
    def neighbors(self) -> Tensor:
        """int32 [P, 27] of the blocks."""
        return neighbor_map(self.compressed)


class CompressionV1(nn.Module):
    """Linear -> SiLU -> mean of each block: [N, C] -> [P, C]. plus_one divides the sums by n + 1."""

    def __init__(self, channels: int, *, plus_one: bool):
        super().__init__()
        self.plus_one = plus_one
        self.linear = nn.Linear(channels, channels)

    def forward(self, x_NC: Tensor, layout: TokenLayout) -> Tensor:
        return block_mean(F.silu(self.linear(x_NC)), layout.index, plus_one=self.plus_one)


class CompressionV2(nn.Module):
    """GN -> SiLU -> mean -> conv -> GN -> SiLU -> conv, plus the mean of x: [N, C] -> [P, C]."""

    def __init__(self, channels: int, *, plus_one: bool):
        super().__init__()
        self.plus_one = plus_one
        self.norm1, self.norm2 = (
            GroupNormSiLU(COMPRESSION_GROUPS, channels),
            GroupNormSiLU(COMPRESSION_GROUPS, channels),
        )
        self.conv1, self.conv2 = SparseConv3d(channels, channels), SparseConv3d(channels, channels)

    def forward(self, x_NC: Tensor, layout: TokenLayout) -> Tensor:
        index, neighbors = layout.index, layout.neighbors
        both = torch.cat([_norm(self.norm1, x_NC, index.token_starts), x_NC], 1)
        pooled_PC, skip_PC = block_mean(both, index, plus_one=self.plus_one).chunk(2, 1)
        hidden_PC = _norm(
            self.norm2, self.conv1(pooled_PC.contiguous(), neighbors), index.asset_compressed
        )
        return self.conv2(hidden_PC, neighbors) + skip_PC


def _norm(norm: GroupNormSiLU, x_NC: Tensor, asset_starts: Tensor) -> Tensor:
    return group_norm(x_NC, asset_starts, norm.groups, norm.weight, norm.bias, silu=True)


def make_compression(version: Compression, channels: int, *, plus_one: bool) -> nn.Module:
    return (CompressionV1 if version == "v1" else CompressionV2)(channels, plus_one=plus_one)
