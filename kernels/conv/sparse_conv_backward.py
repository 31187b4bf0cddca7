"""Weight gradient of the sparse convolution: gathered rows, transposed, times their output rows.

The definition is the gradient of `sparse_conv` in kernels.conv.reference.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.conv.gather_gemm import (
    Taps,
    has_warpgroup_products,
    load_source,
    power_of_2,
    row_positions,
    source_rows,
    tap_offset,
    zero_sums,
)
from kernels.runtime.autotune_cache import choose, size_class
from kernels.runtime.integer_math import cdiv
from kernels.runtime.triton_ops import add_dot, needs_long_offsets, on_device

_MAX_PARTIALS = 1 << 25  # fp32 elements of all partial sums, unless one of them is larger
_PROGRAMS = 132 * 8  # enough for every multiprocessor to have a few


@triton.jit
def _gradient_tile(
    rows, step, C: tl.constexpr, O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Outputs, channels and first tap of this program, and its part of the rows: begin and end."""
    CT: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    OT: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O
    pid = tl.program_id(0)
    o = pid % OT * BLOCK_O + tl.arange(0, BLOCK_O)
    c = pid // OT % CT * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = pid // (OT * CT) * BLOCK_T
    begin = tl.program_id(1) * step
    return o, c, tap, begin, tl.minimum(begin + step, rows)


@triton.jit
def _locate_rows(
    first, end, S: tl.constexpr, SI: tl.constexpr, STRIDE: tl.constexpr, LONG: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Rows first..first + BLOCK_R, and whether they lie before `end`.

    Also returns the offset of their blocks in the neighbour table, and the packed position of their
    first tap.
    """
    row = first + tl.arange(0, BLOCK_R)
    ok = row < end
    block = row // (S * S * S)
    block27 = (block.to(tl.int64) if LONG else block) * 27
    position = row_positions(row if S > 1 else 0, S, STRIDE, SI) - ((1 << 20) + (1 << 10) + 1)
    return row, ok, block27, position


@triton.jit
def _load_outputs(d_ptr, row, ok, o, O: tl.constexpr, BLOCK_O: tl.constexpr, LONG: tl.constexpr):
    """Outputs o of the rows: [BLOCK_R, BLOCK_O]."""
    first = (row.to(tl.int64) if LONG else row) * O
    mask = ok[:, None] & (o < O)[None, :] if O % BLOCK_O else ok[:, None]
    return tl.load(d_ptr + first[:, None] + o[None, :], mask, other=0.0)


@triton.jit(do_not_specialize=["rows", "step"])
def _weight_grad(
    g_ptr, d_ptr, table_ptr, p_ptr, rows, step, C: tl.constexpr, O: tl.constexpr, S: tl.constexpr,
    SI: tl.constexpr, LOG: tl.constexpr, T: tl.constexpr, STRIDE: tl.constexpr, LONG: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # One program: BLOCK_T taps side by side, BLOCK_C channels and BLOCK_O outputs, from one part of
    # the rows.
    TAPS: tl.constexpr = T * T * T
    o, c, first_tap, begin, end = _gradient_tile(  # pyright: ignore[reportGeneralTypeIssues]
        rows, step, C, O, BLOCK_T, BLOCK_C, BLOCK_O
    )
    tap = first_tap + (tl.arange(0, BLOCK_T) if BLOCK_T > 1 else 0)
    acc = zero_sums(g_ptr, BLOCK_T * BLOCK_C, BLOCK_O)
    for first in range(begin, end, BLOCK_R):
        row, ok, block27, position = _locate_rows(  # pyright: ignore[reportGeneralTypeIssues]
            first, end, S, SI, STRIDE, LONG, BLOCK_R
        )
        # Gathered rows of all taps: [BLOCK_R, BLOCK_T * BLOCK_C].
        if BLOCK_T > 1:
            if S > 1:
                position = position[:, None]
            position = position + tap_offset(tap, T)[None, :]
            mask = ok[:, None] & (tap < TAPS)[None, :]
            source = source_rows(table_ptr, block27[:, None], position, mask, SI, LOG)
            g_first = (source.to(tl.int64) if LONG else source) * C
            g_mask = (source >= 0)[:, :, None]
            if C % BLOCK_C:
                g_mask = (source >= 0)[:, :, None] & (c < C)[None, None, :]
            g = tl.load(g_ptr + g_first[:, :, None] + c[None, None, :], g_mask, other=0.0)
            g = tl.reshape(g, [BLOCK_R, BLOCK_T * BLOCK_C])
        else:
            source = source_rows(table_ptr, block27, position + tap_offset(tap, T), ok, SI, LOG)
            g = load_source(g_ptr, source, c, C, BLOCK_C, LONG)
        d = _load_outputs(d_ptr, row, ok, o, O, BLOCK_O, LONG)  # [BLOCK_R, BLOCK_O]
        acc = add_dot(tl.trans(g), d, acc)

    # Store the partial sum of this part of the rows.
    tap = first_tap + tl.arange(0, BLOCK_T)
    out = tl.reshape(tap[:, None] * C + c[None, :], [BLOCK_T * BLOCK_C])
    inside = tl.reshape((tap < TAPS)[:, None] & (c < C)[None, :], [BLOCK_T * BLOCK_C])
    x_ptr = p_ptr + tl.program_id(1).to(tl.int64) * (TAPS * C * O) + out[:, None] * O + o[None, :]
    tl.store(x_ptr, acc.to(tl.float32), inside[:, None] & (o < O)[None, :])


@triton.jit
def _add_tap(
    acc, d, g_ptr, table_ptr, block27, position, tap, ok, c, C: tl.constexpr, SI: tl.constexpr,
    LOG: tl.constexpr, T: tl.constexpr, LONG: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_O, BLOCK_C] + d g for one tap, with d [BLOCK_O, BLOCK_R]."""
    exists = ok & (tap < T * T * T)
    source = source_rows(table_ptr, block27, position + tap_offset(tap, T), exists, SI, LOG)
    g = load_source(g_ptr, source, c, C, BLOCK_C, LONG)  # [BLOCK_R, BLOCK_C]
    return add_dot(d, g, acc)


@triton.jit
def _store_tap(p_ptr, acc, tap, c, o, C: tl.constexpr, O: tl.constexpr, TAPS: tl.constexpr):
    """Store the partial sum of one tap."""
    mask = ((o < O) & (tap < TAPS))[:, None] & (c < C)[None, :]
    tl.store(p_ptr + tap * (C * O) + c[None, :] * O + o[:, None], acc.to(tl.float32), mask)


@triton.jit(do_not_specialize=["rows", "step"])
def _weight_grad_by_tap(
    g_ptr, d_ptr, table_ptr, p_ptr, rows, step, C: tl.constexpr, O: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
    S: tl.constexpr, SI: tl.constexpr, LOG: tl.constexpr, T: tl.constexpr, STRIDE: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """The same result as `_weight_grad`, with a matrix product for each of 1, 2 or 4 taps.

    The products share the output rows as their tall side.
    """
    o, c, tap, begin, end = _gradient_tile(  # pyright: ignore[reportGeneralTypeIssues]
        rows, step, C, O, BLOCK_T, BLOCK_C, BLOCK_O
    )
    TAPS: tl.constexpr = T * T * T

    # Sums of up to four taps. Triton has no arrays of tensors.
    acc0 = zero_sums(g_ptr, BLOCK_O, BLOCK_C)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for first in range(begin, end, BLOCK_R):
        row, ok, block27, position = _locate_rows(  # pyright: ignore[reportGeneralTypeIssues]
            first, end, S, SI, STRIDE, LONG, BLOCK_R
        )
        d = tl.trans(_load_outputs(d_ptr, row, ok, o, O, BLOCK_O, LONG))  # [BLOCK_O, BLOCK_R]
        acc0 = _add_tap(
            acc0, d, g_ptr, table_ptr, block27, position, tap, ok, c, C, SI, LOG, T, LONG, BLOCK_C
        )  # fmt: skip
        if BLOCK_T > 1:
            acc1 = _add_tap(
                acc1, d, g_ptr, table_ptr, block27, position, tap + 1, ok, c, C, SI, LOG, T, LONG,
                BLOCK_C,
            )  # fmt: skip
        if BLOCK_T > 2:
            acc2 = _add_tap(
                acc2, d, g_ptr, table_ptr, block27, position, tap + 2, ok, c, C, SI, LOG, T, LONG,
                BLOCK_C,
            )  # fmt: skip
            acc3 = _add_tap(
                acc3, d, g_ptr, table_ptr, block27, position, tap + 3, ok, c, C, SI, LOG, T, LONG,
                BLOCK_C,
            )  # fmt: skip

    # Store the partial sums of this part of the rows.
    p_first = p_ptr + tl.program_id(1).to(tl.int64) * (TAPS * C * O)
    _store_tap(p_first, acc0, tap, c, o, C, O, TAPS)
    if BLOCK_T > 1:
        _store_tap(p_first, acc1, tap + 1, c, o, C, O, TAPS)
    if BLOCK_T > 2:
        _store_tap(p_first, acc2, tap + 2, c, o, C, O, TAPS)
        _store_tap(p_first, acc3, tap + 3, c, o, C, O, TAPS)


@dataclass(frozen=True)
class GradTileSizes:
    """Sizes of one program: its part of the gradient, rows at a time, warps and pipeline stages."""

    taps: int
    channels: int
    outputs: int
    rows: int
    warps: int
    stages: int
    by_tap: bool = False
    """Whether the kernel is `_weight_grad_by_tap`."""


@functools.cache
def grad_tiles(C: int, O: int, dtype: torch.dtype, warpgroup: bool) -> tuple[GradTileSizes, ...]:
    """Return the default tile sizes, then others that may be faster.

    `warpgroup` is the result of `has_warpgroup_products`.
    """
    if dtype == torch.float32:
        channels, outputs = power_of_2(C, 16, 64), power_of_2(O, 16, 64)
        return (GradTileSizes(64 // channels, channels, outputs, 32, 4, 2),)
    channels, outputs = power_of_2(C, 16, 128), power_of_2(O, 16, 128)
    taps = 128 // channels
    # Too few outputs for a Hopper matrix product: the taps side by side are the tall side.
    if outputs < 64:
        tiles = [GradTileSizes(taps, channels, outputs, 128, warps, 2) for warps in (4, 8)]
        return (*tiles, GradTileSizes(2 * taps, channels, outputs, 64, 4, 2))
    taps, stages = min(taps, 4), 3 if outputs == 128 else 2
    # Without warpgroup products, 128 registers of sums and the factors would spill in four warps.
    warps = 4 if warpgroup or outputs < 128 else 8
    tiles = [
        GradTileSizes(taps, channels, outputs, 64, warps, s, True) for s in (stages, 5 - stages)
    ]
    # 128 rows of 256 numbers, twice, leave room for one program.
    if outputs < 128:
        tiles += [GradTileSizes(taps, channels, outputs, 128, warps, 2, True)]
    return (*tiles, GradTileSizes(taps, channels, outputs, 32, warps, 4, True))


KERNELS = (_weight_grad, _weight_grad_by_tap)


def weight_grad(
    gathered: Tensor,
    dense: Tensor,
    table_M27: Tensor,
    taps: Taps,
    *,
    splits: int | None = None,
    long_offsets: bool = False,
) -> Tensor:
    """Return the sum over rows of gathered source rows times dense rows.

    Rows are cut into parts whose sums are added in order, so that results are bit-identical from
    run to run.

    Args:
        gathered: [source rows, C], contiguous.
        dense: [rows, O], contiguous.
        table_M27: int32 neighbour table of the M blocks, contiguous.
        taps: Which source rows a dense row sees.
        splits: Number of parts. None chooses it by the size.
        long_offsets: Force 64-bit offsets.

    Returns:
        fp32 [taps, C, O].
    """
    rows = len(dense)
    C, O = gathered.shape[1], dense.shape[1]
    size = taps.count * C * O
    if rows == 0 or size == 0:
        return dense.new_zeros(taps.count, C, O, dtype=torch.float32)
    long_offsets = long_offsets or needs_long_offsets(gathered, dense, table_M27)

    def partial_sums(tiles: GradTileSizes) -> Tensor:
        sizes = ((taps.count, tiles.taps), (C, tiles.channels), (O, tiles.outputs))
        programs = math.prod(cdiv(n, tile) for n, tile in sizes)
        # Enough parts to occupy the GPU, but not more memory or shorter parts than is useful.
        count = splits or max(
            1, min(_PROGRAMS // programs, _MAX_PARTIALS // size, cdiv(rows, 8 * tiles.rows))
        )
        step = cdiv(cdiv(rows, count), tiles.rows) * tiles.rows
        count = cdiv(rows, step)
        partial = dense.new_empty(count, taps.count, C, O, dtype=torch.float32)
        kernel = _weight_grad_by_tap if tiles.by_tap else _weight_grad
        kernel[(programs, count)](
            gathered, dense, table_M27, partial, rows, step, C, O,
            S=taps.size, SI=taps.source, LOG=taps.source.bit_length() - 1, T=taps.taps,
            STRIDE=taps.stride, LONG=long_offsets, BLOCK_T=tiles.taps, BLOCK_C=tiles.channels,
            BLOCK_O=tiles.outputs, BLOCK_R=tiles.rows, num_warps=tiles.warps,
            num_stages=tiles.stages,
        )  # fmt: skip
        return partial

    key = ("weights", taps.size, taps.source, taps.taps, C, O, dense.dtype, size_class(rows))
    with on_device(dense):
        candidates = grad_tiles(C, O, dense.dtype, has_warpgroup_products(dense.device))
        tiles = choose(key, candidates, partial_sums, dense, KERNELS)
        return partial_sums(tiles).sum(0)
