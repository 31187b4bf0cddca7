"""Spatial sparse attention as one differentiable function, and as custom operators.

The definition is `spatial_sparse_attention` in kernels.attention.reference. torch.compile sees one
custom operator each for forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention import checks, reference
from kernels.attention.block_index import BlockIndex
from kernels.attention.block_score import block_score
from kernels.attention.gates import gated_sum_forward, gates_backward
from kernels.attention.inverse_lists import (
    ChunkRange,
    InverseListStorage,
    chunk_ranges,
    fill_lists,
    new_ranks,
)
from kernels.attention.launches import CHOSEN, SsaLaunches
from kernels.attention.scaled_keys import scale_keys
from kernels.attention.segment import (
    asset_segments,
    compressed_segments,
    segment_forward,
    window_segments,
)
from kernels.attention.segment_backward import segment_backward
from kernels.attention.selection import combine_partials, selection_partials
from kernels.attention.selection_backward import SelectionGradient, selection_backward
from kernels.attention.selection_by_block import selection_by_block
from kernels.attention.softmax import lse_dtype
from kernels.attention.top_blocks import top_blocks
from kernels.runtime import eager_autograd
from kernels.runtime.triton_ops import on_device

RANGE_BYTES = 400 << 20
"""Memory that one range of queries may need at a time, for scores, ranks and partial outputs."""


def _without_gradients(inputs: Sequence[Tensor]) -> bool:
    """Return whether eager code may take the forward pass that has no gradient."""
    wide = inputs[0].dtype in (torch.float32, torch.float64)
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return wide and not tracked and not eager_autograd.needs_dispatcher(*inputs)


def split_queries(
    index: BlockIndex, H: int, G: int, D: int, top_k: int, itemsize: int, range_bytes: int = 0
) -> list[ChunkRange]:
    """Return the ranges of queries that selection processes one after another.

    They are the same in forward and backward. `range_bytes` 0 stands for RANGE_BYTES.
    """
    # Bytes per query. Scores with their ranks are freed before the partial outputs are made.
    scores = G * index.max_blocks * 5
    partial_outputs = top_k * H * (D * itemsize + 4)
    return chunk_ranges(index, max(partial_outputs, scores), range_bytes or RANGE_BYTES)


def ssa_forward(
    inputs: Sequence[Tensor],
    index: BlockIndex,
    top_k: int,
    shifted: bool,
    scale: float,
    launches: SsaLaunches = CHOSEN,
) -> tuple[Tensor, ...]:
    """Run the forward kernels.

    Args:
        inputs: q, k, v, ck, cv and gates of `spatial_sparse_attention`, already checked.
        index: Block index.
        top_k: Number of blocks per query.
        shifted: Whether the windows are shifted.
        scale: Factor of the scores.
        launches: Tile sizes.

    Returns:
        The output, the outputs of the three branches, their log-sums [3, N, H], the flags of
        `segment_forward`, the selection [G, N, T], and the three tensors of its inverse lists.
    """
    with on_device(inputs[0]):
        return _forward(*(x.contiguous() for x in inputs), index, top_k, shifted, scale, launches)


def _forward(
    q_NHD, k_NGD, v_NGD, ck_PGD, cv_PGD, gates_N3, index, top_k, shifted, scale, launches
) -> tuple[Tensor, ...]:
    N, H, D = q_NHD.shape
    G = k_NGD.shape[1]
    lse_3NH = q_NHD.new_empty(3, N, H, dtype=lse_dtype(q_NHD))
    top = min(top_k, index.num_blocks)
    selected_GNT = torch.empty(G, N, top, dtype=torch.int32, device=q_NHD.device)
    storage = InverseListStorage.empty(index, G, top)
    flags = torch.empty(1 + index.chunk_asset.shape[0], dtype=torch.int32, device=q_NHD.device)
    saved = (flags, selected_GNT, storage.entries, storage.sums, storage.items)
    if N == 0:
        return *(torch.empty_like(q_NHD) for _ in range(4)), lse_3NH, *saved

    # Compressed and window branch.
    keys, ckeys = scale_keys(k_NGD, scale, ck_PGD, flags)
    compressed = compressed_segments(index)
    chunk_flags = (flags, index.chunk_of)
    cmp_NHD = segment_forward(
        q_NHD, ckeys, cv_PGD, compressed, lse_3NH[0], *chunk_flags, launches.compressed_forward
    )
    windows = window_segments(index, shifted)
    win_NHD = segment_forward(
        q_NHD, keys, v_NGD, windows, lse_3NH[2], *chunk_flags, launches.window_forward
    )

    # Selection branch. Where every block is selected it is dense attention within the asset.
    if top_k >= index.max_blocks:
        sel_NHD = segment_forward(q_NHD, keys, v_NGD, asset_segments(index), lse_3NH[1])
        out_NHD = gated_sum_forward((cmp_NHD, sel_NHD, win_NHD), gates_N3)
        return out_NHD, cmp_NHD, sel_NHD, win_NHD, lse_3NH, *saved
    sel_NHD, out_NHD = torch.empty_like(q_NHD), torch.empty_like(q_NHD)
    ranges = split_queries(index, H, G, D, top, q_NHD.element_size(), launches.range_bytes)
    for queries, lists in zip(ranges, storage.views(ranges, G, top), strict=True):
        first, last = queries.first_token, queries.last_token
        score_GNM = block_score(
            q_NHD, ck_PGD, lse_3NH[0], index, scale, first, last, launches.block_score
        )
        ranks = new_ranks(index, queries, G, top)
        chunk = queries.first_chunk
        top_blocks(score_GNM, index, selected_GNT, ranks, first=first, first_chunk=chunk)
        del score_GNM
        fill_lists(ranks, index, queries, G, top, lists)
        del ranks
        part, part_lse = selection_partials(
            q_NHD, keys, v_NGD, lists, flags, index, queries, top, launches.selection_forward
        )
        gated = (cmp_NHD, win_NHD, gates_N3, out_NHD)
        combine_partials(
            part, part_lse, selected_GNT, queries, sel_NHD, lse_3NH[1], gated,
            launches.selection_combine,
        )  # fmt: skip
        del part, part_lse  # before the next range takes as much
    return out_NHD, cmp_NHD, sel_NHD, win_NHD, lse_3NH, *saved


def ssa_backward(
    do_NHD: Tensor,
    inputs: Sequence[Tensor],
    saved: Sequence[Tensor],
    index: BlockIndex,
    top_k: int,
    shifted: bool,
    scale: float,
    launches: SsaLaunches = CHOSEN,
) -> tuple[Tensor, ...]:
    """Run the backward kernels.

    Args:
        do_NHD: Gradient of the output.
        inputs: q, k, v, ck, cv and gates.
        saved: All results of `ssa_forward` but the output.
        index: Block index.
        top_k: As in the forward.
        shifted: As in the forward.
        scale: As in the forward.
        launches: Tile sizes, with the range_bytes of the forward.

    Returns:
        Gradients of q, k, v, ck, cv and gates.
    """
    with on_device(do_NHD):
        tensors = (x.contiguous() for x in (do_NHD, *inputs))
        return _backward(*tensors, saved, index, top_k, shifted, scale, launches)


def _backward(
    do_NHD,
    q_NHD,
    k_NGD,
    v_NGD,
    ck_PGD,
    cv_PGD,
    gates_N3,
    saved,
    index,
    top_k,
    shifted,
    scale,
    launches,
) -> tuple[Tensor, ...]:
    cmp_NHD, sel_NHD, win_NHD, lse_3NH, flags, selected_GNT, *lists = saved
    _, H, D = q_NHD.shape
    G, _, top = selected_GNT.shape
    keys, ckeys = scale_keys(k_NGD, scale, ck_PGD)
    (cmp, sel, win), dgates_N3 = gates_backward(
        (cmp_NHD, sel_NHD, win_NHD),
        lse_3NH,
        gates_N3,
        do_NHD,
        None if keys.scaled is None else flags,
        launches.gates,
    )

    # Window and compressed branch.
    windows = window_segments(index, shifted)
    choice = (launches.window_dq, launches.window_dkdv)
    dq_NHD, dk_NGD, dv_NGD = segment_backward(q_NHD, keys, v_NGD, win, windows, launches=choice)
    compressed = compressed_segments(index)
    choice = (launches.compressed_dq, launches.compressed_dkdv)
    _, dck_PGD, dcv_PGD = segment_backward(q_NHD, ckeys, cv_PGD, cmp, compressed, dq_NHD, choice)
    del win, cmp  # before selection takes as much

    # Selection branch.
    if top_k >= index.max_blocks:
        _, dk, dv = segment_backward(q_NHD, keys, v_NGD, sel, asset_segments(index), dq_NHD)
        dk_NGD, dv_NGD = dk_NGD + dk, dv_NGD + dv
    else:
        ranges = split_queries(index, H, G, D, top, q_NHD.element_size(), launches.range_bytes)
        views = InverseListStorage(*lists).views(ranges, G, top)
        for queries, part in zip(ranges, views, strict=True):
            gradient = SelectionGradient(
                q_NHD, keys, v_NGD, sel, selected_GNT, part, index, queries
            )
            selection_backward(gradient, dq_NHD, dk_NGD, dv_NGD, launches)
    grads = (x.to(q_NHD.dtype) for x in (dk_NGD, dv_NGD, dck_PGD, dcv_PGD))
    return dq_NHD, *grads, dgates_N3


@torch.library.custom_op("sparse3d::ssa", mutates_args=())
def _ssa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ck: Tensor,
    cv: Tensor,
    gates: Tensor,
    index: list[Tensor],
    top_k: int,
    shifted: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (q, k, v, ck, cv, gates)
    return ssa_forward(inputs, BlockIndex(*index), top_k, shifted, scale)


@_ssa.register_fake
def _(q, k, v, ck, cv, gates, index, top_k, shifted, scale):
    index = BlockIndex(*index)
    N, H, _ = q.shape
    G = k.shape[1]
    top = torch.sym_min(top_k, index.num_blocks)
    sizes = InverseListStorage.sizes(N, index.pair_block.shape[0], G, top)
    return (
        *(q.new_empty(q.shape) for _ in range(4)),
        q.new_empty(3, N, H, dtype=lse_dtype(q)),
        q.new_empty(1 + index.chunk_asset.shape[0], dtype=torch.int32),
        q.new_empty(G, N, top, dtype=torch.int32),
        *(q.new_empty(size, dtype=torch.int32) for size in sizes),
    )


@torch.library.custom_op("sparse3d::ssa_backward", mutates_args=())
def _ssa_backward(
    do: Tensor,
    inputs: list[Tensor],
    saved: list[Tensor],
    index: list[Tensor],
    top_k: int,
    shifted: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return ssa_backward(do, inputs, saved, BlockIndex(*index), top_k, shifted, scale)


@_ssa_backward.register_fake
def _(do, inputs, saved, index, top_k, shifted, scale):
    return tuple(x.new_empty(x.shape) for x in inputs)


def _setup(ctx, inputs, output):
    *tensors, index, ctx.top_k, ctx.shifted, ctx.scale = inputs
    _, *saved = output
    ctx.num_saved = len(saved)
    ctx.save_for_backward(*tensors, *saved, *index)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, do, *_):
    tensors = list(ctx.saved_tensors)  # read once: each reading unpacks them again
    inputs, rest = tensors[:6], tensors[6:]
    saved, index = rest[: ctx.num_saved], rest[ctx.num_saved :]
    if do is None:
        return (None,) * 6 + ([None] * len(index), None, None, None)
    grads = _ssa_backward(do, inputs, saved, index, ctx.top_k, ctx.shifted, ctx.scale)
    return *grads, [None] * len(index), None, None, None


_ssa.register_autograd(_op_backward, setup_context=_setup)


def _eager_forward(q, k, v, ck, cv, gates, *options):
    inputs = (q, k, v, ck, cv, gates)
    out, *saved = ssa_forward(inputs, *options)
    return (out, *saved[:3]), (*inputs, *saved), options


def _eager_backward(_, do, tensors, options):
    return ssa_backward(do, tensors[:6], tensors[6:], *options)


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
    """Gated sum of compressed, selection and window attention.

    Differentiable in all six tensors, except through the choice of blocks. Gradients are
    bit-identical from run to run. Sums are fp32 for fp16 and bf16 inputs and fp64 for fp32 inputs.
    There is no host copy, so that the function can be captured in a CUDA graph after one call
    outside of it.

    N tokens, P compressed tokens, H query heads, G key/value heads, head size D. Query head h uses
    key/value head h // (H / G).

    Args:
        q_NHD: Queries [N, H, D], fp32, bf16 or fp16, in the token order of the index. D is 16, 32,
            64 or 128, and H / G is 1, 2, 4, 8, 16 or 32.
        k_NGD: Keys [N, G, D] in the dtype of `q_NHD`, as all following tensors.
        v_NGD: Values [N, G, D].
        ck_PGD: Compressed keys [P, G, D], see `block_mean`.
        cv_PGD: Compressed values [P, G, D].
        gates_N3: Gates of compression, selection and window, before the sigmoid, [N, 3].
        index: Block index of the N tokens.
        top_k: Number of blocks that each query of each key/value head selects.
        shifted: Whether the windows are the index's shifted windows.
        scale: Factor of the scores. None stands for 1 / sqrt(D).
        backend: "auto" takes Triton for CUDA tensors and the torch reference for others, with
            `selection_by_block` where fp32 or fp64 tensors need no gradients. "triton" works on CPU
            tensors only in Triton's interpreter. "reference" takes the torch definition with any
            float dtype, D and H / G. The reference is dense in slices of the queries and meant for
            tests and tiny models.

    Returns:
        [N, H, D] in the dtype of `q_NHD`.

    Raises:
        ValueError: If a shape, dtype, device or option does not fit.
    """
    tensors = (q_NHD, k_NGD, v_NGD, ck_PGD, cv_PGD, gates_N3)
    options = {"top_k": top_k, "shifted": shifted, "scale": scale, "backend": backend}
    return ssa_with_branches(tensors, index, **options)[0]


def ssa_with_branches(
    inputs: Sequence[Tensor],
    index: BlockIndex,
    *,
    top_k: int = 8,
    shifted: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """`spatial_sparse_attention`, and the outputs of its branches.

    The backward pass keeps the branches, so that a caller can compute the result again from them
    and need not keep it too.

    Args:
        inputs: q, k, v, ck, cv and gates of `spatial_sparse_attention`.
        index: Block index.
        top_k: Number of blocks that each query selects.
        shifted: Whether the windows are shifted.
        scale: Factor of the scores.
        backend: "auto", "triton" or "reference".

    Returns:
        The result [N, H, D], and compressed, selection and window attention [N, H, D] without
        gradients. `gated_sum` of these and the gates is the result.

    Raises:
        ValueError: As in `spatial_sparse_attention`.
    """
    q_NHD, k_NGD, v_NGD, ck_PGD, cv_PGD, gates_N3 = inputs
    N, P = index.num_tokens, index.num_compressed
    keys = [("k_NGD", k_NGD, N), ("v_NGD", v_NGD, N), ("ck_PGD", ck_PGD, P), ("cv_PGD", cv_PGD, P)]
    triton = checks.check_heads(q_NHD, keys, index, backend)
    checks.check_gates(gates_N3, N, "q_NHD", q_NHD)
    checks.check_top_k(top_k)
    scale = checks.check_scale(scale, q_NHD.shape[2])
    if not triton:
        selected_GNT = reference.select_blocks(q_NHD, ck_PGD, index, top_k, scale)
        if backend == "auto" and _without_gradients(inputs):
            branches = (
                reference.compressed_attention(q_NHD, ck_PGD, cv_PGD, index, scale),
                selection_by_block(q_NHD, k_NGD, v_NGD, selected_GNT, index, scale),
                reference.window_attention(q_NHD, k_NGD, v_NGD, index, shifted, scale),
            )
        else:
            branches = reference.ssa_branches(*inputs[:5], selected_GNT, index, shifted, scale)
        out, detached = reference.gated_sum(branches, gates_N3), (x.detach() for x in branches)
    elif eager_autograd.needs_dispatcher(*inputs):
        out, *saved = _ssa(*inputs, index.tensors(), top_k, shifted, scale)
        detached = (x.detach() for x in saved[:3])
    else:
        options = (index, top_k, shifted, scale)
        out, *detached = eager_autograd.apply(_eager_forward, _eager_backward, *inputs, *options)
    compressed, selected, windows = detached
    return out, (compressed, selected, windows)
