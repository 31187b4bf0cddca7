"""Attention of runs of queries to runs of keys: gradients, deterministic, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.segment import Segments
from kernels.tiles import LOG2E, load_heads, load_keys, load_rows, on_device, queries_per_tile, store_rows

_PROGRAMS = 5280  # wanted for dk and dv: eight waves of five on an H200; fixed, so that sums do not depend on the GPU


@triton.jit(do_not_specialize=["N"])
def _segment_dq(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, segment_ptr, starts_ptr, dq_ptr, N, scale, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    ORDERED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = BQ * GS
    first, g = tl.program_id(0) * BQ, tl.program_id(1)
    n, c = first + tl.arange(0, BQ), tl.arange(0, BK)
    ok = n < N
    row = tl.load(order_ptr + n, ok, other=0) if ORDERED else n
    q, do = load_rows(q_ptr, row, ok, g, G, GS, D, BQ), load_rows(do_ptr, row, ok, g, G, GS, D, BQ)
    lse = load_heads(lse_ptr, row, ok, g, float("inf"), G, GS, BQ)
    dot = load_heads(dot_ptr, row, ok, g, 0.0, G, GS, BQ)
    segment_of = tl.load(segment_ptr + n, ok, other=-1)
    segment_of = tl.reshape(tl.broadcast_to(segment_of[:, None], [BQ, GS]), [R])
    acc = tl.zeros([R, D], tl.float32)
    last = tl.load(segment_ptr + tl.minimum(first + BQ, N) - 1)
    for segment in range(tl.load(segment_ptr + first), last + 1):
        start, end = tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)
        lse_inside = tl.where(segment_of == segment, lse, float("inf"))
        full = start + (end - start) // BK * BK
        for t in range(start, full, BK):
            k = load_keys(k_ptr, order_ptr, t + c, end, g, G, D, ORDERED, True)
            v = load_keys(v_ptr, order_ptr, t + c, end, g, G, D, ORDERED, True)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale2 - lse_inside[:, None])
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - dot[:, None])
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
        if full < end:
            inside = full + c < end
            k = load_keys(k_ptr, order_ptr, full + c, end, g, G, D, ORDERED, False)
            v = load_keys(v_ptr, order_ptr, full + c, end, g, G, D, ORDERED, False)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale2 - lse_inside[:, None])
            p = tl.where(inside[None, :], p, 0.0)  # a padded key's exponent may overflow
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - dot[:, None])
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    acc *= scale
    if ADD:
        acc += load_rows(dq_ptr, row, ok, g, G, GS, D, BQ).to(tl.float32)
    store_rows(dq_ptr, acc, row, ok, g, G, GS, D, BQ)


@triton.jit(do_not_specialize=["N", "M", "step"])
def _segment_dkdv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, key_segment_ptr, starts_ptr, dk_ptr, dv_ptr,
    N, M, step, scale, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    t, g, split = tl.program_id(0) * BK, tl.program_id(1), tl.program_id(2)
    m, r, d = t + tl.arange(0, BK), tl.arange(0, BQ * GS), tl.arange(0, D)
    ok_m = m < M
    k = load_keys(k_ptr, order_ptr, m, M, g, G, D, ORDERED, False)
    v = load_keys(v_ptr, order_ptr, m, M, g, G, D, ORDERED, False)
    segment_of = tl.load(key_segment_ptr + m, ok_m, other=-1)
    dk, dv = tl.zeros([BK, D], tl.float32), tl.zeros([BK, D], tl.float32)
    last = tl.load(key_segment_ptr + tl.minimum(t + BK, M) - 1)
    first_segment = tl.load(key_segment_ptr + t)
    for segment in range(first_segment, last + 1):
        start = tl.maximum(tl.load(starts_ptr + segment), split * step)
        end = tl.minimum(tl.load(starts_ptr + segment + 1), split * step + step)
        inside = segment_of == segment
        for first in range(start, end, BQ):
            n = first + r // GS
            ok = n < end
            row = tl.load(order_ptr + n, ok, other=0) if ORDERED else n
            head = row.to(tl.int64) * (G * GS) + g * GS + r % GS
            q = tl.load(q_ptr + head[:, None] * D + d[None, :], ok[:, None], other=0.0)
            do = tl.load(do_ptr + head[:, None] * D + d[None, :], ok[:, None], other=0.0)
            lse = tl.load(lse_ptr + head, ok, other=float("inf"))
            dot = tl.load(dot_ptr + head, ok, other=0.0)
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale2 - lse[None, :])
            if last != first_segment:  # else keys past the end only fill rows that are not stored
                p = tl.where(inside[:, None], p, 0.0)
            dv = tl.dot(p.to(q.dtype), do, dv, input_precision="ieee")
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - dot[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    row = tl.load(order_ptr + m, ok_m, other=0) if ORDERED else m
    x = ((split.to(tl.int64) * M + row) * (G * D) + g * D)[:, None] + d[None, :]
    tl.store(dk_ptr + x, dk * scale, ok_m[:, None])
    tl.store(dv_ptr + x, dv, ok_m[:, None])


def segment_backward(
    q_NHD: Tensor,
    k_MGD: Tensor,
    v_MGD: Tensor,
    do_NHD: Tensor,
    lse_NH: Tensor,
    dot_NH: Tensor,
    segments: Segments,
    scale: float,
    dq_NHD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [N, H, D] in q's dtype, dk and dv [M, G, D] in fp32.

    The output's gradient is g * do with one gate g per token: lse is then the forward's minus log2 g, and dot is
    sum over D of o * do. Where dq is given it is added to in place.
    """
    (N, H, D), (M, G, _) = q_NHD.shape, k_MGD.shape
    add = dq_NHD is not None
    dq_NHD = torch.empty_like(q_NHD) if dq_NHD is None else dq_NHD
    if N == 0:
        return dq_NHD, *(k_MGD.new_zeros(M, G, D, dtype=torch.float32) for _ in range(2))
    wide, ordered = q_NHD.dtype == torch.float32 or D == 128, len(segments.order) > 0
    group, scale2 = H // G, scale * LOG2E
    with on_device(q_NHD):
        BQ = queries_per_tile(64, group)
        options = {"maxnreg": 128} if D <= 32 and not wide else {}  # four programs a multiprocessor
        _segment_dq[(triton.cdiv(N, BQ), G)](
            q_NHD, k_MGD, v_MGD, do_NHD, lse_NH, dot_NH, segments.order, segments.query_segment, segments.key_starts,
            dq_NHD, N, scale, scale2, G, group, D, BQ, BK=32 if wide else 64, ORDERED=ordered, ADD=add,
            num_warps=4, num_stages=3 if D <= 32 else 2 if D == 64 else 1, **options,
        )  # fmt: skip
        BQ, BK = queries_per_tile(32, group), 32 if wide else 64
        tiles = triton.cdiv(M, BK) * G
        splits = 1 if segments.short else min(triton.cdiv(_PROGRAMS, tiles), triton.cdiv(N, 256))
        step = triton.cdiv(triton.cdiv(N, splits), BQ) * BQ
        dk_SMGD = q_NHD.new_empty(splits, M, G, D, dtype=torch.float32)
        dv_SMGD = torch.empty_like(dk_SMGD)
        _segment_dkdv[(triton.cdiv(M, BK), G, splits)](
            q_NHD, k_MGD, v_MGD, do_NHD, lse_NH, dot_NH, segments.order, segments.key_segment, segments.query_starts,
            dk_SMGD, dv_SMGD, N, M, step, scale, scale2, G, group, D, BQ, BK, ORDERED=ordered,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    if splits == 1:  # no copy
        return dq_NHD, dk_SMGD[0], dv_SMGD[0]
    return dq_NHD, dk_SMGD.sum(0), dv_SMGD.sum(0)
