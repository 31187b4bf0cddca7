"""Definitions of the attention operations: the shortest correct torch code.

They run on any device in any float dtype and are differentiable. The kernels are tested against
them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention.block_index import BlockIndex

# Elements of one dense score matrix. More queries are processed in slices.
_MAX_SCORES = 1 << 24


def block_mean(x_NC: Tensor, index: BlockIndex, plus_one: bool = False) -> Tensor:
    """Mean of the rows of each compression block: [N, C] -> [P, C].

    With `plus_one` the sum of n rows is divided by n + 1, as the published Direct3D-S2 weights
    expect.
    """
    counts_P = torch.diff(index.compressed_starts).to(x_NC.dtype) + int(plus_one)
    sums_PC = x_NC.new_zeros(index.num_compressed, x_NC.shape[1])
    return sums_PC.index_add(0, index.compressed_of, x_NC) / counts_P[:, None]


def attend(
    q_NHD: Tensor, k_MGD: Tensor, v_MGD: Tensor, scale: float, mask_GNM: Tensor | None = None
) -> Tensor:
    """Softmax attention of query head h to key/value head h // (H / G): [N, H, D].

    Where there is a mask, queries attend to the keys whose mask is true.
    """
    group = q_NHD.shape[1] // k_MGD.shape[1]
    scores_HNM = _scores(q_NHD, k_MGD, scale)
    if mask_GNM is not None:
        scores_HNM = scores_HNM.masked_fill(~mask_GNM.repeat_interleave(group, 0), -math.inf)
    v_HMD = v_MGD.repeat_interleave(group, 1).transpose(0, 1)
    return (scores_HNM.softmax(2) @ v_HMD).transpose(0, 1)


def _scores(q_NHD: Tensor, k_MGD: Tensor, scale: float) -> Tensor:
    k_HDM = k_MGD.repeat_interleave(q_NHD.shape[1] // k_MGD.shape[1], 1).permute(1, 2, 0)
    return q_NHD.transpose(0, 1) @ k_HDM * scale


def _slices(index: BlockIndex, heads: int, keys_A: Tensor) -> list[tuple[int, slice, slice]]:
    """Yield slices (asset, queries, keys of the asset) with a bounded heads * queries * keys."""
    slices = []
    starts = index.token_starts.tolist()
    keys = keys_A.tolist()
    for asset in range(index.num_assets):
        step = max(1, _MAX_SCORES // max(1, heads * (keys[asset + 1] - keys[asset])))
        for first in range(starts[asset], starts[asset + 1], step):
            last = min(first + step, starts[asset + 1])
            slices.append((asset, slice(first, last), slice(keys[asset], keys[asset + 1])))
    return slices


def _concatenate(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else like


def compressed_attention(
    q_NHD: Tensor, ck_PGD: Tensor, cv_PGD: Tensor, index: BlockIndex, scale: float
) -> Tensor:
    """Attention of every query to all compressed tokens of its asset: [N, H, D]."""
    slices = _slices(index, q_NHD.shape[1], index.asset_compressed)
    parts = [attend(q_NHD[n], ck_PGD[m], cv_PGD[m], scale) for _, n, m in slices]
    return _concatenate(parts, q_NHD)


def block_scores(q_NHD: Tensor, ck_PGD: Tensor, index: BlockIndex, scale: float) -> Tensor:
    """Softmax probability that compressed attention gives to each block: [G, N, max_blocks].

    Probabilities are summed over the heads of a group and over the compressed tokens of the block.
    Blocks count from the asset's first; -1 stands where the asset has no such block.
    """
    N, H = q_NHD.shape[:2]
    G = ck_PGD.shape[1]
    scores_GNM = q_NHD.new_full((G, N, index.max_blocks), -1.0)
    first_A = index.asset_blocks.tolist()
    for asset, n, m in _slices(index, H, index.asset_compressed):
        p_HNM = _scores(q_NHD[n], ck_PGD[m], scale).softmax(2)
        p_GNM = p_HNM.unflatten(0, (G, H // G)).sum(1)
        block = index.compressed_block[m] - first_A[asset]
        blocks = first_A[asset + 1] - first_A[asset]
        sums_GNM = p_GNM.new_zeros(*p_GNM.shape[:2], blocks)
        scores_GNM[:, n, :blocks] = sums_GNM.index_add(2, block, p_GNM)
    return scores_GNM


def top_blocks(scores_GNM: Tensor, index: BlockIndex, top_k: int) -> Tensor:
    """The top_k blocks of largest score per query: int32 [G, N, min(top_k, max_blocks)].

    Block numbers of the whole batch, ascending; -1 after an asset's last block. Of equal scores the
    lower block wins.
    """
    k = min(top_k, index.max_blocks)
    first_N, last_N = index.asset_blocks[index.asset_of], index.asset_blocks[index.asset_of + 1]
    columns = torch.arange(scores_GNM.shape[2], device=scores_GNM.device)
    exists_NM = columns < (last_N - first_N)[:, None]
    # A GPU sorts a NaN whose sign bit is set below all numbers. Every NaN becomes the positive one.
    scores_GNM = scores_GNM.masked_fill(scores_GNM.isnan(), math.nan)
    scores_GNM = scores_GNM.masked_fill(~exists_NM, -math.inf)
    ranked = scores_GNM.sort(dim=2, descending=True, stable=True).indices[..., :k]
    selected_GNM = torch.zeros_like(scores_GNM, dtype=torch.bool).scatter(2, ranked, True)
    selected_GNM &= exists_NM
    absent = len(columns)
    column_GNM = columns.expand_as(selected_GNM).masked_fill(~selected_GNM, absent)
    column_GNT = column_GNM.sort(dim=2).values[..., :k]
    return torch.where(column_GNT < absent, column_GNT + first_N[:, None], -1).int()


def select_blocks(
    q_NHD: Tensor, ck_PGD: Tensor, index: BlockIndex, top_k: int, scale: float
) -> Tensor:
    """The blocks that each query of each key/value head attends to, as `top_blocks`.

    The selection carries no gradient.
    """
    return top_blocks(block_scores(q_NHD.detach(), ck_PGD.detach(), index, scale), index, top_k)


def selection_attention(
    q_NHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    blocks_GNT: Tensor,
    index: BlockIndex,
    scale: float,
) -> Tensor:
    """Attention of every query to all tokens of its selected blocks: [N, H, D].

    `blocks_GNT` holds the numbers of the selected blocks in the batch, -1 for none.
    """
    parts = []
    G = k_NGD.shape[1]
    for _, n, m in _slices(index, q_NHD.shape[1], index.token_starts):
        selected = blocks_GNT[:, n].long()
        # One extra column receives the -1.
        shape = (G, selected.shape[1], index.num_blocks + 1)
        is_selected = torch.zeros(shape, dtype=torch.bool, device=q_NHD.device)
        is_selected.scatter_(2, torch.where(selected < 0, index.num_blocks, selected), True)
        mask = is_selected[:, :, index.block_of[m]]
        parts.append(attend(q_NHD[n], k_NGD[m], v_NGD[m], scale, mask))
    return _concatenate(parts, q_NHD)


def window_attention(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, index: BlockIndex, shifted: bool, scale: float
) -> Tensor:
    """Attention of every query to the tokens of its aligned or shifted window: [N, H, D]."""
    order, starts = index.window_order, index.window_starts
    if shifted:
        order, starts = index.shifted_order, index.shifted_starts
    if not len(order):  # the token order itself
        order = torch.arange(index.num_tokens, device=q_NHD.device)
    q, k, v = q_NHD[order], k_NGD[order], v_NGD[order]
    windows = itertools.pairwise(starts.tolist())
    parts = [attend(q[a:b], k[a:b], v[a:b], scale) for a, b in windows]
    return torch.empty_like(q_NHD).index_copy(0, order.long(), _concatenate(parts, q_NHD))


def cross_attention(
    q_NHD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    query_starts_A1: Tensor,
    key_starts_A1: Tensor,
    scale: float,
) -> Tensor:
    """Attention of each asset's queries to the keys of the same asset: [N, H, D]."""
    queries, keys = (
        itertools.pairwise(starts.tolist()) for starts in (query_starts_A1, key_starts_A1)
    )
    parts = [
        attend(q_NHD[a:b], k_SGD[c:d], v_SGD[c:d], scale)
        for (a, b), (c, d) in zip(queries, keys, strict=True)
    ]
    return torch.cat(parts)


def gated_sum(branches_3_NHD: tuple[Tensor, Tensor, Tensor], gates_N3: Tensor) -> Tensor:
    """Sum of the three branches, each times the sigmoid of its gate: [N, H, D]."""
    gates = gates_N3.sigmoid()
    return sum(gates[:, i, None, None] * x_NHD for i, x_NHD in enumerate(branches_3_NHD))


def spatial_sparse_attention(
    inputs: Sequence[Tensor],
    index: BlockIndex,
    *,
    top_k: int,
    shifted: bool,
    scale: float,
    selected_GNT: Tensor | None = None,
) -> Tensor:
    """Gated sum of compressed, selection and window attention: [N, H, D].

    `inputs` are q, k, v, ck, cv and gates. `selected_GNT` replaces the top-k, for tests.
    """
    q_NHD, _, _, ck_PGD, _, gates_N3 = inputs
    if selected_GNT is None:
        selected_GNT = select_blocks(q_NHD, ck_PGD, index, top_k, scale)
    branches = ssa_branches(*inputs[:5], selected_GNT, index, shifted, scale)
    return gated_sum(branches, gates_N3)


def ssa_branches(
    q_NHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    ck_PGD: Tensor,
    cv_PGD: Tensor,
    selected_GNT: Tensor,
    index: BlockIndex,
    shifted: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compressed, selection and window attention: [N, H, D] each."""
    return (
        compressed_attention(q_NHD, ck_PGD, cv_PGD, index, scale),
        selection_attention(q_NHD, k_NGD, v_NGD, selected_GNT, index, scale),
        window_attention(q_NHD, k_NGD, v_NGD, index, shifted, scale),
    )
