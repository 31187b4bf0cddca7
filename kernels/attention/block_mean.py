"""Mean over the tokens of each compression block: the pooling step of SSA's compression.

The definition is `block_mean` in kernels.attention.reference.
"""

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
def _block_mean_fwd(
    x_ptr, starts_ptr, y_ptr, C, extra, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    # One program: BLOCK_C channels of one compression block.
    m = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, end = tl.load(starts_ptr + m), tl.load(starts_ptr + m + 1)
    acc = tl.zeros([BLOCK_C], tl.float32)
    for first in range(start, end, BLOCK_N):
        n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)  # n * C can exceed 2**31
        mask = (n < end)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + n[:, None] * C + c[None, :], mask, other=0.0)  # [BLOCK_N, BLOCK_C]
        acc += tl.sum(x.to(tl.float32), axis=0)
    mean = acc / (end - start + extra).to(tl.float32)
    tl.store(y_ptr + m * C + c, mean.to(y_ptr.dtype.element_ty), c < C)


def _run_forward(x_NC: Tensor, index: BlockIndex, plus_one: bool) -> Tensor:
    x_NC = x_NC.contiguous()
    C = x_NC.shape[1]
    y_PC = x_NC.new_empty(index.num_compressed, C)
    if y_PC.numel():
        grid = (len(y_PC), cdiv(C, 64))
        with on_device(x_NC):
            _block_mean_fwd[grid](
                x_NC,
                index.compressed_starts,
                y_PC,
                C,
                int(plus_one),
                BLOCK_N=32,
                BLOCK_C=64,
                num_warps=2,
            )
    return y_PC


def _run_backward(dy_PC: Tensor, index: BlockIndex, plus_one: bool) -> Tensor:
    # One gather, which is at memory speed in torch.
    counts_P = index.compressed_counts + 1 if plus_one else index.compressed_counts
    return (dy_PC / counts_P[:, None]).to(dy_PC.dtype)[index.compressed_of]


@torch.library.custom_op("sparse3d::block_mean", mutates_args=())
def _mean(x: Tensor, index: list[Tensor], plus_one: bool) -> Tensor:
    return _run_forward(x, BlockIndex(*index), plus_one)


@_mean.register_fake
def _(x, index, plus_one):
    return x.new_empty(BlockIndex(*index).num_compressed, x.shape[1])


def _mean_setup(ctx, inputs, output):
    _, index, ctx.plus_one = inputs
    ctx.save_for_backward(*index)


def _mean_autograd(ctx, dy):
    index = ctx.saved_tensors
    return _run_backward(dy, BlockIndex(*index), ctx.plus_one), [None] * len(index), None


_mean.register_autograd(_mean_autograd, setup_context=_mean_setup)


def _eager_mean(x, index, plus_one):
    return _run_forward(x, index, plus_one), (), (index, plus_one)


def _eager_mean_backward(_, dy, __, context):
    return (_run_backward(dy, *context),)


def block_mean(
    x_NC: Tensor, index: BlockIndex, *, plus_one: bool = False, backend: str = "auto"
) -> Tensor:
    """Mean of the rows of each compression block. Sums are fp32. Differentiable.

    Args:
        x_NC: [N, C], fp32, bf16 or fp16, rows in the token order of the index.
        index: Block index of the N tokens.
        plus_one: Divide the sum of n rows by n + 1, as the published Direct3D-S2 weights expect.
        backend: As in `spatial_sparse_attention`.

    Returns:
        [P, C] in the dtype of `x_NC`, one row per compressed token.

    Raises:
        ValueError: If `x_NC` does not have one row per token on the device of the index.
    """
    if x_NC.ndim != 2 or len(x_NC) != index.num_tokens or x_NC.device != index.device:
        raise ValueError(
            f"x_NC must be [{index.num_tokens}, C] on {index.device}, "
            f"got {list(x_NC.shape)} on {x_NC.device}"
        )
    if not use_triton(backend, x_NC):
        return reference.block_mean(x_NC, index, plus_one)
    check_dtype("x_NC", x_NC)
    if eager_autograd.needs_dispatcher(x_NC):
        return _mean(x_NC, index.tensors(), plus_one)
    return eager_autograd.apply(_eager_mean, _eager_mean_backward, x_NC, index, plus_one)
