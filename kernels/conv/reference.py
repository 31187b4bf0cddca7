"""What the convolution, pooling and normalisation kernels compute, in torch: any device, any float type."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

_MAX_GATHERED = 1 << 25  # entries of the rows gathered at a time


def _halo(x_NC: Tensor, neighbors_M27: Tensor, size: int) -> Tensor:
    """Blocks with one voxel of their surroundings, zeros where there are none: [M, C, size + 2 (three times)]."""
    M, C = len(neighbors_M27), x_NC.shape[1]
    blocks = x_NC.reshape(M, size, size, size, C)
    padded = torch.cat([blocks, blocks.new_zeros(1, size, size, size, C)])
    rows_M27 = torch.where(neighbors_M27 < 0, M, neighbors_M27).long()
    near = (
        slice(size - 1, size),
        slice(0, size),
        slice(0, 1),
    )  # what a block sees of the one before, of itself, after

    def piece(dx: int, dy: int, dz: int) -> Tensor:
        own = dx == dy == dz == 1
        return (
            blocks
            if own
            else padded[:, near[dx], near[dy], near[dz]][rows_M27[:, dx * 9 + dy * 3 + dz]]
        )

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


def _voxels_forward(x_NC: Tensor, weight_27CO: Tensor, neighbors: Tensor) -> Tensor:
    parts = [
        _gather(x_NC, neighbors[n]) @ weight_27CO.flatten(0, 1)
        for n in _slices(neighbors, x_NC.shape[1])
    ]
    return torch.cat(parts) if parts else x_NC.new_empty(0, weight_27CO.shape[2])


class _Voxels(torch.autograd.Function):
    """One row a voxel. Both gradients gather, none scatters."""

    @staticmethod
    def forward(ctx, x_NC, weight_27CO, neighbors):
        ctx.save_for_backward(x_NC, weight_27CO, neighbors)
        return _voxels_forward(x_NC, weight_27CO, neighbors)

    @staticmethod
    def backward(ctx, *grads):
        (dy_NO,), (x_NC, weight_27CO, neighbors) = grads, ctx.saved_tensors
        dx = _voxels_forward(dy_NO, weight_27CO.flip(0).transpose(1, 2), neighbors)
        dw = torch.zeros_like(weight_27CO.flatten(0, 1), memory_format=torch.contiguous_format)
        for n in _slices(neighbors, x_NC.shape[1]):
            dw = dw + _gather(x_NC, neighbors[n]).T @ dy_NO[n]
        return dx, dw.view_as(weight_27CO), None


def _kernel(weight_TCO: Tensor, side: int) -> Tensor:
    """[side^3, C, O] -> conv3d's [O, C, side, side, side]."""
    return weight_TCO.unflatten(0, (side,) * 3).permute(4, 3, 0, 1, 2)


def _weight_grad(x: Tensor, dy: Tensor, side: int, stride: int) -> Tensor:
    """Gradient of `_kernel`'s weight: [side^3, C, O]."""
    dw = grad.conv3d_weight(x, [dy.shape[1], x.shape[1], side, side, side], dy, stride=stride)
    return dw.permute(2, 3, 4, 1, 0).flatten(0, 2)


class _Blocks(torch.autograd.Function):
    """Full blocks: a dense convolution of each with its surroundings."""

    @staticmethod
    def forward(ctx, x_NC, weight_27CO, neighbors, size):
        ctx.save_for_backward(x_NC, weight_27CO, neighbors)
        ctx.size = size
        return _rows(F.conv3d(_halo(x_NC, neighbors, size), _kernel(weight_27CO, 3)))

    @staticmethod
    def backward(ctx, *grads):
        (dy_NO,), size, (x_NC, weight_27CO, neighbors) = grads, ctx.size, ctx.saved_tensors
        dx = F.conv3d(
            _halo(dy_NO, neighbors, size), _kernel(weight_27CO.flip(0).transpose(1, 2), 3)
        )
        dy = dy_NO.reshape(-1, size, size, size, dy_NO.shape[1]).permute(0, 4, 1, 2, 3)
        return _rows(dx), _weight_grad(_halo(x_NC, neighbors, size), dy, 3, 1), None, None


class _Upsampled(torch.autograd.Function):
    """Full blocks of half the size, every voxel standing for its 8 children: the transpose of a stride 2 with 4^3."""

    @staticmethod
    def forward(ctx, x_NC, weight_88CO, neighbors, size):
        ctx.save_for_backward(x_NC, weight_88CO, neighbors)
        ctx.size, half = size, size // 2
        halo, M, O = _halo(x_NC, neighbors, half), len(neighbors), weight_88CO.shape[3]
        y = x_NC.new_empty(M, half, 2, half, 2, half, 2, O)
        for q, (a, b, c) in enumerate(itertools.product(range(2), repeat=3)):
            near = halo[:, :, a : a + half + 1, b : b + half + 1, c : c + half + 1]
            y[:, :, a, :, b, :, c] = F.conv3d(near, _kernel(weight_88CO[q], 2)).permute(
                0, 2, 3, 4, 1
            )
        return y.view(-1, O)

    @staticmethod
    def backward(ctx, *grads):
        (dy_NO,), size, (x_NC, weight_88CO, neighbors) = grads, ctx.size, ctx.saved_tensors
        half, dy = size // 2, _halo(dy_NO, neighbors, size)
        dx = _rows(F.conv3d(dy, _kernel(transposed_upsample(weight_88CO), 4), stride=2))
        x = x_NC.reshape(-1, half, half, half, x_NC.shape[1]).permute(0, 4, 1, 2, 3)
        dw_64OC = _weight_grad(dy, x, 4, 2)
        return dx, untransposed_upsample(dw_64OC), None, None


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def sum_upsample_taps(weight_27CO: Tensor) -> Tensor:
    """Weights of a convolution that follows duplication to 8 children: [27, C, O] -> [8 parities, 8 taps, C, O].

    On each axis the children of one voxel are equal: an even child sees w[-1] of the voxel before and w[0] + w[1] of
    its own, an odd one w[-1] + w[0] of its own and w[1] of the next. Parity and tap count as 4 * x + 2 * y + z.
    """
    w = at_least_fp32(weight_27CO).unflatten(0, (3, 3, 3))
    for _ in range(3):
        before, own, after = w.unbind(0)
        w = torch.stack([torch.stack([before, own + after]), torch.stack([before + own, after])])
        w = w.movedim((0, 1), (-2, -1))  # one axis after the other goes to the end as (parity, tap)
    return w.permute(2, 4, 6, 3, 5, 7, 0, 1).flatten(3, 5).flatten(0, 2)


def transposed_upsample(weight_88CO: Tensor) -> Tensor:
    """The same seen from the voxels that were duplicated: [64, O, C], stride 2, taps -1..2 on each axis.

    Child 2 * h + d - 1 of parity q has voxel h as its tap e where d = 2 * (1 - e) + (1 - q).
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
    neighbors_M27: Tensor,
    size: int = 1,
    upsample: bool = False,
) -> Tensor:
    """Cross-correlation with 3^3 taps where voxels are: [N, C] -> [M * size^3, O]; absent neighbours count as zero."""
    if upsample:
        y_NO = _Upsampled.apply(
            x_NC, sum_upsample_taps(weight_27CO).to(x_NC.dtype), neighbors_M27, size
        )
    elif size > 1:
        y_NO = _Blocks.apply(x_NC, weight_27CO.to(x_NC.dtype), neighbors_M27, size)
    else:
        y_NO = _Voxels.apply(x_NC, weight_27CO.to(x_NC.dtype), neighbors_M27)
    return y_NO if bias_O is None else y_NO + bias_O.to(x_NC.dtype)


def duplicate_children(x_NC: Tensor, size: int) -> Tensor:
    """Every voxel of full blocks of (size / 2)^3 becomes its 8 children: rows of blocks of size^3, [8 * N, C]."""
    half, C = size // 2, x_NC.shape[1]
    x = x_NC.reshape(-1, half, 1, half, 1, half, 1, C)
    return x.expand(-1, half, 2, half, 2, half, 2, C).reshape(-1, C)


def pool_children(x_NC: Tensor, children_P8: Tensor, plus_one: bool = False) -> Tensor:
    """Mean over the children there are: [N, C] -> [P, C]; plus_one divides by n + 1."""
    present_P8 = children_P8 >= 0
    padded = torch.cat([x_NC, x_NC.new_zeros(1, x_NC.shape[1])])
    rows_P8 = torch.where(present_P8, children_P8, len(x_NC))
    counts_P1 = present_P8.sum(1, keepdim=True) + int(plus_one)
    return padded.index_select(0, rows_P8.view(-1)).view(-1, 8, x_NC.shape[1]).sum(
        1
    ) / counts_P1.to(x_NC.dtype)


def group_norm(
    x_NC: Tensor,
    asset_starts_A1: Tensor,
    groups: int,
    weight_C: Tensor,
    bias_C: Tensor,
    eps: float = 1e-5,
    silu: bool = False,
) -> Tensor:
    """Each asset's groups of channels to mean 0 and variance 1 over all its rows, then weight, bias and SiLU."""
    x, weight_C, bias_C = (at_least_fp32(t) for t in (x_NC, weight_C, bias_C))
    parts = []
    for first, last in itertools.pairwise(asset_starts_A1.tolist()):
        if first < last:
            parts.append(
                torch.group_norm(x[first:last].T[None], groups, weight_C, bias_C, eps)[0].T
            )
    y_NC = torch.cat(parts) if parts else x * weight_C + bias_C
    return (F.silu(y_NC) if silu else y_NC).to(x_NC.dtype)


def sdf_head(x_NC: Tensor, weight_C: Tensor, bias_1: Tensor) -> Tensor:
    """tanh of a linear layer of SiLU(x): [N, C] -> [N], at least fp32."""
    x, weight_C, bias_1 = (at_least_fp32(t) for t in (x_NC, weight_C, bias_1))
    return torch.tanh(F.silu(x) @ weight_C.to(x.dtype) + bias_1.to(x.dtype))
