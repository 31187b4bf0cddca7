"""Attention of each query to its selected blocks, gradients: deterministic, one exponential a score."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.blocks import BlockIndex
from kernels.lists import ITEM, ITEM_FIELDS, Lists, QueryRange
from kernels.tiles import LOG2E, load_heads, load_keys, load_rows, on_device, queries_per_tile, store_rows


@triton.jit
def _tile_bwd(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, dq_ptr, dk_ptr, dv_ptr, first_token, top_k, first, last,
    start, t, end, partial, g, scale, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Entries first..last against keys t..t + BK of a block start..end: adds to dq, writes dk and dv."""
    j, c, d = tl.arange(0, BQ), tl.arange(0, BK), tl.arange(0, D)
    inside = t + c < end
    k = load_keys(k_ptr, k_ptr, t + c, end, g, G, D, False, False)
    v = load_keys(v_ptr, v_ptr, t + c, end, g, G, D, False, False)
    dk, dv = tl.zeros([BK, D], tl.float32), tl.zeros([BK, D], tl.float32)
    ok_next = first + j < last
    entry_next = tl.load(entry_ptr + first + j, ok_next, other=0)
    n = first_token + entry_next // top_k
    q_next = load_rows(q_ptr, n, ok_next, g, G, GS, D, BQ)
    do_next = load_rows(do_ptr, n, ok_next, g, G, GS, D, BQ)
    lse_next = load_heads(lse_ptr, n, ok_next, g, float("inf"), G, GS, BQ)
    dot_next = load_heads(dot_ptr, n, ok_next, g, 0.0, G, GS, BQ)
    for e in range(first, last, BQ):
        q, do, lse, dot, ok, entry = q_next, do_next, lse_next, dot_next, ok_next, entry_next
        # Only this program writes the entry's row. Asked for early: the sum is the end of a long chain.
        dq_before = load_rows(dq_ptr, entry, ok & (t > start), g, G, GS, D, BQ)
        ok_next = e + BQ + j < last  # the next rows are on their way while these are used
        entry_next = tl.load(entry_ptr + e + BQ + j, ok_next, other=0)
        n = first_token + entry_next // top_k
        q_next = load_rows(q_ptr, n, ok_next, g, G, GS, D, BQ)
        do_next = load_rows(do_ptr, n, ok_next, g, G, GS, D, BQ)
        lse_next = load_heads(lse_ptr, n, ok_next, g, float("inf"), G, GS, BQ)
        dot_next = load_heads(dot_ptr, n, ok_next, g, 0.0, G, GS, BQ)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale2 - lse[None, :])
        if t + BK > end:  # a padded key's exponent may overflow
            p = tl.where(inside[:, None], p, 0.0)
        dv = tl.dot(p.to(q.dtype), do, dv, input_precision="ieee")
        ds = (p * (tl.dot(v, tl.trans(do), input_precision="ieee") - dot[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        dq = tl.dot(tl.trans(ds), k, input_precision="ieee") * scale + dq_before.to(tl.float32)
        store_rows(dq_ptr, dq, entry, ok, g, G, GS, D, BQ)
    tl.debug_barrier()  # the next tile's loads of dq see these stores
    x = (partial + t - start + c)[:, None] * D + d[None, :]
    tl.store(dk_ptr + x, dk * scale, inside[:, None])
    tl.store(dv_ptr + x, dv, inside[:, None])


@triton.jit(do_not_specialize=["first_token", "top_k"])
def _selection_bwd(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, item_ptr, total_ptr, starts_ptr, dq_ptr, dk_ptr, dv_ptr,
    first_token, top_k, scale, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    if item < tl.load(total_ptr):
        item_ptr += item * FIELDS
        block, g = tl.load(item_ptr), tl.load(item_ptr + 1)
        first, last = tl.load(item_ptr + 2), tl.load(item_ptr + 3)
        start, end = tl.load(starts_ptr + block), tl.load(starts_ptr + block + 1)
        partial = tl.load(item_ptr + 4).to(tl.int64)
        rest = (end - start) % BK
        wide_end = tl.where(rest <= BK // 2, end - rest, end)  # a short rest takes a tile of half the size
        for t in range(start, wide_end, BK):
            _tile_bwd(
                q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, dq_ptr, dk_ptr, dv_ptr, first_token, top_k,
                first, last, start, t, end, partial, g, scale, scale2, G, GS, D, BQ, BK,
            )  # fmt: skip
        if wide_end < end:
            _tile_bwd(
                q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, dq_ptr, dk_ptr, dv_ptr, first_token, top_k,
                first, last, start, wide_end, end, partial, g, scale, scale2, G, GS, D, BQ, BK // 2,
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
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, do_NHD: Tensor, lse_NH: Tensor, dot_NH: Tensor, selected_GNT: Tensor,
    lists: Lists, index: BlockIndex, queries: QueryRange, scale: float, dq_NHD: Tensor, dk_NGD: Tensor, dv_NGD: Tensor,
) -> None:  # fmt: skip
    """Adds one range's gradients to dq (q's dtype), dk and dv (fp32). lse and dot as in `segment_backward`."""
    (N, H, D), (G, _, top_k) = q_NHD.shape, selected_GNT.shape
    tokens = queries.last - queries.first
    part_nTHD = q_NHD.new_empty(tokens, top_k, H, D)
    # Each pair's block once, and once more per full item.
    partials = queries.tokens * G + tokens * G * top_k // ITEM * index.max_block_tokens
    part_dk = q_NHD.new_empty(partials, D, dtype=torch.float32)
    part_dv = torch.empty_like(part_dk)
    wide = q_NHD.dtype == torch.float32 or D == 128
    rows = queries.pairs * G
    with on_device(q_NHD):
        _selection_bwd[(len(lists.items),)](
            q_NHD, k_NGD, v_NGD, do_NHD, lse_NH, dot_NH, lists.entries, lists.items, lists.sums[1, -1:],
            index.block_starts, part_nTHD, part_dk, part_dv, queries.first, top_k, scale, scale * LOG2E,
            G, H // G, D, queries_per_tile(32, H // G), BK=32 if wide else 64 if D == 64 else 128, FIELDS=ITEM_FIELDS,
            num_warps=4, num_stages=1,
        )  # fmt: skip
        R = max(1, 2048 // D)
        _combine_dq[(triton.cdiv(tokens * H, R),)](
            part_nTHD, selected_GNT, dq_NHD, queries.first, tokens * H, N, top_k, H, H // G, D, R,
            num_warps=4,
        )  # fmt: skip
        BK = 32
        _reduce_dkdv[(index.num_blocks, G, triton.cdiv(index.max_block_tokens, BK))](
            part_dk, part_dv, lists.sums, index.block_starts, index.block_asset, index.asset_blocks,
            index.chunk_asset, index.chunk_pairs, dk_NGD, dv_NGD, queries.first_chunk, queries.last_chunk, rows,
            G, D, BK, num_warps=4,
        )  # fmt: skip
