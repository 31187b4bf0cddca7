"""The decoder's last layer: SiLU, a linear layer to one channel, tanh; of its input nothing but itself is kept."""

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

_TILES = 32  # a program of the backward works through, so that its sums for the weight are few


@triton.jit
def _rows(x_ptr, w_ptr, n, N, C, BC: tl.constexpr):
    """Rows n of x in fp32 (fp64 for fp32) [BN, BC], the weight [BC], where they are and their mask."""
    WIDE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float32 else tl.float32  # pyright: ignore[reportAssignmentType]
    c = tl.arange(0, BC)
    at = n.to(tl.int64)[:, None] * C + c[None, :]
    mask = (n < N)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + at, mask, other=0.0).to(WIDE)
    return x, tl.load(w_ptr + c, c < C, other=0.0).to(WIDE), at, mask


@triton.jit(do_not_specialize=["N"])
def _head_fwd(x_ptr, w_ptr, b_ptr, y_ptr, N, C: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    x, w, _, _ = _rows(x_ptr, w_ptr, n, N, C, BC)  # pyright: ignore[reportGeneralTypeIssues]
    logit = tl.sum(x * tl.sigmoid(x) * w[None, :], 1) + tl.load(b_ptr)
    e = tl.exp(-2.0 * tl.abs(logit))  # tanh without overflow; the interpreter has none of its own
    tl.store(y_ptr + n, tl.where(logit < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e), n < N)


@triton.jit(do_not_specialize=["N"])
def _head_bwd(
    x_ptr, w_ptr, y_ptr, dy_ptr, dx_ptr, dw_ptr, db_ptr, N,
    C: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    program, c = tl.program_id(0).to(tl.int64), tl.arange(0, BC)
    SUM: tl.constexpr = dw_ptr.dtype.element_ty
    dw, db = tl.zeros([BC], SUM), tl.zeros([BN], SUM)
    for tile in range(TILES):
        n = (program * TILES + tile) * BN + tl.arange(0, BN)
        x, w, at, mask = _rows(x_ptr, w_ptr, n, N, C, BC)  # pyright: ignore[reportGeneralTypeIssues]
        y, dy = tl.load(y_ptr + n, n < N, other=0.0).to(SUM), tl.load(dy_ptr + n, n < N, other=0.0)
        dlogit = dy * ((1.0 - y) * (1.0 + y))
        gate = tl.sigmoid(x)
        active = x * gate
        dx = dlogit[:, None] * w[None, :] * (gate + active * (1.0 - gate))
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask)
        dw += tl.sum(active * dlogit[:, None], 0)
        db += dlogit
    tl.store(dw_ptr + program * C + c, dw, c < C)
    tl.store(db_ptr + program, tl.sum(db, 0))


def _sizes(C: int) -> tuple[int, int]:
    BC = next_power_of_2(C)
    return max(1, 2048 // BC), BC


def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x, (N, C) = x.contiguous(), x.shape
    y = torch.empty(N, dtype=torch.float32, device=x.device)
    if N:
        BN, BC = _sizes(C)
        with on_device(x):
            _head_fwd[(cdiv(N, BN),)](x, weight.contiguous(), bias, y, N, C, BN, BC)
    return y


_head = torch.library.custom_op("sparse3d::sdf_head", _forward, mutates_args=())


@_head.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _backward(
    dy: Tensor, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x, (N, C) = x.contiguous(), x.shape
    dx, (BN, BC) = torch.empty_like(x), _sizes(C)
    programs = cdiv(N, BN * _TILES)
    sums = torch.float64 if x.dtype == torch.float32 else torch.float32
    dw, db = x.new_empty(programs, C, dtype=sums), x.new_empty(programs, 1, dtype=sums)
    if N:
        with on_device(x):
            _head_bwd[(programs,)](
                x, weight.contiguous(), y, dy.contiguous(), dx, dw, db, N, C, BN, BC, _TILES
            )
    return dx, dw.sum(0).to(weight.dtype), db.sum(0).to(bias.dtype)


_head_grad = torch.library.custom_op("sparse3d::sdf_head_backward", _backward, mutates_args=())


@_head_grad.register_fake
def _(dy, y, x, weight, bias):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output, *inputs)


_head.register_autograd(lambda ctx, dy: _head_grad(dy, *ctx.saved_tensors), setup_context=_setup)


def _eager_forward(*inputs):
    y = _forward(*inputs)
    return y, (y, *inputs), None


def _eager_backward(_, dy, saved, __):
    return _backward(dy, *saved)


def sdf_head(x_NC: Tensor, weight_C: Tensor, bias_1: Tensor, *, backend: str = "auto") -> Tensor:
    """tanh(SiLU(x) @ weight + bias) in fp32: [N, C] -> [N] in [-1, 1], float32 (float64 for float64).

    weight [C], bias [1], in x's dtype or float32. Differentiable in all three; the backward computes SiLU again.
    ValueError for other shapes, dtypes or devices.
    """
    if x_NC.ndim != 2 or not x_NC.is_floating_point():
        raise ValueError(f"x_NC must be floating [N, C], got {x_NC.dtype} {list(x_NC.shape)}")
    for name, w, rows in (("weight_C", weight_C, x_NC.shape[1]), ("bias_1", bias_1, 1)):
        if (
            w.shape != (rows,)
            or w.dtype not in (x_NC.dtype, torch.float32)
            or w.device != x_NC.device
        ):
            found = f"{w.dtype} {list(w.shape)} on {w.device}"
            raise ValueError(
                f"{name} must be [{rows}] in x_NC's dtype or float32 on {x_NC.device}, got {found}"
            )
    if not use_triton(backend, x_NC):
        with torch.autocast(x_NC.device.type, enabled=False):
            return reference_conv.sdf_head(x_NC, weight_C, bias_1)
    check_dtype("x_NC", x_NC)
    if eager_autograd.needs_dispatcher(x_NC, weight_C, bias_1):
        return _head(x_NC, weight_C, bias_1)
    return eager_autograd.apply(_eager_forward, _eager_backward, x_NC, weight_C, bias_1)
