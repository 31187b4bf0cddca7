"""Mean over the tokens of each compression block: the pooling step of SSA's compression."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import reference
from kernels.attention.block_index import BlockIndex
from kernels.runtime import eager_autograd
from kernels.runtime.checks import check_dtype, use_triton
from kernels.runtime.integer_math import cdiv
from kernels.runtime.triton_ops import on_device


@triton.jit(do_not_specialize=["C", "extra"])
def _block_mean_fwd(x_ptr, starts_ptr, y_ptr, C, extra, BN: tl.constexpr, BC: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    start, end = tl.load(starts_ptr + m), tl.load(starts_ptr + m + 1)
    acc = tl.zeros([BC], tl.float32)
    for first in range(start, end, BN):
        n = (first + tl.arange(0, BN)).to(tl.int64)
        mask = (n < end)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + n[:, None] * C + c[None, :], mask, other=0.0)
        acc += tl.sum(x.to(tl.float32), axis=0)
    mean = acc / (end - start + extra).to(tl.float32)
    tl.store(y_ptr + m * C + c, mean.to(y_ptr.dtype.element_ty), c < C)


def block_mean_forward(x_NC: Tensor, index: BlockIndex, plus_one: bool) -> Tensor:
    """[N, C] contiguous -> [P, C], sums in fp32."""
    y_PC = x_NC.new_empty(index.num_compressed, x_NC.shape[1])
    if y_PC.numel():
        with on_device(x_NC):
            _block_mean_fwd[(len(y_PC), cdiv(x_NC.shape[1], 64))](
                x_NC,
                index.compressed_starts,
                y_PC,
                x_NC.shape[1],
                int(plus_one),
                BN=32,
                BC=64,
                num_warps=2,
            )
    return y_PC


def block_mean_backward(dy_PC: Tensor, index: BlockIndex, plus_one: bool) -> Tensor:
    """One gather, already at memory speed in torch."""
    counts_P = index.compressed_counts + 1 if plus_one else index.compressed_counts
    return (dy_PC / counts_P[:, None]).to(dy_PC.dtype)[index.compressed_of]


@torch.library.custom_op("sparse3d::block_mean", mutates_args=())
def _mean(x: Tensor, index: list[Tensor], plus_one: bool) -> Tensor:
    return block_mean_forward(x.contiguous(), BlockIndex(*index), plus_one)


@_mean.register_fake
def _(x, index, plus_one):
    return x.new_empty(BlockIndex(*index).num_compressed, x.shape[1])


def _mean_setup(ctx, inputs, output):
    _, index, ctx.plus_one = inputs
    ctx.save_for_backward(*index)


def _mean_backward(ctx, dy):
    index = ctx.saved_tensors
    return block_mean_backward(dy, BlockIndex(*index), ctx.plus_one), [None] * len(index), None


_mean.register_autograd(_mean_backward, setup_context=_mean_setup)


def _eager_mean(x, index, plus_one):
    return block_mean_forward(x.contiguous(), index, plus_one), (), (index, plus_one)


def _eager_mean_backward(_, dy, __, rest):
    return (block_mean_backward(dy, *rest),)


def block_mean(
    x_NC: Tensor, index: BlockIndex, *, plus_one: bool = False, backend: str = "auto"
) -> Tensor:
    """Mean of the rows of each compression block: [N, C] fp32, fp16 or bf16 -> [P, C], same dtype, sums in fp32.

    plus_one divides by n + 1, as the published weights expect. Differentiable. ValueError if x_NC is not [N, C] of the
    index's N on its device.
    """
    if x_NC.ndim != 2 or len(x_NC) != index.num_tokens or x_NC.device != index.device:
        found = f"{list(x_NC.shape)} on {x_NC.device}"
        raise ValueError(f"x_NC must be [{index.num_tokens}, C] on {index.device}, got {found}")
    if not use_triton(backend, x_NC):
        return reference.block_mean(x_NC, index, plus_one)
    check_dtype("x_NC", x_NC)
    if eager_autograd.needs_dispatcher(x_NC):
        return _mean(x_NC, index.tensors(), plus_one)
    return eager_autograd.apply(_eager_mean, _eager_mean_backward, x_NC, index, plus_one)
