"""Attention of runs of queries to runs of keys: gradients, deterministic, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.segment import Segments
from kernels.sizes import cdiv
from kernels.tiles import (
    LOG2E,
    add_dot,
    load_heads,
    load_keys,
    load_rows,
    long_offsets,
    products,
    queries_per_tile,
    store_rows,
)

_PROGRAMS = 5280  # wanted for dk and dv: eight waves of five on an H200; fixed, so that sums do not depend on the GPU
_MANY_KEYS = 2048


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
    acc = tl.zeros([R, D], lse_ptr.dtype.element_ty)
    last = tl.load(segment_ptr + tl.minimum(first + BQ, N) - 1)
    for segment in range(tl.load(segment_ptr + first), last + 1):
        start, end = tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)
        lse_inside = tl.where(segment_of == segment, lse, float("inf"))
        full = start + (end - start) // BK * BK
        for t in range(start, full, BK):
            k = load_keys(k_ptr, order_ptr, t + c, end, g, G, D, ORDERED, True)
            v = load_keys(v_ptr, order_ptr, t + c, end, g, G, D, ORDERED, True)
            p = tl.exp2(products(q, k) * scale2 - lse_inside[:, None])
            ds = p * (products(do, v) - dot[:, None])
            acc = add_dot(ds.to(k.dtype), k, acc)
        if full < end:
            inside = full + c < end
            k = load_keys(k_ptr, order_ptr, full + c, end, g, G, D, ORDERED, False)
            v = load_keys(v_ptr, order_ptr, full + c, end, g, G, D, ORDERED, False)
            p = tl.exp2(products(q, k) * scale2 - lse_inside[:, None])
            p = tl.where(inside[None, :], p, 0.0)  # a padded key's exponent may overflow
            ds = p * (products(do, v) - dot[:, None])
            acc = add_dot(ds.to(k.dtype), k, acc)
    acc *= scale
    if ADD:
        acc += load_rows(dq_ptr, row, ok, g, G, GS, D, BQ).to(tl.float32)
    store_rows(dq_ptr, acc, row, ok, g, G, GS, D, BQ)


@triton.jit
def _keys_step(
    k, v, dk, dv, q_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, first, end, inside, mixed, g, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, ORDERED: tl.constexpr, FULL: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """Adds what queries first .. first + BQ give; FULL says that none lies past the end."""
    r, d = tl.arange(0, BQ * GS), tl.arange(0, D)
    n = first + r // GS
    ok = n < end
    if ORDERED:
        n = tl.load(order_ptr + n) if FULL else tl.load(order_ptr + n, ok, other=0)
    if LONG:
        n = n.to(tl.int64)
    row = n * (G * GS) + (g * GS + r % GS)
    x = row[:, None] * D + d[None, :]
    if FULL:  # masks cost a third of the loop
        q, do, lse, dot = tl.load(q_ptr + x), tl.load(do_ptr + x), tl.load(lse_ptr + row), tl.load(dot_ptr + row)
    else:
        q, do = tl.load(q_ptr + x, ok[:, None], other=0.0), tl.load(do_ptr + x, ok[:, None], other=0.0)
        lse, dot = tl.load(lse_ptr + row, ok, other=float("inf")), tl.load(dot_ptr + row, ok, other=0.0)
    p = tl.exp2(products(k, q) * scale2 - lse[None, :])
    if mixed:  # else keys past the end only fill rows that are not stored
        p = tl.where(inside[:, None], p, 0.0)
    dv = add_dot(p.to(q.dtype), do, dv)
    ds = p * (products(v, do) - dot[None, :])
    return add_dot(ds.to(q.dtype), q, dk), dv


@triton.jit(do_not_specialize=["M"])
def _segment_dkdv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, key_segment_ptr, starts_ptr, dk_ptr, dv_ptr,
    M, scale, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, ORDERED: tl.constexpr,
    FAST: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    t, g, split = tl.program_id(0) * BK, tl.program_id(1), tl.program_id(2)
    m, d = t + tl.arange(0, BK), tl.arange(0, D)
    ok_m = m < M
    k = load_keys(k_ptr, order_ptr, m, M, g, G, D, ORDERED, False)
    v = load_keys(v_ptr, order_ptr, m, M, g, G, D, ORDERED, False)
    segment_of = tl.load(key_segment_ptr + m, ok_m, other=-1)
    dk = tl.zeros([BK, D], lse_ptr.dtype.element_ty)
    dv = dk
    first_segment = tl.load(key_segment_ptr + t)
    last_segment = tl.load(key_segment_ptr + tl.minimum(t + BK, M) - 1)
    mixed = first_segment != last_segment
    for segment in range(first_segment, last_segment + 1):
        start, end = tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)
        step = tl.cdiv(tl.cdiv(end - start, tl.num_programs(2)), BQ) * BQ
        start += split * step
        end = tl.minimum(start + step, end)
        inside = segment_of == segment
        full = start + tl.maximum(end - start, 0) // BQ * BQ if FAST else end
        for first in range(start, full, BQ):
            dk, dv = _keys_step(
                k, v, dk, dv, q_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, first, end, inside, mixed, g, scale2,
                G, GS, D, BQ, ORDERED, FAST, LONG,
            )  # fmt: skip
        if full < end:
            dk, dv = _keys_step(
                k, v, dk, dv, q_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, full, end, inside, mixed, g, scale2,
                G, GS, D, BQ, ORDERED, False, LONG,
            )  # fmt: skip
    row = tl.load(order_ptr + m, ok_m, other=0) if ORDERED else m
    x = ((split.to(tl.int64) * M + row) * (G * D) + g * D)[:, None] + d[None, :]
    tl.store(dk_ptr + x, dk * scale, ok_m[:, None])
    tl.store(dv_ptr + x, dv, ok_m[:, None])


def _splits(tiles: int, segments: Segments, N: int) -> int:
    """Parts that every segment's queries are cut into, for programs enough; fixed by sizes, so that sums are too."""
    if segments.short:
        return max(1, min(_PROGRAMS // 4 // tiles, 8))
    return min(cdiv(_PROGRAMS, tiles), cdiv(N, 256))


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
    wide, ordered = q_NHD.dtype == torch.float32 or D == 128, segments.ordered
    small = D <= 32 and not wide
    group, scale2 = H // G, scale * LOG2E
    BQ = queries_per_tile(32 if q_NHD.dtype == torch.float32 else 64, group)
    options = {"maxnreg": 128} if small and not segments.short else {}  # four programs a multiprocessor
    _segment_dq[(cdiv(N, BQ), G)](
        q_NHD, k_MGD, v_MGD, do_NHD, lse_NH, dot_NH, segments.order, segments.query_segment, segments.key_starts,
        dq_NHD, N, scale, scale2, G, group, D, BQ, BK=32 if wide or segments.short else 64, ORDERED=ordered, ADD=add,
        num_warps=4, num_stages=3 if D <= 32 else 2 if D == 64 else 1, **options,
    )  # fmt: skip
    # Many keys: 128 of them share a load of two queries. Few: four queries for 64, and more programs.
    many = small and M >= _MANY_KEYS and not segments.short
    BK = 32 if wide else 128 if many else 64
    BQ = queries_per_tile(64 if small and not many else 32, group)
    splits = _splits(cdiv(M, BK) * G, segments, N)
    dk_SMGD = q_NHD.new_empty(splits, M, G, D, dtype=torch.float32)
    dv_SMGD = torch.empty_like(dk_SMGD)
    options = {"maxnreg": 168} if many or (small and ordered) else {}  # three programs a multiprocessor
    _segment_dkdv[(cdiv(M, BK), G, splits)](
        q_NHD, k_MGD, v_MGD, do_NHD, lse_NH, dot_NH, segments.order, segments.key_segment, segments.query_starts,
        dk_SMGD, dv_SMGD, M, scale, scale2, G, group, D, BQ, BK, ORDERED=ordered, FAST=not wide,
        LONG=long_offsets(q_NHD), num_warps=4, num_stages=2 if ordered else 3, **options,
    )  # fmt: skip
    if splits == 1:  # no copy
        return dq_NHD, dk_SMGD[0], dv_SMGD[0]
    return dq_NHD, dk_SMGD.sum(0), dv_SMGD.sum(0)
