"""Exact, deterministic top-k of block scores, and the rank map that inverse lists are made from.

The definition is `top_blocks` in kernels.attention.reference. Long rows are read once for the
largest score of each of a few hundred groups of columns. The top-k of these gives the k groups that
hold the top-k of the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.block_index import BlockIndex
from kernels.runtime.integer_math import cdiv, next_power_of_2


@triton.jit
def _sortable_bits(score_ptr, x, exists):
    """Scores as integers: non-negative floats are ordered as their bits are. -1 for no score.

    A NaN of either sign is above infinity, but not so high that the sums of the bisection overflow
    and it never ends.
    """
    bits = tl.load(score_ptr + x, exists, other=0.0).to(tl.int32, bitcast=True)
    return tl.where(exists, tl.minimum(bits & 0x7FFFFFFF, 0x7F800001), -1)


@triton.jit
def _threshold(bits, k, low, reach, high):
    """Bisect for a threshold that exactly k scores reach, or for the k-th largest score.

    `reach` scores are at least `low`, at least k of them, and none is above `high`. Returns the
    threshold and the number of scores that reach it.
    """
    # The first guess is 2^-8 of the largest score: the threshold is mostly close to it.
    near = tl.maximum(high - (8 << 23), low)
    middle = tl.where(near > low, near, low + ((high - low + 1) >> 1))
    while tl.max(((low < high) & (reach != k)).to(tl.int32), 0) > 0:
        searching = (low < high) & (reach != k)
        count = tl.sum((bits >= middle[:, None]).to(tl.int32), 1)
        low = tl.where(searching & (count >= k), middle, low)
        reach = tl.where(searching & (count >= k), count, reach)
        high = tl.where(searching & (count < k), middle - 1, high)
        middle = low + ((high - low + 1) >> 1)
    return low, reach


@triton.jit
def _leading_groups(score_ptr, line, blocks, k, GROUPS: tl.constexpr):
    """The k groups with the largest scores, which hold the k largest scores.

    Group c has the columns c, c + GROUPS, c + 2 GROUPS, ... Groups are ordered by their largest
    score and then by its column, as scores are. If a group is not among the first k, then k scores
    come before its largest one, so that none of its scores is among the first k.

    Returns which groups are chosen [ROWS, GROUPS], a score that k of their scores reach, and the
    largest score [ROWS].
    """
    # Largest score of each group, and the first column that has it.
    c = tl.arange(0, GROUPS)[None, :]
    largest = tl.full([line.shape[0], GROUPS], -1, tl.int32)
    leader = tl.zeros([line.shape[0], GROUPS], tl.int32) + c
    for first in range(0, tl.max(blocks, 0), GROUPS):
        b = first + c
        bits = _sortable_bits(score_ptr, line[:, None] + b, b < blocks[:, None])
        leader = tl.where(bits > largest, b, leader)
        largest = tl.maximum(largest, bits)

    low, high = k * 0, tl.max(largest, 1)
    low, reach = _threshold(largest, k, low, tl.sum((largest >= 0).to(tl.int32), 1), high)
    chosen = largest >= low[:, None]
    if tl.max((reach != k).to(tl.int32), 0) > 0:
        # Of the groups with the score `low`, take those whose leaders come first.
        above, equal = largest > low[:, None], largest == low[:, None]
        room = k - tl.sum(above.to(tl.int32), 1)
        nearest, farthest = room - 1, blocks - 1  # bounds of the last leader that is taken
        while tl.max((nearest < farthest).to(tl.int32), 0) > 0:
            middle = (nearest + farthest) >> 1
            enough = tl.sum((equal & (leader <= middle[:, None])).to(tl.int32), 1) >= room
            farthest = tl.where(enough, middle, farthest)
            nearest = tl.where(enough, nearest, tl.minimum(middle + 1, farthest))
        chosen = above | (equal & (leader <= farthest[:, None]))
    return chosen, low, high


@triton.jit(
    do_not_specialize=["first_token", "tokens", "columns", "top_k", "stride", "first_chunk"]
)
def _top_blocks(
    score_ptr, asset_ptr, asset_blocks_ptr, chunk_ptr, chunk_starts_ptr, chunk_ranks_ptr,
    selected_ptr, rank_ptr, first_token, tokens, columns, top_k, stride, first_chunk,
    G: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHOSEN: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    # One program: ROWS queries of one key/value head, with all blocks of their assets. Without
    # groups, COLUMNS is the length of a row and CHOSEN is 1. With groups, COLUMNS is the largest
    # number of columns of a group and CHOSEN is top_k. All are rounded up to powers of two.
    i, g = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    n, ok = first_token + i, i < tokens
    asset = tl.load(asset_ptr + n, ok, other=0)  # [ROWS]
    block0 = tl.load(asset_blocks_ptr + asset, ok, other=0)
    blocks = tl.load(asset_blocks_ptr + asset + 1, ok, other=0) - block0
    k = tl.minimum(top_k, blocks)
    line = (g.to(tl.int64) * tokens + i) * columns
    to = selected_ptr + ((g.to(tl.int64) * stride + n) * top_k)[:, None]

    x = tl.arange(0, COLUMNS * CHOSEN)[None, :]
    if GROUPS == 0:
        # All columns at once.
        b = x
        bits = _sortable_bits(score_ptr, line[:, None] + b, b < blocks[:, None])
        low, high, reach = k * 0, tl.max(bits, 1), blocks
    else:
        # The columns of the leading groups, in ascending order. The row of the result holds the
        # numbers of the groups until it is written.
        chosen, low, high = _leading_groups(  # pyright: ignore[reportGeneralTypeIssues]
            score_ptr, line, blocks, k, GROUPS
        )
        rank = tl.cumsum(chosen.to(tl.int32), 1) - 1
        tl.store(to + rank, rank * 0 + tl.arange(0, GROUPS)[None, :], chosen)
        tl.debug_barrier()
        listed = x % CHOSEN < k[:, None]
        group = tl.load(to + x % CHOSEN, listed, other=0)
        tl.debug_barrier()
        b = group + x // CHOSEN * GROUPS
        bits = _sortable_bits(score_ptr, line[:, None] + b, listed & (b < blocks[:, None]))
        reach = tl.sum((bits >= low[:, None]).to(tl.int32), 1)

    # Take all scores that reach the threshold. If there are more than k, take those above it, and
    # of those equal to it the lower blocks.
    low, reach = _threshold(bits, k, low, reach, high)  # pyright: ignore
    selected = bits >= low[:, None]
    if tl.max((reach != k).to(tl.int32), 0) > 0:
        above, equal = bits > low[:, None], bits == low[:, None]
        room = (k - tl.sum(above.to(tl.int32), 1))[:, None]
        selected = above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= room))

    # Write the blocks in ascending order, then -1.
    rank = tl.cumsum(selected.to(tl.int32), 1) - 1
    tl.store(to + rank, block0[:, None] + b, selected)
    tl.store(to + x + rank * 0, rank * 0 - 1, (x >= k[:, None]) & (x < top_k) & ok[:, None])

    # Write rank + 1 of each choice into the rank map.
    if RANKS:
        chunk = tl.load(chunk_ptr + n, ok, other=0)
        start = tl.load(chunk_starts_ptr + chunk, ok, other=0)
        size = tl.load(chunk_starts_ptr + chunk + 1, ok, other=0) - start
        first_rank = tl.load(chunk_ranks_ptr + first_chunk)
        base = (tl.load(chunk_ranks_ptr + chunk, ok, other=0) - first_rank) * G
        place = (base + n - start)[:, None] + (b * G + g).to(tl.int64) * size[:, None]
        tl.store(rank_ptr + place, (rank + 1).to(rank_ptr.dtype.element_ty), selected)


def choose_groups(columns: int, top_k: int) -> int:
    """Return the number of groups that `top_blocks` narrows rows of scores with.

    0 stands for none: a row is then held by one program at once, which is fast for short rows and
    is needed where the groups of the largest scores are most of the row.

    Args:
        columns: Length of a row.
        top_k: Number of scores to choose.
    """
    groups = 128 if columns <= 512 else 256 if columns <= 4096 else 512
    listed = next_power_of_2(top_k) * next_power_of_2(cdiv(columns, groups))
    return groups if columns > 256 and top_k <= groups and 4 * listed <= columns else 0


def top_blocks(
    score_GNM: Tensor,
    index: BlockIndex,
    selected_GNT: Tensor,
    ranks: Tensor | None = None,
    *,
    first: int = 0,
    first_chunk: int = 0,
    groups: int | None = None,
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
        groups: Number of groups of columns, a power of two of at least T, or 0. It changes the time
            and not the result. None takes `choose_groups`.
    """
    G, tokens, columns = score_GNM.shape
    if tokens == 0:
        return
    top_k = selected_GNT.shape[2]
    groups = choose_groups(columns, top_k) if groups is None else groups
    if groups:
        COLUMNS, CHOSEN = next_power_of_2(cdiv(columns, groups)), next_power_of_2(top_k)
        widest = max(groups, COLUMNS * CHOSEN)
    else:
        COLUMNS, CHOSEN = max(32, next_power_of_2(columns)), 1
        widest = COLUMNS
    # One warp per row is fastest. The interpreter has a cost per program instead.
    ROWS = max(1, 8192 // widest) if triton.knobs.runtime.interpret else 1
    _top_blocks[(cdiv(tokens, ROWS), G)](
        score_GNM, index.asset_of, index.asset_blocks, index.chunk_of, index.chunk_starts,
        index.chunk_ranks, selected_GNT, selected_GNT if ranks is None else ranks, first, tokens,
        columns, top_k, selected_GNT.shape[1], first_chunk, G, COLUMNS, groups, CHOSEN, ROWS,
        RANKS=ranks is not None, num_warps=min(16, max(1, widest // 512)),
    )  # fmt: skip


def rank_dtype(top_k: int) -> torch.dtype:
    """Return the smallest integer dtype that holds 0..top_k."""
    return torch.uint8 if top_k < 256 else torch.int16 if top_k < 1 << 15 else torch.int32
