"""Attention of runs of queries to runs of keys: the compressed and the window branch, forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.blocks import BlockIndex
from kernels.sizes import cdiv, next_power_of_2
from kernels.tiles import (
    BOUND_LIMIT,
    LOG2E,
    Bounds,
    attend_run,
    key_norms,
    load_rows,
    log_sum,
    queries_per_tile,
    row_bound,
    store_heads,
    store_rows,
)


@dataclass(frozen=True, eq=False)
class Segments:
    """Queries of segment s attend to keys of segment s. Positions count along `order` where that is not empty."""

    order: Tensor  # int32 [N], of queries and keys alike; empty = as they lie
    query_segment: Tensor  # [N], ascending
    query_starts: Tensor  # [S + 1]
    key_segment: Tensor  # [M], ascending
    key_starts: Tensor  # [S + 1]
    short: bool = False  # few queries per key: gradients of keys need no splitting

    @property
    def ordered(self) -> bool:
        return self.order.shape[0] > 0


def compressed_segments(index: BlockIndex) -> Segments:
    """Tokens of an asset to its compressed tokens."""
    return Segments(
        order=index.asset_of[:0],
        query_segment=index.asset_of,
        query_starts=index.token_starts,
        key_segment=index.compressed_asset,
        key_starts=index.asset_compressed,
    )


def asset_segments(index: BlockIndex) -> Segments:
    """Tokens of an asset to all its tokens: selection where every block is selected."""
    return Segments(
        order=index.asset_of[:0],
        query_segment=index.asset_of,
        query_starts=index.token_starts,
        key_segment=index.asset_of,
        key_starts=index.token_starts,
    )


def window_segments(index: BlockIndex, shifted: bool) -> Segments:
    """Tokens of a window to each other."""
    order, of, starts = index.window_order, index.window_of, index.window_starts
    if shifted:
        order, of, starts = index.shifted_order, index.shifted_of, index.shifted_starts
    return Segments(order=order, query_segment=of, query_starts=starts, key_segment=of, key_starts=starts, short=True)


@triton.jit(do_not_specialize=["N", "norms"])
def _segment_fwd(
    q_ptr, k_ptr, v_ptr, norm_ptr, order_ptr, segment_ptr, starts_ptr, o_ptr, lse_ptr, row_bound_ptr,
    flag_ptr, chunk_ptr, N, scale2, norms,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    NORMS: tl.constexpr, ORDERED: tl.constexpr, BOUNDED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = BQ * GS
    first, g = tl.program_id(0) * BQ, tl.program_id(1)
    n = first + tl.arange(0, BQ)
    ok = n < N
    row = tl.load(order_ptr + n, ok, other=0) if ORDERED else n
    q = load_rows(q_ptr, row, ok, g, G, GS, D, BQ)
    segment_of = tl.load(segment_ptr + n, ok, other=-1)
    segment_of = tl.reshape(tl.broadcast_to(segment_of[:, None], [BQ, GS]), [R])
    bounded = False
    m = tl.full([R], -1e30, lse_ptr.dtype.element_ty)
    if BOUNDED:
        bound = row_bound(q, norm_ptr, g, norms, scale2, NORMS)
        bounded = tl.max(bound, 0) <= BOUND_LIMIT
        m = tl.where(bounded, bound, m)
        if KEEP:
            store_heads(row_bound_ptr, bound, row, ok, g, G, GS, BQ)
            if not bounded:
                largest = tl.max(tl.reshape(bound, [BQ, GS]), 1)
                tl.store(flag_ptr + tl.load(chunk_ptr + row, ok, other=0), 1, ok & (largest > BOUND_LIMIT))
    l8, acc = tl.zeros([R, 8], tl.float32), tl.zeros([R, D], tl.float32)
    last = tl.load(segment_ptr + tl.minimum(first + BQ, N) - 1)
    for segment in range(tl.load(segment_ptr + first), last + 1):  # mostly one
        start, end = tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)
        m, l8, acc = attend_run(
            q, m, l8, acc, k_ptr, v_ptr, order_ptr, start, end, segment_of == segment, bounded, g, scale2,
            G, D, BK, ORDERED,
        )  # fmt: skip
    l = tl.sum(l8, 1)
    l = tl.where(l > 0, l, 1.0)  # rows past the end
    store_rows(o_ptr, acc / l.to(lse_ptr.dtype.element_ty)[:, None], row, ok, g, G, GS, D, BQ)
    store_heads(lse_ptr, log_sum(m, l, lse_ptr), row, ok, g, G, GS, BQ)


def segment_forward(
    q_NHD: Tensor,
    k_MGD: Tensor,
    v_MGD: Tensor,
    segments: Segments,
    scale: float,
    lse_NH: Tensor,
    norms: Tensor | None = None,
    bounds: Bounds | None = None,
    chunk_of: Tensor | None = None,
) -> Tensor:
    """Output [N, H, D]; writes log2 of the softmax denominators into lse, [N, H]. Contiguous, checked inputs.

    `norms` = `key_norms` of k, where they are known already: bf16 rows whose scores are provably moderate skip the
    running maximum. `bounds` receives the rows' bounds and the flags of their chunks, `chunk_of` [N].
    """
    (N, H, D), G = q_NHD.shape, k_MGD.shape[1]
    o_NHD = torch.empty_like(q_NHD)
    if N == 0:
        return o_NHD
    bounded = q_NHD.dtype == torch.bfloat16
    wide = q_NHD.dtype == torch.float32 or D == 128
    BQ = queries_per_tile(64 if wide else 128, H // G)
    if bounded and norms is None:
        norms, _ = key_norms(k_MGD)
    num_norms = norms.shape[1] if bounded and norms is not None else 0
    kept = (bounds.rows, bounds.flags, chunk_of) if bounds else (lse_NH, segments.order, segments.order)
    # Four programs share a multiprocessor instead of two: measured 12% faster at D = 32.
    options = {"maxnreg": 128} if D <= 32 and not wide else {}
    _segment_fwd[(cdiv(N, BQ), G)](
        q_NHD, k_MGD, v_MGD, norms if bounded else lse_NH, segments.order, segments.query_segment, segments.key_starts,
        o_NHD, lse_NH, *kept, N, scale * LOG2E, num_norms, G, H // G, D, BQ, BK=32 if D <= 32 or wide else 64,
        NORMS=next_power_of_2(max(1, num_norms)), ORDERED=segments.ordered, BOUNDED=bounded,
        KEEP=bounds is not None, num_warps=4, num_stages=3 if D <= 32 else 2, **options,
    )  # fmt: skip
    return o_NHD
