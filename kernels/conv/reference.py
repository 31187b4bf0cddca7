"""Definitions of convolution, pooling, normalisation and the SDF head in torch.

They run on any device in any float dtype and are differentiable. The kernels are tested against
them.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

# Elements of the rows that are gathered at a time.
_MAX_GATHERED = 1 << 25


def _halo(x_NC: Tensor, neighbors_M27: Tensor, size: int) -> Tensor:
    """Blocks with one voxel of their surroundings: [M, C, size + 2, size + 2, size + 2].

    Absent surroundings are zero.
    """
    M, C = len(neighbors_M27), x_NC.shape[1]
    blocks = x_NC.reshape(M, size, size, size, C)
    padded = torch.cat([blocks, blocks.new_zeros(1, size, size, size, C)])
    rows_M27 = torch.where(neighbors_M27 < 0, M, neighbors_M27).long()
    # Voxels that a block needs, on one axis, from the block before, itself and the block after.
    seen = (slice(size - 1, size), slice(0, size), slice(0, 1))

    def piece(dx: int, dy: int, dz: int) -> Tensor:
        if dx == dy == dz == 1:
            return blocks
        return padded[:, seen[dx], seen[dy], seen[dz]][rows_M27[:, dx * 9 + dy * 3 + dz]]

    lines = [
        [torch.cat([piece(dx, dy, dz) for dz in range(3)], 3) for dy in range(3)] for dx in range(3)
    ]
    return torch.cat([torch.cat(line, 2) for line in lines], 1).permute(0, 4, 1, 2, 3)


def _rows(y: Tensor) -> Tensor:
    """[M, O, size, size, size] -> [M * size^3, O]."""
    return y.permute(0, 2, 3, 4, 1).reshape(-1, y.shape[1])


def _slices(neighbors_M27: Tensor, channels: int) -> list[slice]:
    step = max(1, _MAX_GATHERED // (27 * max(1, channels)))
    return [slice(first, first + step) for first in range(0, len(neighbors_M27), step)]


def _gather(x_NC: Tensor, neighbors_M27: Tensor) -> Tensor:
    """The rows of all 27 neighbours: [M, 27 * C]."""
    padded = torch.cat([x_NC, x_NC.new_zeros(1, x_NC.shape[1])])
    rows = torch.where(neighbors_M27 < 0, len(x_NC), neighbors_M27).view(-1)
    return padded.index_select(0, rows).view(len(neighbors_M27), 27 * x_NC.shape[1])


def _convolve_voxels(x_NC: Tensor, weight_27CO: Tensor, neighbors: Tensor) -> Tensor:
    parts = [
        _gather(x_NC, neighbors[n]) @ weight_27CO.flatten(0, 1)
        for n in _slices(neighbors, x_NC.shape[1])
    ]
    return torch.cat(parts) if parts else x_NC.new_empty(0, weight_27CO.shape[2])


class VoxelConvolution(torch.autograd.Function):
    """Convolution of single voxels, one row per voxel. Both gradients gather rows."""

    @staticmethod
    def forward(ctx, x_NC, weight_27CO, neighbors):
        ctx.save_for_backward(x_NC, weight_27CO, neighbors)
        return _convolve_voxels(x_NC, weight_27CO, neighbors)

    @staticmethod
    def backward(ctx, *grads):
        (dy_NO,) = grads
        x_NC, weight_27CO, neighbors = ctx.saved_tensors
        dx = _convolve_voxels(dy_NO, weight_27CO.flip(0).transpose(1, 2), neighbors)
        dw = torch.zeros_like(weight_27CO.flatten(0, 1), memory_format=torch.contiguous_format)
        for n in _slices(neighbors, x_NC.shape[1]):
            dw = dw + _gather(x_NC, neighbors[n]).T @ dy_NO[n]
        return dx, dw.view_as(weight_27CO), None


def _kernel(weight_TCO: Tensor, side: int) -> Tensor:
    """[side^3, C, O] -> the layout of conv3d, [O, C, side, side, side]."""
    return weight_TCO.unflatten(0, (side,) * 3).permute(4, 3, 0, 1, 2)


def _weight_grad(x: Tensor, dy: Tensor, side: int, stride: int) -> Tensor:
    """Gradient of the weight of `_kernel`: [side^3, C, O]."""
    dw = grad.conv3d_weight(x, [dy.shape[1], x.shape[1], side, side, side], dy, stride=stride)
    return dw.permute(2, 3, 4, 1, 0).flatten(0, 2)


class _BlockConvolution(torch.autograd.Function):
    """Convolution of full blocks: a dense convolution of each block with its surroundings."""

    @staticmethod
    def forward(ctx, x_NC, weight_27CO, neighbors, size):
        ctx.save_for_backward(x_NC, weight_27CO, neighbors)
        ctx.size = size
        return _rows(F.conv3d(_halo(x_NC, neighbors, size), _kernel(weight_27CO, 3)))

    @staticmethod
    def backward(ctx, *grads):
        (dy_NO,) = grads
        size = ctx.size
        x_NC, weight_27CO, neighbors = ctx.saved_tensors
        dx = F.conv3d(
            _halo(dy_NO, neighbors, size), _kernel(weight_27CO.flip(0).transpose(1, 2), 3)
        )
        dy = dy_NO.reshape(-1, size, size, size, dy_NO.shape[1]).permute(0, 4, 1, 2, 3)
        return _rows(dx), _weight_grad(_halo(x_NC, neighbors, size), dy, 3, 1), None, None


class _UpsampledConvolution(torch.autograd.Function):
    """Convolution of full blocks of half the size, in which each voxel stands for its 8 children.

    It is the transpose of a convolution with stride 2 and 4^3 taps.
    """

    @staticmethod
    def forward(ctx, x_NC, weight_88CO, neighbors, size):
        ctx.save_for_backward(x_NC, weight_88CO, neighbors)
        ctx.size = size
        half = size // 2
        M, O = len(neighbors), weight_88CO.shape[3]
        halo = _halo(x_NC, neighbors, half)
        y = x_NC.new_empty(M, half, 2, half, 2, half, 2, O)
        for q, (a, b, c) in enumerate(itertools.product(range(2), repeat=3)):
            near = halo[:, :, a : a + half + 1, b : b + half + 1, c : c + half + 1]
            results = F.conv3d(near, _kernel(weight_88CO[q], 2))
            y[:, :, a, :, b, :, c] = results.permute(0, 2, 3, 4, 1)
        return y.view(-1, O)

    @staticmethod
    def backward(ctx, *grads):
        (dy_NO,) = grads
        x_NC, weight_88CO, neighbors = ctx.saved_tensors
        half = ctx.size // 2
        dy = _halo(dy_NO, neighbors, ctx.size)
        dx = _rows(F.conv3d(dy, _kernel(transposed_upsample(weight_88CO), 4), stride=2))
        x = x_NC.reshape(-1, half, half, half, x_NC.shape[1]).permute(0, 4, 1, 2, 3)
        dw_64OC = _weight_grad(dy, x, 4, 2)
        return dx, untransposed_upsample(dw_64OC), None, None


def at_least_fp32(x: Tensor) -> Tensor:
    """Return x in fp32, or as it is if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


def sum_upsample_taps(weight_27CO: Tensor) -> Tensor:
    """Weights of a convolution after duplication: [27, C, O] -> [8 parities, 8 taps, C, O].

    On each axis the children of one voxel are equal. An even child sees w[-1] of the voxel before
    and w[0] + w[1] of its own. An odd child sees w[-1] + w[0] of its own and w[1] of the next.
    Parity and tap are numbered 4 * x + 2 * y + z.
    """
    w = at_least_fp32(weight_27CO).unflatten(0, (3, 3, 3))
    for _ in range(3):
        before, own, after = w.unbind(0)
        w = torch.stack([torch.stack([before, own + after]), torch.stack([before + own, after])])
        w = w.movedim((0, 1), (-2, -1))  # each axis moves to the end as (parity, tap)
    return w.permute(2, 4, 6, 3, 5, 7, 0, 1).flatten(3, 5).flatten(0, 2)


def transposed_upsample(weight_88CO: Tensor) -> Tensor:
    """The same weights seen from the voxels that were duplicated: [8, 8, C, O] -> [64, O, C].

    The taps have stride 2 and reach from -1 to 2 on each axis. Child 2 * h + d - 1 of parity q has
    voxel h as its tap e where d = 2 * (1 - e) + (1 - q).
    """
    w = weight_88CO.unflatten(1, (2, 2, 2)).unflatten(0, (2, 2, 2)).flip(0, 1, 2, 3, 4, 5)
    return w.permute(3, 0, 4, 1, 5, 2, 7, 6).flatten(0, 5)


def untransposed_upsample(weight_64OC: Tensor) -> Tensor:
    """Inverse of `transposed_upsample`: [64, O, C] -> [8, 8, C, O]."""
    w = weight_64OC.unflatten(0, (2,) * 6).permute(1, 3, 5, 0, 2, 4, 7, 6).flip(0, 1, 2, 3, 4, 5)
    return w.flatten(3, 5).flatten(0, 2)


def sparse_conv(
    x_NC: Tensor,
    weight_27CO: Tensor,
    bias_O: Tensor | None,
    table_M27: Tensor,
    size: int,
    upsample: bool,
) -> Tensor:
    """Cross-correlation with 3^3 taps at existing voxels: [N, C] -> [M * size^3, O].

    Absent neighbours count as zero. Rows, weights and the neighbour table
    have the layout of `kernels.sparse_conv`.
    """
    if upsample:
        weight_88CO = sum_upsample_taps(weight_27CO).to(x_NC.dtype)
        y_NO = _UpsampledConvolution.apply(x_NC, weight_88CO, table_M27, size)
    elif size > 1:
        y_NO = _BlockConvolution.apply(x_NC, weight_27CO.to(x_NC.dtype), table_M27, size)
    else:
        y_NO = VoxelConvolution.apply(x_NC, weight_27CO.to(x_NC.dtype), table_M27)
    return y_NO if bias_O is None else y_NO + bias_O.to(x_NC.dtype)


def duplicate_children(x_NC: Tensor, size: int) -> Tensor:
    """Give every voxel's row to its 8 children: [N, C] -> [8 * N, C].

    Rows are full blocks of (size / 2)^3 voxels before and of size^3 voxels after.
    """
    half, C = size // 2, x_NC.shape[1]
    x = x_NC.reshape(-1, half, 1, half, 1, half, 1, C)
    return x.expand(-1, half, 2, half, 2, half, 2, C).reshape(-1, C)


def pool_children(x_NC: Tensor, children_P8: Tensor, plus_one: bool = False) -> Tensor:
    """Mean over the existing children: [N, C] -> [P, C].

    With `plus_one` the sum of n rows is divided by n + 1.
    """
    present_P8 = children_P8 >= 0
    padded = torch.cat([x_NC, x_NC.new_zeros(1, x_NC.shape[1])])
    rows_P8 = torch.where(present_P8, children_P8, len(x_NC))
    counts_P1 = present_P8.sum(1, keepdim=True) + int(plus_one)
    sums_PC = padded.index_select(0, rows_P8.view(-1)).view(-1, 8, x_NC.shape[1]).sum(1)
    return sums_PC / counts_P1.to(x_NC.dtype)


def group_norm(
    x_NC: Tensor,
    starts_A1: Tensor,
    groups: int,
    weight_C: Tensor,
    bias_C: Tensor,
    eps: float,
    silu: bool,
) -> Tensor:
    """GroupNorm over all rows of each asset, then SiLU if asked for: [N, C] -> [N, C]."""
    x, weight_C, bias_C = (at_least_fp32(t) for t in (x_NC, weight_C, bias_C))
    parts = []
    for first, last in itertools.pairwise(starts_A1.tolist()):
        if first < last:
            rows_1CN = x[first:last].T[None]
            parts.append(torch.group_norm(rows_1CN, groups, weight_C, bias_C, eps)[0].T)
    y_NC = torch.cat(parts) if parts else x * weight_C + bias_C
    return (F.silu(y_NC) if silu else y_NC).to(x_NC.dtype)


def sdf_head(x_NC: Tensor, weight_C: Tensor, bias_1: Tensor) -> Tensor:
    """tanh(SiLU(x) @ weight + bias): [N, C] -> [N], at least fp32."""
    x, weight_C, bias_1 = (at_least_fp32(t) for t in (x_NC, weight_C, bias_1))
    return torch.tanh(F.silu(x) @ weight_C.to(x.dtype) + bias_1.to(x.dtype))
