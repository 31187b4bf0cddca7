"""Attention of runs of queries to runs of keys: the compressed and the window branch, forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.block_index import BlockIndex
from kernels.runtime.integer_math import cdiv, next_power_of_2
from kernels.runtime.triton_ops import (
    BOUND_LIMIT,
    LOG2E,
    Keys,
    attend_run,
    load_rows,
    log_sum,
    long_offsets,
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
    return Segments(
        order=order,
        query_segment=of,
        query_starts=starts,
        key_segment=of,
        key_starts=starts,
        short=True,
    )


@triton.jit(do_not_specialize=["N", "norms"])
def _segment_fwd(
    q_ptr, k_ptr, scaled_ptr, v_ptr, norm_ptr, order_ptr, segment_ptr, starts_ptr, o_ptr, lse_ptr, flag_ptr, chunk_ptr,
    N, scale2, norms,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    NORMS: tl.constexpr, ORDERED: tl.constexpr, BOUNDED: tl.constexpr, KEEP: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = BQ * GS
    first, g = tl.program_id(0) * BQ, tl.program_id(1)
    n = first + tl.arange(0, BQ)
    ok = n < N
    row = tl.load(order_ptr + n, ok, other=0) if ORDERED else n
    q = load_rows(q_ptr, row, ok, g, G, GS, D, BQ)
    segment_of = tl.load(segment_ptr + n, ok, other=-1)
    bounded = False
    m = tl.full([R], -1e30, lse_ptr.dtype.element_ty)
    if BOUNDED:
        bound = row_bound(q, norm_ptr, g, norms, NORMS)
        bounded = tl.max(bound, 0) <= BOUND_LIMIT
        m = tl.where(bounded, 0.0, m)
        if KEEP and not bounded:
            largest = tl.max(tl.reshape(bound, [BQ, GS]), 1)
            far = ok & (largest > BOUND_LIMIT)
            tl.store(flag_ptr + row * 0, 1, far)
            tl.store(flag_ptr + 1 + tl.load(chunk_ptr + row, ok, other=0), 1, far)
    last = tl.load(segment_ptr + tl.minimum(first + BQ, N) - 1)
    for segment in range(tl.load(segment_ptr + first), last + 1):  # mostly one
        start, end = tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)
        l8, acc = tl.zeros([R, 8], tl.float32), tl.zeros([R, D], tl.float32)
        m_run, l8, acc = attend_run(
            q,
            m,
            l8,
            acc,
            k_ptr,
            scaled_ptr,
            v_ptr,
            order_ptr,
            start,
            end,
            bounded,
            g,
            scale2,
            G,
            D,
            BK,
            ORDERED,
            LONG,
        )
        l = tl.sum(l8, 1)
        mine = segment_of == segment  # what other rows hold is not stored
        store_rows(o_ptr, acc / l.to(lse_ptr.dtype.element_ty)[:, None], row, mine, g, G, GS, D, BQ)
        store_heads(lse_ptr, log_sum(m_run, l, lse_ptr), row, mine, g, G, GS, BQ)


def segment_forward(
    q_NHD: Tensor,
    keys: Keys,
    v_MGD: Tensor,
    segments: Segments,
    lse_NH: Tensor,
    flags: Tensor | None = None,
    chunk_of: Tensor | None = None,
) -> Tensor:
    """Output [N, H, D]; writes log2 of the softmax denominators into lse, [N, H]. Contiguous, checked inputs.

    bf16 rows whose scores are provably moderate skip the running maximum. Where there are others, flags[0] becomes 1,
    and flags[1 + c] of their chunks c (`chunk_of`, [N]); int32 [1 + chunks].
    """
    (N, H, D), G = q_NHD.shape, keys.k.shape[1]
    o_NHD = torch.empty_like(q_NHD)
    if N == 0:
        return o_NHD
    wide = q_NHD.dtype == torch.float32 or D == 128
    BQ = queries_per_tile(64 if wide else 128, H // G)
    num_norms = 0 if keys.norms is None else keys.norms.shape[1]
    kept = (segments.order, segments.order) if flags is None else (flags, chunk_of)
    # Four programs share a multiprocessor instead of two: measured 12% faster at D = 32.
    options = {"maxnreg": 128} if D <= 32 and not wide else {}
    _segment_fwd[(cdiv(N, BQ), G)](
        q_NHD, *keys.both, v_MGD, lse_NH if keys.norms is None else keys.norms, segments.order, segments.query_segment,
        segments.key_starts, o_NHD, lse_NH, *kept, N, keys.scale * LOG2E, num_norms, G, H // G, D, BQ,
        BK=32 if D <= 32 or wide else 64,
        NORMS=next_power_of_2(max(1, num_norms)), ORDERED=segments.ordered, BOUNDED=keys.norms is not None,
        KEEP=flags is not None and keys.norms is not None, LONG=long_offsets(q_NHD), num_warps=4,
        num_stages=3 if D <= 32 else 2, **options,
    )  # fmt: skip
    return o_NHD
