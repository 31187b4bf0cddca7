"""Attention of the generator: spatial sparse and full self-attention, and cross-attention to image tokens."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import spatial_sparse_attention
from model.config import Compression
from model.image_tokens import ImageTokens
from model.kv_compression import TokenLayout, make_compression


def ragged_attention(
    q_NHD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    max_q: int,
    max_k: int,
) -> Tensor:
    """Softmax attention of each asset's queries to the same asset's keys: [N, H, D] in q's dtype.

    Asset a has rows q_starts[a]:q_starts[a + 1] of q and k_starts[a]:k_starts[a + 1] of k and v; starts int32 [A + 1],
    max_q and max_k the largest asset's rows. An asset with queries must have keys. fp16 and bf16 on CUDA take torch's
    FlashAttention for ragged batches, without a copy to the host; everything else goes asset by asset.
    """
    if q_NHD.is_cuda and q_NHD.dtype in (torch.float16, torch.bfloat16) and max_q > 0:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q_NHD, k_SHD, v_SHD, q_starts, k_starts, max_q, max_k)
        assert isinstance(out, Tensor)
        return out
    parts = []
    spans = zip(
        itertools.pairwise(q_starts.tolist()), itertools.pairwise(k_starts.tolist()), strict=True
    )
    for (q_first, q_last), (k_first, k_last) in spans:
        q = q_NHD[q_first:q_last].transpose(0, 1)[None]
        k, v = (x[k_first:k_last].transpose(0, 1)[None] for x in (k_SHD, v_SHD))
        parts.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
    return torch.cat(parts)


class SpatialSparseAttention(nn.Module):
    """SSA with its projections: [N, C] in the layout's order -> [N, C]. paper, sec. 5"""

    def __init__(
        self, channels: int, heads: int, kv_heads: int, *, compress_block: int, compression: Compression, top_k: int,
        shifted: bool, plus_one: bool,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.kv_heads, self.top_k, self.shifted = heads, kv_heads, top_k, shifted
        kv_channels = channels // heads * kv_heads
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, kv_channels, bias=False)
        self.value = nn.Linear(channels, kv_channels, bias=False)
        self.gate = nn.Linear(
            channels, 3, bias=False
        )  # of compression, selection, window; before the sigmoid
        self.key_position = nn.Parameter(torch.zeros(compress_block**3, kv_channels))
        self.compress_key = make_compression(compression, kv_channels, plus_one=plus_one)
        self.compress_value = make_compression(compression, kv_channels, plus_one=plus_one)
        self.out = nn.Linear(channels, channels, bias=False)

    def forward(self, x_NC: Tensor, layout: TokenLayout) -> Tensor:
        q_NC, k_NE, v_NE = self.query(x_NC), self.key(x_NC), self.value(x_NC)
        placed_NE = k_NE + F.embedding(layout.position_of, self.key_position.to(k_NE.dtype))
        ck_PE = self.compress_key(placed_NE, layout)
        cv_PE = self.compress_value(v_NE, layout)
        k, v, ck, cv = (x.unflatten(1, (self.kv_heads, -1)) for x in (k_NE, v_NE, ck_PE, cv_PE))
        out_NHD = spatial_sparse_attention(
            q_NC.unflatten(1, (self.heads, -1)), k, v, ck, cv, self.gate(x_NC), layout.index,
            top_k=self.top_k, shifted=self.shifted,
        )  # fmt: skip
        return self.out(out_NHD.flatten(1))


class FullAttention(nn.Module):
    """Every token attends to all tokens of its asset: what SSA stands in for. [N, C] -> [N, C]."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x_NC: Tensor, layout: TokenLayout) -> Tensor:
        q, k, v = self.qkv(x_NC).unflatten(1, (3, self.heads, -1)).unbind(1)
        starts, most = layout.index.token_starts, layout.index.max_tokens
        return self.out(ragged_attention(q, k, v, starts, starts, most, most).flatten(1))


class CrossAttention(nn.Module):
    """Every token attends to all image tokens of its asset: [N, C] -> [N, C]."""

    def __init__(self, channels: int, condition_channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(condition_channels, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x_NC: Tensor, layout: TokenLayout, condition: ImageTokens) -> Tensor:
        q_NHD = self.query(x_NC).unflatten(1, (self.heads, -1))
        k_SHD, v_SHD = (
            self.key_value(condition.feats_SC).unflatten(1, (2, self.heads, -1)).unbind(1)
        )
        starts, most = layout.index.token_starts, layout.index.max_tokens
        out = ragged_attention(
            q_NHD, k_SHD, v_SHD, starts, condition.starts, most, condition.max_tokens
        )
        return self.out(out.flatten(1))
