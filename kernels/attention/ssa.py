"""Spatial sparse attention as one differentiable function, and as custom operators that torch.compile can see."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import checks, reference
from kernels.attention.block_index import BlockIndex
from kernels.attention.block_score import block_score
from kernels.attention.gates import gated_sum_forward, gates_backward
from kernels.attention.inverse_lists import (
    ITEM_FIELDS,
    Lists,
    QueryRange,
    fill_lists,
    item_capacity,
    new_ranks,
    query_ranges,
)
from kernels.attention.segment import (
    asset_segments,
    compressed_segments,
    segment_forward,
    window_segments,
)
from kernels.attention.segment_backward import segment_backward
from kernels.attention.selection import combine_partials, selection_partials
from kernels.attention.selection_backward import selection_backward
from kernels.attention.top_blocks import top_blocks
from kernels.runtime import eager_autograd
from kernels.runtime.triton_ops import log2_keys, lse_dtype, on_device

RANGE_BYTES = (
    400 << 20
)  # of what one range of queries needs at a time: scores, ranks, partial outputs


def split_queries(
    index: BlockIndex, H: int, G: int, D: int, top_k: int, itemsize: int
) -> list[QueryRange]:
    """The ranges of queries that selection takes one after another; the same in forward and backward."""
    scores = (
        G * index.max_blocks * 5
    )  # bytes a query, with ranks; they are gone when partial outputs come
    return query_ranges(index, max(top_k * H * (D * itemsize + 4), scores), RANGE_BYTES)


class SelectionLists:
    """Storage of the inverse lists of all ranges in three tensors of a size known from shapes alone."""

    def __init__(self, entries: Tensor, sums: Tensor, items: Tensor):
        self.entries, self.sums, self.items = entries, sums, items

    @staticmethod
    def sizes(N: int, pairs: int, G: int, top_k: int) -> tuple[int, int, int]:
        return N * G * top_k, 3 * pairs * G, item_capacity(pairs, N * G * top_k, G) * ITEM_FIELDS

    @classmethod
    def empty(cls, index: BlockIndex, G: int, top_k: int) -> SelectionLists:
        sizes = cls.sizes(index.num_tokens, index.pair_block.shape[0], G, top_k)
        return cls(*(torch.empty(size, dtype=torch.int32, device=index.device) for size in sizes))

    def of(self, ranges: list[QueryRange], G: int, top_k: int) -> list[Lists]:
        lists, item = [], 0
        for queries in ranges:
            entries = (queries.last - queries.first) * G * top_k
            capacity = item_capacity(queries.pairs, entries, G)
            sums = self.sums[3 * queries.first_pair * G : 3 * queries.last_pair * G]
            lists.append(
                Lists(
                    self.entries[queries.first * G * top_k :][:entries],
                    sums.view(3, queries.pairs * G),
                    self.items[item * ITEM_FIELDS : (item + capacity) * ITEM_FIELDS].view(
                        capacity, ITEM_FIELDS
                    ),
                )
            )
            item += capacity
        return lists


def ssa_forward(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, ck_PGD: Tensor, cv_PGD: Tensor, gates_N3: Tensor, index: BlockIndex,
    top_k: int, shifted: bool, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """out, the three branches' outputs, their lse [3, N, H], flags, the selection [G, N, T] and its lists."""
    with on_device(q_NHD):
        tensors = (x.contiguous() for x in (q_NHD, k_NGD, v_NGD, ck_PGD, cv_PGD, gates_N3))
        return _forward(*tensors, index, top_k, shifted, scale)


def _forward(
    q_NHD, k_NGD, v_NGD, ck_PGD, cv_PGD, gates_N3, index, top_k, shifted, scale
) -> tuple[Tensor, ...]:
    (N, H, D), G = q_NHD.shape, k_NGD.shape[1]
    lse_3NH = q_NHD.new_empty(3, N, H, dtype=lse_dtype(q_NHD))
    top = min(top_k, index.num_blocks)
    selected_GNT = torch.empty(G, N, top, dtype=torch.int32, device=q_NHD.device)
    storage = SelectionLists.empty(index, G, top)
    flags = torch.empty(1 + index.chunk_asset.shape[0], dtype=torch.int32, device=q_NHD.device)
    saved = (flags, selected_GNT, storage.entries, storage.sums, storage.items)
    if N == 0:
        return *(torch.empty_like(q_NHD) for _ in range(4)), lse_3NH, *saved
    dense = top_k >= index.max_blocks  # every block is selected
    keys, ckeys = log2_keys(k_NGD, scale, ck_PGD, flags)
    compressed = compressed_segments(index)
    cmp_NHD = segment_forward(q_NHD, ckeys, cv_PGD, compressed, lse_3NH[0], flags, index.chunk_of)
    windows = window_segments(index, shifted)
    win_NHD = segment_forward(q_NHD, keys, v_NGD, windows, lse_3NH[2], flags, index.chunk_of)
    if dense:
        sel_NHD = segment_forward(q_NHD, keys, v_NGD, asset_segments(index), lse_3NH[1])
        out_NHD = gated_sum_forward((cmp_NHD, sel_NHD, win_NHD), gates_N3)
        return out_NHD, cmp_NHD, sel_NHD, win_NHD, lse_3NH, *saved
    sel_NHD, out_NHD = torch.empty_like(q_NHD), torch.empty_like(q_NHD)
    ranges = split_queries(index, H, G, D, top, q_NHD.element_size())
    for queries, lists in zip(ranges, storage.of(ranges, G, top), strict=True):
        score_GNM = block_score(
            q_NHD, ck_PGD, lse_3NH[0], index, scale, queries.first, queries.last
        )
        ranks = new_ranks(index, queries, G, top)
        top_blocks(score_GNM, index, selected_GNT, queries.first, ranks, queries.first_chunk)
        del score_GNM
        fill_lists(ranks, index, queries, G, top, lists)
        del ranks
        part, part_lse = selection_partials(q_NHD, keys, v_NGD, lists, flags, index, queries, top)
        gated = (cmp_NHD, win_NHD, gates_N3, out_NHD)
        combine_partials(part, part_lse, selected_GNT, queries, sel_NHD, lse_3NH[1], gated)
        del part, part_lse  # before the next range takes as much
    return out_NHD, cmp_NHD, sel_NHD, win_NHD, lse_3NH, *saved


def ssa_backward(
    do_NHD: Tensor, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, ck_PGD: Tensor, cv_PGD: Tensor, gates_N3: Tensor,
    branches: tuple[Tensor, Tensor, Tensor], lse_3NH: Tensor, flags: Tensor, selected_GNT: Tensor,
    storage: SelectionLists, index: BlockIndex, top_k: int, shifted: bool, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v, ck, cv and gates."""
    with on_device(q_NHD):
        tensors = (x.contiguous() for x in (do_NHD, q_NHD, k_NGD, v_NGD, ck_PGD, cv_PGD, gates_N3))
        return _backward(
            *tensors, branches, lse_3NH, flags, selected_GNT, storage, index, top_k, shifted, scale
        )


def _backward(
    do_NHD, q_NHD, k_NGD, v_NGD, ck_PGD, cv_PGD, gates_N3, branches, lse_3NH, flags, selected_GNT, storage, index,
    top_k, shifted, scale,
) -> tuple[Tensor, ...]:  # fmt: skip
    (_, H, D), (G, _, top) = q_NHD.shape, selected_GNT.shape
    keys, ckeys = log2_keys(k_NGD, scale, ck_PGD)
    fold = None if keys.scaled is None else flags
    (cmp, sel, win), dgates_N3 = gates_backward(branches, lse_3NH, gates_N3, do_NHD, fold)
    dq_NHD, dk_NGD, dv_NGD = segment_backward(
        q_NHD, keys, v_NGD, win, window_segments(index, shifted)
    )
    _, dck_PGD, dcv_PGD = segment_backward(
        q_NHD, ckeys, cv_PGD, cmp, compressed_segments(index), dq_NHD
    )
    del win, cmp  # before selection takes as much
    if top_k >= index.max_blocks:
        _, dk, dv = segment_backward(q_NHD, keys, v_NGD, sel, asset_segments(index), dq_NHD)
        dk_NGD, dv_NGD = dk_NGD + dk, dv_NGD + dv
    else:
        ranges = split_queries(index, H, G, D, top, q_NHD.element_size())
        for queries, lists in zip(ranges, storage.of(ranges, G, top), strict=True):
            selection_backward(
                q_NHD, keys, v_NGD, sel, selected_GNT, lists, index, queries, dq_NHD, dk_NGD, dv_NGD
            )
    dtype = q_NHD.dtype
    return (
        dq_NHD,
        dk_NGD.to(dtype),
        dv_NGD.to(dtype),
        dck_PGD.to(dtype),
        dcv_PGD.to(dtype),
        dgates_N3,
    )


@torch.library.custom_op("sparse3d::ssa", mutates_args=())
def _ssa(
    q: Tensor, k: Tensor, v: Tensor, ck: Tensor, cv: Tensor, gates: Tensor, index: list[Tensor],
    top_k: int, shifted: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return ssa_forward(q, k, v, ck, cv, gates, BlockIndex(*index), top_k, shifted, scale)


@_ssa.register_fake
def _(q, k, v, ck, cv, gates, index, top_k, shifted, scale):
    index = BlockIndex(*index)
    (N, H, _), G = q.shape, k.shape[1]
    top = torch.sym_min(top_k, index.num_blocks)
    sizes = SelectionLists.sizes(N, index.pair_block.shape[0], G, top)
    return (
        *(q.new_empty(q.shape) for _ in range(4)),
        q.new_empty(3, N, H, dtype=lse_dtype(q)),
        q.new_empty(1 + index.chunk_asset.shape[0], dtype=torch.int32),
        q.new_empty(G, N, top, dtype=torch.int32),
        *(q.new_empty(size, dtype=torch.int32) for size in sizes),
    )


@torch.library.custom_op("sparse3d::ssa_backward", mutates_args=())
def _ssa_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, ck: Tensor, cv: Tensor, gates: Tensor, saved: list[Tensor],
    index: list[Tensor], top_k: int, shifted: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    cmp, sel, win, lse, flags, selected, *lists = saved
    branches, storage, blocks = (cmp, sel, win), SelectionLists(*lists), BlockIndex(*index)
    return ssa_backward(
        do,
        q,
        k,
        v,
        ck,
        cv,
        gates,
        branches,
        lse,
        flags,
        selected,
        storage,
        blocks,
        top_k,
        shifted,
        scale,
    )


@_ssa_backward.register_fake
def _(do, q, k, v, ck, cv, gates, saved, index, top_k, shifted, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, ck, cv, gates))


def _setup(ctx, inputs, output):
    q, k, v, ck, cv, gates, index, ctx.top_k, ctx.shifted, ctx.scale = inputs
    _, *saved = output
    ctx.num_saved = len(saved)
    ctx.save_for_backward(q, k, v, ck, cv, gates, *saved, *index)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, do, *_):
    inputs, rest = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    saved, index = list(rest[: ctx.num_saved]), list(rest[ctx.num_saved :])
    if do is None:
        return (None,) * 6 + ([None] * len(index), None, None, None)
    grads = _ssa_backward(do, *inputs, saved, index, ctx.top_k, ctx.shifted, ctx.scale)
    return *grads, [None] * len(index), None, None, None


_ssa.register_autograd(_op_backward, setup_context=_setup)


def _eager_forward(q, k, v, ck, cv, gates, index, *options):
    out, *saved = ssa_forward(q, k, v, ck, cv, gates, index, *options)
    return out, (q, k, v, ck, cv, gates, *saved), (index, *options)


def _eager_backward(_, do, saved, rest):
    q, k, v, ck, cv, gates, cmp, sel, win, lse, flags, selected, *lists = saved
    branches, storage = (cmp, sel, win), SelectionLists(*lists)
    return ssa_backward(do, q, k, v, ck, cv, gates, branches, lse, flags, selected, storage, *rest)


def spatial_sparse_attention(
    q_NHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    ck_PGD: Tensor,
    cv_PGD: Tensor,
    gates_N3: Tensor,
    index: BlockIndex,
    *,
    top_k: int = 8,
    shifted: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum of SSA's three branches, each times the sigmoid of its gate: [N, H, D] in q's dtype.

    q [N, H, D], k and v [N, G, D] of the tokens in the index's order; ck and cv [P, G, D] of its compressed tokens
    (see `block_mean`); gates [N, 3] before the sigmoid, of compression, selection, window. Query head h uses key/value
    head h // (H / G). `shifted` takes the index's shifted windows. scale is 1 / sqrt(D) unless given.

    Differentiable in all six tensors, except through the choice of blocks; gradients are bit-identical from run to
    run. fp16 or bf16 with fp32 sums, fp32 with fp64 ones; D in 16, 32, 64, 128; H / G in 1, 2, .. 32. No host copy,
    so that it can be captured in a CUDA graph after one call outside of it. On CPU tensors (or with backend
    "reference") the torch reference runs instead, dense in slices of the queries: any float dtype, meant for tests and
    tiny models.
    ValueError on any other shape, dtype, device or option.
    """
    N, P = index.num_tokens, index.num_compressed
    keys = [("k_NGD", k_NGD, N), ("v_NGD", v_NGD, N), ("ck_PGD", ck_PGD, P), ("cv_PGD", cv_PGD, P)]
    triton = checks.check_heads(q_NHD, keys, index, backend)
    checks.check_gates(gates_N3, N, "q_NHD", q_NHD)
    checks.check_top_k(top_k)
    scale = checks.check_scale(scale, q_NHD.shape[2])
    if not triton:
        return reference.spatial_sparse_attention(
            q_NHD,
            k_NGD,
            v_NGD,
            ck_PGD,
            cv_PGD,
            gates_N3,
            index,
            top_k=top_k,
            shifted=shifted,
            scale=scale,
        )
    tensors = (q_NHD, k_NGD, v_NGD, ck_PGD, cv_PGD, gates_N3)
    if eager_autograd.needs_dispatcher(*tensors):
        return _ssa(*tensors, index.tensors(), top_k, shifted, scale)[0]
    return eager_autograd.apply(
        _eager_forward, _eager_backward, *tensors, index, top_k, shifted, scale
    )
