"""Attention of each query to its selected blocks, forward: one program holds a block's keys, queries come to it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.block_index import BlockIndex
from kernels.attention.inverse_lists import ITEM_FIELDS, Lists, QueryRange, entry_shift, spread
from kernels.runtime.integer_math import cdiv
from kernels.runtime.triton_ops import (
    LOG2E,
    Keys,
    attend_run,
    log_sum,
    long_offsets,
    lse_dtype,
    queries_per_tile,
)


@triton.jit
def _store_partial(part_ptr, lse_ptr, m, l8, acc, x, ok, D: tl.constexpr):
    l = tl.sum(l8, 1)
    l = tl.where(l > 0, l, 1.0)  # rows past the end
    acc *= (1.0 / l.to(lse_ptr.dtype.element_ty)).to(tl.float32)[:, None]
    tl.store(
        part_ptr + x[:, None] * D + tl.arange(0, D)[None, :],
        acc.to(part_ptr.dtype.element_ty),
        ok[:, None],
    )
    tl.store(lse_ptr + x, log_sum(m, l, lse_ptr), ok)


@triton.jit(do_not_specialize=["first_token", "top_k", "shift"])
def _selection_fwd(
    q_ptr, k_ptr, scaled_ptr, v_ptr, flag_ptr, entry_ptr, item_ptr, total_ptr, starts_ptr, part_ptr, lse_ptr,
    first_token, top_k, shift, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BOUNDED: tl.constexpr,
    LONG: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = BQ * GS
    item, r, d = tl.program_id(0), tl.arange(0, R), tl.arange(0, D)
    if item < tl.load(total_ptr):
        item_ptr += item * FIELDS
        block, g = tl.load(item_ptr), tl.load(item_ptr + 1)
        first, last = tl.load(item_ptr + 2) + tl.program_id(1) * BQ, tl.load(item_ptr + 3)
        start, end = tl.load(starts_ptr + block), tl.load(starts_ptr + block + 1)
        bounded = False
        if BOUNDED:
            bounded = tl.load(flag_ptr + 1 + tl.load(item_ptr + 5)) == 0
        for e in range(first, last, BQ * tl.num_programs(1)):
            # Addresses by row, not by token and head: a reshape of a tile would go through shared memory.
            slot = e + r // GS
            ok = slot < last
            entry = tl.load(entry_ptr + slot, ok, other=0)
            n = entry >> shift
            to = n * top_k + entry - (n << shift)
            n += first_token
            if LONG:
                n, to = n.to(tl.int64), to.to(tl.int64)
            h = g * GS + r % GS
            row, x = n * (G * GS) + h, to * (G * GS) + h
            q = tl.load(q_ptr + row[:, None] * D + d[None, :], ok[:, None], other=0.0)
            l8, acc = tl.zeros([R, 8], tl.float32), tl.zeros([R, D], tl.float32)
            if bounded:
                m = tl.zeros([R], lse_ptr.dtype.element_ty)
                m, l8, acc = attend_run(
                    q,
                    m,
                    l8,
                    acc,
                    k_ptr,
                    scaled_ptr,
                    v_ptr,
                    k_ptr,
                    start,
                    end,
                    True,
                    g,
                    scale2,
                    G,
                    D,
                    BK,
                    False,
                    LONG,
                )
                _store_partial(part_ptr, lse_ptr, m, l8, acc, x, ok, D)
            else:
                m = tl.full([R], -1e30, lse_ptr.dtype.element_ty)
                m, l8, acc = attend_run(
                    q,
                    m,
                    l8,
                    acc,
                    k_ptr,
                    scaled_ptr,
                    v_ptr,
                    k_ptr,
                    start,
                    end,
                    False,
                    g,
                    scale2,
                    G,
                    D,
                    BK,
                    False,
                    LONG,
                )
                _store_partial(part_ptr, lse_ptr, m, l8, acc, x, ok, D)


@triton.jit(do_not_specialize=["first_token", "rows", "stride", "top_k"])
def _selection_combine(
    part_ptr, part_lse_ptr, selected_ptr, cmp_ptr, win_ptr, gate_ptr, sel_ptr, lse_ptr, out_ptr,
    first_token, rows, stride, top_k, H: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * R + tl.arange(0, R)
    ok, d = i < rows, tl.arange(0, D)
    n, h = i // H, i % H
    selected_ptr += ((h // GS).to(tl.int64) * stride + first_token + n) * top_k
    p = n.to(tl.int64) * top_k * H + h
    m = tl.full([R], -1e30, lse_ptr.dtype.element_ty)
    for t in range(top_k):
        mask = tl.load(selected_ptr + t, ok, other=-1) >= 0
        m = tl.maximum(m, tl.load(part_lse_ptr + p + t * H, mask, other=-1e30))
    l, acc = tl.zeros([R], lse_ptr.dtype.element_ty), tl.zeros([R, D], tl.float32)
    for t in range(top_k):
        mask = tl.load(selected_ptr + t, ok, other=-1) >= 0
        w = tl.exp2(tl.load(part_lse_ptr + p + t * H, mask, other=-float("inf")) - m)
        l += w
        part = tl.load(part_ptr + (p + t * H)[:, None] * D + d[None, :], mask[:, None], other=0.0)
        acc += w.to(tl.float32)[:, None] * part.to(tl.float32)
    l = tl.where(l > 0, l, 1.0)  # no block selected gives zero
    acc = acc / l[:, None]
    row = first_token.to(tl.int64) * H + i
    x, mask = row[:, None] * D + d[None, :], ok[:, None]
    tl.store(sel_ptr + x, acc.to(sel_ptr.dtype.element_ty), mask)
    tl.store(lse_ptr + row, log_sum(m, l, lse_ptr), ok)
    if GATED:
        gate_ptr += (first_token + n).to(tl.int64) * 3
        g0 = tl.sigmoid(tl.load(gate_ptr, ok, other=0.0).to(lse_ptr.dtype.element_ty))
        g1 = tl.sigmoid(tl.load(gate_ptr + 1, ok, other=0.0).to(lse_ptr.dtype.element_ty))
        g2 = tl.sigmoid(tl.load(gate_ptr + 2, ok, other=0.0).to(lse_ptr.dtype.element_ty))
        y = g0[:, None] * tl.load(cmp_ptr + x, mask, other=0.0).to(tl.float32) + g1[:, None] * acc
        y += g2[:, None] * tl.load(win_ptr + x, mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + x, y.to(out_ptr.dtype.element_ty), mask)


def selection_partials(
    q_NHD: Tensor, keys: Keys, v_NGD: Tensor, lists: Lists, flags: Tensor, index: BlockIndex,
    queries: QueryRange, top_k: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One softmax per (query, rank): outputs [n, T, H, D] and log2 denominators [n, T, H].

    Ranks that a query lacks are not written. In bf16, queries of chunks without a flag (see `segment_forward`) skip the
    running maximum.
    """
    (_, H, D), G = q_NHD.shape, keys.k.shape[1]
    tokens = queries.last - queries.first
    part = q_NHD.new_empty(tokens, top_k, H, D)
    part_lse = q_NHD.new_empty(tokens, top_k, H, dtype=lse_dtype(q_NHD))
    wide = q_NHD.dtype == torch.float32 or D == 128
    BQ = queries_per_tile(32 if D == 128 else 64 if wide else 128, H // G)
    options = {"maxnreg": 168} if D <= 32 and not wide else {}  # three programs a multiprocessor
    _selection_fwd[(lists.capacity, spread(lists, BQ))](
        q_NHD, *keys.both, v_NGD, flags, lists.entries, lists.items,
        lists.total, index.block_starts, part, part_lse, queries.first, top_k, entry_shift(top_k), keys.scale * LOG2E,
        G, H // G, D, BQ, BK=32, BOUNDED=keys.scaled is not None, LONG=long_offsets(q_NHD, part), FIELDS=ITEM_FIELDS,
        num_warps=4, num_stages=3 if D <= 32 else 2, **options,
    )  # fmt: skip
    return part, part_lse


def combine_partials(
    part: Tensor, part_lse: Tensor, selected_GNT: Tensor, queries: QueryRange, o_NHD: Tensor, lse_NH: Tensor,
    gated: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Writes the range's rows of the selection output and its lse.

    `gated` = (compressed output, window output, gates [N, 3], out) also writes the sum of the three gated branches.
    """
    (N, H, D), (G, _, top_k) = o_NHD.shape, selected_GNT.shape
    rows = (queries.last - queries.first) * H
    R = max(1, 2048 // D)
    cmp, win, gates, out = gated or (o_NHD, o_NHD, o_NHD, o_NHD)
    _selection_combine[(cdiv(rows, R),)](
        part, part_lse, selected_GNT, cmp, win, gates, o_NHD, lse_NH, out, queries.first, rows, N, top_k, H, H // G, D,
        R, GATED=gated is not None, num_warps=4,
    )  # fmt: skip
