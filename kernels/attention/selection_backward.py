"""Attention of each query to its selected blocks, gradients: deterministic, without atomics.

The definition is `selection_attention` in kernels.attention.reference. There are two kernels, as in
`kernels.attention.segment_backward`. One holds a block's keys and sums their gradients over the
queries of its list. The other holds queries and writes dq once per (query, rank).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.block_index import BlockIndex
from kernels.attention.gates import OutputGradient, is_folded
from kernels.attention.inverse_lists import ITEM_FIELDS, ChunkRange, InverseLists, programs_per_item
from kernels.attention.launches import (
    CHOSEN,
    Launch,
    SsaLaunches,
    combine_launch,
    reduce_launch,
    selection_dkdv_launch,
    selection_dq_launch,
)
from kernels.attention.list_entries import entry_shift, load_entries, load_item
from kernels.attention.packed_heads import load_keys, load_row_gradients, queries_per_tile
from kernels.attention.scaled_keys import BranchKeys
from kernels.attention.segment_backward import add_dkdv, dq_of_run
from kernels.attention.selection import locate_range_rows
from kernels.attention.softmax import LN2, LOG2E
from kernels.runtime.integer_math import cdiv
from kernels.runtime.triton_ops import needs_long_offsets


@triton.jit
def _add_entries(
    k, v, dk, dv, q_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, e, last, first_token, shift, g,
    scale2, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr,
    FULL: tl.constexpr, LONG: tl.constexpr, FOLDED: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """dk and dv plus the share of entries e..e + BLOCK_Q. FULL: all lie before `last`."""
    row, _, ok = load_entries(  # pyright: ignore[reportGeneralTypeIssues]
        entry_ptr, e, last, first_token, 0, shift, g, G, GROUP, BLOCK_Q, FULL, LONG
    )
    q, do, lse, dot = load_row_gradients(  # pyright: ignore[reportGeneralTypeIssues]
        q_ptr, do_ptr, lse_ptr, dot_ptr, row, ok, D, FULL, FOLDED
    )
    return add_dkdv(k, v, dk, dv, q, do, lse, dot, scale2, FOLDED, EMULATED)


@triton.jit
def _tile_dkdv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, dk_ptr, dv_ptr, first_token, shift,
    first, last, t, end, to, g, scale, scale2, G: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, FAST: tl.constexpr,
    LONG: tl.constexpr, FOLDED: tl.constexpr, UNROLL: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Gradients of keys t..t + BLOCK_K of a block that ends at `end`, from entries first..last.

    They are stored in rows from `to` on of the partial gradients.
    """
    c, d = tl.arange(0, BLOCK_K), tl.arange(0, D)
    # Keys past the end repeat the last one; their rows are not stored.
    m = tl.minimum(t + c, end - 1)
    k = load_keys(k_ptr, k_ptr, m, end, g, G, D, False, True, LONG)  # [BLOCK_K, D]
    v = load_keys(v_ptr, v_ptr, m, end, g, G, D, False, True, LONG)  # [BLOCK_K, D]

    # Whole steps without masks, then the rest.
    dk = tl.zeros([BLOCK_K, D], lse_ptr.dtype.element_ty)
    dv = dk
    full = first + (last - first) // BLOCK_Q * BLOCK_Q if FAST else last
    for e in tl.range(first, full, BLOCK_Q, loop_unroll_factor=UNROLL):
        dk, dv = _add_entries(
            k, v, dk, dv, q_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, e, last, first_token, shift,
            g, scale2, G, GROUP, D, BLOCK_Q, FAST, LONG, FOLDED, EMULATED,
        )  # fmt: skip
    if full < last:
        dk, dv = _add_entries(
            k, v, dk, dv, q_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, full, last, first_token,
            shift, g, scale2, G, GROUP, D, BLOCK_Q, False, LONG, FOLDED, EMULATED,
        )  # fmt: skip
    x = (to + c)[:, None] * D + d[None, :]
    inside = (t + c < end)[:, None]
    tl.store(dk_ptr + x, dk * scale, inside)
    tl.store(dv_ptr + x, dv, inside)


@triton.jit
def _item_dkdv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, dk_ptr, dv_ptr, entry_ptr, item_ptr, total_ptr,
    starts_ptr, first_token, shift, scale, scale2, G: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, FAST: tl.constexpr,
    LONG: tl.constexpr, FIELDS: tl.constexpr, FOLDED: tl.constexpr, UNROLL: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys of an item's block, from the item's entries."""
    if tl.program_id(0) < tl.load(total_ptr):
        g, first, last, to, start, end, _ = load_item(  # pyright: ignore
            item_ptr, starts_ptr, FIELDS
        )
        to = to.to(tl.int64)

        # Tiles of BLOCK_K keys, shared by the programs of the item. A short rest of the block takes
        # a tile of half the size.
        wide_end = end
        if FAST:
            rest = (end - start) % BLOCK_K
            wide_end = tl.where(rest <= BLOCK_K // 2, end - rest, end)
        own_start = start + tl.program_id(1) * BLOCK_K
        for t in range(own_start, wide_end, BLOCK_K * tl.num_programs(1)):
            _tile_dkdv(
                q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, dk_ptr, dv_ptr,
                first_token, shift, first, last, t, end, to + t - start, g, scale, scale2, G, GROUP,
                D, BLOCK_Q, BLOCK_K, FAST, LONG, FOLDED, UNROLL, EMULATED,
            )  # fmt: skip
        if FAST:  # noqa: SIM102 (decides what is compiled)
            if (wide_end < end) & ((wide_end - own_start) % (BLOCK_K * tl.num_programs(1)) == 0):
                _tile_dkdv(
                    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, dk_ptr, dv_ptr,
                    first_token, shift, first, last, wide_end, end, to + wide_end - start, g, scale,
                    scale2, G, GROUP, D, BLOCK_Q, BLOCK_K // 2, FAST, LONG, FOLDED, UNROLL,
                    EMULATED,
                )  # fmt: skip


@triton.jit(do_not_specialize=["first_token", "shift"])
def _selection_dkdv(
    q_ptr, k_ptr, scaled_ptr, v_ptr, do_ptr, weighted_ptr, lse_ptr, dot_ptr, flag_ptr, entry_ptr,
    item_ptr, total_ptr, starts_ptr, dk_ptr, dv_ptr, first_token, shift, scale, scale2,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, FAST: tl.constexpr, LONG: tl.constexpr, FIELDS: tl.constexpr,
    FOLD: tl.constexpr, UNROLL: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    if is_folded(flag_ptr, FOLD):
        _item_dkdv(
            q_ptr, scaled_ptr, v_ptr, weighted_ptr, lse_ptr, dot_ptr, dk_ptr, dv_ptr, entry_ptr,
            item_ptr, total_ptr, starts_ptr, first_token, shift, scale, 1.0, G, GROUP, D,
            BLOCK_Q, BLOCK_K, FAST, LONG, FIELDS, True, UNROLL, EMULATED,
        )  # fmt: skip
    else:
        _item_dkdv(
            q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, dk_ptr, dv_ptr, entry_ptr, item_ptr,
            total_ptr, starts_ptr, first_token, shift, scale, scale2, G, GROUP, D, BLOCK_Q,
            BLOCK_K, FAST, LONG, FIELDS, False, UNROLL, 0,
        )  # fmt: skip


@triton.jit
def _item_dq(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, item_ptr, total_ptr, starts_ptr,
    part_ptr, first_token, top_k, shift, dq_scale, scale2, G: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LONG: tl.constexpr,
    FIELDS: tl.constexpr, FOLDED: tl.constexpr, UNROLL: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """dq of each entry of an item, from the keys of the item's block."""
    d = tl.arange(0, D)
    if tl.program_id(0) < tl.load(total_ptr):
        g, first, last, _, start, end, _ = load_item(  # pyright: ignore
            item_ptr, starts_ptr, FIELDS
        )
        first += tl.program_id(1) * BLOCK_Q
        for e in range(first, last, BLOCK_Q * tl.num_programs(1)):
            row, to, ok = load_entries(  # pyright: ignore[reportGeneralTypeIssues]
                entry_ptr, e, last, first_token, top_k, shift, g, G, GROUP, BLOCK_Q, False, LONG
            )
            q, do, lse, dot = load_row_gradients(  # pyright: ignore[reportGeneralTypeIssues]
                q_ptr, do_ptr, lse_ptr, dot_ptr, row, ok, D, False, FOLDED
            )
            acc = dq_of_run(
                q, do, lse, dot, k_ptr, v_ptr, k_ptr, start, end, g, scale2, G, D, BLOCK_K, False,
                LONG, FOLDED, UNROLL, EMULATED,
            )  # fmt: skip
            x = to[:, None] * D + d[None, :]
            tl.store(part_ptr + x, (acc * dq_scale).to(part_ptr.dtype.element_ty), ok[:, None])


@triton.jit(do_not_specialize=["first_token", "top_k", "shift"])
def _selection_dq(
    q_ptr, k_ptr, scaled_ptr, v_ptr, do_ptr, weighted_ptr, lse_ptr, dot_ptr, flag_ptr, entry_ptr,
    item_ptr, total_ptr, starts_ptr, part_ptr, first_token, top_k, shift, scale, scale2,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, LONG: tl.constexpr, FIELDS: tl.constexpr, FOLD: tl.constexpr,
    UNROLL: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    if is_folded(flag_ptr, FOLD):
        _item_dq(
            q_ptr, scaled_ptr, v_ptr, weighted_ptr, lse_ptr, dot_ptr, entry_ptr, item_ptr,
            total_ptr, starts_ptr, part_ptr, first_token, top_k, shift, LN2, 1.0, G, GROUP, D,
            BLOCK_Q, BLOCK_K, LONG, FIELDS, True, UNROLL, EMULATED,
        )  # fmt: skip
    else:
        _item_dq(
            q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, entry_ptr, item_ptr, total_ptr,
            starts_ptr, part_ptr, first_token, top_k, shift, scale, scale2, G, GROUP, D, BLOCK_Q,
            BLOCK_K, LONG, FIELDS, False, UNROLL, 0,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_token", "rows", "stride", "top_k"])
def _combine_dq(
    part_ptr, selected_ptr, dq_ptr, first_token, rows, stride, top_k, H: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    # Add the ranks of each row to dq, in order.
    i, ok, _, selected_ptr, p = locate_range_rows(  # pyright: ignore[reportGeneralTypeIssues]
        selected_ptr, first_token, rows, stride, top_k, H, GROUP, R
    )
    d = tl.arange(0, D)
    x, mask = (first_token.to(tl.int64) * H + i)[:, None] * D + d[None, :], ok[:, None]
    acc = tl.load(dq_ptr + x, mask, other=0.0).to(tl.float32)  # [R, D]
    for t in range(top_k):
        selected = tl.load(selected_ptr + t, ok, other=-1) >= 0  # [R]
        x_ptr = part_ptr + (p + t * H)[:, None] * D + d[None, :]
        part = tl.load(x_ptr, selected[:, None], other=0.0)  # [R, D]
        acc += part.to(tl.float32)
    tl.store(dq_ptr + x, acc.to(dq_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["first_chunk", "last_chunk", "rows"])
def _reduce_dkdv(
    part_k_ptr, part_v_ptr, sum_ptr, block_starts_ptr, block_asset_ptr, asset_blocks_ptr,
    chunk_asset_ptr, chunk_pairs_ptr, dk_ptr, dv_ptr, first_chunk, last_chunk, rows,
    G: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    # One program: BLOCK_K tokens of one block and one key/value head.
    block, g = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(block_starts_ptr + block), tl.load(block_starts_ptr + block + 1)
    t = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    tokens, d = end - start, tl.arange(0, D)
    if tl.program_id(2) * BLOCK_K < tokens:
        mask = (t < tokens)[:, None]
        x = ((start + t).to(tl.int64) * G + g)[:, None] * D + d[None, :]
        dk = tl.load(dk_ptr + x, mask, other=0.0)  # [BLOCK_K, D]
        dv = tl.load(dv_ptr + x, mask, other=0.0)  # [BLOCK_K, D]
        asset = tl.load(block_asset_ptr + block)
        local = block - tl.load(asset_blocks_ptr + asset)
        first_pair = tl.load(chunk_pairs_ptr + first_chunk)

        # Add the items of the block, chunk by chunk, in order. The rows of CHUNKS chunks are looked
        # up together, so that the loop over the items waits for nothing but the items.
        i = tl.arange(0, CHUNKS)
        for first in range(first_chunk, last_chunk, CHUNKS):
            chunk = first + i
            own = chunk < last_chunk
            own &= tl.load(chunk_asset_ptr + chunk, own, other=-1) == asset
            row = (tl.load(chunk_pairs_ptr + chunk, own, other=0) - first_pair + local) * G + g
            begin = tl.load(sum_ptr + 2 * rows + row - 1, own & (row > 0), other=0)
            past = tl.load(sum_ptr + 2 * rows + row, own, other=0)
            items = tl.where(own, (past - begin) // tokens, 0)  # [CHUNKS]
            items_to = tl.cumsum(items, 0)
            for item in tl.range(0, tl.sum(items, 0), num_stages=4):
                is_its_chunk = (items_to > item) & (items_to - items <= item)
                partial = begin + (item - (items_to - items)) * tokens
                partial = tl.sum(tl.where(is_its_chunk, partial, 0), 0)
                y = (partial + t).to(tl.int64)[:, None] * D + d[None, :]
                dk += tl.load(part_k_ptr + y, mask, other=0.0)
                dv += tl.load(part_v_ptr + y, mask, other=0.0)
        tl.store(dk_ptr + x, dk, mask)
        tl.store(dv_ptr + x, dv, mask)


@dataclass(frozen=True, eq=False)
class SelectionGradient:
    """What the gradients of a range of n queries are computed from."""

    q_NHD: Tensor
    """[N, H, D], contiguous."""

    keys: BranchKeys
    """Keys [N, G, D]."""

    v_NGD: Tensor
    """[N, G, D], contiguous."""

    output: OutputGradient
    """Gradient of the branch's output."""

    selected_GNT: Tensor
    """Selected blocks, -1 for none."""

    lists: InverseLists
    """Inverse lists of the range."""

    index: BlockIndex
    """Block index."""

    queries: ChunkRange
    """The range."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """First arguments of the kernels of partial gradients."""
        return (
            self.q_NHD,
            *self.keys.plain_and_scaled,
            self.v_NGD,
            *self.output.tensors(self.lists.total),
            self.lists.entries,
            self.lists.items,
            self.lists.total,
            self.index.block_starts,
        )


def partial_dq(gradient: SelectionGradient, launch: Launch | None = None) -> Tensor:
    """Return dq of each (query, rank), [n, T, H, D] in the dtype of q.

    `launch` None takes `selection_dq_launch`.
    """
    q_NHD, lists, queries = gradient.q_NHD, gradient.lists, gradient.queries
    _, H, D = q_NHD.shape
    G, _, top_k = gradient.selected_GNT.shape
    launch = launch or selection_dq_launch(q_NHD)
    BLOCK_Q = queries_per_tile(launch.rows, H // G)
    part_nTHD = q_NHD.new_empty(queries.num_tokens, top_k, H, D)
    scale = gradient.keys.scale
    _selection_dq[(lists.capacity, programs_per_item(lists, BLOCK_Q))](
        *gradient.inputs, part_nTHD, queries.first_token, top_k, entry_shift(top_k), scale,
        scale * LOG2E, G, H // G, D, BLOCK_Q, launch.keys,
        LONG=needs_long_offsets(q_NHD, part_nTHD), FIELDS=ITEM_FIELDS,
        FOLD=gradient.output.flag is not None, UNROLL=launch.unroll, EMULATED=launch.emulated,
        **launch.options,
    )  # fmt: skip
    return part_nTHD


def combine_dq(
    part_nTHD: Tensor, gradient: SelectionGradient, dq_NHD: Tensor, launch: Launch | None = None
) -> None:
    """Add the sums over ranks of `partial_dq` to dq. `launch` None takes `combine_launch`."""
    N, H, D = dq_NHD.shape
    G, _, top_k = gradient.selected_GNT.shape
    launch = launch or combine_launch(dq_NHD)
    rows = gradient.queries.num_tokens * H
    _combine_dq[(cdiv(rows, launch.rows),)](
        part_nTHD, gradient.selected_GNT, dq_NHD, gradient.queries.first_token, rows, N, top_k, H,
        H // G, D, launch.rows, **launch.options,
    )  # fmt: skip


def partial_dkdv(
    gradient: SelectionGradient, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """Return dk and dv of each item, fp32 [rows, D].

    `launch` None takes `selection_dkdv_launch`.
    """
    q_NHD, lists, queries = gradient.q_NHD, gradient.lists, gradient.queries
    _, H, D = q_NHD.shape
    G, _, top_k = gradient.selected_GNT.shape
    most_tokens = gradient.index.max_block_tokens
    launch = launch or selection_dkdv_launch(q_NHD)
    rows = queries.partial_rows(G, top_k, most_tokens)
    part_dk = q_NHD.new_empty(rows, D, dtype=torch.float32)
    part_dv = torch.empty_like(part_dk)
    tiles = cdiv(most_tokens, launch.keys) if programs_per_item(lists, 1) > 1 else 1
    scale = gradient.keys.scale
    _selection_dkdv[(lists.capacity, tiles)](
        *gradient.inputs, part_dk, part_dv, queries.first_token, entry_shift(top_k), scale,
        scale * LOG2E, G, H // G, D, queries_per_tile(launch.rows, H // G), launch.keys,
        FAST=q_NHD.dtype != torch.float32 and D < 128, LONG=needs_long_offsets(q_NHD),
        FIELDS=ITEM_FIELDS, FOLD=gradient.output.flag is not None, UNROLL=launch.unroll,
        EMULATED=launch.emulated, **launch.options,
    )  # fmt: skip
    return part_dk, part_dv


def reduce_dkdv(
    partials: tuple[Tensor, Tensor],
    gradient: SelectionGradient,
    dk_NGD: Tensor,
    dv_NGD: Tensor,
    launch: Launch | None = None,
) -> None:
    """Add the sums over items of `partial_dkdv` to dk and dv. `launch` None: `reduce_launch`."""
    index, queries = gradient.index, gradient.queries
    _, G, D = dk_NGD.shape
    launch = launch or reduce_launch(dk_NGD)
    _reduce_dkdv[(index.num_blocks, G, cdiv(index.max_block_tokens, launch.keys))](
        *partials, gradient.lists.sums, index.block_starts, index.block_asset, index.asset_blocks,
        index.chunk_asset, index.chunk_pairs, dk_NGD, dv_NGD, queries.first_chunk,
        queries.last_chunk, queries.num_pairs * G, G, D, launch.keys, CHUNKS=32, **launch.options,
    )  # fmt: skip


def selection_backward(
    gradient: SelectionGradient,
    dq_NHD: Tensor,
    dk_NGD: Tensor,
    dv_NGD: Tensor,
    launches: SsaLaunches = CHOSEN,
) -> None:
    """Add one range's gradients to dq (in the dtype of q), dk and dv (fp32)."""
    part_nTHD = partial_dq(gradient, launches.selection_dq)
    combine_dq(part_nTHD, gradient, dq_NHD, launches.combine_dq)
    del part_nTHD  # before the partial dk and dv take as much
    partials = partial_dkdv(gradient, launches.selection_dkdv)
    reduce_dkdv(partials, gradient, dk_NGD, dv_NGD, launches.reduce_dkdv)
