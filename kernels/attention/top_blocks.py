"""Exact, deterministic top-k of block scores, and the rank map that the inverse lists are made from."""

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
    score_ptr, asset_ptr, asset_blocks_ptr, chunk_ptr, chunk_starts_ptr, chunk_ranks_ptr, selected_ptr, rank_ptr,
    first_token, tokens, columns, top_k, stride, first_chunk, G: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    i, g = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    n, ok = first_token + i, i < tokens
    asset = tl.load(asset_ptr + n, ok, other=0)
    block0 = tl.load(asset_blocks_ptr + asset, ok, other=0)
    blocks = tl.load(asset_blocks_ptr + asset + 1, ok, other=0) - block0
    b = tl.arange(0, COLUMNS)[None, :]
    # Non-negative floats order as their bits do. A NaN, of either sign, lies above infinity, but not so high that
    # the bisection's sums overflow and it never ends.
    at = (g.to(tl.int64) * tokens + i)[:, None] * columns + b
    there = b < blocks[:, None]
    x = tl.load(score_ptr + at, there, other=0.0).to(tl.int32, bitcast=True)
    x = tl.where(there, tl.minimum(x & 0x7FFFFFFF, 0x7F800001), -1)
    k = tl.minimum(top_k, blocks)
    # Bisection for a threshold that k scores reach; `reach` of them do.
    low, high, reach = k * 0, tl.max(x, 1), blocks
    while tl.max(((low < high) & (reach != k)).to(tl.int32), 0) > 0:
        searching = (low < high) & (reach != k)
        middle = low + ((high - low + 1) >> 1)
        count = tl.sum((x >= middle[:, None]).to(tl.int32), 1)
        low = tl.where(searching & (count >= k), middle, low)
        reach = tl.where(searching & (count >= k), count, reach)
        high = tl.where(searching & (count < k), middle - 1, high)
    above, level = x > low[:, None], x == low[:, None]
    room = (k - tl.sum(above.to(tl.int32), 1))[:, None]
    taken = above | (
        level & (tl.cumsum(level.to(tl.int32), 1) <= room)
    )  # of equals the lower block
    taken &= b < blocks[:, None]
    rank = tl.cumsum(taken.to(tl.int32), 1) - 1
    selected = selected_ptr + ((g.to(tl.int64) * stride + n) * top_k)[:, None]
    tl.store(selected + rank, block0[:, None] + b, taken)
    tl.store(selected + b + rank * 0, rank * 0 - 1, (b >= k[:, None]) & (b < top_k) & ok[:, None])
    if RANKS:
        chunk = tl.load(chunk_ptr + n, ok, other=0)
        start = tl.load(chunk_starts_ptr + chunk, ok, other=0)
        size = tl.load(chunk_starts_ptr + chunk + 1, ok, other=0) - start
        base = (
            tl.load(chunk_ranks_ptr + chunk, ok, other=0) - tl.load(chunk_ranks_ptr + first_chunk)
        ) * G
        to = (base + n - start)[:, None] + (b * G + g).to(tl.int64) * size[:, None]
        tl.store(rank_ptr + to, (rank + 1).to(rank_ptr.dtype.element_ty), taken)


def top_blocks(
    score_GNM: Tensor,
    index: BlockIndex,
    selected_GNT: Tensor,
    first: int = 0,
    ranks: Tensor | None = None,
    first_chunk: int = 0,
) -> None:
    """Writes the blocks of largest score of tokens first .. first + n into selected, int32 [G, N, T].

    T <= max_blocks. Ascending block numbers of the batch, -1 after an asset's last; of equals the lower block.
    Scores are fp32 [G, n, max_blocks], not negative; NaN is above all. `ranks` (zeroed, see `kernels.attention.inverse_lists`) also
    receives each choice's rank + 1.
    """
    G, tokens, columns = score_GNM.shape
    if tokens == 0:
        return
    COLUMNS = max(32, next_power_of_2(columns))
    # One warp a row is fastest; the interpreter pays per program instead.
    ROWS = max(1, 2048 // COLUMNS) if triton.knobs.runtime.interpret else 1
    _top_blocks[(cdiv(tokens, ROWS), G)](
        score_GNM, index.asset_of, index.asset_blocks, index.chunk_of, index.chunk_starts, index.chunk_ranks,
        selected_GNT, selected_GNT if ranks is None else ranks, first, tokens, columns, selected_GNT.shape[2],
        selected_GNT.shape[1], first_chunk, G, COLUMNS, ROWS, RANKS=ranks is not None,
        num_warps=min(16, max(1, COLUMNS // 512)),
    )  # fmt: skip


def rank_dtype(top_k: int) -> torch.dtype:
    """Smallest integer that holds 0..top_k."""
    return torch.uint8 if top_k < 256 else torch.int16 if top_k < 1 << 15 else torch.int32
