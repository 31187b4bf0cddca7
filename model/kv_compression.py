"""Compression of SSA: one key and one value for each block of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import BlockIndex, block_mean, invert_order, neighbor_map, token_order
from model.config import COMPRESSION_GROUPS, Compression
from model.conv import GroupNormSiLU, SparseConv3d
from model.sparse_tensor import WINDOW, WINDOW_SHIFT, Level


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Order and indices of a batch's tokens as SSA needs them, shared by all transformer blocks.

    Tokens are sorted by blocks of compress_block^3. A level is sorted by blocks of 4^3, so with
    another block size the rows of the layout are the level's in another order.

    Attributes:
        index: Index of the attention blocks and windows of the N tokens.
        order: int64 [N], the level's row of each row of the layout. None if the orders agree.
        inverse: int64 [N], the layout's row of each row of the level. None if the orders agree.
        position_of: int64 [N], the position (x * m + y) * m + z of each token in its block of m^3.
        compressed: int32 [P, 4] = (batch, x, y, z) of the compressed blocks.
        max_tokens: Number of tokens of the largest asset.
    """

    index: BlockIndex
    order: Tensor | None
    inverse: Tensor | None
    position_of: Tensor
    compressed: Tensor
    max_tokens: int

    @classmethod
    def of(cls, level: Level, compress_block: int) -> TokenLayout:
        """Make the layout of a level's tokens.

        This copies from the device to the host once, unless the level has its block index already.
        """
        m = compress_block
        coords = level.coords
        index = level.block_index
        order, inverse = None, None
        if m != int(index.host[1]):
            order = token_order(coords, compress_block=m)
            inverse = invert_order(order)
            coords = coords[order]
            sizes = {"compress_block": m, "window": WINDOW, "window_shift": WINDOW_SHIFT}
            index = BlockIndex.from_coords(coords, level.batch_size, **sizes)
        x, y, z = (coords[:, 1:].long() % m).unbind(1)
        first = coords[index.compressed_starts[:-1].long()]
        compressed = torch.cat([first[:, :1], first[:, 1:] // m], 1)
        return cls(index, order, inverse, (x * m + y) * m + z, compressed, index.max_tokens)

    def place_indicator(self, positions: int, dtype: torch.dtype) -> Tensor:
        """Return [N, positions], 1 at the position of each token in its block and 0 elsewhere.

        Its product with a table looks rows up. The gradient of the table is then a matrix product
        and needs no sort. It is made once per dtype.
        """
        made = self._indicators.get(dtype)
        if made is None:
            places = torch.arange(positions, device=self.position_of.device)
            made = self._indicators[dtype] = (self.position_of[:, None] == places).to(dtype)
        return made

    @cached_property
    def _indicators(self) -> dict[torch.dtype, Tensor]:
        return {}

    @cached_property
    def neighbors(self) -> Tensor:
        """Rows of the 27 neighbours of each compressed block, int32 [P, 27]."""
        return neighbor_map(self.compressed)


class _Compression(nn.Module):
    """Base of the compressions. With `plus_one` sums are divided by n + 1 instead of n."""

    def __init__(self, *, plus_one: bool):
        super().__init__()
        self.plus_one = plus_one

    def _mean(self, x_NC: Tensor, layout: TokenLayout) -> Tensor:
        """Return the mean of each block: [N, C] -> [P, C]."""
        return block_mean(x_NC, layout.index, plus_one=self.plus_one)


class CompressionV1(_Compression):
    """Linear -> SiLU -> mean of each block: [N, C] -> [P, C]."""

    def __init__(self, channels: int, *, plus_one: bool):
        super().__init__(plus_one=plus_one)
        self.linear = nn.Linear(channels, channels)

    def forward(self, x_NC: Tensor, layout: TokenLayout) -> Tensor:
        """Compress tokens in the layout's order."""
        return self._mean(F.silu(self.linear(x_NC)), layout)


class CompressionV2(_Compression):
    """GroupNorm -> SiLU -> mean of each block -> conv -> GroupNorm -> SiLU -> conv.

    It maps [N, C] to [P, C]. The mean of the input is added to the result.
    """

    def __init__(self, channels: int, *, plus_one: bool):
        super().__init__(plus_one=plus_one)
        self.norm1 = GroupNormSiLU(COMPRESSION_GROUPS, channels)
        self.norm2 = GroupNormSiLU(COMPRESSION_GROUPS, channels)
        self.conv1 = SparseConv3d(channels, channels)
        self.conv2 = SparseConv3d(channels, channels)

    def forward(self, x_NC: Tensor, layout: TokenLayout) -> Tensor:
        """Compress tokens in the layout's order."""
        index, neighbors = layout.index, layout.neighbors
        # Both means are taken in one pass.
        both = torch.cat([self.norm1(x_NC, index.token_starts), x_NC], 1)
        pooled_PC, skip_PC = self._mean(both, layout).chunk(2, 1)
        hidden_PC = self.conv1(pooled_PC.contiguous(), neighbors)
        hidden_PC = self.norm2(hidden_PC, index.asset_compressed)
        return self.conv2(hidden_PC, neighbors) + skip_PC


def make_compression(version: Compression, channels: int, *, plus_one: bool) -> nn.Module:
    """Return a compression of version "v1" or "v2"."""
    return (CompressionV1 if version == "v1" else CompressionV2)(channels, plus_one=plus_one)
