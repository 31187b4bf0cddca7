"""Attention of the SS-DiT: sparse and full self-attention, and cross-attention to image tokens."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import cross_attention, gated_sum, ssa_with_branches
from model.config import Compression
from model.image_tokens import ImageTokens
from model.kept_activations import BlockActivations
from model.kv_compression import TokenLayout, make_compression
from model.layers import weight_of


def ragged_attention(
    q_NHD: Tensor,
    k_SHD: Tensor,
    v_SHD: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    max_q: int,
    max_k: int,
) -> Tensor:
    """Softmax attention of each asset's queries to the keys of the same asset.

    On CUDA fp16 and bf16 use torch's FlashAttention for ragged batches, without a copy to the host.
    Without gradients, assets of one size are one dense batch for cuDNN, which is faster. Everything
    else is computed asset by asset.

    Args:
        q_NHD: [N, H, D] queries of all assets.
        k_SHD: [S, H, D] keys. An asset with queries must have keys.
        v_SHD: [S, H, D] values.
        q_starts: int32 [A + 1]. Asset a has the queries q_starts[a]:q_starts[a + 1].
        k_starts: int32 [A + 1]. Asset a has the keys k_starts[a]:k_starts[a + 1].
        max_q: Largest number of queries of an asset.
        max_k: Largest number of keys of an asset.

    Returns:
        [N, H, D] in q's dtype.
    """
    if q_NHD.is_cuda and q_NHD.dtype in (torch.float16, torch.bfloat16) and max_q > 0:
        B = len(q_starts) - 1
        of_one_size = (B * max_q, B * max_k) == (len(q_NHD), len(k_SHD))
        if of_one_size and not torch.is_grad_enabled():
            return _dense_attention(q_NHD, k_SHD, v_SHD, B)
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q_NHD, k_SHD, v_SHD, q_starts, k_starts, max_q, max_k)
        assert isinstance(out, Tensor)
        return out
    outputs = []
    spans = zip(
        itertools.pairwise(q_starts.tolist()), itertools.pairwise(k_starts.tolist()), strict=True
    )
    for (q_first, q_last), (k_first, k_last) in spans:
        q = q_NHD[q_first:q_last].transpose(0, 1)[None]
        k, v = (x[k_first:k_last].transpose(0, 1)[None] for x in (k_SHD, v_SHD))
        outputs.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
    return torch.cat(outputs)


def _dense_attention(q_NHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, B: int) -> Tensor:
    """Attend in a batch of B assets that have the same numbers of queries and of keys."""
    q, k, v = (x.unflatten(0, (B, -1)).transpose(1, 2) for x in (q_NHD, k_SHD, v_SHD))
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel(backends, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(0, 1)


class SelfAttention(nn.Module):
    """Self-attention of the tokens of each asset, with an output layer `out`."""

    out: nn.Linear

    def forward(
        self, x_NC: Tensor, layout: TokenLayout, kept: BlockActivations | None = None
    ) -> Tensor:
        """Attend: [N, C] -> [N, C], rows in the layout's order.

        Args:
            x_NC: [N, C].
            layout: Layout of the N tokens.
            kept: The activations of the block. None keeps all.
        """
        kept = kept or BlockActivations("all", x_NC.device.type)
        return _project(self.out, self.attend(x_NC, layout, kept).flatten(1), kept)

    def attend(self, x_NC: Tensor, layout: TokenLayout, kept: BlockActivations) -> Tensor:
        """Attend without the output layer: [N, C] -> [N, H, D]."""
        raise NotImplementedError


class SpatialSparseAttention(SelfAttention):
    """Spatial sparse attention (SSA) with its projections and gates.

    Direct3D-S2 paper (arXiv 2505.17412), section 5.

    Args:
        channels: Channels C of the tokens.
        heads: Query heads.
        kv_heads: Key and value heads.
        compress_block: Tokens along one side of a compressed block.
        compression: How a block is compressed, "v1" or "v2".
        top_k: Blocks that each token selects.
        shifted: Whether windows are shifted by half their side.
        plus_one: Whether means of the compression divide by n + 1.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        kv_heads: int,
        *,
        compress_block: int,
        compression: Compression,
        top_k: int,
        shifted: bool,
        plus_one: bool,
    ):
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.top_k = top_k
        self.shifted = shifted
        kv_channels = channels // heads * kv_heads
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, kv_channels, bias=False)
        self.value = nn.Linear(channels, kv_channels, bias=False)
        # Logits of the gates of the branches compression, selection and window.
        self.gate = nn.Linear(channels, 3, bias=False)
        self.key_position = nn.Parameter(torch.zeros(compress_block**3, kv_channels))
        self.compress_key = make_compression(compression, kv_channels, plus_one=plus_one)
        self.compress_value = make_compression(compression, kv_channels, plus_one=plus_one)
        self.out = nn.Linear(channels, channels, bias=False)

    def attend(self, x_NC: Tensor, layout: TokenLayout, kept: BlockActivations) -> Tensor:
        q_NC = self.query(x_NC)
        kept.drop("products", q_NC, self.query, x_NC)
        # Keys, values and gates come from one product, padded to a multiple of eight columns.
        E = self.key.weight.shape[0]
        padding = self.gate.weight.new_zeros(-(2 * E + 3) % 8, x_NC.shape[1])
        weights = [*(weight_of(layer) for layer in (self.key, self.value, self.gate)), padding]
        k_NE, v_NE, gates_N3, _ = F.linear(x_NC, torch.cat(weights)).split(
            [E, E, 3, len(padding)], 1
        )
        # Only the keys to be compressed know their position in the block.
        table_PE = self.key_position.to(k_NE.dtype)
        placed_NE = k_NE + layout.place_indicator(len(table_PE), k_NE.dtype) @ table_PE
        ck_PE = self.compress_key(placed_NE, layout)
        cv_PE = self.compress_value(v_NE, layout)
        k, v, ck, cv = (x.unflatten(1, (self.kv_heads, -1)) for x in (k_NE, v_NE, ck_PE, cv_PE))
        gates_N3 = gates_N3.contiguous()
        out_NHD, branches = ssa_with_branches(
            (q_NC.unflatten(1, (self.heads, -1)), k, v, ck, cv, gates_N3),
            layout.index,
            top_k=self.top_k,
            shifted=self.shifted,
        )
        kept.drop("products", out_NHD, _gated_sum, *branches, gates_N3)
        return out_NHD


def _gated_sum(a_NHD: Tensor, b_NHD: Tensor, c_NHD: Tensor, gates_N3: Tensor) -> Tensor:
    return gated_sum((a_NHD, b_NHD, c_NHD), gates_N3)


class HeadNorm(nn.Module):
    """Scale the vector of each head to length sqrt(D), times a learned factor of each channel.

    The norm is computed in fp32, or in fp64 for fp64.
    """

    def __init__(self, heads: int, head_size: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, head_size))

    def forward(self, x_NHD: Tensor) -> Tensor:
        """Normalise [N, H, D]."""
        wide = x_NHD if x_NHD.dtype == torch.float64 else x_NHD.float()
        normed = F.normalize(wide, dim=-1) * self.gamma * x_NHD.shape[-1] ** 0.5
        return normed.to(x_NHD.dtype)


class FullAttention(SelfAttention):
    """Self-attention of every token to all tokens of its asset, which SSA replaces.

    Args:
        channels: Channels C of the tokens.
        heads: Attention heads.
        qk_norm: Whether the queries and keys of each head are normalised.
    """

    def __init__(self, channels: int, heads: int, *, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.query_norm = HeadNorm(heads, channels // heads) if qk_norm else None
        self.key_norm = HeadNorm(heads, channels // heads) if qk_norm else None
        self.out = nn.Linear(channels, channels)

    def attend(self, x_NC: Tensor, layout: TokenLayout, _kept: BlockActivations) -> Tensor:
        q_NHD, k_NHD, v_NHD = self.qkv(x_NC).unflatten(1, (3, self.heads, -1)).unbind(1)
        if self.query_norm is not None and self.key_norm is not None:
            q_NHD, k_NHD = self.query_norm(q_NHD), self.key_norm(k_NHD)
        starts, longest = layout.index.token_starts, layout.max_tokens
        return ragged_attention(q_NHD, k_NHD, v_NHD, starts, starts, longest, longest)


def _project(layer: nn.Linear, x_NC: Tensor, kept: BlockActivations | None) -> Tensor:
    """Apply the last layer of an attention, whose result is dropped at the level "attention"."""
    out_NC = layer(x_NC)
    if kept is not None:
        kept.drop("attention", out_NC, layer, x_NC)
    return out_NC


class CrossAttention(nn.Module):
    """Attention of every token to all image tokens of its asset."""

    def __init__(self, channels: int, condition_channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(condition_channels, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def keys_and_values(self, image: ImageTokens) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of the S image tokens, [S, H, D] each."""
        k_SHD, v_SHD = self.key_value(image.feats_SC).unflatten(1, (2, self.heads, -1)).unbind(1)
        return k_SHD, v_SHD

    def forward(
        self,
        x_NC: Tensor,
        layout: TokenLayout,
        image: ImageTokens,
        kept: BlockActivations | None = None,
        key_value: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend: [N, C] -> [N, C], rows in the layout's order.

        Args:
            x_NC: [N, C].
            layout: Layout of the N tokens.
            image: Image tokens.
            kept: The activations of the block. None keeps all.
            key_value: `self.keys_and_values(image)`. None computes it.
        """
        q_NC = self.query(x_NC)
        if kept is not None:
            kept.drop("attention", q_NC, self.query, x_NC)
        k_SHD, v_SHD = key_value or self.keys_and_values(image)
        q_NHD = q_NC.unflatten(1, (self.heads, -1))
        starts, index = layout.index.token_starts, layout.index
        # On a GPU the kernels compute fp32 in fp64, which is slow. On a CPU the reference holds the
        # scores of all pairs, which inference need not keep: 7 GB a copy at the paper's size.
        fp32_on_gpu = q_NC.is_cuda and q_NC.dtype == torch.float32
        if fp32_on_gpu or not (q_NC.is_cuda or torch.is_grad_enabled()):
            out_NHD = ragged_attention(
                q_NHD, k_SHD, v_SHD, starts, image.starts, layout.max_tokens, image.max_tokens
            )
        else:
            out_NHD = cross_attention(
                q_NHD, k_SHD, v_SHD, index.asset_of, starts, image.asset_of, image.starts
            )
        return _project(self.out, out_NHD.flatten(1), kept)
