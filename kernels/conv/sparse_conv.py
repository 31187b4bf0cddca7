"""Submanifold 3^3 convolution over single voxels or over full blocks of them."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from kernels.conv import reference as reference_conv
from kernels.conv.gather_gemm import downsampling, gather_gemm, plain, upsampling
from kernels.conv.sparse_conv_backward import weight_grad
from kernels.runtime import eager_autograd
from kernels.runtime.checks import check_dtype, use_triton

SIZES = (1, 2, 4, 8)


@functools.cache
def _summed_taps(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of `reference_conv.sum_upsample_taps`: taps of each sum [64, 8], 27 for none; sums of each tap [27, 8]."""
    sums: list[list[int]] = []
    users: list[list[int]] = [[] for _ in range(27)]
    offsets = [[[0], [1, 2]], [[0, 1], [2]]]  # of parity and tap, on each axis
    for parity, tap in itertools.product(itertools.product(range(2), repeat=3), repeat=2):
        axes = [offsets[q][e] for q, e in zip(parity, tap, strict=True)]
        taps = [9 * x + 3 * y + z for x, y, z in itertools.product(*axes)]
        for t in taps:
            users[t].append(len(sums))
        sums.append(taps + [27] * (8 - len(taps)))
    return torch.tensor(sums).to(device), torch.tensor(users).to(device)


def _upsample_weight(weight_27CO: Tensor) -> Tensor:
    """`reference_conv.sum_upsample_taps` in few kernels: fp32 [8, 8, C, O]."""
    C, O = weight_27CO.shape[1:]
    padded = torch.cat([weight_27CO.float(), weight_27CO.new_zeros(1, C, O, dtype=torch.float32)])
    taps = _summed_taps(weight_27CO.device)[0]
    return padded.index_select(0, taps.view(-1)).view(64, 8, C, O).sum(1).view(8, 8, C, O)


def _upsample_weight_grad(dw_88CO: Tensor) -> Tensor:
    sums = _summed_taps(dw_88CO.device)[1]
    C, O = dw_88CO.shape[2:]
    return dw_88CO.reshape(64, C, O).index_select(0, sums.view(-1)).view(27, 8, C, O).sum(1)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbors: Tensor,
    size: int,
    upsample: bool,
    wide: bool,
) -> Tensor:
    x, neighbors = x.contiguous(), neighbors.contiguous()
    taps = upsampling(size) if upsample else plain(size)
    weight = _upsample_weight(weight) if upsample else weight
    bias = None if bias is None else bias.contiguous()
    return gather_gemm(x, weight.to(x.dtype).contiguous(), bias, neighbors, taps, wide=wide)


_conv = torch.library.custom_op("sparse3d::sparse_conv", _forward, mutates_args=())


@_conv.register_fake
def _(x, weight, bias, neighbors, size, upsample, wide):
    return x.new_empty(neighbors.shape[0] * size**3, weight.shape[2])


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    size: int,
    upsample: bool,
    wide: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight (fp32) and bias (fp32); empty where not wanted."""
    x, dy, neighbors = x.contiguous(), dy.contiguous(), neighbors.contiguous()
    dx, dw, db = (
        x.new_empty(0),
        dy.new_empty(0, dtype=torch.float32),
        dy.new_empty(0, dtype=torch.float32),
    )
    if wanted[0]:
        if upsample:
            transposed = reference_conv.transposed_upsample(_upsample_weight(weight))
        else:
            transposed = weight.flip(0).transpose(1, 2)
        taps = downsampling(size) if upsample else plain(size)
        dx = gather_gemm(dy, transposed.to(x.dtype).contiguous(), None, neighbors, taps, wide=wide)
    if wanted[1] and upsample:
        dw_64OC = weight_grad(dy, x, neighbors, downsampling(size), wide=wide)
        dw = _upsample_weight_grad(reference_conv.untransposed_upsample(dw_64OC))
    elif wanted[1] and dy.shape[1] < x.shape[1]:  # the narrower rows are gathered, 27 times
        dw = (
            weight_grad(dy, x, neighbors, plain(size), wide=wide)
            .flip(0)
            .transpose(1, 2)
            .contiguous()
        )
    elif wanted[1]:
        dw = weight_grad(x, dy, neighbors, plain(size), wide=wide)
    if wanted[2]:
        db = dy.sum(0, dtype=torch.float32)
    return dx, dw, db


_conv_grad = torch.library.custom_op("sparse3d::sparse_conv_backward", _backward, mutates_args=())


@_conv_grad.register_fake
def _(dy, x, weight, neighbors, size, upsample, wide, wanted):
    shapes = (x.shape, weight.shape, weight.shape[2:])
    dx, dw, db = (shape if want else (0,) for shape, want in zip(shapes, wanted, strict=True))
    return (
        x.new_empty(dx),
        x.new_empty(dw, dtype=torch.float32),
        x.new_empty(db, dtype=torch.float32),
    )


def _conv_setup(ctx, inputs, output):
    x, weight, bias, neighbors, ctx.size, ctx.upsample, ctx.wide = inputs
    ctx.save_for_backward(x, weight, neighbors)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _conv_backward(ctx, dy):
    x, weight, neighbors = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    grads = _conv_grad(dy, x, weight, neighbors, ctx.size, ctx.upsample, ctx.wide, wanted)
    return *_typed(grads, wanted, weight.dtype, ctx.bias_dtype), None, None, None, None


def _typed(
    grads: tuple[Tensor, Tensor, Tensor],
    wanted: list[bool],
    weight: torch.dtype,
    bias: torch.dtype | None,
) -> list[Tensor | None]:
    dx, dw, db = grads
    typed = dx, dw.to(weight), db if bias is None else db.to(bias)
    return [grad if want else None for grad, want in zip(typed, wanted, strict=True)]


_conv.register_autograd(_conv_backward, setup_context=_conv_setup)


def _eager_forward(x, weight, bias, neighbors, *options):
    y = _forward(x, weight, bias, neighbors, *options)
    return y, (x, weight, neighbors), (*options, None if bias is None else bias.dtype)


def _eager_backward(wanted, dy, saved, rest):
    *options, bias_dtype = rest
    wanted = list(wanted[:3])
    return _typed(_backward(dy, *saved, *options, wanted), wanted, saved[1].dtype, bias_dtype)


def check_neighbors(neighbors_M27: Tensor, x_NC: Tensor) -> None:
    if (
        neighbors_M27.ndim != 2
        or neighbors_M27.shape[1] != 27
        or neighbors_M27.dtype != torch.int32
    ):
        raise ValueError(
            f"neighbors_M27 must be int32 [M, 27], got {neighbors_M27.dtype} {list(neighbors_M27.shape)}"
        )
    if neighbors_M27.device != x_NC.device:
        raise ValueError(
            f"neighbors_M27 must be on x_NC's device {x_NC.device}, got {neighbors_M27.device}"
        )


def _check(
    x_NC: Tensor,
    weight_27CO: Tensor,
    bias_O: Tensor | None,
    neighbors_M27: Tensor,
    size: int,
    upsample: bool,
) -> None:
    check_neighbors(neighbors_M27, x_NC)
    if size not in SIZES or (upsample and size == 1):
        raise ValueError(f"size must be one of {SIZES[1:] if upsample else SIZES}, got {size!r}")
    rows = len(neighbors_M27) * (size // 2 if upsample else size) ** 3
    if x_NC.ndim != 2 or len(x_NC) != rows or not x_NC.is_floating_point():
        raise ValueError(f"x_NC must be floating [{rows}, C], got {x_NC.dtype} {list(x_NC.shape)}")
    C = x_NC.shape[1]
    if weight_27CO.ndim != 3 or weight_27CO.shape[:2] != (27, C):
        raise ValueError(f"weight_27CO must be [27, {C}, O], got {list(weight_27CO.shape)}")
    if bias_O is not None and bias_O.shape != weight_27CO.shape[2:]:
        raise ValueError(f"bias_O must be [{weight_27CO.shape[2]}], got {list(bias_O.shape)}")
    for name, w in (("weight_27CO", weight_27CO), ("bias_O", bias_O)):
        if w is not None and w.device != x_NC.device:
            raise ValueError(f"{name} must be on x_NC's device {x_NC.device}, got {w.device}")
        if w is not None and w.dtype not in (x_NC.dtype, torch.float32):
            raise ValueError(f"{name} must be {x_NC.dtype} as x_NC or torch.float32, got {w.dtype}")


def sparse_conv(
    x_NC: Tensor,
    weight_27CO: Tensor,
    bias_O: Tensor | None,
    neighbors_M27: Tensor,
    *,
    size: int = 1,
    upsample: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Convolution with 3^3 taps at the voxels there are, absent ones counting as zero: [M * size^3, O] in x's dtype.

    size 1: a row is a voxel and neighbors_M27 (`neighbor_map`) holds the rows around it. size 2, 4 or 8: rows are full
    blocks, voxel (lx, ly, lz) of block m in row m * size^3 + (lx * size + ly) * size + lz, and neighbors_M27 is that of
    the blocks. upsample: x holds blocks of (size / 2)^3 whose voxels each stand for their 8 children; the result is
    that of the convolution after `duplicate_children`, from 8 taps a child instead of 27.

    x [N, C]; weight [27, C, O], tap (dx + 1) * 9 + (dy + 1) * 3 + dz + 1 multiplies the voxel at +(dx, dy, dz); weight
    and bias in x's dtype or float32. Under autocast x is cast to its dtype. Sums in fp32; taps are summed in fp32
    before they are rounded. Differentiable in x, weight and bias. ValueError for other shapes, dtypes or devices.
    """
    device_type = x_NC.device.type
    if torch.is_autocast_enabled(device_type) and x_NC.dtype != torch.float64:
        x_NC = x_NC.to(torch.get_autocast_dtype(device_type))
    _check(x_NC, weight_27CO, bias_O, neighbors_M27, size, upsample)
    if use_triton(backend, x_NC):
        check_dtype("x_NC", x_NC)
        inputs = (x_NC, weight_27CO, bias_O, neighbors_M27, size, upsample, False)
        if eager_autograd.needs_dispatcher(x_NC, weight_27CO, bias_O):
            return _conv(*inputs)
        return eager_autograd.apply(_eager_forward, _eager_backward, *inputs)
    with torch.autocast(device_type, enabled=False):
        return reference_conv.sparse_conv(x_NC, weight_27CO, bias_O, neighbors_M27, size, upsample)


def duplicate_children(x_NC: Tensor, size: int) -> Tensor:
    """Rows of full blocks of (size / 2)^3 -> [8 * N, C], rows of blocks of size^3: every voxel becomes its 8 children.

    ValueError if size is not 2, 4 or 8 or the rows are not whole blocks.
    """
    if size not in SIZES[1:]:
        raise ValueError(f"size must be one of {SIZES[1:]}, got {size!r}")
    if x_NC.ndim != 2 or len(x_NC) % (size // 2) ** 3:
        raise ValueError(f"x_NC must be [M * {(size // 2) ** 3}, C], got {list(x_NC.shape)}")
    return reference_conv.duplicate_children(x_NC, size)
