"""Attention over segments with its gradient: what windows, compressed tokens and images share.

Gradients are deterministic. For bf16 rows with moderate scores the log-sums are multiplied into the
output gradient ("folded"), as in SSA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.gates import OutputGradient, branch_gradient, is_folded
from kernels.attention.scaled_keys import FOLDED_DTYPES, scale_keys
from kernels.attention.segment import Segments, segment_forward
from kernels.attention.segment_backward import segment_backward
from kernels.attention.softmax import lse_dtype
from kernels.runtime import eager_autograd
from kernels.runtime.integer_math import cdiv, next_power_of_2
from kernels.runtime.triton_ops import on_device


@triton.jit(do_not_specialize=["N"])
def _fold(
    o_ptr, lse_ptr, do_ptr, flag_ptr, dot_ptr, weighted_ptr, N, H: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    # One program: all heads of BLOCK_N tokens. HEADS is H rounded up to a power of two.
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h, d = tl.arange(0, HEADS), tl.arange(0, D)
    y = n.to(tl.int64)[:, None] * H + h[None, :]
    x = y[:, :, None] * D + d[None, None, :]
    ok = (n < N)[:, None] & (h < H)[None, :]
    do = tl.load(do_ptr + x, ok[:, :, None], other=0.0).to(lse_ptr.dtype.element_ty)
    gate = tl.full([BLOCK_N], 1.0, lse_ptr.dtype.element_ty)
    branch_gradient(
        o_ptr, lse_ptr, dot_ptr, lse_ptr, weighted_ptr, gate, do, x, y, ok,
        is_folded(flag_ptr, FOLD), FOLD, False,
    )  # fmt: skip


def fold_gradient(
    o_NHD: Tensor, lse_NH: Tensor, do_NHD: Tensor, flags: Tensor | None
) -> OutputGradient:
    """Return what the backward of an attention without gates needs of its output gradient.

    Args:
        o_NHD: Output of the attention, contiguous.
        lse_NH: Log-sums of `segment_forward`.
        do_NHD: Gradient of the output, contiguous.
        flags: Flags of `segment_forward`. If flags[0] is 0, the log-sums are folded into the
            gradient. None never folds.
    """
    N, H, D = do_NHD.shape
    dot_NH = torch.empty_like(lse_NH)
    weighted = None if flags is None else torch.empty_like(do_NHD)
    heads = next_power_of_2(H)
    BLOCK_N = max(1, 2048 // (heads * D))
    if N:
        _fold[(cdiv(N, BLOCK_N),)](
            o_NHD, lse_NH, do_NHD, lse_NH if flags is None else flags, dot_NH,
            do_NHD if weighted is None else weighted, N, H, heads, D, BLOCK_N,
            FOLD=flags is not None, num_warps=4,
        )  # fmt: skip
    return OutputGradient(do_NHD, lse_NH, dot_NH, weighted, flags)


def attend_segments(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend without a gradient.

    Args:
        q: [N, H, D], contiguous.
        k: [M, G, D], contiguous.
        v: [M, G, D], contiguous.
        segments: Which queries attend to which keys.
        scale: Factor of the scores.

    Returns:
        The output [N, H, D], its log-sums [N, H], and the flag of `segment_forward`.
    """
    lse = q.new_empty(q.shape[:2], dtype=lse_dtype(q))
    flags = torch.zeros(1, dtype=torch.int32, device=q.device)
    with on_device(q):
        keys, _ = scale_keys(k, scale)
        return segment_forward(q, keys, v, segments, lse, flags), lse, flags


def attend_segments_backward(
    do: Tensor, saved: Sequence[Tensor], segments: Segments, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v.

    Args:
        do: Gradient of the output.
        saved: q, k and v as in the forward, and its three results.
        segments: As in the forward.
        scale: As in the forward.
    """
    q, k, v, o, lse, flags = (x.contiguous() for x in saved)
    folded = q.dtype in FOLDED_DTYPES
    with on_device(q):
        keys, _ = scale_keys(k, scale)
        gradient = fold_gradient(o, lse, do.contiguous(), flags if folded else None)
        dq, dk, dv = segment_backward(q, keys, v, gradient, segments)
    return dq, dk.to(q.dtype), dv.to(q.dtype)


@torch.library.custom_op("sparse3d::segment_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, segments: list[Tensor], short: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.contiguous() for x in (q, k, v))
    return attend_segments(q, k, v, Segments(*segments, short=short), scale)


@_attention.register_fake
def _(q, k, v, segments, short, scale):
    lse = q.new_empty(q.shape[:2], dtype=lse_dtype(q))
    return q.new_empty(q.shape), lse, q.new_empty(1, dtype=torch.int32)


@torch.library.custom_op("sparse3d::segment_attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, saved: list[Tensor], segments: list[Tensor], short: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return attend_segments_backward(do, saved, Segments(*segments, short=short), scale)


@_attention_backward.register_fake
def _(do, saved, segments, short, scale):
    return tuple(x.new_empty(x.shape) for x in saved[:3])


def _setup(ctx, inputs, output):
    q, k, v, segments, ctx.short, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, *segments)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, do, *_):
    tensors = list(ctx.saved_tensors)
    saved, segments = tensors[:6], tensors[6:]
    grads = (None,) * 3
    if do is not None:
        grads = _attention_backward(do, saved, segments, ctx.short, ctx.scale)
    return *grads, [None] * len(segments), None, None


_attention.register_autograd(_op_backward, setup_context=_setup)


def _eager_forward(q, k, v, segments, scale):
    q, k, v = (x.contiguous() for x in (q, k, v))
    o, lse, flags = attend_segments(q, k, v, segments, scale)
    return o, (q, k, v, o, lse, flags), (segments, scale)


def _eager_backward(_, do, saved, options):
    return attend_segments_backward(do, saved, *options)


def segment_attention(
    q_NHD: Tensor, k_MGD: Tensor, v_MGD: Tensor, segments: Segments, scale: float
) -> Tensor:
    """Attention of the queries of each segment to its keys: [N, H, D]. Differentiable.

    Args:
        q_NHD: [N, H, D].
        k_MGD: [M, G, D].
        v_MGD: [M, G, D].
        segments: Which queries attend to which keys.
        scale: Factor of the scores.
    """
    tensors = (q_NHD, k_MGD, v_MGD)
    if eager_autograd.needs_dispatcher(*tensors):
        return _attention(*tensors, segments.tensors(), segments.short, scale)[0]
    return eager_autograd.apply(_eager_forward, _eager_backward, *tensors, segments, scale)
