"""Attention of runs of queries to runs of keys, gradients: deterministic, without atomics.

The definitions are `compressed_attention` and `window_attention` in kernels.attention.reference.
One kernel holds queries and sums their gradients over the keys, the other holds keys and sums their
gradients over the queries. If the log-sums are already multiplied into the output gradient
("folded", see `OutputGradient`), the loops do not subtract them from the scores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.gates import OutputGradient, is_folded
from kernels.attention.launches import Launch, segment_dkdv_launch, segment_dq_launch
from kernels.attention.packed_heads import (
    load_heads,
    load_keys,
    load_row_gradients,
    load_rows,
    queries_per_tile,
    store_rows,
)
from kernels.attention.scaled_keys import BranchKeys
from kernels.attention.segment import Segments
from kernels.attention.softmax import LN2, LOG2E, exponentials, products, score_gradients
from kernels.runtime.integer_math import cdiv
from kernels.runtime.triton_ops import add_dot, needs_long_offsets


@triton.jit
def probabilities(a, b, lse, scale2, FOLDED: tl.constexpr, EMULATED: tl.constexpr):
    """Powers of two of the scores a b^T, less lse, which must broadcast. FOLDED: without lse.

    EMULATED is that of `exponentials`, for folded rows.
    """
    if FOLDED:
        p = exponentials(products(a, b), EMULATED, True)
    else:
        p = tl.exp2(products(a, b) * scale2 - lse)
    return p


@triton.jit
def _add_dq_of_keys(
    q, do, lse, dot, acc, k_ptr, v_ptr, order_ptr, m, end, g, scale2, G: tl.constexpr,
    D: tl.constexpr, ORDERED: tl.constexpr, FULL: tl.constexpr, LONG: tl.constexpr,
    FOLDED: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """acc [R, D] + ds k for keys m [BLOCK_K]."""
    k = load_keys(k_ptr, order_ptr, m, end, g, G, D, ORDERED, FULL, LONG)  # [BLOCK_K, D]
    v = load_keys(v_ptr, order_ptr, m, end, g, G, D, ORDERED, FULL, LONG)  # [BLOCK_K, D]
    p = probabilities(q, k, lse[:, None], scale2, FOLDED, EMULATED)  # [R, BLOCK_K]
    if not FULL:
        p = tl.where((m < end)[None, :], p, 0.0)  # a padded key's exponent may overflow
    ds = p * (products(do, v) - dot[:, None])  # [R, BLOCK_K]
    return add_dot(ds.to(k.dtype), k, acc)


@triton.jit
def dq_of_run(
    q, do, lse, dot, k_ptr, v_ptr, order_ptr, start, end, g, scale2, G: tl.constexpr,
    D: tl.constexpr, BLOCK_K: tl.constexpr, ORDERED: tl.constexpr, LONG: tl.constexpr,
    FOLDED: tl.constexpr, UNROLL: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Sum over keys start..end of ds k: [R, D]. FOLDED: no row has an lse, keys carry the scale."""
    c = tl.arange(0, BLOCK_K)
    acc = tl.zeros([q.shape[0], D], lse.dtype)
    # Whole steps without masks, then the rest.
    full = start + (end - start) // BLOCK_K * BLOCK_K
    for first in tl.range(start, full, BLOCK_K, loop_unroll_factor=UNROLL):
        acc = _add_dq_of_keys(
            q, do, lse, dot, acc, k_ptr, v_ptr, order_ptr, first + c, end, g, scale2, G, D, ORDERED,
            True, LONG, FOLDED, EMULATED,
        )  # fmt: skip
    if full < end:
        acc = _add_dq_of_keys(
            q, do, lse, dot, acc, k_ptr, v_ptr, order_ptr, full + c, end, g, scale2, G, D, ORDERED,
            False, LONG, FOLDED, EMULATED,
        )  # fmt: skip
    return acc


@triton.jit
def _tile_dq(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, segment_ptr, starts_ptr, dq_ptr, N,
    dq_scale, scale2, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, ORDERED: tl.constexpr, ADD: tl.constexpr, LONG: tl.constexpr,
    FOLDED: tl.constexpr, UNROLL: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_Q queries and the R = BLOCK_Q * GROUP rows of one key/value head."""
    first, g = tl.program_id(0) * BLOCK_Q, tl.program_id(1)
    n = first + tl.arange(0, BLOCK_Q)
    ok = n < N
    row = tl.load(order_ptr + n, ok, other=0) if ORDERED else n
    q = load_rows(q_ptr, row, ok, g, G, GROUP, D, BLOCK_Q)  # [R, D]
    do = load_rows(do_ptr, row, ok, g, G, GROUP, D, BLOCK_Q)  # [R, D]
    lse = load_heads(lse_ptr, row, ok, g, float("inf"), G, GROUP, BLOCK_Q)  # [R]
    dot = load_heads(dot_ptr, row, ok, g, 0.0, G, GROUP, BLOCK_Q)  # [R]
    segment_of = tl.load(segment_ptr + n, ok, other=-1)  # [BLOCK_Q]

    # Each segment that the tile has queries of, mostly one.
    last = tl.load(segment_ptr + tl.minimum(first + BLOCK_Q, N) - 1)
    for segment in range(tl.load(segment_ptr + first), last + 1):
        start, end = tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)
        acc = dq_of_run(
            q, do, lse, dot, k_ptr, v_ptr, order_ptr, start, end, g, scale2, G, D, BLOCK_K, ORDERED,
            LONG, FOLDED, UNROLL, EMULATED,
        )  # fmt: skip
        acc *= dq_scale
        inside = segment_of == segment  # other rows hold arbitrary values
        if ADD:
            before = load_rows(dq_ptr, row, inside, g, G, GROUP, D, BLOCK_Q)  # [R, D]
            acc += before.to(tl.float32)
        store_rows(dq_ptr, acc, row, inside, g, G, GROUP, D, BLOCK_Q)


@triton.jit(do_not_specialize=["N"])
def _segment_dq(
    q_ptr, k_ptr, scaled_ptr, v_ptr, do_ptr, weighted_ptr, lse_ptr, dot_ptr, flag_ptr, order_ptr,
    segment_ptr, starts_ptr, dq_ptr, N, scale, scale2, G: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ORDERED: tl.constexpr,
    ADD: tl.constexpr, LONG: tl.constexpr, FOLD: tl.constexpr, UNROLL: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    # The whole tile exists twice: two loops in one body would share its registers.
    if is_folded(flag_ptr, FOLD):
        _tile_dq(
            q_ptr, scaled_ptr, v_ptr, weighted_ptr, lse_ptr, dot_ptr, order_ptr, segment_ptr,
            starts_ptr, dq_ptr, N, LN2, 1.0, G, GROUP, D, BLOCK_Q, BLOCK_K, ORDERED, ADD, LONG,
            True, UNROLL, EMULATED,
        )  # fmt: skip
    else:
        _tile_dq(
            q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, segment_ptr, starts_ptr,
            dq_ptr, N, scale, scale2, G, GROUP, D, BLOCK_Q, BLOCK_K, ORDERED, ADD, LONG, False,
            UNROLL, 0,
        )  # fmt: skip


@triton.jit
def add_dkdv(k, v, dk, dv, q, do, lse, dot, scale2, FOLDED: tl.constexpr, EMULATED: tl.constexpr):
    """dk and dv [BLOCK_K, D] plus what the rows q, do [R, D] contribute to the keys k and v."""
    p = probabilities(k, q, lse[None, :], scale2, FOLDED, EMULATED)  # [BLOCK_K, R]
    dv = add_dot(p.to(q.dtype), do, dv)
    ds = score_gradients(p, products(v, do) - dot[None, :], q)  # [BLOCK_K, R]
    return add_dot(ds, q, dk), dv


@triton.jit
def _add_queries(
    k, v, dk, dv, q_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, first, end, g, scale2,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr,
    ORDERED: tl.constexpr, FULL: tl.constexpr, LONG: tl.constexpr, FOLDED: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    """dk and dv plus the share of queries first..first + BLOCK_Q. FULL: all lie before `end`."""
    r = tl.arange(0, BLOCK_Q * GROUP)
    n = first + r // GROUP
    ok = n < end
    if ORDERED:
        n = tl.load(order_ptr + n) if FULL else tl.load(order_ptr + n, ok, other=0)
    if LONG:
        n = n.to(tl.int64)
    row = n * (G * GROUP) + (g * GROUP + r % GROUP)
    q, do, lse, dot = load_row_gradients(  # pyright: ignore[reportGeneralTypeIssues]
        q_ptr, do_ptr, lse_ptr, dot_ptr, row, ok, D, FULL, FOLDED
    )
    return add_dkdv(k, v, dk, dv, q, do, lse, dot, scale2, FOLDED, EMULATED)


@triton.jit
def _tile_dkdv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, key_segment_ptr, starts_ptr, dk_ptr,
    dv_ptr, M, scale, scale2, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ORDERED: tl.constexpr, FAST: tl.constexpr,
    LONG: tl.constexpr, FOLDED: tl.constexpr, UNROLL: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_K keys of one key/value head, from one part of their segments' queries."""
    t, g, split = tl.program_id(0) * BLOCK_K, tl.program_id(1), tl.program_id(2)
    m, d = t + tl.arange(0, BLOCK_K), tl.arange(0, D)
    ok_m = m < M
    k = load_keys(k_ptr, order_ptr, m, M, g, G, D, ORDERED, False, LONG)  # [BLOCK_K, D]
    v = load_keys(v_ptr, order_ptr, m, M, g, G, D, ORDERED, False, LONG)  # [BLOCK_K, D]
    segment_of = tl.load(key_segment_ptr + m, ok_m, other=-1)  # [BLOCK_K]
    row = tl.load(order_ptr + m, ok_m, other=0) if ORDERED else m
    x = ((split.to(tl.int64) * M + row) * (G * D) + g * D)[:, None] + d[None, :]

    # Each segment that the tile has keys of, mostly one.
    last_segment = tl.load(key_segment_ptr + tl.minimum(t + BLOCK_K, M) - 1)
    for segment in range(tl.load(key_segment_ptr + t), last_segment + 1):
        # The part of the segment's queries that belongs to this split.
        start, end = tl.load(starts_ptr + segment), tl.load(starts_ptr + segment + 1)
        step = tl.cdiv(tl.cdiv(end - start, tl.num_programs(2)), BLOCK_Q) * BLOCK_Q
        start += split * step
        end = tl.minimum(start + step, end)

        # Whole steps without masks, then the rest.
        dk = tl.zeros([BLOCK_K, D], lse_ptr.dtype.element_ty)
        dv = dk
        full = start + tl.maximum(end - start, 0) // BLOCK_Q * BLOCK_Q if FAST else end
        for first in tl.range(start, full, BLOCK_Q, loop_unroll_factor=UNROLL):
            dk, dv = _add_queries(
                k, v, dk, dv, q_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, first, end, g, scale2, G,
                GROUP, D, BLOCK_Q, ORDERED, FAST, LONG, FOLDED, EMULATED,
            )  # fmt: skip
        if full < end:
            dk, dv = _add_queries(
                k, v, dk, dv, q_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, full, end, g, scale2, G,
                GROUP, D, BLOCK_Q, ORDERED, False, LONG, FOLDED, EMULATED,
            )  # fmt: skip
        inside = (segment_of == segment)[:, None]  # other rows hold arbitrary values
        tl.store(dk_ptr + x, dk * scale, inside)
        tl.store(dv_ptr + x, dv, inside)


@triton.jit(do_not_specialize=["M"])
def _segment_dkdv(
    q_ptr, k_ptr, scaled_ptr, v_ptr, do_ptr, weighted_ptr, lse_ptr, dot_ptr, flag_ptr, order_ptr,
    key_segment_ptr, starts_ptr, dk_ptr, dv_ptr, M, scale, scale2, G: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ORDERED: tl.constexpr, FAST: tl.constexpr, LONG: tl.constexpr, FOLD: tl.constexpr,
    UNROLL: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    if is_folded(flag_ptr, FOLD):
        _tile_dkdv(
            q_ptr, scaled_ptr, v_ptr, weighted_ptr, lse_ptr, dot_ptr, order_ptr, key_segment_ptr,
            starts_ptr, dk_ptr, dv_ptr, M, scale, 1.0, G, GROUP, D, BLOCK_Q, BLOCK_K, ORDERED, FAST,
            LONG, True, UNROLL, EMULATED,
        )  # fmt: skip
    else:
        _tile_dkdv(
            q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dot_ptr, order_ptr, key_segment_ptr, starts_ptr,
            dk_ptr, dv_ptr, M, scale, scale2, G, GROUP, D, BLOCK_Q, BLOCK_K, ORDERED, FAST, LONG,
            False, UNROLL, 0,
        )  # fmt: skip


def _splits(tiles: int, segments: Segments, N: int, programs: int) -> int:
    """Number of parts that each segment's queries are cut into, so that there are enough programs.

    It depends on sizes alone, so that sums do not depend on the GPU.
    """
    if segments.short:
        return max(1, min(programs // 4 // tiles, 8))
    return min(cdiv(programs, tiles), cdiv(N, 256))


def segment_dq(
    q_NHD: Tensor,
    keys: BranchKeys,
    v_MGD: Tensor,
    gradient: OutputGradient,
    segments: Segments,
    dq_NHD: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Return the gradient of the queries, [N, H, D] in their dtype.

    The arguments are those of `segment_backward`. `launch` None takes `segment_dq_launch`.
    """
    N, H, D = q_NHD.shape
    G = keys.k.shape[1]
    add = dq_NHD is not None
    dq_NHD = torch.empty_like(q_NHD) if dq_NHD is None else dq_NHD
    if N == 0:
        return dq_NHD
    launch = launch or segment_dq_launch(q_NHD, segments.short)
    BLOCK_Q = queries_per_tile(launch.rows, H // G)
    _segment_dq[(cdiv(N, BLOCK_Q), G)](
        q_NHD, *keys.plain_and_scaled, v_MGD, *gradient.tensors(segments.order), segments.order,
        segments.query_segment, segments.key_starts, dq_NHD, N, keys.scale, keys.scale * LOG2E, G,
        H // G, D, BLOCK_Q, launch.keys, ORDERED=segments.ordered, ADD=add,
        LONG=needs_long_offsets(q_NHD), FOLD=gradient.flag is not None, UNROLL=launch.unroll,
        EMULATED=launch.emulated, **launch.options,
    )  # fmt: skip
    return dq_NHD


def segment_dkdv(
    q_NHD: Tensor,
    keys: BranchKeys,
    v_MGD: Tensor,
    gradient: OutputGradient,
    segments: Segments,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of keys and values, fp32 [M, G, D].

    The arguments are those of `segment_backward`. `launch` None takes `segment_dkdv_launch`.
    """
    N, H, D = q_NHD.shape
    M, G, _ = keys.k.shape
    if N == 0:
        dk_MGD, dv_MGD = (v_MGD.new_zeros(M, G, D, dtype=torch.float32) for _ in range(2))
        return dk_MGD, dv_MGD
    launch = launch or segment_dkdv_launch(q_NHD, M, segments.short, segments.ordered)
    wide = q_NHD.dtype == torch.float32 or D == 128
    tiles = cdiv(M, launch.keys)
    splits = _splits(tiles * G, segments, N, launch.programs)
    dk_SMGD = q_NHD.new_empty(splits, M, G, D, dtype=torch.float32)
    dv_SMGD = torch.empty_like(dk_SMGD)
    _segment_dkdv[(tiles, G, splits)](
        q_NHD, *keys.plain_and_scaled, v_MGD, *gradient.tensors(segments.order), segments.order,
        segments.key_segment, segments.query_starts, dk_SMGD, dv_SMGD, M, keys.scale,
        keys.scale * LOG2E, G, H // G, D, queries_per_tile(launch.rows, H // G), launch.keys,
        ORDERED=segments.ordered, FAST=not wide, LONG=needs_long_offsets(q_NHD),
        FOLD=gradient.flag is not None, UNROLL=launch.unroll, EMULATED=launch.emulated,
        **launch.options,
    )  # fmt: skip
    if splits == 1:  # spares a copy
        return dk_SMGD[0], dv_SMGD[0]
    return dk_SMGD.sum(0), dv_SMGD.sum(0)


def segment_backward(
    q_NHD: Tensor,
    keys: BranchKeys,
    v_MGD: Tensor,
    gradient: OutputGradient,
    segments: Segments,
    dq_NHD: Tensor | None = None,
    launches: tuple[Launch | None, Launch | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values.

    Args:
        q_NHD: [N, H, D], contiguous.
        keys: Keys [M, G, D].
        v_MGD: [M, G, D], contiguous.
        gradient: Gradient of the branch's output.
        segments: Which queries attend to which keys.
        dq_NHD: [N, H, D]. If given, the gradient of the queries is added to it in place.
        launches: Launches of `segment_dq` and `segment_dkdv`.

    Returns:
        dq [N, H, D] in the dtype of `q_NHD`, dk and dv [M, G, D] in fp32.
    """
    inputs = (q_NHD, keys, v_MGD, gradient, segments)
    dq_NHD = segment_dq(*inputs, dq_NHD, launches[0])
    return dq_NHD, *segment_dkdv(*inputs, launches[1])
