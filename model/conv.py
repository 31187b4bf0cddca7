"""Sparse convolution blocks: halving the resolution in the encoder, doubling it in the decoder."""

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
    """Submanifold convolution with 3^3 taps.

    `weight` is [27, in_channels, out_channels]. Tap (dx + 1) * 9 + (dy + 1) * 3 + (dz + 1) belongs
    to the voxel at +(dx, dy, dz).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        # The decoder has six convolutions and no norm. With torch's default bound each of them
        # would shrink the signal to a third.
        bound = SILU_GAIN * math.sqrt(3 / (TAPS * in_channels))
        self.weight = nn.Parameter(
            torch.empty(TAPS, in_channels, out_channels).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(
        self, x_NC: Tensor, neighbors_M27: Tensor, size: int = 1, upsample: bool = False
    ) -> Tensor:
        """Convolve; the arguments are those of `kernels.sparse_conv`."""
        return sparse_conv(
            x_NC, self.weight, self.bias, neighbors_M27, size=size, upsample=upsample
        )


class GroupNormSiLU(nn.Module):
    """GroupNorm with the statistics of each asset's voxels, followed by SiLU."""

    def __init__(self, groups: int, channels: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_NC: Tensor, asset_starts: Tensor) -> Tensor:
        """Normalise [N, C]; asset a has the rows asset_starts[a]:asset_starts[a + 1]."""
        return group_norm(x_NC, asset_starts, self.groups, self.weight, self.bias, silu=True)


class DownBlock(nn.Module):
    """Residual block that halves the resolution.

    GroupNorm -> SiLU -> mean of the 2^3 children -> conv -> GroupNorm -> SiLU -> conv, plus a
    linear layer of the children's mean.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, *, plus_one: bool):
        super().__init__()
        self.plus_one = plus_one
        self.norm1 = GroupNormSiLU(groups, in_channels)
        self.conv1 = SparseConv3d(in_channels, out_channels)
        self.norm2 = GroupNormSiLU(groups, out_channels)
        self.conv2 = SparseConv3d(out_channels, out_channels)
        self.skip = nn.Linear(in_channels, out_channels)

    def forward(self, x_NC: Tensor, x: SparseTensor) -> Tensor:
        """Compute the features of the parents.

        Args:
            x_NC: Features of `x`. They are an argument of their own so that the block can be
                recomputed in the backward pass.
            x: Gives the level.

        Returns:
            [P, out_channels] of the parents of x's voxels.
        """
        level, _, children_P8 = x.level.parents
        normed_NC = self.norm1(x_NC, x.level.asset_starts)
        pooled_PC = pool_children(normed_NC, children_P8, plus_one=self.plus_one)
        mean_PC = pool_children(x_NC, children_P8, plus_one=self.plus_one)
        hidden_PC = self.norm2(self.conv1(pooled_PC, level.neighbors), level.asset_starts)
        return self.conv2(hidden_PC, level.neighbors) + self.skip(mean_PC)


class UpBlock(nn.Module):
    """Block that doubles the resolution: conv -> SiLU -> duplication to 2^3 children -> conv.

    The SiLU that follows belongs to the next layer.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = SparseConv3d(in_channels, out_channels)
        self.conv2 = SparseConv3d(out_channels, out_channels)

    def forward(self, x_NC: Tensor, neighbors_M27: Tensor, size: int) -> Tensor:
        """Compute the features of the children.

        Args:
            x_NC: [M * (size / 2)^3, C] of M full cells with (size / 2)^3 voxels each.
            neighbors_M27: Rows of the neighbouring cells.
            size: Voxels along one side of a cell in the result.

        Returns:
            [M * size^3, out_channels], rows in the order of `kernels.sparse_conv`.
        """
        hidden_NC = F.silu(self.conv1(x_NC, neighbors_M27, size=size // 2))
        return self.conv2(hidden_NC, neighbors_M27, size=size, upsample=True)


def count_pairs(neighbors_M27: Tensor, size: int, upsample: bool) -> Tensor:
    """Count the (voxel, tap) pairs of a convolution over full cells that multiply something.

    Args:
        neighbors_M27: Rows of the neighbouring cells, -1 where absent.
        size: Voxels along one side of a cell.
        upsample: Whether duplication comes before. Then there are 2 taps an axis instead of 3,
            because the children of a voxel are equal.

    Returns:
        int64 scalar.
    """
    # Pairs along one axis: `inside` within the cell, and one with either neighbour.
    inside = 2 * size - 2 if upsample else 3 * size - 2
    axis = torch.tensor([1, inside, 1], device=neighbors_M27.device)
    shared_27 = (axis[:, None, None] * axis[:, None] * axis).flatten()
    return ((neighbors_M27 >= 0).sum(0) * shared_27).sum()
