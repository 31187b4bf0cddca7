"""Attention of each asset's queries to the keys of the same asset, which are other tokens.

The definition is `cross_attention` in kernels.attention.reference. The kernels are those of the
compressed branch of SSA. Unlike FlashAttention's, their gradients are deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import checks, reference
from kernels.attention.segment import Segments
from kernels.attention.segment_attention import attend_segments, attend_segments_backward
from kernels.attention.softmax import lse_dtype
from kernels.runtime import eager_autograd


def _segments(segments: list[Tensor]) -> Segments:
    query_segment, query_starts, key_segment, key_starts = segments
    return Segments(query_segment[:0], query_segment, query_starts, key_segment, key_starts)


@torch.library.custom_op("sparse3d::cross_attention", mutates_args=())
def _cross(
    q: Tensor, k: Tensor, v: Tensor, segments: list[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.contiguous() for x in (q, k, v))
    return attend_segments(q, k, v, _segments(segments), scale)


@_cross.register_fake
def _(q, k, v, segments, scale):
    lse = q.new_empty(q.shape[:2], dtype=lse_dtype(q))
    return q.new_empty(q.shape), lse, q.new_empty(1, dtype=torch.int32)


@torch.library.custom_op("sparse3d::cross_attention_backward", mutates_args=())
def _cross_backward(
    do: Tensor, saved: list[Tensor], segments: list[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return attend_segments_backward(do, saved, _segments(segments), scale)


@_cross_backward.register_fake
def _(do, saved, segments, scale):
    return tuple(x.new_empty(x.shape) for x in saved[:3])


def _setup(ctx, inputs, output):
    q, k, v, segments, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, *segments)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, do, *_):
    tensors = list(ctx.saved_tensors)
    saved, segments = tensors[:6], tensors[6:]
    grads = (None,) * 3
    if do is not None:
        grads = _cross_backward(do, saved, segments, ctx.scale)
    return *grads, [None] * len(segments), None


_cross.register_autograd(_op_backward, setup_context=_setup)


def _eager_forward(q, k, v, segments, scale):
    q, k, v = (x.contiguous() for x in (q, k, v))
    o, lse, flags = attend_segments(q, k, v, _segments(segments), scale)
    return o, (q, k, v, o, lse, flags, *segments), scale


def _eager_backward(_, do, saved, scale):
    return attend_segments_backward(do, saved[:6], _segments(saved[6:]), scale)


def cross_attention(
    q_NHD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    query_asset_N: Tensor,
    query_starts_A1: Tensor,
    key_asset_S: Tensor,
    key_starts_A1: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of each asset's queries to all keys of the same asset. Differentiable.

    Gradients are bit-identical from run to run. There is no host copy.

    Args:
        q_NHD: Queries [N, H, D], with the dtypes and sizes of `spatial_sparse_attention`, rows
            sorted by asset.
        k_SGD: Keys [S, G, D], rows sorted by asset. An asset with queries must have keys.
        v_SGD: Values [S, G, D].
        query_asset_N: int32 [N], asset of each query.
        query_starts_A1: int32 [A + 1], first query of each asset, and N.
        key_asset_S: int32 [S], asset of each key.
        key_starts_A1: int32 [A + 1], first key of each asset, and S.
        scale: Factor of the scores. None stands for 1 / sqrt(D).
        backend: As in `spatial_sparse_attention`.

    Returns:
        [N, H, D] in the dtype of `q_NHD`.

    Raises:
        ValueError: If a shape, dtype, device or option does not fit.
    """
    segments = [query_asset_N, query_starts_A1, key_asset_S, key_starts_A1]
    names = ("query_asset_N", "query_starts_A1", "key_asset_S", "key_starts_A1")
    for name, tensor in zip(names, segments, strict=True):
        if tensor.ndim != 1 or tensor.dtype != torch.int32 or tensor.device != q_NHD.device:
            raise ValueError(
                f"{name} must be one-dimensional int32 on {q_NHD.device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    if len(query_starts_A1) != len(key_starts_A1):
        raise ValueError(
            f"key_starts_A1 must be [{len(query_starts_A1)}] as query_starts_A1, "
            f"got {list(key_starts_A1.shape)}"
        )
    S = len(key_asset_S)
    keys = [("k_SGD", k_SGD, S), ("v_SGD", v_SGD, S)]
    triton = checks.check_tensors(q_NHD, keys, len(query_asset_N), backend)
    scale = checks.check_scale(scale, q_NHD.shape[2])
    if not triton:
        return reference.cross_attention(q_NHD, k_SGD, v_SGD, query_starts_A1, key_starts_A1, scale)
    if eager_autograd.needs_dispatcher(q_NHD, k_SGD, v_SGD):
        return _cross(q_NHD, k_SGD, v_SGD, segments, scale)[0]
    return eager_autograd.apply(
        _eager_forward, _eager_backward, q_NHD, k_SGD, v_SGD, segments, scale
    )
