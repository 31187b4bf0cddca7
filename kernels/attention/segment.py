"""Attention of runs of queries to runs of keys, forward: the compressed and the window branch.

The definitions are `compressed_attention` and `window_attention` in kernels.attention.reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.block_index import BlockIndex
from kernels.attention.launches import Launch, segment_forward_launch
from kernels.attention.packed_heads import load_rows, queries_per_tile, store_heads, store_rows
from kernels.attention.scaled_keys import BranchKeys
from kernels.attention.softmax import BOUND_LIMIT, LOG2E, attend_run, log_sum, row_bound
from kernels.runtime.integer_math import cdiv, next_power_of_2
from kernels.runtime.triton_ops import needs_long_offsets


@dataclass(frozen=True, eq=False)
class Segments:
    """Queries of segment s attend to the keys of segment s. S segments, N queries, M keys.

    Queries and keys are sorted by segment. Positions count along `order` where it is not empty.
    """

    order: Tensor
    """int32 [N], order of the queries and of the keys. Empty if rows are already in order."""

    query_segment: Tensor
    """int32 [N], ascending."""

    query_starts: Tensor
    """int32 [S + 1], first query of each segment."""

    key_segment: Tensor
    """int32 [M], ascending."""

    key_starts: Tensor
    """int32 [S + 1], first key of each segment."""

    short: bool = False
    """True for few queries per key. The gradients of keys then need no splitting."""

    @property
    def ordered(self) -> bool:
        """True if positions count along `order`."""
        return self.order.shape[0] > 0

    def tensors(self) -> list[Tensor]:
        """Return the tensors, of which `Segments(*tensors, short=...)` makes the segments again."""
        return [
            self.order,
            self.query_segment,
            self.query_starts,
            self.key_segment,
            self.key_starts,
        ]


def _asset_segments(index: BlockIndex, key_segment: Tensor, key_starts: Tensor) -> Segments:
    return Segments(
        order=index.asset_of[:0],
        query_segment=index.asset_of,
        query_starts=index.token_starts,
        key_segment=key_segment,
        key_starts=key_starts,
    )


def compressed_segments(index: BlockIndex) -> Segments:
    """Return segments in which the tokens of an asset attend to its compressed tokens."""
    return _asset_segments(index, index.compressed_asset, index.asset_compressed)


def asset_segments(index: BlockIndex) -> Segments:
    """Return segments in which the tokens of an asset attend to all its tokens.

    This is the selection branch if every block is selected.
    """
    return _asset_segments(index, index.asset_of, index.token_starts)


def window_segments(index: BlockIndex, shifted: bool) -> Segments:
    """Return segments in which the tokens of an aligned or shifted window attend to each other."""
    if shifted:
        order, of, starts = index.shifted_order, index.shifted_of, index.shifted_starts
    else:
        order, of, starts = index.window_order, index.window_of, index.window_starts
    return Segments(order, of, starts, of, starts, short=True)


@triton.jit(do_not_specialize=["N", "norms"])
def _segment_fwd(
    q_ptr, k_ptr, scaled_ptr, v_ptr, norm_ptr, order_ptr, segment_ptr, starts_ptr, o_ptr, lse_ptr,
    flag_ptr, chunk_ptr, N, scale2, norms, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, NORMS: tl.constexpr, ORDERED: tl.constexpr,
    BOUNDED: tl.constexpr, KEEP: tl.constexpr, CHUNKS: tl.constexpr, LONG: tl.constexpr,
    UNROLL: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    # One program: BLOCK_Q queries with the R = BLOCK_Q * GROUP rows of one key/value head.
    R: tl.constexpr = BLOCK_Q * GROUP
    first, g = tl.program_id(0) * BLOCK_Q, tl.program_id(1)
    n = first + tl.arange(0, BLOCK_Q)
    ok = n < N
    row = tl.load(order_ptr + n, ok, other=0) if ORDERED else n
    q = load_rows(q_ptr, row, ok, g, G, GROUP, D, BLOCK_Q)  # [R, D]
    segment_of = tl.load(segment_ptr + n, ok, other=-1)  # [BLOCK_Q]

    # Rows whose scores are provably moderate need no running maximum. Chunks with other rows are
    # flagged for the selection branch, and all of SSA for the backward.
    bounded = False
    row_max = tl.full([R], -1e30, lse_ptr.dtype.element_ty)
    if BOUNDED:
        bound = row_bound(q, norm_ptr, g, norms, NORMS)  # [R]
        bounded = tl.max(bound, 0) <= BOUND_LIMIT
        row_max = tl.where(bounded, 0.0, row_max)
        if KEEP and not bounded:
            largest = tl.max(tl.reshape(bound, [BLOCK_Q, GROUP]), 1)
            far = ok & (largest > BOUND_LIMIT)
            tl.store(flag_ptr + row * 0, 1, far)
            if CHUNKS:
                tl.store(flag_ptr + 1 + tl.load(chunk_ptr + row, ok, other=0), 1, far)

    # Attend to each segment that the tile has queries of, mostly one, and store its rows.
    last = tl.load(segment_ptr + tl.minimum(first + BLOCK_Q, N) - 1)
    for segment in range(tl.load(segment_ptr + first), last + 1):
        start, end = tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)
        sums_R8, acc = tl.zeros([R, 8], tl.float32), tl.zeros([R, D], tl.float32)
        final_max, sums_R8, acc = attend_run(
            q, row_max, sums_R8, acc, k_ptr, scaled_ptr, v_ptr, order_ptr, start, end, bounded, g,
            scale2, G, D, BLOCK_K, ORDERED, LONG, UNROLL, EMULATED,
        )  # fmt: skip
        denominator = tl.sum(sums_R8, 1)
        inside = segment_of == segment  # other rows hold arbitrary values
        o = acc / denominator.to(lse_ptr.dtype.element_ty)[:, None]
        store_rows(o_ptr, o, row, inside, g, G, GROUP, D, BLOCK_Q)
        lse = log_sum(final_max, denominator, lse_ptr)
        store_heads(lse_ptr, lse, row, inside, g, G, GROUP, BLOCK_Q)


def segment_forward(
    q_NHD: Tensor,
    keys: BranchKeys,
    v_MGD: Tensor,
    segments: Segments,
    lse_NH: Tensor,
    flags: Tensor | None = None,
    chunk_of: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Return the attention output [N, H, D] and write the log-sums. Inputs are checked before.

    bf16 rows whose scores are provably moderate skip the running maximum.

    Args:
        q_NHD: [N, H, D], contiguous.
        keys: Keys [M, G, D].
        v_MGD: [M, G, D], contiguous.
        segments: Which queries attend to which keys.
        lse_NH: [N, H], receives log2 of the softmax denominators.
        flags: int32 [1 + chunks]. Where there are bf16 rows with other scores, flags[0] becomes 1
            and flags[1 + c] for the chunks c of those rows.
        chunk_of: int32 [N], chunk of each token. Without it only flags[0] is set.
        launch: Tile sizes. None takes `segment_forward_launch`.
    """
    N, H, D = q_NHD.shape
    G = keys.k.shape[1]
    o_NHD = torch.empty_like(q_NHD)
    if N == 0:
        return o_NHD
    launch = launch or segment_forward_launch(q_NHD)
    BLOCK_Q = queries_per_tile(launch.rows, H // G)
    num_norms = 0 if keys.norms is None else keys.norms.shape[1]
    flags_and_chunks = (x if x is not None else segments.order for x in (flags, chunk_of))
    _segment_fwd[(cdiv(N, BLOCK_Q), G)](
        q_NHD, *keys.plain_and_scaled, v_MGD, lse_NH if keys.norms is None else keys.norms,
        segments.order, segments.query_segment, segments.key_starts, o_NHD, lse_NH,
        *flags_and_chunks, N, keys.scale * LOG2E, num_norms, G, H // G, D, BLOCK_Q,
        launch.keys, NORMS=next_power_of_2(max(1, num_norms)),
        ORDERED=segments.ordered, BOUNDED=keys.norms is not None,
        KEEP=flags is not None and keys.norms is not None, CHUNKS=chunk_of is not None,
        LONG=needs_long_offsets(q_NHD), UNROLL=launch.unroll, EMULATED=launch.emulated,
        **launch.options,
    )  # fmt: skip
    return o_NHD
