"""Linear -> GELU -> linear, whose backward keeps the first product and not the activation.

The definition is `mlp` in kernels.fused.reference. One kernel computes the activation again, its
gradient, and the sums of the first bias's gradient. The sums are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import gelu

from kernels.fused import reference
from kernels.runtime import eager_autograd
from kernels.runtime.checks import check_dtype, check_float_rows, check_same_type, use_triton
from kernels.runtime.integer_math import cdiv, next_power_of_2
from kernels.runtime.triton_ops import on_device

_ROWS = 64  # rows whose bias gradients one program sums
# gelu(x) = x (1 + tanh(u)) / 2 = x sigmoid(2 u) with u = SQRT_2_PI (x + CUBIC x^3).
SQRT_2_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)


@triton.jit(do_not_specialize=["N"])
def _gelu_bwd(
    pre_ptr, dact_ptr, act_ptr, dpre_ptr, part_ptr, N, F: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    # One program: ROWS rows of BLOCK_F channels, row by row. part [programs, F] receives the sums.
    i = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = f < F
    total = tl.zeros([BLOCK_F], tl.float32)
    for n in tl.range(i * ROWS, tl.minimum((i + 1) * ROWS, N), num_stages=3):
        x = tl.load(pre_ptr + n * F + f, inside, other=0.0).to(tl.float32)
        dact = tl.load(dact_ptr + n * F + f, inside, other=0.0).to(tl.float32)
        share = tl.sigmoid((x + x * x * x * CUBIC) * SQRT_2_PI * 2.0)
        tl.store(act_ptr + n * F + f, (x * share).to(act_ptr.dtype.element_ty), inside)
        slope_of_u = (1.0 + x * x * CUBIC * 3.0) * SQRT_2_PI
        slope = share + 2.0 * x * share * (1.0 - share) * slope_of_u
        dpre = (dact * slope).to(dpre_ptr.dtype.element_ty)
        tl.store(dpre_ptr + n * F + f, dpre, inside)
        total += dpre.to(tl.float32)
    tl.store(part_ptr + i * F + f, total, inside)


def _gelu_backward(pre_NF: Tensor, dact_NF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the activation, the gradient before it, and the fp32 sum of that over the rows.

    The gradient overwrites `dact_NF`.
    """
    N, F = pre_NF.shape
    act_NF = torch.empty_like(pre_NF)
    part = pre_NF.new_empty(cdiv(N, _ROWS), F, dtype=torch.float32)
    BLOCK_F = min(1024, next_power_of_2(F))
    if N:
        with on_device(pre_NF):
            _gelu_bwd[(len(part), cdiv(F, BLOCK_F))](
                pre_NF, dact_NF, act_NF, dact_NF, part, N, F, _ROWS, BLOCK_F, num_warps=4
            )
    return act_NF, dact_NF, part.sum(0)


def _forward(x, weight1, bias1, weight2, bias2) -> tuple[Tensor, Tensor]:
    """Return the result and the first product."""
    pre_NF = torch.addmm(bias1, x, weight1.t())
    return torch.addmm(bias2, gelu(pre_NF, approximate="tanh"), weight2.t()), pre_NF


def _backward(dout, x, pre, weight1, weight2) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, the first weight and bias, and the second weight and bias."""
    dout = dout.contiguous()
    act, dpre, dbias1 = _gelu_backward(pre, dout @ weight2)
    dweight2 = dout.t() @ act
    del act
    dbias2 = dout.sum(0, dtype=torch.float32).to(dout.dtype)
    return dpre @ weight1, dpre.t() @ x, dbias1.to(dout.dtype), dweight2, dbias2


@torch.library.custom_op("sparse3d::mlp", mutates_args=())
def _mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> tuple[Tensor, Tensor]:
    return _forward(x, weight1, bias1, weight2, bias2)


@_mlp.register_fake
def _(x, weight1, bias1, weight2, bias2):
    return x.new_empty(x.shape[0], weight2.shape[0]), x.new_empty(x.shape[0], weight1.shape[0])


@torch.library.custom_op("sparse3d::mlp_backward", mutates_args=())
def _mlp_backward(
    dout: Tensor, x: Tensor, pre: Tensor, weight1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backward(dout, x, pre, weight1, weight2)


@_mlp_backward.register_fake
def _(dout, x, pre, weight1, weight2):
    return (
        x.new_empty(x.shape),
        weight1.new_empty(weight1.shape),
        weight1.new_empty(weight1.shape[0]),
        weight2.new_empty(weight2.shape),
        weight2.new_empty(weight2.shape[0]),
    )


def _setup(ctx, inputs, output):
    x, weight1, _, weight2, _ = inputs
    ctx.save_for_backward(x, output[1], weight1, weight2)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dout, _):
    return (None,) * 5 if dout is None else _mlp_backward(dout, *ctx.saved_tensors)


_mlp.register_autograd(_op_backward, setup_context=_setup)


def _eager_forward(x, weight1, bias1, weight2, bias2):
    out, pre = _forward(x, weight1, bias1, weight2, bias2)
    return (out, pre), (x, pre, weight1, weight2), None


def _eager_backward(_, dout, saved, __):
    return _backward(dout, *saved)


def mlp(
    x_NC: Tensor,
    weight1_FC: Tensor,
    bias1_F: Tensor,
    weight2_CF: Tensor,
    bias2_C: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Linear -> GELU (tanh) -> linear. Differentiable.

    Args:
        x_NC: [N, C], fp32, bf16 or fp16.
        weight1_FC: [F, C] in the dtype of `x_NC`, as all following tensors.
        bias1_F: [F].
        weight2_CF: [C, F].
        bias2_C: [C].
        backend: As in `norm`.

    Returns:
        [N, C] in the dtype of `x_NC`, and the first product [N, F], which the backward pass needs.
        It carries no gradient, and is None where the torch definition runs.

    Raises:
        ValueError: If a shape, dtype or option does not fit.
    """
    check_float_rows("x_NC", x_NC)
    F, C = weight1_FC.shape if weight1_FC.ndim == 2 else (0, 0)
    shapes = {
        "weight1_FC": (weight1_FC, (F, x_NC.shape[1])),
        "bias1_F": (bias1_F, (F,)),
        "weight2_CF": (weight2_CF, (C, F)),
        "bias2_C": (bias2_C, (C,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        check_same_type(name, tensor, "x_NC", x_NC)
    inputs = (x_NC, weight1_FC, bias1_F, weight2_CF, bias2_C)
    if not use_triton(backend, x_NC):
        return reference.mlp(*inputs), None
    check_dtype("x_NC", x_NC)
    if eager_autograd.needs_dispatcher(*inputs):
        out, pre = _mlp(*inputs)
        return out, pre.detach()
    return eager_autograd.apply(_eager_forward, _eager_backward, *inputs, differentiable=1)
