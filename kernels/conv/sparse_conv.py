"""Submanifold 3^3 convolution over single voxels or over full blocks of voxels.

The definition is `sparse_conv` in kernels.conv.reference.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from kernels.conv import reference as reference_conv
from kernels.conv.gather_gemm import downsampling_taps, gather_gemm, plain_taps, upsampling_taps
from kernels.conv.sparse_conv_backward import weight_grad
from kernels.runtime import eager_autograd
from kernels.runtime.checks import (
    check_device,
    check_dtype,
    check_float_rows,
    check_parameter_dtype,
    use_triton,
)

SIZES = (1, 2, 4, 8)
"""Sides of blocks, in voxels."""


@functools.cache
def _summed_taps(device: torch.device) -> tuple[Tensor, Tensor]:
    """Index tables of `reference_conv.sum_upsample_taps`.

    Returns the taps of each sum [64, 8], 27 for none, and the sums of each tap [27, 8].
    """
    sums: list[list[int]] = []
    users: list[list[int]] = [[] for _ in range(27)]
    offsets = [[[0], [1, 2]], [[0, 1], [2]]]  # taps of each parity and summed tap, on each axis
    for parity, tap in itertools.product(itertools.product(range(2), repeat=3), repeat=2):
        axes = [offsets[q][e] for q, e in zip(parity, tap, strict=True)]
        taps = [9 * x + 3 * y + z for x, y, z in itertools.product(*axes)]
        for t in taps:
            users[t].append(len(sums))
        sums.append(taps + [27] * (8 - len(taps)))
    return torch.tensor(sums).to(device), torch.tensor(users).to(device)


def _upsample_weight(weight_27CO: Tensor) -> Tensor:
    """`reference_conv.sum_upsample_taps` with few kernels: fp32 [8, 8, C, O]."""
    C, O = weight_27CO.shape[1:]
    padded = torch.cat([weight_27CO.float(), weight_27CO.new_zeros(1, C, O, dtype=torch.float32)])
    taps, _ = _summed_taps(weight_27CO.device)
    return padded.index_select(0, taps.view(-1)).view(64, 8, C, O).sum(1).view(8, 8, C, O)


def _upsample_weight_grad(dw_88CO: Tensor) -> Tensor:
    """Gradient of `_upsample_weight`: [27, C, O]."""
    _, sums = _summed_taps(dw_88CO.device)
    C, O = dw_88CO.shape[2:]
    return dw_88CO.reshape(64, C, O).index_select(0, sums.view(-1)).view(27, 8, C, O).sum(1)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbors: Tensor,
    size: int,
    upsample: bool,
    long_offsets: bool,
) -> Tensor:
    taps = upsampling_taps(size) if upsample else plain_taps(size)
    weight = _upsample_weight(weight) if upsample else weight
    return gather_gemm(
        x.contiguous(),
        weight.to(x.dtype).contiguous(),
        None if bias is None else bias.contiguous(),
        neighbors.contiguous(),
        taps,
        long_offsets=long_offsets,
    )


_conv = torch.library.custom_op("sparse3d::sparse_conv", _forward, mutates_args=())


@_conv.register_fake
def _(x, weight, bias, neighbors, size, upsample, long_offsets):
    return x.new_empty(neighbors.shape[0] * size**3, weight.shape[2])


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbors: Tensor,
    size: int,
    upsample: bool,
    long_offsets: bool,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight (fp32) and bias (fp32), empty where they are not needed."""
    x, dy, neighbors = x.contiguous(), dy.contiguous(), neighbors.contiguous()
    dx = x.new_empty(0)
    dw = dy.new_empty(0, dtype=torch.float32)
    db = dy.new_empty(0, dtype=torch.float32)
    taps = downsampling_taps(size) if upsample else plain_taps(size)
    if needs_grad[0]:
        if upsample:
            transposed = reference_conv.transposed_upsample(_upsample_weight(weight))
        else:
            transposed = weight.flip(0).transpose(1, 2)
        transposed = transposed.to(x.dtype).contiguous()
        dx = gather_gemm(dy, transposed, None, neighbors, taps, long_offsets=long_offsets)
    if needs_grad[1]:
        # The narrower rows are gathered, 27 times. With upsampling those are the rows of dy.
        gather_dy = upsample or dy.shape[1] < x.shape[1]
        gathered, dense = (dy, x) if gather_dy else (x, dy)
        dw = weight_grad(gathered, dense, neighbors, taps, long_offsets=long_offsets)
        if upsample:
            dw = _upsample_weight_grad(reference_conv.untransposed_upsample(dw))
        elif gather_dy:
            dw = dw.flip(0).transpose(1, 2).contiguous()
    if needs_grad[2]:
        db = dy.sum(0, dtype=torch.float32)
    return dx, dw, db


_conv_grad = torch.library.custom_op("sparse3d::sparse_conv_backward", _backward, mutates_args=())


@_conv_grad.register_fake
def _(dy, x, weight, neighbors, size, upsample, long_offsets, needs_grad):
    shapes = (x.shape, weight.shape, weight.shape[2:])
    dx, dw, db = (
        shape if needed else (0,) for shape, needed in zip(shapes, needs_grad, strict=True)
    )
    return (
        x.new_empty(dx),
        x.new_empty(dw, dtype=torch.float32),
        x.new_empty(db, dtype=torch.float32),
    )


def _conv_setup(ctx, inputs, output):
    x, weight, bias, neighbors, ctx.size, ctx.upsample, ctx.long_offsets = inputs
    ctx.save_for_backward(x, weight, neighbors)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _conv_backward(ctx, dy):
    x, weight, neighbors = ctx.saved_tensors
    needs_grad = list(ctx.needs_input_grad[:3])
    options = (ctx.size, ctx.upsample, ctx.long_offsets)
    grads = _conv_grad(dy, x, weight, neighbors, *options, needs_grad)
    return *_typed(grads, needs_grad, weight.dtype, ctx.bias_dtype), None, None, None, None


def _typed(
    grads: tuple[Tensor, Tensor, Tensor],
    needs_grad: list[bool],
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> list[Tensor | None]:
    """The gradients in the dtypes of their inputs, None where they are not needed."""
    dx, dw, db = grads
    typed = dx, dw.to(weight_dtype), db if bias_dtype is None else db.to(bias_dtype)
    return [grad if needed else None for grad, needed in zip(typed, needs_grad, strict=True)]


_conv.register_autograd(_conv_backward, setup_context=_conv_setup)


def _eager_forward(x, weight, bias, neighbors, *options):
    y = _forward(x, weight, bias, neighbors, *options)
    return y, (x, weight, neighbors), (*options, None if bias is None else bias.dtype)


def _eager_backward(needs_grad, dy, saved, context):
    *options, bias_dtype = context
    needs_grad = list(needs_grad[:3])
    grads = _backward(dy, *saved, *options, needs_grad)
    return _typed(grads, needs_grad, saved[1].dtype, bias_dtype)


def _check(
    x_NC: Tensor,
    weight_27CO: Tensor,
    bias_O: Tensor | None,
    neighbors_M27: Tensor,
    size: int,
    upsample: bool,
) -> None:
    shape = list(neighbors_M27.shape)
    if len(shape) != 2 or shape[1] != 27 or neighbors_M27.dtype != torch.int32:
        raise ValueError(f"neighbors_M27 must be int32 [M, 27], got {neighbors_M27.dtype} {shape}")
    check_device("neighbors_M27", neighbors_M27, "x_NC", x_NC)
    if size not in SIZES or (upsample and size == 1):
        raise ValueError(f"size must be one of {SIZES[1:] if upsample else SIZES}, got {size!r}")
    rows = len(neighbors_M27) * (size // 2 if upsample else size) ** 3
    check_float_rows("x_NC", x_NC, rows)
    C = x_NC.shape[1]
    if weight_27CO.ndim != 3 or weight_27CO.shape[:2] != (27, C):
        raise ValueError(f"weight_27CO must be [27, {C}, O], got {list(weight_27CO.shape)}")
    if bias_O is not None and bias_O.shape != weight_27CO.shape[2:]:
        raise ValueError(f"bias_O must be [{weight_27CO.shape[2]}], got {list(bias_O.shape)}")
    for name, parameter in (("weight_27CO", weight_27CO), ("bias_O", bias_O)):
        if parameter is not None:
            check_device(name, parameter, "x_NC", x_NC)
            check_parameter_dtype(name, parameter, "x_NC", x_NC)


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
    """Convolution with 3^3 taps at the voxels that exist. Absent voxels count as zero.

    With size 1, a row is a voxel and `neighbors_M27` holds the rows around it. With size 2, 4 or 8,
    rows are full blocks of voxels: voxel (lx, ly, lz) of block m has row m * size^3 + (lx * size +
    ly) * size + lz, and `neighbors_M27` is the table of the blocks.

    Differentiable in x, weight and bias. Sums are fp32. Under autocast x is cast to its dtype.

    Args:
        x_NC: [N, C], fp32, bf16 or fp16, with N = M * size^3 rows. With `upsample`, blocks of
            (size / 2)^3 voxels, which each stand for their 8 children.
        weight_27CO: [27, C, O] in the dtype of `x_NC` or float32. Tap (dx + 1) * 9 + (dy + 1) * 3 +
            dz + 1 multiplies the voxel at +(dx, dy, dz).
        bias_O: [O] in the dtype of `x_NC` or float32, or None.
        neighbors_M27: int32 [M, 27], see `neighbor_map`.
        size: Side of the blocks of the result in voxels.
        upsample: Give the result of the convolution after `duplicate_children`, from 8 taps per
            child instead of 27. Taps are summed in fp32 before they are rounded.
        backend: "auto" takes Triton for CUDA tensors and the torch reference for others. "triton"
            works on CPU tensors only in Triton's interpreter. "reference" takes the torch
            definition, with any float dtype.

    Returns:
        [M * size^3, O] in the dtype of `x_NC`.

    Raises:
        ValueError: If a shape, dtype, device or option does not fit.
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
    """Give every voxel's row to its 8 children.

    Args:
        x_NC: [N, C], rows of full blocks of (size / 2)^3 voxels.
        size: Side of the blocks of the result in voxels: 2, 4 or 8.

    Returns:
        [8 * N, C], rows of blocks of size^3 voxels.

    Raises:
        ValueError: If the size is another one or the rows are not whole blocks.
    """
    if size not in SIZES[1:]:
        raise ValueError(f"size must be one of {SIZES[1:]}, got {size!r}")
    if x_NC.ndim != 2 or len(x_NC) % (size // 2) ** 3:
        raise ValueError(f"x_NC must be [M * {(size // 2) ** 3}, C], got {list(x_NC.shape)}")
    return reference_conv.duplicate_children(x_NC, size)
