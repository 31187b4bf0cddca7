"""Attention of each query to its selected blocks, forward: one program holds a block's keys, queries come to it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.blocks import BlockIndex
from kernels.lists import ITEM_FIELDS, Lists, QueryRange
from kernels.tiles import (
    BOUND_LIMIT,
    LOG2E,
    attend_run,
    load_rows,
    on_device,
    queries_per_tile,
    row_bound,
    store_heads,
    store_rows,
)


@triton.jit(do_not_specialize=["first_token", "top_k", "norms"])
def _selection_fwd(
    q_ptr, k_ptr, v_ptr, norm_ptr, entry_ptr, item_ptr, total_ptr, starts_ptr, part_ptr, lse_ptr,
    first_token, top_k, scale2, norms,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, NORMS: tl.constexpr,
    BOUNDED: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = BQ * GS
    item = tl.program_id(0)
    if item < tl.load(total_ptr):
        item_ptr += item * FIELDS
        block, g = tl.load(item_ptr), tl.load(item_ptr + 1)
        first, last = tl.load(item_ptr + 2), tl.load(item_ptr + 3)
        start, end = tl.load(starts_ptr + block), tl.load(starts_ptr + block + 1)
        for e in range(first, last, BQ):
            slot = e + tl.arange(0, BQ)
            ok = slot < last
            entry = tl.load(entry_ptr + slot, ok, other=0)
            q = load_rows(q_ptr, first_token + entry // top_k, ok, g, G, GS, D, BQ)
            inside = tl.full([R], 1, tl.int1)
            bounded = False
            m = tl.full([R], -1e30, tl.float32)
            if BOUNDED:
                bound = row_bound(q, norm_ptr, g, norms, scale2, NORMS)
                bounded = tl.max(bound, 0) <= BOUND_LIMIT
                m = tl.where(bounded, bound, m)
            l8, acc = tl.zeros([R, 8], tl.float32), tl.zeros([R, D], tl.float32)
            m, l8, acc = attend_run(
                q, m, l8, acc, k_ptr, v_ptr, k_ptr, start, end, inside, bounded, g, scale2, G, D, BK, False
            )
            l = tl.sum(l8, 1)
            l = tl.where(l > 0, l, 1.0)  # rows past the end
            store_rows(part_ptr, acc / l[:, None], entry, ok, g, G, GS, D, BQ)
            store_heads(lse_ptr, m + tl.log2(l), entry, ok, g, G, GS, BQ)


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
    m = tl.full([R], -1e30, tl.float32)
    for t in range(top_k):
        mask = tl.load(selected_ptr + t, ok, other=-1) >= 0
        m = tl.maximum(m, tl.load(part_lse_ptr + p + t * H, mask, other=-1e30))
    l, acc = tl.zeros([R], tl.float32), tl.zeros([R, D], tl.float32)
    for t in range(top_k):
        mask = tl.load(selected_ptr + t, ok, other=-1) >= 0
        w = tl.exp2(tl.load(part_lse_ptr + p + t * H, mask, other=-float("inf")) - m)
        l += w
        part = tl.load(part_ptr + (p + t * H)[:, None] * D + d[None, :], mask[:, None], other=0.0)
        acc += w[:, None] * part.to(tl.float32)
    l = tl.where(l > 0, l, 1.0)  # no block selected gives zero
    acc = acc / l[:, None]
    row = first_token.to(tl.int64) * H + i
    x, mask = row[:, None] * D + d[None, :], ok[:, None]
    tl.store(sel_ptr + x, acc.to(sel_ptr.dtype.element_ty), mask)
    tl.store(lse_ptr + row, m + tl.log2(l), ok)
    if GATED:
        gate_ptr += (first_token + n).to(tl.int64) * 3
        g0 = tl.sigmoid(tl.load(gate_ptr, ok, other=0.0).to(tl.float32))
        g1 = tl.sigmoid(tl.load(gate_ptr + 1, ok, other=0.0).to(tl.float32))
        g2 = tl.sigmoid(tl.load(gate_ptr + 2, ok, other=0.0).to(tl.float32))
        y = g0[:, None] * tl.load(cmp_ptr + x, mask, other=0.0).to(tl.float32) + g1[:, None] * acc
        y += g2[:, None] * tl.load(win_ptr + x, mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + x, y.to(out_ptr.dtype.element_ty), mask)


def selection_partials(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, lists: Lists, norms: Tensor | None, index: BlockIndex,
    queries: QueryRange, top_k: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One softmax per (query, rank): outputs [n, T, H, D] and log2 denominators fp32 [n, T, H].

    Ranks that a query lacks are not written. `norms` as in `segment_forward`.
    """
    (_, H, D), G = q_NHD.shape, k_NGD.shape[1]
    tokens = queries.last - queries.first
    part = q_NHD.new_empty(tokens, top_k, H, D)
    part_lse = q_NHD.new_empty(tokens, top_k, H, dtype=torch.float32)
    bounded = norms is not None
    wide = q_NHD.dtype == torch.float32 or D == 128
    options = {"maxnreg": 128} if D <= 32 and not wide else {}  # four programs a multiprocessor, worth a few spills
    with on_device(q_NHD):
        _selection_fwd[(len(lists.items),)](
            q_NHD, k_NGD, v_NGD, norms if bounded else part_lse, lists.entries, lists.items, lists.sums[1, -1:],
            index.block_starts, part, part_lse, queries.first, top_k, scale * LOG2E, norms.shape[1] if bounded else 0,
            G, H // G, D, queries_per_tile(32 if D == 128 else 64 if wide else 128, H // G), BK=32,
            NORMS=triton.next_power_of_2(norms.shape[1]) if bounded else 1, BOUNDED=bounded, FIELDS=ITEM_FIELDS,
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
    with on_device(o_NHD):
        _selection_combine[(triton.cdiv(rows, R),)](
            part, part_lse, selected_GNT, cmp, win, gates, o_NHD, lse_NH, out, queries.first, rows, N, top_k, H, H // G,
            D, R, GATED=gated is not None, num_warps=4,
        )  # fmt: skip
