"""The parts of SSA as differentiable functions, for callers that combine them differently.

The definitions are the functions of the same names in kernels.attention.reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import checks, reference
from kernels.attention.block_index import BlockIndex
from kernels.attention.block_score import block_score
from kernels.attention.gates import OutputGradient, gated_sum_forward, gates_backward
from kernels.attention.inverse_lists import InverseListStorage, fill_lists, selected_ranks
from kernels.attention.scaled_keys import BranchKeys, scale_keys
from kernels.attention.segment import (
    compressed_segments,
    segment_forward,
    window_segments,
)
from kernels.attention.segment_attention import segment_attention
from kernels.attention.selection import combine_partials, selection_partials
from kernels.attention.selection_backward import SelectionGradient, selection_backward
from kernels.attention.softmax import BOUND_LIMIT, lse_dtype
from kernels.attention.ssa import split_queries
from kernels.attention.top_blocks import top_blocks
from kernels.runtime.checks import check_dtype, check_same_type, use_triton
from kernels.runtime.triton_ops import on_device


def _output_gradient(do: Tensor, o: Tensor, lse: Tensor) -> OutputGradient:
    return OutputGradient(do, lse, (o.to(lse.dtype) * do.to(lse.dtype)).sum(2))


# Compressed and window attention.


def compressed_attention(
    q_NHD: Tensor,
    ck_PGD: Tensor,
    cv_PGD: Tensor,
    index: BlockIndex,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every query to all compressed tokens of its asset. Differentiable.

    Args:
        q_NHD: Queries [N, H, D], with the dtypes and sizes of `spatial_sparse_attention`.
        ck_PGD: Compressed keys [P, G, D].
        cv_PGD: Compressed values [P, G, D].
        index: Block index of the N tokens.
        scale: Factor of the scores. None stands for 1 / sqrt(D).
        backend: As in `spatial_sparse_attention`.

    Returns:
        Output [N, H, D] in the dtype of `q_NHD`.

    Raises:
        ValueError: If a tensor does not fit the index or the queries, or an option is invalid.
    """
    P = index.num_compressed
    keys = [("ck_PGD", ck_PGD, P), ("cv_PGD", cv_PGD, P)]
    triton = checks.check_heads(q_NHD, keys, index, backend)
    scale = checks.check_scale(scale, q_NHD.shape[2])
    if not triton:
        return reference.compressed_attention(q_NHD, ck_PGD, cv_PGD, index, scale)
    return segment_attention(q_NHD, ck_PGD, cv_PGD, compressed_segments(index), scale)


def window_attention(
    q_NHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    index: BlockIndex,
    *,
    shifted: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every query to the tokens of its window. Differentiable.

    Args:
        q_NHD: Queries [N, H, D], with the dtypes and sizes of `spatial_sparse_attention`.
        k_NGD: Keys [N, G, D].
        v_NGD: Values [N, G, D].
        index: Block index of the N tokens. It defines the windows.
        shifted: Take the shifted windows instead of the aligned ones.
        scale: Factor of the scores, 1 / sqrt(D) if None.
        backend: As in `spatial_sparse_attention`.

    Returns:
        [N, H, D] in the dtype of `q_NHD`.

    Raises:
        ValueError: If a shape, dtype, device or option does not fit.
    """
    N = index.num_tokens
    keys = [("k_NGD", k_NGD, N), ("v_NGD", v_NGD, N)]
    triton = checks.check_heads(q_NHD, keys, index, backend)
    scale = checks.check_scale(scale, q_NHD.shape[2])
    if not triton:
        return reference.window_attention(q_NHD, k_NGD, v_NGD, index, shifted, scale)
    return segment_attention(q_NHD, k_NGD, v_NGD, window_segments(index, shifted), scale)


# Selection.


@torch.library.custom_op("sparse3d::select_blocks", mutates_args=())
def _select(q: Tensor, ck: Tensor, index: list[Tensor], top_k: int, scale: float) -> Tensor:
    q, ck, blocks = q.contiguous(), ck.contiguous(), BlockIndex(*index)
    N, H, D = q.shape
    G = ck.shape[1]
    lse = q.new_empty(N, H, dtype=lse_dtype(q))
    T = min(top_k, blocks.num_blocks)  # the largest asset may have fewer blocks
    selected = torch.full((G, N, T), -1, dtype=torch.int32, device=q.device)
    with on_device(q):
        segment_forward(q, scale_keys(ck, scale)[0], ck, compressed_segments(blocks), lse)
        for queries in split_queries(blocks, H, G, D, T, q.element_size()):
            first, last = queries.first_token, queries.last_token
            score = block_score(q, ck, lse, blocks, scale, first, last)
            top_blocks(score, blocks, selected, first=first)
    return selected


@_select.register_fake
def _(q, ck, index, top_k, scale):
    blocks = BlockIndex(*index).num_blocks
    return q.new_empty(ck.shape[1], q.shape[0], torch.sym_min(top_k, blocks), dtype=torch.int32)


def select_blocks(
    q_NHD: Tensor,
    ck_PGD: Tensor,
    index: BlockIndex,
    *,
    top_k: int = 8,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the blocks that each query of each key/value head attends to, without a gradient.

    The score of a block is the softmax probability that compressed attention gives to it, summed
    over the heads of the group. Of equal scores the lower block wins.

    Args:
        q_NHD: Queries [N, H, D], with the dtypes and sizes of `spatial_sparse_attention`.
        ck_PGD: Compressed keys [P, G, D].
        index: Block index of the N tokens.
        top_k: Number of blocks per query.
        scale: Factor of the scores. None stands for 1 / sqrt(D).
        backend: As in `spatial_sparse_attention`.

    Returns:
        int32 [G, N, min(top_k, blocks)], ascending block numbers of the batch, -1 after the last.

    Raises:
        ValueError: If `top_k` is less than 1, or a tensor or another option does not fit.
    """
    keys = [("ck_PGD", ck_PGD, index.num_compressed)]
    triton = checks.check_heads(q_NHD, keys, index, backend)
    checks.check_top_k(top_k)
    scale = checks.check_scale(scale, q_NHD.shape[2])
    if not triton:
        return reference.select_blocks(q_NHD, ck_PGD, index, top_k, scale)
    return _select(q_NHD.detach(), ck_PGD.detach(), index.tensors(), top_k, scale)


def _far_flags(q: Tensor, norms: Tensor | None, index: BlockIndex) -> Tensor:
    """The flags that `segment_forward` sets within the whole of SSA."""
    flags = torch.zeros(1 + len(index.chunk_asset), dtype=torch.int32, device=q.device)
    if norms is not None:
        largest_H = norms.amax(1).repeat_interleave(q.shape[1] // len(norms))
        bound_NH = torch.linalg.vector_norm(q, dim=2, dtype=torch.float32) * largest_H
        far_N = (bound_NH > BOUND_LIMIT.value).any(1)
        flags.scatter_reduce_(0, 1 + index.chunk_of.long(), far_N.int(), "amax")
    return flags


@torch.library.custom_op("sparse3d::selection_attention", mutates_args=())
def _selection(
    q: Tensor, k: Tensor, v: Tensor, selected: Tensor, index: list[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, selected = (x.contiguous() for x in (q, k, v, selected))
    _, H, D = q.shape
    G, _, top_k = selected.shape
    blocks = BlockIndex(*index)
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=lse_dtype(q))
    storage = InverseListStorage.empty(blocks, G, top_k)
    ranges = split_queries(blocks, H, G, D, top_k, q.element_size())
    with on_device(q):
        keys, _ = scale_keys(k, scale)
        flags = _far_flags(q, keys.norms, blocks)
        for queries, lists in zip(ranges, storage.views(ranges, G, top_k), strict=True):
            fill_lists(selected_ranks(selected, blocks, queries), blocks, queries, G, top_k, lists)
            part, part_lse = selection_partials(q, keys, v, lists, flags, blocks, queries, top_k)
            combine_partials(part, part_lse, selected, queries, o, lse)
    return o, lse, storage.entries, storage.sums, storage.items


@_selection.register_fake
def _(q, k, v, selected, index, scale):
    G, N, top_k = selected.shape
    sizes = InverseListStorage.sizes(N, BlockIndex(*index).pair_block.shape[0], G, top_k)
    lists = (q.new_empty(size, dtype=torch.int32) for size in sizes)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=lse_dtype(q)), *lists


@torch.library.custom_op("sparse3d::selection_attention_backward", mutates_args=())
def _selection_backward_op(
    do: Tensor, inputs: list[Tensor], saved: list[Tensor], index: list[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    do, q, k, v, selected = (x.contiguous() for x in (do, *inputs))
    o, lse, *lists = saved
    _, H, D = q.shape
    G, _, top_k = selected.shape
    blocks = BlockIndex(*index)
    dq = torch.zeros_like(q)
    dk, dv = (x.new_zeros(x.shape, dtype=torch.float32) for x in (k, v))
    keys = BranchKeys(k, scale)
    gradient = _output_gradient(do, o, lse)
    ranges = split_queries(blocks, H, G, D, top_k, q.element_size())
    views = InverseListStorage(*lists).views(ranges, G, top_k)
    with on_device(q):
        for queries, part in zip(ranges, views, strict=True):
            range_gradient = SelectionGradient(
                q, keys, v, gradient, selected, part, blocks, queries
            )
            selection_backward(range_gradient, dq, dk, dv)
    return (dq, dk, dv) if q.dtype == torch.float32 else (dq, dk.to(q.dtype), dv.to(q.dtype))


@_selection_backward_op.register_fake
def _(do, inputs, saved, index, scale):
    return tuple(x.new_empty(x.shape) for x in inputs[:3])


def _selection_setup(ctx, inputs, output):
    q, k, v, selected, index, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, selected, *output, *index)
    ctx.set_materialize_grads(False)


def _selection_autograd(ctx, do, *_):
    tensors = list(ctx.saved_tensors)
    inputs, saved, index = tensors[:4], tensors[4:9], tensors[9:]
    grads = (None,) * 3
    if do is not None:
        grads = _selection_backward_op(do, inputs, saved, index, ctx.scale)
    return *grads, None, [None] * len(index), None


_selection.register_autograd(_selection_autograd, setup_context=_selection_setup)


def _canonical(selected_GNT: Tensor, index: BlockIndex) -> Tensor:
    """Selection in ascending order, each valid block of the query's asset once, -1 at the end."""
    first, last = (index.asset_blocks[index.asset_of + i][:, None] for i in (0, 1))
    none = index.num_blocks
    valid = (selected_GNT >= first) & (selected_GNT < last)
    ordered = torch.where(valid, selected_GNT, none).sort(dim=2).values
    ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]] = none
    ordered = ordered.sort(dim=2).values
    return torch.where(ordered == none, -1, ordered).int()


def selection_attention(
    q_NHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    selected_GNT: Tensor,
    index: BlockIndex,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every query to all tokens of its selected blocks. Differentiable in q, k and v.

    Args:
        q_NHD: [N, H, D], of the dtypes and sizes that `spatial_sparse_attention` takes.
        k_NGD: [N, G, D], keys of the tokens.
        v_NGD: [N, G, D], values of the tokens.
        selected_GNT: int32 or int64 [G, N, T], block numbers of the batch in any order, as from
            `select_blocks`. A block counts once. Numbers that are not a block of the query's asset
            are skipped, and at least one number must remain.
        index: Block index of the N tokens, in whose numbering the blocks are given.
        scale: Factor of the scores, 1 / sqrt(D) if None.
        backend: As in `spatial_sparse_attention`.

    Returns:
        Output [N, H, D], in the dtype of the queries.

    Raises:
        ValueError: If `selected_GNT` is not int32 or int64 [G, N, T], or another argument does not
            fit.
    """
    N = index.num_tokens
    keys = [("k_NGD", k_NGD, N), ("v_NGD", v_NGD, N)]
    triton = checks.check_heads(q_NHD, keys, index, backend)
    scale = checks.check_scale(scale, q_NHD.shape[2])
    G = k_NGD.shape[1]
    if selected_GNT.ndim != 3 or selected_GNT.shape[:2] != (G, N) or selected_GNT.shape[2] == 0:
        raise ValueError(
            f"selected_GNT must be [{G}, {N}, T] with T >= 1, got {list(selected_GNT.shape)}"
        )
    if selected_GNT.dtype not in (torch.int32, torch.int64) or selected_GNT.device != q_NHD.device:
        raise ValueError(
            f"selected_GNT must be int32 or int64 on {q_NHD.device}, "
            f"got {selected_GNT.dtype} on {selected_GNT.device}"
        )
    selected_GNT = _canonical(selected_GNT, index)
    if not triton:
        return reference.selection_attention(q_NHD, k_NGD, v_NGD, selected_GNT, index, scale)
    return _selection(q_NHD, k_NGD, v_NGD, selected_GNT, index.tensors(), scale)[0]


# Gated sum.


@torch.library.custom_op("sparse3d::gated_sum", mutates_args=())
def _gated(a: Tensor, b: Tensor, c: Tensor, gates: Tensor) -> Tensor:
    with on_device(a):
        branches = (a.contiguous(), b.contiguous(), c.contiguous())
        return gated_sum_forward(branches, gates.contiguous())


@_gated.register_fake
def _(a, b, c, gates):
    return a.new_empty(a.shape)


@torch.library.custom_op("sparse3d::gated_sum_backward", mutates_args=())
def _gated_backward_op(
    do: Tensor, a: Tensor, b: Tensor, c: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    do, a, b, c, gates = (x.contiguous() for x in (do, a, b, c, gates))
    lse = do.new_zeros(3, *do.shape[:2], dtype=torch.float32)
    with on_device(do):
        _, dgates = gates_backward((a, b, c), lse, gates, do)
    open_N3 = gates.float().sigmoid()
    return *((do * open_N3[:, i, None, None]).to(do.dtype) for i in range(3)), dgates


@_gated_backward_op.register_fake
def _(do, a, b, c, gates):
    return tuple(x.new_empty(x.shape) for x in (a, b, c, gates))


_gated.register_autograd(
    lambda ctx, do: _gated_backward_op(do, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def gated_sum(
    branches_3_NHD: tuple[Tensor, Tensor, Tensor], gates_N3: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Sum of three tensors, each times the sigmoid of its gate. Differentiable.

    Args:
        branches_3_NHD: Three tensors [N, H, D] of one dtype, with the dtypes and head sizes of
            `spatial_sparse_attention`.
        gates_N3: Gates before the sigmoid, [N, 3] in the same dtype.
        backend: As in `spatial_sparse_attention`.

    Returns:
        [N, H, D] in the dtype of the branches.

    Raises:
        ValueError: If a shape, dtype, device or option does not fit.
    """
    if len(branches_3_NHD) != 3 or branches_3_NHD[0].ndim != 3:
        raise ValueError(
            f"branches_3_NHD must be three [N, H, D], got {[list(x.shape) for x in branches_3_NHD]}"
        )
    a, b, c = branches_3_NHD
    for x in (b, c):
        if x.shape != a.shape:
            raise ValueError(
                f"branches_3_NHD must have one shape, got {list(a.shape)} and {list(x.shape)}"
            )
        check_same_type("branches_3_NHD", x, "the first branch", a)
    checks.check_gates(gates_N3, len(a), "branches_3_NHD", a)
    triton = use_triton(backend, a)
    if triton:
        check_dtype("branches_3_NHD", a)
    if backend != "reference":
        checks.check_head_size("branches_3_NHD", a.shape[2])
    if not triton:
        return reference.gated_sum(branches_3_NHD, gates_N3)
    return _gated(a, b, c, gates_N3)
