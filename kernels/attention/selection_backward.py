"""Attention of each query to its selected blocks, gradients: deterministic, without atomics.

Two kernels, as in `kernels.attention.segment_backward`: one holds a block's keys and sums their gradients over the queries of
its list, the other holds queries and writes dq once per (query, rank).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.block_index import BlockIndex
from kernels.attention.gates import Rows
from kernels.attention.inverse_lists import (
    ITEM,
    ITEM_FIELDS,
    Lists,
    QueryRange,
    entry_shift,
    spread,
)
from kernels.attention.segment_backward import queries_run
from kernels.runtime.integer_math import cdiv
from kernels.runtime.triton_ops import (
    LN2,
    LOG2E,
    Keys,
    add_dot,
    load_keys,
    long_offsets,
    products,
    queries_per_tile,
    score_gradients,
)


@triton.jit
def _load_entries(
    q_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, e, last, first_token, top_k, shift, g,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, FULL: tl.constexpr, LONG: tl.constexpr,
    FOLDED: tl.constexpr,
):  # fmt: skip
    """q, do [R, D], lse (FOLDED: dot again), dot [R] of entries e .. e + BQ, which rows exist, and their rows of
    partial results."""
    r, d = tl.arange(0, BQ * GS), tl.arange(0, D)
    slot = e + r // GS
    ok = slot < last
    entry = tl.load(entry_ptr + slot) if FULL else tl.load(entry_ptr + slot, ok, other=0)
    n = entry >> shift
    to = n * top_k + entry - (n << shift)
    n += first_token
    if LONG:
        n, to = n.to(tl.int64), to.to(tl.int64)
    h = g * GS + r % GS
    row, to = n * (G * GS) + h, to * (G * GS) + h
    x = row[:, None] * D + d[None, :]
    if FULL:  # masks cost a third of the keys' loop
        q, do, dot = tl.load(q_ptr + x), tl.load(do_ptr + x), tl.load(dot_ptr + row)
    else:
        q, do = (
            tl.load(q_ptr + x, ok[:, None], other=0.0),
            tl.load(do_ptr + x, ok[:, None], other=0.0),
        )
        dot = tl.load(dot_ptr + row, ok, other=0.0)
    lse = dot
    if not FOLDED:
        lse = tl.load(lse_ptr + row) if FULL else tl.load(lse_ptr + row, ok, other=float("inf"))
    return q, do, lse, dot, ok, to


@triton.jit
def _keys_step(k, v, dk, dv, q, do, lse, dot, scale2, FOLDED: tl.constexpr):
    p = tl.exp2(products(k, q)) if FOLDED else tl.exp2(products(k, q) * scale2 - lse[None, :])
    dv = add_dot(p.to(q.dtype), do, dv)
    ds = score_gradients(p, products(v, do) - dot[None, :], q)
    return add_dot(ds, q, dk), dv


@triton.jit
def _tile_dkdv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, dk_ptr, dv_ptr, first_token, shift, first, last, t, end,
    to, g, scale, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, FAST: tl.constexpr,
    LONG: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """Gradients of keys t .. t + BK of a block that ends at `end`, from entries first .. last, to rows to .. ."""
    c, d = tl.arange(0, BK), tl.arange(0, D)
    m = tl.minimum(
        t + c, end - 1
    )  # keys past the end repeat the last one; their rows are not stored
    k = load_keys(k_ptr, k_ptr, m, end, g, G, D, False, True, LONG)
    v = load_keys(v_ptr, v_ptr, m, end, g, G, D, False, True, LONG)
    dk = tl.zeros([BK, D], lse_ptr.dtype.element_ty)
    dv = dk
    full = first + (last - first) // BQ * BQ if FAST else last
    for e in range(first, full, BQ):
        q, do, lse, dot, _, _ = _load_entries(
            q_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, e, last, first_token, 0, shift, g, G, GS, D, BQ, FAST, LONG,
            FOLDED,
        )  # fmt: skip
        dk, dv = _keys_step(k, v, dk, dv, q, do, lse, dot, scale2, FOLDED)
    if full < last:
        q, do, lse, dot, _, _ = _load_entries(
            q_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, full, last, first_token, 0, shift, g, G, GS, D, BQ, False, LONG,
            FOLDED,
        )  # fmt: skip
        dk, dv = _keys_step(k, v, dk, dv, q, do, lse, dot, scale2, FOLDED)
    x = (to + c)[:, None] * D + d[None, :]
    inside = (t + c < end)[:, None]
    tl.store(dk_ptr + x, dk * scale, inside)
    tl.store(dv_ptr + x, dv, inside)


@triton.jit
def _item_dkdv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, item_ptr, total_ptr, starts_ptr, dk_ptr, dv_ptr,
    first_token, shift, scale, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, FAST: tl.constexpr,
    LONG: tl.constexpr, FIELDS: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    if item < tl.load(total_ptr):
        item_ptr += item * FIELDS
        block, g = tl.load(item_ptr), tl.load(item_ptr + 1)
        first, last = tl.load(item_ptr + 2), tl.load(item_ptr + 3)
        start, end = tl.load(starts_ptr + block), tl.load(starts_ptr + block + 1)
        to = tl.load(item_ptr + 4).to(tl.int64)
        wide_end = end
        if FAST:
            rest = (end - start) % BK
            wide_end = tl.where(
                rest <= BK // 2, end - rest, end
            )  # a short rest takes a tile of half the size
        mine = start + tl.program_id(1) * BK
        for t in range(mine, wide_end, BK * tl.num_programs(1)):
            _tile_dkdv(
                q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, dk_ptr, dv_ptr, first_token, shift, first,
                last, t, end, to + t - start, g, scale, scale2, G, GS, D, BQ, BK, FAST, LONG, FOLDED,
            )  # fmt: skip
        if FAST:  # noqa: SIM102 (decides what is compiled)
            if (wide_end < end) & ((wide_end - mine) % (BK * tl.num_programs(1)) == 0):
                _tile_dkdv(
                    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, dk_ptr, dv_ptr, first_token, shift, first,
                    last, wide_end, end, to + wide_end - start, g, scale, scale2, G, GS, D, BQ, BK // 2, FAST, LONG,
                    FOLDED,
                )  # fmt: skip


@triton.jit(do_not_specialize=["first_token", "shift"])
def _selection_dkdv(
    q_ptr, k_ptr, scaled_ptr, v_ptr, do_ptr, weighted_ptr, lse_ptr, dot_ptr, flag_ptr, entry_ptr, item_ptr, total_ptr,
    starts_ptr, dk_ptr, dv_ptr, first_token, shift, scale, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, FAST: tl.constexpr,
    LONG: tl.constexpr, FIELDS: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    folded = False
    if FOLD:
        folded = tl.load(flag_ptr) == 0
    if folded:
        _item_dkdv(
            q_ptr, scaled_ptr, v_ptr, weighted_ptr, lse_ptr, dot_ptr, entry_ptr, item_ptr, total_ptr, starts_ptr,
            dk_ptr, dv_ptr, first_token, shift, scale, 1.0, G, GS, D, BQ, BK, FAST, LONG, FIELDS, True,
        )  # fmt: skip
    else:
        _item_dkdv(
            q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, item_ptr, total_ptr, starts_ptr, dk_ptr, dv_ptr,
            first_token, shift, scale, scale2, G, GS, D, BQ, BK, FAST, LONG, FIELDS, False,
        )  # fmt: skip


@triton.jit
def _item_dq(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, item_ptr, total_ptr, starts_ptr, part_ptr, first_token,
    top_k, shift, dq_scale, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, LONG: tl.constexpr,
    FIELDS: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    item, d = tl.program_id(0), tl.arange(0, D)
    if item < tl.load(total_ptr):
        item_ptr += item * FIELDS
        block, g = tl.load(item_ptr), tl.load(item_ptr + 1)
        first, last = tl.load(item_ptr + 2) + tl.program_id(1) * BQ, tl.load(item_ptr + 3)
        start, end = tl.load(starts_ptr + block), tl.load(starts_ptr + block + 1)
        for e in range(first, last, BQ * tl.num_programs(1)):
            q, do, lse, dot, ok, to = _load_entries(  # pyright: ignore[reportGeneralTypeIssues]
                q_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, e, last, first_token, top_k, shift, g, G, GS, D, BQ, False,
                LONG, FOLDED,
            )  # fmt: skip
            acc = queries_run(
                q,
                do,
                lse,
                dot,
                k_ptr,
                v_ptr,
                k_ptr,
                start,
                end,
                g,
                scale2,
                G,
                D,
                BK,
                False,
                LONG,
                FOLDED,
            )
            x = to[:, None] * D + d[None, :]
            tl.store(part_ptr + x, (acc * dq_scale).to(part_ptr.dtype.element_ty), ok[:, None])


@triton.jit(do_not_specialize=["first_token", "top_k", "shift"])
def _selection_dq(
    q_ptr, k_ptr, scaled_ptr, v_ptr, do_ptr, weighted_ptr, lse_ptr, dot_ptr, flag_ptr, entry_ptr, item_ptr, total_ptr,
    starts_ptr, part_ptr, first_token, top_k, shift, scale, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, LONG: tl.constexpr,
    FIELDS: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    folded = False
    if FOLD:
        folded = tl.load(flag_ptr) == 0
    if folded:
        _item_dq(
            q_ptr, scaled_ptr, v_ptr, weighted_ptr, lse_ptr, dot_ptr, entry_ptr, item_ptr, total_ptr, starts_ptr,
            part_ptr, first_token, top_k, shift, LN2, 1.0, G, GS, D, BQ, BK, LONG, FIELDS, True,
        )  # fmt: skip
    else:
        _item_dq(
            q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, item_ptr, total_ptr, starts_ptr, part_ptr,
            first_token, top_k, shift, scale, scale2, G, GS, D, BQ, BK, LONG, FIELDS, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_token", "rows", "stride", "top_k"])
def _combine_dq(
    part_ptr, selected_ptr, dq_ptr, first_token, rows, stride, top_k,
    H: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * R + tl.arange(0, R)
    ok, d = i < rows, tl.arange(0, D)
    n, h = i // H, i % H
    selected_ptr += ((h // GS).to(tl.int64) * stride + first_token + n) * top_k
    p = n.to(tl.int64) * top_k * H + h
    x, mask = (first_token.to(tl.int64) * H + i)[:, None] * D + d[None, :], ok[:, None]
    acc = tl.load(dq_ptr + x, mask, other=0.0).to(tl.float32)
    for t in range(top_k):
        taken = tl.load(selected_ptr + t, ok, other=-1) >= 0
        part = tl.load(part_ptr + (p + t * H)[:, None] * D + d[None, :], taken[:, None], other=0.0)
        acc += part.to(tl.float32)
    tl.store(dq_ptr + x, acc.to(dq_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["first_chunk", "last_chunk", "rows"])
def _reduce_dkdv(
    part_k_ptr, part_v_ptr, sum_ptr, block_starts_ptr, block_asset_ptr, asset_blocks_ptr, chunk_asset_ptr,
    chunk_pairs_ptr, dk_ptr, dv_ptr, first_chunk, last_chunk, rows,
    G: tl.constexpr, D: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    block, g = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(block_starts_ptr + block), tl.load(block_starts_ptr + block + 1)
    t = tl.program_id(2) * BK + tl.arange(0, BK)
    tokens, d = end - start, tl.arange(0, D)
    if tl.program_id(2) * BK < tokens:
        mask = (t < tokens)[:, None]
        x = ((start + t).to(tl.int64) * G + g)[:, None] * D + d[None, :]
        dk, dv = tl.load(dk_ptr + x, mask, other=0.0), tl.load(dv_ptr + x, mask, other=0.0)
        asset = tl.load(block_asset_ptr + block)
        local = block - tl.load(asset_blocks_ptr + asset)
        first_pair = tl.load(chunk_pairs_ptr + first_chunk)
        for chunk in range(first_chunk, last_chunk):
            if tl.load(chunk_asset_ptr + chunk) == asset:
                row = (tl.load(chunk_pairs_ptr + chunk) - first_pair + local) * G + g
                begin = tl.load(sum_ptr + 2 * rows + row - 1, row > 0, other=0)
                for partial in range(begin, tl.load(sum_ptr + 2 * rows + row), tokens):
                    y = (partial + t).to(tl.int64)[:, None] * D + d[None, :]
                    dk += tl.load(part_k_ptr + y, mask, other=0.0)
                    dv += tl.load(part_v_ptr + y, mask, other=0.0)
        tl.store(dk_ptr + x, dk, mask)
        tl.store(dv_ptr + x, dv, mask)


def selection_backward(
    q_NHD: Tensor, keys: Keys, v_NGD: Tensor, rows: Rows, selected_GNT: Tensor, lists: Lists, index: BlockIndex,
    queries: QueryRange, dq_NHD: Tensor, dk_NGD: Tensor, dv_NGD: Tensor,
) -> None:  # fmt: skip
    """Adds one range's gradients to dq (q's dtype), dk and dv (fp32)."""
    (N, H, D), (G, _, top_k) = q_NHD.shape, selected_GNT.shape
    tokens = queries.last - queries.first
    part_nTHD = q_NHD.new_empty(tokens, top_k, H, D)
    wide = q_NHD.dtype == torch.float32 or D == 128
    small = D <= 32 and not wide
    inputs = (
        q_NHD, *keys.both, v_NGD, *rows.tensors(lists.total), lists.entries, lists.items, lists.total,
        index.block_starts,
    )  # fmt: skip
    common = {
        "LONG": long_offsets(q_NHD, part_nTHD),
        "FIELDS": ITEM_FIELDS,
        "FOLD": rows.flag is not None,
    }
    shift, scale2, group = entry_shift(top_k), keys.scale * LOG2E, H // G
    BQ = queries_per_tile(32 if wide else 64, group)
    _selection_dq[(lists.capacity, spread(lists, BQ))](
        *inputs, part_nTHD, queries.first, top_k, shift, keys.scale, scale2, G, group, D, BQ, BK=32, num_warps=4,
        num_stages=3 if D <= 32 else 2 if D == 64 else 1, **common,
    )  # fmt: skip
    R = max(1, 2048 // D)
    _combine_dq[(cdiv(tokens * H, R),)](
        part_nTHD,
        selected_GNT,
        dq_NHD,
        queries.first,
        tokens * H,
        N,
        top_k,
        H,
        group,
        D,
        R,
        num_warps=4,
    )
    del part_nTHD  # before the partial dk and dv take as much
    # Each pair's block once, and once more per full item.
    partials = queries.tokens * G + tokens * G * top_k // ITEM * index.max_block_tokens
    part_dk = q_NHD.new_empty(partials, D, dtype=torch.float32)
    part_dv = torch.empty_like(part_dk)
    BK = 32 if wide else 128 if small else 64
    tiles = cdiv(index.max_block_tokens, BK) if spread(lists, 1) > 1 else 1
    options = {"maxnreg": 168} if small else {}  # three programs a multiprocessor
    _selection_dkdv[(lists.capacity, tiles)](
        *inputs, part_dk, part_dv, queries.first, shift, keys.scale, scale2, G, group, D, queries_per_tile(32, group),
        BK, FAST=not wide, num_warps=4, num_stages=2 if not wide else 1, **common, **options,
    )  # fmt: skip
    BK = 32
    _reduce_dkdv[(index.num_blocks, G, cdiv(index.max_block_tokens, BK))](
        part_dk, part_dv, lists.sums, index.block_starts, index.block_asset, index.asset_blocks, index.chunk_asset,
        index.chunk_pairs, dk_NGD, dv_NGD, queries.first_chunk, queries.last_chunk, queries.pairs * G, G, D, BK,
        num_warps=4,
    )  # fmt: skip
