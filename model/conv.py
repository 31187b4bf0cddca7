"""Sparse convolution blocks: the way down of the encoder, and the way up of the decoder."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import group_norm, pool_children, sparse_conv
from model.sparse_tensor import SparseTensor

TAPS = 27
SILU_GAIN = 1.67  # 1 / sqrt(E[silu(x)^2]) for a normal x: keeps the variance through conv -> SiLU


class SparseConv3d(nn.Module):
    """Submanifold 3^3 convolution; `weight` [27, in, out] with tap (dx + 1) * 9 + (dy + 1) * 3 + dz + 1."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        # The decoder has six of these and no norm: torch's own bound would shrink a signal to a third in each.
        bound = SILU_GAIN * math.sqrt(3 / (TAPS * in_channels))
        self.weight = nn.Parameter(
            torch.empty(TAPS, in_channels, out_channels).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(
        self, x_NC: Tensor, neighbors_M27: Tensor, size: int = 1, upsample: bool = False
    ) -> Tensor:
        return sparse_conv(
            x_NC, self.weight, self.bias, neighbors_M27, size=size, upsample=upsample
        )


class GroupNormSiLU(nn.Module):
    """GroupNorm with the statistics of each asset's tokens, then SiLU."""

    def __init__(self, groups: int, channels: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: SparseTensor) -> SparseTensor:
        return x.replace(
            group_norm(
                x.feats, x.level.asset_starts, self.groups, self.weight, self.bias, silu=True
            )
        )


class DownBlock(nn.Module):
    """GN -> SiLU -> mean of 2^3 -> conv -> GN -> SiLU -> conv, plus a linear of the mean: half the resolution."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, *, plus_one: bool):
        super().__init__()
        self.plus_one = plus_one
        self.norm1 = GroupNormSiLU(groups, in_channels)
        self.conv1 = SparseConv3d(in_channels, out_channels)
        self.norm2 = GroupNormSiLU(groups, out_channels)
        self.conv2 = SparseConv3d(out_channels, out_channels)
        self.skip = nn.Linear(in_channels, out_channels)

    def forward(self, x_NC: Tensor, x: SparseTensor) -> Tensor:
        """Features of x's level, given apart so that they can be recomputed -> those of its parents."""
        x, (level, _, children_P8) = x.replace(x_NC), x.level.parents
        pooled, mean = (
            pool_children(y, children_P8, plus_one=self.plus_one)
            for y in (self.norm1(x).feats, x_NC)
        )
        hidden = SparseTensor(self.conv1(pooled, level.neighbors), level)
        return self.conv2(self.norm2(hidden).feats, level.neighbors) + self.skip(mean)


class UpBlock(nn.Module):
    """conv -> SiLU -> every voxel becomes its 8 children -> conv; the SiLU that follows is left to what comes next."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = SparseConv3d(in_channels, out_channels)
        self.conv2 = SparseConv3d(out_channels, out_channels)

    def forward(self, x_NC: Tensor, neighbors_M27: Tensor, size: int) -> Tensor:
        """Rows of full blocks of (size / 2)^3 -> rows of full blocks of size^3; see kernels.conv.sparse_conv."""
        x_NC = F.silu(self.conv1(x_NC, neighbors_M27, size=size // 2))
        return self.conv2(x_NC, neighbors_M27, size=size, upsample=True)


def pairs_of_blocks(neighbors_M27: Tensor, size: int, upsample: bool) -> Tensor:
    """int64 []: how many (voxel, tap) pairs meet a voxel in a convolution over full blocks of size^3.

    upsample: with 2 taps an axis instead of 3, as children of one voxel are equal.
    """
    inside = (
        2 * size - 2 if upsample else 3 * size - 2
    )  # on one axis, of the block's own; one with each neighbour
    axis = torch.tensor([1, inside, 1], device=neighbors_M27.device)
    shared_27 = (axis[:, None, None] * axis[:, None] * axis).flatten()
    return ((neighbors_M27 >= 0).sum(0) * shared_27).sum()
