"""Attention of runs of queries to runs of keys: gradients, deterministic, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.gates import Rows
from kernels.attention.segment import Segments
from kernels.runtime.integer_math import cdiv
from kernels.runtime.triton_ops import (
    LN2,
    LOG2E,
    Keys,
    add_dot,
    load_heads,
    load_keys,
    load_rows,
    long_offsets,
    products,
    queries_per_tile,
    score_gradients,
    store_rows,
)

_PROGRAMS = 5280  # wanted for dk and dv: eight waves of five on an H200; fixed, so that sums do not depend on the GPU
_MANY_KEYS = 2048


@triton.jit
def queries_run(
    q, do, lse, dot, k_ptr, v_ptr, order_ptr, start, end, g, scale2,
    G: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, ORDERED: tl.constexpr, LONG: tl.constexpr,
    FOLDED: tl.constexpr,
):  # fmt: skip
    """Sum over keys start .. end of ds k, [R, D]. FOLDED: no row has an lse, and keys carry the scale."""
    c = tl.arange(0, BK)
    acc = tl.zeros([q.shape[0], D], lse.dtype)
    full = start + (end - start) // BK * BK
    for t in range(start, full, BK):
        k = load_keys(k_ptr, order_ptr, t + c, end, g, G, D, ORDERED, True, LONG)
        v = load_keys(v_ptr, order_ptr, t + c, end, g, G, D, ORDERED, True, LONG)
        p = tl.exp2(products(q, k)) if FOLDED else tl.exp2(products(q, k) * scale2 - lse[:, None])
        ds = p * (products(do, v) - dot[:, None])
        acc = add_dot(ds.to(k.dtype), k, acc)
    if full < end:
        inside = full + c < end
        k = load_keys(k_ptr, order_ptr, full + c, end, g, G, D, ORDERED, False, LONG)
        v = load_keys(v_ptr, order_ptr, full + c, end, g, G, D, ORDERED, False, LONG)
        p = tl.exp2(products(q, k)) if FOLDED else tl.exp2(products(q, k) * scale2 - lse[:, None])
        p = tl.where(inside[None, :], p, 0.0)  # a padded key's exponent may overflow
        ds = p * (products(do, v) - dot[:, None])
        acc = add_dot(ds.to(k.dtype), k, acc)
    return acc


@triton.jit
def _tile_dq(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, segment_ptr, starts_ptr, dq_ptr, N, dq_scale, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, ORDERED: tl.constexpr,
    ADD: tl.constexpr, LONG: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    first, g = tl.program_id(0) * BQ, tl.program_id(1)
    n = first + tl.arange(0, BQ)
    ok = n < N
    row = tl.load(order_ptr + n, ok, other=0) if ORDERED else n
    q, do = load_rows(q_ptr, row, ok, g, G, GS, D, BQ), load_rows(do_ptr, row, ok, g, G, GS, D, BQ)
    lse = load_heads(lse_ptr, row, ok, g, float("inf"), G, GS, BQ)
    dot = load_heads(dot_ptr, row, ok, g, 0.0, G, GS, BQ)
    segment_of = tl.load(segment_ptr + n, ok, other=-1)
    last = tl.load(segment_ptr + tl.minimum(first + BQ, N) - 1)
    for segment in range(tl.load(segment_ptr + first), last + 1):
        start, end = tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)
        acc = queries_run(
            q,
            do,
            lse,
            dot,
            k_ptr,
            v_ptr,
            order_ptr,
            start,
            end,
            g,
            scale2,
            G,
            D,
            BK,
            ORDERED,
            LONG,
            FOLDED,
        )
        acc *= dq_scale
        mine = segment_of == segment  # other rows hold what is not theirs
        if ADD:
            acc += load_rows(dq_ptr, row, mine, g, G, GS, D, BQ).to(tl.float32)
        store_rows(dq_ptr, acc, row, mine, g, G, GS, D, BQ)


@triton.jit(do_not_specialize=["N"])
def _segment_dq(
    q_ptr, k_ptr, scaled_ptr, v_ptr, do_ptr, weighted_ptr, lse_ptr, dot_ptr, flag_ptr, order_ptr, segment_ptr,
    starts_ptr, dq_ptr, N, scale, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, ORDERED: tl.constexpr,
    ADD: tl.constexpr, LONG: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    folded = False
    if FOLD:
        folded = tl.load(flag_ptr) == 0
    if folded:  # the whole of it twice: two loops in one body would share its registers
        _tile_dq(
            q_ptr, scaled_ptr, v_ptr, weighted_ptr, lse_ptr, dot_ptr, order_ptr, segment_ptr, starts_ptr, dq_ptr, N,
            LN2, 1.0, G, GS, D, BQ, BK, ORDERED, ADD, LONG, True,
        )  # fmt: skip
    else:
        _tile_dq(
            q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, segment_ptr, starts_ptr, dq_ptr, N,
            scale, scale2, G, GS, D, BQ, BK, ORDERED, ADD, LONG, False,
        )  # fmt: skip


@triton.jit
def _keys_step(
    k, v, dk, dv, q_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, first, end, g, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, ORDERED: tl.constexpr, FULL: tl.constexpr,
    LONG: tl.constexpr, FOLDED: tl.constexpr,
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
        q, do, dot = tl.load(q_ptr + x), tl.load(do_ptr + x), tl.load(dot_ptr + row)
    else:
        q, do = (
            tl.load(q_ptr + x, ok[:, None], other=0.0),
            tl.load(do_ptr + x, ok[:, None], other=0.0),
        )
        dot = tl.load(dot_ptr + row, ok, other=0.0)
    if FOLDED:
        p = tl.exp2(products(k, q))
    else:
        lse = tl.load(lse_ptr + row) if FULL else tl.load(lse_ptr + row, ok, other=float("inf"))
        p = tl.exp2(products(k, q) * scale2 - lse[None, :])
    dv = add_dot(p.to(q.dtype), do, dv)
    ds = score_gradients(p, products(v, do) - dot[None, :], q)
    return add_dot(ds, q, dk), dv


@triton.jit
def _tile_dkdv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, key_segment_ptr, starts_ptr, dk_ptr, dv_ptr, M, scale,
    scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, ORDERED: tl.constexpr,
    FAST: tl.constexpr, LONG: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    t, g, split = tl.program_id(0) * BK, tl.program_id(1), tl.program_id(2)
    m, d = t + tl.arange(0, BK), tl.arange(0, D)
    ok_m = m < M
    k = load_keys(k_ptr, order_ptr, m, M, g, G, D, ORDERED, False, LONG)
    v = load_keys(v_ptr, order_ptr, m, M, g, G, D, ORDERED, False, LONG)
    segment_of = tl.load(key_segment_ptr + m, ok_m, other=-1)
    row = tl.load(order_ptr + m, ok_m, other=0) if ORDERED else m
    x = ((split.to(tl.int64) * M + row) * (G * D) + g * D)[:, None] + d[None, :]
    last_segment = tl.load(key_segment_ptr + tl.minimum(t + BK, M) - 1)
    for segment in range(tl.load(key_segment_ptr + t), last_segment + 1):
        start, end = tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)
        step = tl.cdiv(tl.cdiv(end - start, tl.num_programs(2)), BQ) * BQ
        start += split * step
        end = tl.minimum(start + step, end)
        dk = tl.zeros([BK, D], lse_ptr.dtype.element_ty)
        dv = dk
        full = start + tl.maximum(end - start, 0) // BQ * BQ if FAST else end
        for first in range(start, full, BQ):
            dk, dv = _keys_step(
                k, v, dk, dv, q_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, first, end, g, scale2, G, GS, D, BQ, ORDERED,
                FAST, LONG, FOLDED,
            )  # fmt: skip
        if full < end:
            dk, dv = _keys_step(
                k, v, dk, dv, q_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, full, end, g, scale2, G, GS, D, BQ, ORDERED,
                False, LONG, FOLDED,
            )  # fmt: skip
        inside = (segment_of == segment)[:, None]  # other rows hold what is not theirs
        tl.store(dk_ptr + x, dk * scale, inside)
        tl.store(dv_ptr + x, dv, inside)


@triton.jit(do_not_specialize=["M"])
def _segment_dkdv(
    q_ptr, k_ptr, scaled_ptr, v_ptr, do_ptr, weighted_ptr, lse_ptr, dot_ptr, flag_ptr, order_ptr, key_segment_ptr,
    starts_ptr, dk_ptr, dv_ptr, M, scale, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, ORDERED: tl.constexpr,
    FAST: tl.constexpr, LONG: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    folded = False
    if FOLD:
        folded = tl.load(flag_ptr) == 0
    if folded:
        _tile_dkdv(
            q_ptr, scaled_ptr, v_ptr, weighted_ptr, lse_ptr, dot_ptr, order_ptr, key_segment_ptr, starts_ptr, dk_ptr,
            dv_ptr, M, scale, 1.0, G, GS, D, BQ, BK, ORDERED, FAST, LONG, True,
        )  # fmt: skip
    else:
        _tile_dkdv(
            q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, key_segment_ptr, starts_ptr, dk_ptr, dv_ptr, M,
            scale, scale2, G, GS, D, BQ, BK, ORDERED, FAST, LONG, False,
        )  # fmt: skip


def _splits(tiles: int, segments: Segments, N: int) -> int:
    """Parts that every segment's queries are cut into, for programs enough; fixed by sizes, so that sums are too."""
    if segments.short:
        return max(1, min(_PROGRAMS // 4 // tiles, 8))
    return min(cdiv(_PROGRAMS, tiles), cdiv(N, 256))


def segment_backward(
    q_NHD: Tensor,
    keys: Keys,
    v_MGD: Tensor,
    rows: Rows,
    segments: Segments,
    dq_NHD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [N, H, D] in q's dtype, dk and dv [M, G, D] in fp32. Where dq is given it is added to in place."""
    (N, H, D), (M, G, _) = q_NHD.shape, keys.k.shape
    add = dq_NHD is not None
    dq_NHD = torch.empty_like(q_NHD) if dq_NHD is None else dq_NHD
    if N == 0:
        return dq_NHD, *(v_MGD.new_zeros(M, G, D, dtype=torch.float32) for _ in range(2))
    wide, ordered = q_NHD.dtype == torch.float32 or D == 128, segments.ordered
    small = D <= 32 and not wide
    group, order = H // G, segments.order
    inputs = (q_NHD, *keys.both, v_MGD, *rows.tensors(order), order)
    BQ = queries_per_tile(32 if q_NHD.dtype == torch.float32 else 64, group)
    options = (
        {"maxnreg": 128} if small and not segments.short else {}
    )  # four programs a multiprocessor
    _segment_dq[(cdiv(N, BQ), G)](
        *inputs, segments.query_segment, segments.key_starts, dq_NHD, N, keys.scale, keys.scale * LOG2E, G, group, D,
        BQ, BK=32 if wide or segments.short else 64, ORDERED=ordered, ADD=add, LONG=long_offsets(q_NHD),
        FOLD=rows.flag is not None, num_warps=4, num_stages=3 if D <= 32 else 2 if D == 64 else 1, **options,
    )  # fmt: skip
    # Many keys: 128 of them share a load of two queries. Few: four queries for 64, and more programs.
    many = small and M >= _MANY_KEYS and not segments.short
    BK = 32 if wide else 128 if many else 64
    BQ = queries_per_tile(64 if small and not many else 32, group)
    splits = _splits(cdiv(M, BK) * G, segments, N)
    dk_SMGD = q_NHD.new_empty(splits, M, G, D, dtype=torch.float32)
    dv_SMGD = torch.empty_like(dk_SMGD)
    options = {"maxnreg": 168} if small else {}  # three programs a multiprocessor
    _segment_dkdv[(cdiv(M, BK), G, splits)](
        *inputs, segments.key_segment, segments.query_starts, dk_SMGD, dv_SMGD, M, keys.scale, keys.scale * LOG2E, G,
        group, D, BQ, BK, ORDERED=ordered, FAST=not wide, LONG=long_offsets(q_NHD), FOLD=rows.flag is not None,
        num_warps=4, num_stages=2 if ordered else 3, **options,
    )  # fmt: skip
    if splits == 1:  # no copy
        return dq_NHD, dk_SMGD[0], dv_SMGD[0]
    return dq_NHD, dk_SMGD.sum(0), dv_SMGD.sum(0)
