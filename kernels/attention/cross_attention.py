"""Attention of each asset's queries to the keys of the same asset, which are other tokens.

The definition is `cross_attention` in kernels.attention.reference. The kernels are those of the
compressed branch of SSA. Unlike FlashAttention's, their gradients are deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import checks, reference
from kernels.attention.segment import Segments
from kernels.attention.segment_attention import segment_attention


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
    return segment_attention(q_NHD, k_SGD, v_SGD, Segments(query_asset_N[:0], *segments), scale)
