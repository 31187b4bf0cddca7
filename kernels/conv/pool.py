"""Mean over the children of each parent voxel: the stride-2 pooling of the encoder.

The definition is `pool_children` in kernels.conv.reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.conv import reference as reference_conv
from kernels.runtime import eager_autograd
from kernels.runtime.checks import check_device, check_dtype, check_float_rows, use_triton
from kernels.runtime.integer_math import cdiv, next_power_of_2
from kernels.runtime.triton_ops import on_device


@triton.jit(do_not_specialize=["P", "extra"])
def _pool_fwd(
    x_ptr, children_ptr, y_ptr, P, C, extra, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    # One program: BLOCK_C channels of BLOCK_P parents.
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    count = tl.zeros([BLOCK_P], tl.int32) + extra
    for child in tl.static_range(8):
        row = tl.load(children_ptr + p.to(tl.int64) * 8 + child, p < P, other=-1)  # [BLOCK_P]
        mask = (row >= 0)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + row.to(tl.int64)[:, None] * C + c[None, :], mask, other=0.0)
        acc += x.to(tl.float32)
        count += (row >= 0).to(tl.int32)
    mean = acc / tl.maximum(count, 1).to(tl.float32)[:, None]
    mask = (p < P)[:, None] & (c < C)[None, :]
    mean = mean.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + p.to(tl.int64)[:, None] * C + c[None, :], mean, mask)


@triton.jit(do_not_specialize=["P", "extra"])
def _pool_bwd(
    dy_ptr, children_ptr, dx_ptr, P, C, extra, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    # One program: BLOCK_C channels of BLOCK_P parents. Count the children.
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = tl.zeros([BLOCK_P], tl.int32) + extra
    for child in tl.static_range(8):
        row = tl.load(children_ptr + p.to(tl.int64) * 8 + child, p < P, other=-1)  # [BLOCK_P]
        count += (row >= 0).to(tl.int32)

    # Give each child its share of the parent's gradient.
    mask = (p < P)[:, None] & (c < C)[None, :]
    dy = tl.load(dy_ptr + p.to(tl.int64)[:, None] * C + c[None, :], mask, other=0.0)
    share = dy.to(tl.float32) / tl.maximum(count, 1).to(tl.float32)[:, None]
    share = share.to(dx_ptr.dtype.element_ty)  # [BLOCK_P, BLOCK_C]
    for child in tl.static_range(8):
        row = tl.load(children_ptr + p.to(tl.int64) * 8 + child, p < P, other=-1)
        mask = (row >= 0)[:, None] & (c < C)[None, :]
        tl.store(dx_ptr + row.to(tl.int64)[:, None] * C + c[None, :], share, mask)


def _launch(kernel, source: Tensor, children: Tensor, target: Tensor, plus_one: bool) -> Tensor:
    P, C = len(children), source.shape[1]
    if P and C:
        BLOCK_C = min(next_power_of_2(C), 128)
        BLOCK_P = max(1, 2048 // BLOCK_C)
        grid = (cdiv(P, BLOCK_P), cdiv(C, BLOCK_C))
        with on_device(source):
            kernel[grid](source, children, target, P, C, int(plus_one), BLOCK_P, BLOCK_C)
    return target


def _forward(x: Tensor, children: Tensor, plus_one: bool) -> Tensor:
    y = x.new_empty(len(children), x.shape[1])
    return _launch(_pool_fwd, x.contiguous(), children.contiguous(), y, plus_one)


_pool = torch.library.custom_op("sparse3d::pool_children", _forward, mutates_args=())


@_pool.register_fake
def _(x, children, plus_one):
    return x.new_empty(children.shape[0], x.shape[1])


def _backward(dy: Tensor, children: Tensor, rows: int, plus_one: bool) -> Tensor:
    dx = dy.new_zeros(rows, dy.shape[1])  # rows may have no parent
    return _launch(_pool_bwd, dy.contiguous(), children.contiguous(), dx, plus_one)


_pool_grad = torch.library.custom_op("sparse3d::pool_children_backward", _backward, mutates_args=())


@_pool_grad.register_fake
def _(dy, children, rows, plus_one):
    return dy.new_empty(rows, dy.shape[1])


def _setup(ctx, inputs, output):
    x, children, ctx.plus_one = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(children)


_pool.register_autograd(
    lambda ctx, dy: (_pool_grad(dy, *ctx.saved_tensors, ctx.rows, ctx.plus_one), None, None),
    setup_context=_setup,
)


def _eager_forward(x, children, plus_one):
    return _forward(x, children, plus_one), (children,), (len(x), plus_one)


def _eager_backward(_, dy, saved, context):
    return (_backward(dy, *saved, *context),)


def pool_children(
    x_NC: Tensor, children_P8: Tensor, *, plus_one: bool = False, backend: str = "auto"
) -> Tensor:
    """Mean of the rows of each parent's children. Sums are fp32. Differentiable in x.

    Args:
        x_NC: [N, C], fp32, bf16 or fp16.
        children_P8: int32 [P, 8], rows of the children of each parent, -1 for none, as in
            `ParentVoxels`. A row is the child of at most one parent, and each parent has a child.
        plus_one: Divide the sum of n rows by n + 1, as the published Direct3D-S2 weights expect.
        backend: As in `sparse_conv`.

    Returns:
        [P, C] in the dtype of `x_NC`.

    Raises:
        ValueError: If `children_P8` is not int32 [P, 8] on the device of `x_NC`, or x does not fit.
    """
    check_float_rows("x_NC", x_NC)
    if children_P8.ndim != 2 or children_P8.shape[1] != 8 or children_P8.dtype != torch.int32:
        raise ValueError(
            f"children_P8 must be int32 [P, 8], got {children_P8.dtype} {list(children_P8.shape)}"
        )
    check_device("children_P8", children_P8, "x_NC", x_NC)
    if not use_triton(backend, x_NC):
        return reference_conv.pool_children(x_NC, children_P8, plus_one)
    check_dtype("x_NC", x_NC)
    if eager_autograd.needs_dispatcher(x_NC):
        return _pool(x_NC, children_P8, plus_one)
    return eager_autograd.apply(_eager_forward, _eager_backward, x_NC, children_P8, plus_one)
