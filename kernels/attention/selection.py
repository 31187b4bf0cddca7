"""Attention of each query to its selected blocks, forward.

The definition is `selection_attention` in kernels.attention.reference. One program holds the keys
of a block and processes the queries that selected it, so that each block's keys are loaded once per
list item (see `kernels.attention.inverse_lists`). Each (query, rank) pair gets a softmax of its
own. A second kernel combines the ranks of each query.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.block_index import BlockIndex
from kernels.attention.gates import add_gated
from kernels.attention.inverse_lists import ITEM_FIELDS, ChunkRange, InverseLists, programs_per_item
from kernels.attention.launches import Launch, combine_launch, selection_forward_launch
from kernels.attention.list_entries import entry_shift, load_entries, load_item
from kernels.attention.packed_heads import queries_per_tile
from kernels.attention.scaled_keys import BranchKeys
from kernels.attention.softmax import LOG2E, attend_run, log_sum, lse_dtype
from kernels.runtime.integer_math import cdiv
from kernels.runtime.triton_ops import needs_long_offsets


@triton.jit
def _attend_block(
    q, k_ptr, scaled_ptr, v_ptr, part_ptr, lse_ptr, start, end, to, ok, g, scale2,
    G: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, BOUNDED: tl.constexpr,
    LONG: tl.constexpr, UNROLL: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Attend rows q [R, D] to tokens start..end, and store the partial results in rows `to`."""
    R: tl.constexpr = q.shape[0]
    if BOUNDED:
        row_max = tl.zeros([R], lse_ptr.dtype.element_ty)
    else:
        row_max = tl.full([R], -1e30, lse_ptr.dtype.element_ty)
    sums_R8, acc = tl.zeros([R, 8], tl.float32), tl.zeros([R, D], tl.float32)
    row_max, sums_R8, acc = attend_run(
        q, row_max, sums_R8, acc, k_ptr, scaled_ptr, v_ptr, k_ptr, start, end, BOUNDED, g, scale2,
        G, D, BLOCK_K, False, LONG, UNROLL, EMULATED,
    )  # fmt: skip
    denominator = tl.sum(sums_R8, 1)
    denominator = tl.where(denominator > 0, denominator, 1.0)  # rows past the end
    acc *= (1.0 / denominator.to(lse_ptr.dtype.element_ty)).to(tl.float32)[:, None]
    x_ptr = part_ptr + to[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(x_ptr, acc.to(part_ptr.dtype.element_ty), ok[:, None])
    tl.store(lse_ptr + to, log_sum(row_max, denominator, lse_ptr), ok)


@triton.jit(do_not_specialize=["first_token", "top_k", "shift"])
def _selection_fwd(
    q_ptr, k_ptr, scaled_ptr, v_ptr, flag_ptr, entry_ptr, item_ptr, total_ptr, starts_ptr, part_ptr,
    lse_ptr, first_token, top_k, shift, scale2, G: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BOUNDED: tl.constexpr,
    LONG: tl.constexpr, FIELDS: tl.constexpr, UNROLL: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) < tl.load(total_ptr):
        # The item's block, key/value head and entries; the block's tokens.
        g, first, last, _, start, end, chunk = load_item(  # pyright: ignore
            item_ptr, starts_ptr, FIELDS
        )
        first += tl.program_id(1) * BLOCK_Q
        bounded = False
        if BOUNDED:
            bounded = tl.load(flag_ptr + 1 + chunk) == 0

        # BLOCK_Q entries at a time.
        for e in range(first, last, BLOCK_Q * tl.num_programs(1)):
            row, to, ok = load_entries(  # pyright: ignore[reportGeneralTypeIssues]
                entry_ptr, e, last, first_token, top_k, shift, g, G, GROUP, BLOCK_Q, False, LONG
            )
            x_ptr = q_ptr + row[:, None] * D + tl.arange(0, D)[None, :]
            q = tl.load(x_ptr, ok[:, None], other=0.0)  # [R, D]
            if bounded:
                _attend_block(
                    q, k_ptr, scaled_ptr, v_ptr, part_ptr, lse_ptr, start, end, to, ok, g,
                    scale2, G, D, BLOCK_K, True, LONG, UNROLL, EMULATED,
                )  # fmt: skip
            else:
                _attend_block(
                    q, k_ptr, scaled_ptr, v_ptr, part_ptr, lse_ptr, start, end, to, ok, g,
                    scale2, G, D, BLOCK_K, False, LONG, UNROLL, EMULATED,
                )  # fmt: skip


@triton.jit
def locate_range_rows(
    selected_ptr, first_token, rows, stride, top_k, H: tl.constexpr, GROUP: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """The R rows (token, head) of this program: their number in the range and whether they exist.

    Also returns the token, the pointer to the selection, and the row of the first partial result.
    """
    i = tl.program_id(0) * R + tl.arange(0, R)
    n, h = i // H, i % H
    selected_ptr += ((h // GROUP).to(tl.int64) * stride + first_token + n) * top_k
    return i, i < rows, n, selected_ptr, n.to(tl.int64) * top_k * H + h


@triton.jit(do_not_specialize=["first_token", "rows", "stride", "top_k"])
def _selection_combine(
    part_ptr, part_lse_ptr, selected_ptr, cmp_ptr, win_ptr, gate_ptr, sel_ptr, lse_ptr, out_ptr,
    first_token, rows, stride, top_k, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    i, ok, n, selected_ptr, p = locate_range_rows(  # pyright: ignore[reportGeneralTypeIssues]
        selected_ptr, first_token, rows, stride, top_k, H, GROUP, R
    )
    d = tl.arange(0, D)

    # The largest log-sum of the ranks.
    row_max = tl.full([R], -1e30, lse_ptr.dtype.element_ty)
    for t in range(top_k):
        mask = tl.load(selected_ptr + t, ok, other=-1) >= 0
        row_max = tl.maximum(row_max, tl.load(part_lse_ptr + p + t * H, mask, other=-1e30))

    # Weighted mean of the ranks' outputs.
    denominator, acc = tl.zeros([R], lse_ptr.dtype.element_ty), tl.zeros([R, D], tl.float32)
    for t in range(top_k):
        mask = tl.load(selected_ptr + t, ok, other=-1) >= 0
        w = tl.exp2(tl.load(part_lse_ptr + p + t * H, mask, other=-float("inf")) - row_max)
        denominator += w
        x_ptr = part_ptr + (p + t * H)[:, None] * D + d[None, :]
        part = tl.load(x_ptr, mask[:, None], other=0.0)  # [R, D]
        acc += w.to(tl.float32)[:, None] * part.to(tl.float32)
    denominator = tl.where(denominator > 0, denominator, 1.0)  # no block selected gives zero
    acc = acc / denominator[:, None]

    # Store the branch's output and log-sum, and the gated sum of the three branches.
    row = first_token.to(tl.int64) * H + i
    x, mask = row[:, None] * D + d[None, :], ok[:, None]
    sel = acc.to(sel_ptr.dtype.element_ty)
    tl.store(sel_ptr + x, sel, mask)
    tl.store(lse_ptr + row, log_sum(row_max, denominator, lse_ptr), ok)
    if GATED:
        gate_ptr += (first_token + n).to(tl.int64) * 3
        cmp = tl.load(cmp_ptr + x, mask, other=0.0)
        win = tl.load(win_ptr + x, mask, other=0.0)
        y = add_gated(gate_ptr, ok, cmp, sel, win)
        tl.store(out_ptr + x, y.to(out_ptr.dtype.element_ty), mask)


def selection_partials(
    q_NHD: Tensor,
    keys: BranchKeys,
    v_NGD: Tensor,
    lists: InverseLists,
    flags: Tensor,
    index: BlockIndex,
    queries: ChunkRange,
    top_k: int,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute one softmax per (query, rank) of a range of n queries.

    Ranks that a query lacks are not written. In bf16, queries of chunks without a flag (see
    `segment_forward`) skip the running maximum. `launch` None takes `selection_forward_launch`.

    Returns:
        Outputs [n, T, H, D] in the dtype of `q_NHD`, and log2 of the denominators [n, T, H].
    """
    _, H, D = q_NHD.shape
    G = keys.k.shape[1]
    part = q_NHD.new_empty(queries.num_tokens, top_k, H, D)
    part_lse = q_NHD.new_empty(queries.num_tokens, top_k, H, dtype=lse_dtype(q_NHD))
    launch = launch or selection_forward_launch(q_NHD)
    BLOCK_Q = queries_per_tile(launch.rows, H // G)
    _selection_fwd[(lists.capacity, programs_per_item(lists, BLOCK_Q))](
        q_NHD, *keys.plain_and_scaled, v_NGD, flags, lists.entries, lists.items, lists.total,
        index.block_starts, part, part_lse, queries.first_token, top_k, entry_shift(top_k),
        keys.scale * LOG2E, G, H // G, D, BLOCK_Q, launch.keys, BOUNDED=keys.scaled is not None,
        LONG=needs_long_offsets(q_NHD, part), FIELDS=ITEM_FIELDS, UNROLL=launch.unroll,
        EMULATED=launch.emulated, **launch.options,
    )  # fmt: skip
    return part, part_lse


def combine_partials(
    part: Tensor,
    part_lse: Tensor,
    selected_GNT: Tensor,
    queries: ChunkRange,
    o_NHD: Tensor,
    lse_NH: Tensor,
    gated: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    launch: Launch | None = None,
) -> None:
    """Write the range's rows of the selection output and its log-sums.

    Args:
        part: Outputs of `selection_partials`.
        part_lse: Log-sums of `selection_partials`.
        selected_GNT: Selected blocks, -1 for none.
        queries: The range.
        o_NHD: Receives the output.
        lse_NH: Receives the log-sums.
        gated: (compressed output, window output, gates [N, 3], out). If given, `out` receives the
            sum of the three gated branches.
        launch: Rows of a program. None takes `combine_launch`.
    """
    N, H, D = o_NHD.shape
    G, _, top_k = selected_GNT.shape
    rows = queries.num_tokens * H
    launch = launch or combine_launch(o_NHD)
    cmp, win, gates, out = gated or (o_NHD, o_NHD, o_NHD, o_NHD)
    _selection_combine[(cdiv(rows, launch.rows),)](
        part, part_lse, selected_GNT, cmp, win, gates, o_NHD, lse_NH, out, queries.first_token,
        rows, N, top_k, H, H // G, D, launch.rows, GATED=gated is not None, **launch.options,
    )  # fmt: skip
