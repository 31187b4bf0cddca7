"""Exact, deterministic top-k of block scores, and the rank map that the inverse lists are made from."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.blocks import BlockIndex
from kernels.tiles import on_device


@triton.jit(do_not_specialize=["first_token", "tokens", "columns", "top_k", "stride", "first_chunk"])
def _top_blocks(
    score_ptr, asset_ptr, asset_blocks_ptr, chunk_ptr, chunk_starts_ptr, chunk_ranks_ptr, selected_ptr, rank_ptr,
    first_token, tokens, columns, top_k, stride, first_chunk, G: tl.constexpr, COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    i, g = tl.program_id(0), tl.program_id(1)
    n = first_token + i
    asset = tl.load(asset_ptr + n)
    block0 = tl.load(asset_blocks_ptr + asset)
    blocks = tl.load(asset_blocks_ptr + asset + 1) - block0
    b = tl.arange(0, COLUMNS)
    # Non-negative floats order as their bits do.
    x = tl.load(score_ptr + (g.to(tl.int64) * tokens + i) * columns + b, b < blocks, other=-1.0)
    x = x.to(tl.int32, bitcast=True)
    k = tl.minimum(top_k, blocks)
    # Bisection for a threshold that k scores reach; `reach` of them do.
    low, high, reach = k * 0, tl.max(x, 0), blocks
    while (low < high) & (reach != k):
        middle = low + ((high - low + 1) >> 1)
        count = tl.sum((x >= middle).to(tl.int32), 0)
        low = tl.where(count >= k, middle, low)
        reach = tl.where(count >= k, count, reach)
        high = tl.where(count >= k, high, middle - 1)
    above, level = x > low, x == low
    room = k - tl.sum(above.to(tl.int32), 0)
    taken = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))  # of equals the lower block
    rank = tl.cumsum(taken.to(tl.int32), 0) - 1
    selected_ptr += (g.to(tl.int64) * stride + n) * top_k
    tl.store(selected_ptr + rank, block0 + b, taken)
    tl.store(selected_ptr + b, -1 + b * 0, (b >= k) & (b < top_k))
    if RANKS:
        chunk = tl.load(chunk_ptr + n)
        start = tl.load(chunk_starts_ptr + chunk)
        size = tl.load(chunk_starts_ptr + chunk + 1) - start
        base = (tl.load(chunk_ranks_ptr + chunk) - tl.load(chunk_ranks_ptr + first_chunk)) * G
        x = base + (b * G + g).to(tl.int64) * size + (n - start)
        tl.store(rank_ptr + x, (rank + 1).to(rank_ptr.dtype.element_ty), taken)


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
    Scores are fp32 [G, n, max_blocks], not negative. `ranks` (zeroed, see `kernels.lists`) also receives each
    choice's rank + 1.
    """
    G, tokens, columns = score_GNM.shape
    if tokens == 0:
        return
    COLUMNS = max(32, triton.next_power_of_2(columns))
    with on_device(score_GNM):
        _top_blocks[(tokens, G)](
            score_GNM, index.asset_of, index.asset_blocks, index.chunk_of, index.chunk_starts, index.chunk_ranks,
            selected_GNT, selected_GNT if ranks is None else ranks, first, tokens, columns, selected_GNT.shape[2],
            selected_GNT.shape[1], first_chunk, G, COLUMNS, RANKS=ranks is not None,
            num_warps=min(16, max(1, COLUMNS // 512)),
        )  # fmt: skip


def rank_dtype(top_k: int) -> torch.dtype:
    """Smallest integer that holds 0..top_k."""
    return torch.uint8 if top_k < 256 else torch.int16 if top_k < 1 << 15 else torch.int32
