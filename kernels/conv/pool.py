"""Mean over the children of each parent voxel: the stride-2 pooling of the encoder."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.conv import reference as reference_conv
from kernels.runtime import eager_autograd
from kernels.runtime.checks import check_dtype, use_triton
from kernels.runtime.integer_math import cdiv, next_power_of_2
from kernels.runtime.triton_ops import on_device


@triton.jit(do_not_specialize=["P", "extra"])
def _pool_fwd(x_ptr, children_ptr, y_ptr, P, C, extra, BP: tl.constexpr, BC: tl.constexpr):
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    acc, count = tl.zeros([BP, BC], tl.float32), tl.zeros([BP], tl.int32) + extra
    for child in tl.static_range(8):
        row = tl.load(children_ptr + p.to(tl.int64) * 8 + child, p < P, other=-1)
        mask = (row >= 0)[:, None] & (c < C)[None, :]
        acc += tl.load(x_ptr + row.to(tl.int64)[:, None] * C + c[None, :], mask, other=0.0).to(
            tl.float32
        )
        count += (row >= 0).to(tl.int32)
    mean = acc / tl.maximum(count, 1).to(tl.float32)[:, None]
    mask = (p < P)[:, None] & (c < C)[None, :]
    tl.store(
        y_ptr + p.to(tl.int64)[:, None] * C + c[None, :], mean.to(y_ptr.dtype.element_ty), mask
    )


@triton.jit(do_not_specialize=["P", "extra"])
def _pool_bwd(dy_ptr, children_ptr, dx_ptr, P, C, extra, BP: tl.constexpr, BC: tl.constexpr):
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    count = tl.zeros([BP], tl.int32) + extra
    for child in tl.static_range(8):
        count += (tl.load(children_ptr + p.to(tl.int64) * 8 + child, p < P, other=-1) >= 0).to(
            tl.int32
        )
    mask = (p < P)[:, None] & (c < C)[None, :]
    dy = tl.load(dy_ptr + p.to(tl.int64)[:, None] * C + c[None, :], mask, other=0.0).to(tl.float32)
    share = (dy / tl.maximum(count, 1).to(tl.float32)[:, None]).to(dx_ptr.dtype.element_ty)
    for child in tl.static_range(8):
        row = tl.load(children_ptr + p.to(tl.int64) * 8 + child, p < P, other=-1)
        tl.store(
            dx_ptr + row.to(tl.int64)[:, None] * C + c[None, :],
            share,
            (row >= 0)[:, None] & (c < C)[None, :],
        )


def _launch(kernel, a: Tensor, children: Tensor, b: Tensor, plus_one: bool) -> Tensor:
    P, C = len(children), a.shape[1]
    if P and C:
        BC = min(next_power_of_2(C), 128)
        BP = max(1, 2048 // BC)
        with on_device(a):
            kernel[(cdiv(P, BP), cdiv(C, BC))](a, children, b, P, C, int(plus_one), BP, BC)
    return b


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


def _eager_backward(_, dy, saved, rest):
    return (_backward(dy, *saved, *rest),)


def pool_children(
    x_NC: Tensor, children_P8: Tensor, *, plus_one: bool = False, backend: str = "auto"
) -> Tensor:
    """Mean of the rows that children_P8 (int32 [P, 8], -1 for none) names: [N, C] -> [P, C] in x's dtype, fp32 sums.

    plus_one divides by n + 1, as the published weights expect. A row is a child of at most one parent, and a parent
    has at least one. Differentiable in x. ValueError for other shapes, dtypes or devices.
    """
    if x_NC.ndim != 2 or not x_NC.is_floating_point():
        raise ValueError(f"x_NC must be floating [N, C], got {x_NC.dtype} {list(x_NC.shape)}")
    if children_P8.ndim != 2 or children_P8.shape[1] != 8 or children_P8.dtype != torch.int32:
        raise ValueError(
            f"children_P8 must be int32 [P, 8], got {children_P8.dtype} {list(children_P8.shape)}"
        )
    if children_P8.device != x_NC.device:
        raise ValueError(
            f"children_P8 must be on x_NC's device {x_NC.device}, got {children_P8.device}"
        )
    if not use_triton(backend, x_NC):
        return reference_conv.pool_children(x_NC, children_P8, plus_one)
    check_dtype("x_NC", x_NC)
    if eager_autograd.needs_dispatcher(x_NC):
        return _pool(x_NC, children_P8, plus_one)
    return eager_autograd.apply(_eager_forward, _eager_backward, x_NC, children_P8, plus_one)
