"""Exact, deterministic top-k of block scores, and the rank map that inverse lists are made from.

The definition is `top_blocks` in kernels.attention.reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.block_index import BlockIndex
from kernels.runtime.integer_math import cdiv, next_power_of_2


@triton.jit(
    do_not_specialize=["first_token", "tokens", "columns", "top_k", "stride", "first_chunk"]
)
def _top_blocks(
    score_ptr, asset_ptr, asset_blocks_ptr, chunk_ptr, chunk_starts_ptr, chunk_ranks_ptr,
    selected_ptr, rank_ptr, first_token, tokens, columns, top_k, stride, first_chunk,
    G: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    # One program: ROWS queries of one key/value head, with all blocks of their assets.
    i, g = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    n, ok = first_token + i, i < tokens
    asset = tl.load(asset_ptr + n, ok, other=0)  # [ROWS]
    block0 = tl.load(asset_blocks_ptr + asset, ok, other=0)
    blocks = tl.load(asset_blocks_ptr + asset + 1, ok, other=0) - block0
    b = tl.arange(0, COLUMNS)[None, :]

    # Scores as integers: non-negative floats are ordered as their bits are. A NaN of either sign is
    # above infinity, but not so high that the sums of the bisection overflow and it never ends.
    x = (g.to(tl.int64) * tokens + i)[:, None] * columns + b
    exists = b < blocks[:, None]
    bits = tl.load(score_ptr + x, exists, other=0.0).to(tl.int32, bitcast=True)  # [ROWS, COLUMNS]
    bits = tl.where(exists, tl.minimum(bits & 0x7FFFFFFF, 0x7F800001), -1)

    # Bisection for a threshold that exactly k scores reach, or the k-th largest score.
    k = tl.minimum(top_k, blocks)
    low, high, reach = k * 0, tl.max(bits, 1), blocks  # `reach` scores are at least `low`
    # The first guess is 2^-8 of the largest score: the threshold is mostly close to it.
    near = 8 << 23
    middle = tl.where(high > near, high - near, (high + 1) >> 1)
    while tl.max(((low < high) & (reach != k)).to(tl.int32), 0) > 0:
        searching = (low < high) & (reach != k)
        count = tl.sum((bits >= middle[:, None]).to(tl.int32), 1)
        low = tl.where(searching & (count >= k), middle, low)
        reach = tl.where(searching & (count >= k), count, reach)
        high = tl.where(searching & (count < k), middle - 1, high)
        middle = low + ((high - low + 1) >> 1)

    # Take all scores that reach the threshold. If there are more than k, take those above it, and
    # of those equal to it the lower blocks.
    selected = bits >= low[:, None]
    if tl.max((reach != k).to(tl.int32), 0) > 0:
        above, equal = bits > low[:, None], bits == low[:, None]
        room = (k - tl.sum(above.to(tl.int32), 1))[:, None]
        selected = above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= room))
    selected &= b < blocks[:, None]

    # Write the blocks in ascending order, then -1.
    rank = tl.cumsum(selected.to(tl.int32), 1) - 1
    to = selected_ptr + ((g.to(tl.int64) * stride + n) * top_k)[:, None]
    tl.store(to + rank, block0[:, None] + b, selected)
    tl.store(to + b + rank * 0, rank * 0 - 1, (b >= k[:, None]) & (b < top_k) & ok[:, None])

    # Write rank + 1 of each choice into the rank map.
    if RANKS:
        chunk = tl.load(chunk_ptr + n, ok, other=0)
        start = tl.load(chunk_starts_ptr + chunk, ok, other=0)
        size = tl.load(chunk_starts_ptr + chunk + 1, ok, other=0) - start
        first_rank = tl.load(chunk_ranks_ptr + first_chunk)
        base = (tl.load(chunk_ranks_ptr + chunk, ok, other=0) - first_rank) * G
        place = (base + n - start)[:, None] + (b * G + g).to(tl.int64) * size[:, None]
        tl.store(rank_ptr + place, (rank + 1).to(rank_ptr.dtype.element_ty), selected)


def top_blocks(
    score_GNM: Tensor,
    index: BlockIndex,
    selected_GNT: Tensor,
    ranks: Tensor | None = None,
    *,
    first: int = 0,
    first_chunk: int = 0,
) -> None:
    """Write the blocks of largest score of tokens first..first + n into `selected_GNT`.

    Blocks are numbered over the whole batch and ascend; -1 follows an asset's last block. Of equal
    scores the lower block wins. NaN is above all numbers.

    Args:
        score_GNM: fp32 [G, n, max_blocks], not negative.
        index: Block index.
        selected_GNT: int32 [G, N, T] with T <= max_blocks.
        ranks: Zeroed rank map (see `kernels.attention.inverse_lists`). It receives the rank + 1 of
            each choice.
        first: First token.
        first_chunk: First chunk of the rank map.
    """
    G, tokens, columns = score_GNM.shape
    if tokens == 0:
        return
    COLUMNS = max(32, next_power_of_2(columns))
    # One warp per row is fastest. The interpreter has a cost per program instead.
    ROWS = max(1, 2048 // COLUMNS) if triton.knobs.runtime.interpret else 1
    _top_blocks[(cdiv(tokens, ROWS), G)](
        score_GNM, index.asset_of, index.asset_blocks, index.chunk_of, index.chunk_starts,
        index.chunk_ranks, selected_GNT, selected_GNT if ranks is None else ranks, first, tokens,
        columns, selected_GNT.shape[2], selected_GNT.shape[1], first_chunk, G, COLUMNS, ROWS,
        RANKS=ranks is not None, num_warps=min(16, max(1, COLUMNS // 512)),
    )  # fmt: skip


def rank_dtype(top_k: int) -> torch.dtype:
    """Return the smallest integer dtype that holds 0..top_k."""
    return torch.uint8 if top_k < 256 else torch.int16 if top_k < 1 << 15 else torch.int32
