"""The decoder's last layer: SiLU, a linear layer to one channel, and tanh.

The definition is `sdf_head` in kernels.conv.reference. The forward keeps no intermediate result.
The backward computes SiLU again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.conv import reference as reference_conv
from kernels.runtime import eager_autograd
from kernels.runtime.checks import check_dtype, check_float_rows, use_triton
from kernels.runtime.integer_math import cdiv, next_power_of_2
from kernels.runtime.triton_ops import on_device

# Tiles that one program of the backward processes, so that there are few partial sums.
_TILES = 32


@triton.jit
def _load_rows(x_ptr, w_ptr, n, N, C, BLOCK_C: tl.constexpr):
    """Rows n of x [BLOCK_N, BLOCK_C] and the weight [BLOCK_C], in fp32 (fp64 for fp32 inputs).

    Also returns the offsets and the mask of the rows.
    """
    WIDE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float32 else tl.float32  # pyright: ignore[reportAssignmentType]
    c = tl.arange(0, BLOCK_C)
    offsets = n.to(tl.int64)[:, None] * C + c[None, :]
    mask = (n < N)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + offsets, mask, other=0.0).to(WIDE)
    return x, tl.load(w_ptr + c, c < C, other=0.0).to(WIDE), offsets, mask


@triton.jit(do_not_specialize=["N"])
def _head_fwd(
    x_ptr, w_ptr, b_ptr, y_ptr, N, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x, w, _, _ = _load_rows(x_ptr, w_ptr, n, N, C, BLOCK_C)  # pyright: ignore[reportGeneralTypeIssues]
    logit = tl.sum(x * tl.sigmoid(x) * w[None, :], 1) + tl.load(b_ptr)  # [BLOCK_N]
    # tanh without overflow. The interpreter has no tanh of its own.
    e = tl.exp(-2.0 * tl.abs(logit))
    tl.store(y_ptr + n, tl.where(logit < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e), n < N)


@triton.jit(do_not_specialize=["N"])
def _head_bwd(
    x_ptr, w_ptr, y_ptr, dy_ptr, dx_ptr, dw_ptr, db_ptr, N, C: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # One program: TILES tiles of BLOCK_N rows, with one partial sum for weight and bias.
    program, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_C)
    SUM: tl.constexpr = dw_ptr.dtype.element_ty
    dw, db = tl.zeros([BLOCK_C], SUM), tl.zeros([BLOCK_N], SUM)
    for tile in range(TILES):
        n = (program * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        x, w, offsets, mask = _load_rows(x_ptr, w_ptr, n, N, C, BLOCK_C)  # pyright: ignore[reportGeneralTypeIssues]
        # Gradient of the logit, through tanh.
        y = tl.load(y_ptr + n, n < N, other=0.0).to(SUM)  # [BLOCK_N]
        dy = tl.load(dy_ptr + n, n < N, other=0.0)  # [BLOCK_N]
        dlogit = dy * ((1.0 - y) * (1.0 + y))
        # Gradient of x, through SiLU.
        gate = tl.sigmoid(x)
        active = x * gate
        dx = dlogit[:, None] * w[None, :] * (gate + active * (1.0 - gate))
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask)
        dw += tl.sum(active * dlogit[:, None], 0)
        db += dlogit
    tl.store(dw_ptr + program * C + c, dw, c < C)
    tl.store(db_ptr + program, tl.sum(db, 0))


def _tile_sizes(C: int) -> tuple[int, int]:
    """Rows and channels of a tile."""
    BLOCK_C = next_power_of_2(C)
    return max(1, 2048 // BLOCK_C), BLOCK_C


def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = x.contiguous()
    N, C = x.shape
    y = torch.empty(N, dtype=torch.float32, device=x.device)
    if N:
        BLOCK_N, BLOCK_C = _tile_sizes(C)
        with on_device(x):
            _head_fwd[(cdiv(N, BLOCK_N),)](x, weight.contiguous(), bias, y, N, C, BLOCK_N, BLOCK_C)
    return y


_head = torch.library.custom_op("sparse3d::sdf_head", _forward, mutates_args=())


@_head.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _backward(
    dy: Tensor, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    N, C = x.shape
    dx = torch.empty_like(x)
    BLOCK_N, BLOCK_C = _tile_sizes(C)
    programs = cdiv(N, BLOCK_N * _TILES)
    sum_dtype = torch.float64 if x.dtype == torch.float32 else torch.float32
    dw = x.new_empty(programs, C, dtype=sum_dtype)
    db = x.new_empty(programs, 1, dtype=sum_dtype)
    if N:
        weight_C, dy_N = weight.contiguous(), dy.contiguous()
        with on_device(x):
            _head_bwd[(programs,)](x, weight_C, y, dy_N, dx, dw, db, N, C, BLOCK_N, BLOCK_C, _TILES)
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
    """Return tanh(SiLU(x) @ weight + bias). Differentiable in all three tensors.

    Args:
        x_NC: [N, C], fp32, bf16 or fp16.
        weight_C: [C] in the dtype of `x_NC` or float32.
        bias_1: [1] in the dtype of `x_NC` or float32.
        backend: As in `sparse_conv`.

    Returns:
        float32 [N] in [-1, 1]; float64 for float64 inputs.

    Raises:
        ValueError: If `x_NC` is not floating [N, C], or a parameter does not fit it.
    """
    check_float_rows("x_NC", x_NC)
    for name, w, rows in (("weight_C", weight_C, x_NC.shape[1]), ("bias_1", bias_1, 1)):
        fits = w.shape == (rows,) and w.dtype in (x_NC.dtype, torch.float32)
        if not fits or w.device != x_NC.device:
            raise ValueError(
                f"{name} must be [{rows}] in x_NC's dtype or float32 on {x_NC.device}, "
                f"got {w.dtype} {list(w.shape)} on {w.device}"
            )
    if not use_triton(backend, x_NC):
        with torch.autocast(x_NC.device.type, enabled=False):
            return reference_conv.sdf_head(x_NC, weight_C, bias_1)
    check_dtype("x_NC", x_NC)
    if eager_autograd.needs_dispatcher(x_NC, weight_C, bias_1):
        return _head(x_NC, weight_C, bias_1)
    return eager_autograd.apply(_eager_forward, _eager_backward, x_NC, weight_C, bias_1)
