"""Weight gradient of the sparse convolution: gathered rows, transposed, times the rows they belong to."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.conv import gather_gemm
from kernels.conv.gather_gemm import Taps, is_wide, places, power_of_2, source_rows, tap_place
from kernels.runtime.autotune_cache import choose, size_class
from kernels.runtime.integer_math import cdiv
from kernels.runtime.triton_ops import add_dot, on_device

_MAX_PARTIALS = 1 << 25  # fp32 entries of all partial sums, unless one of them is larger
_PROGRAMS = 132 * 8  # enough for every multiprocessor to have a few


@triton.jit(do_not_specialize=["rows", "step"])
def _weight_grad(
    g_ptr, d_ptr, table_ptr, p_ptr, rows, step, C: tl.constexpr, O: tl.constexpr,
    S: tl.constexpr, SI: tl.constexpr, LOG: tl.constexpr, T: tl.constexpr, STRIDE: tl.constexpr, WIDE: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    TAPS: tl.constexpr = T * T * T
    CT: tl.constexpr = (C + BC - 1) // BC
    OT: tl.constexpr = (O + BO - 1) // BO
    pid, split = tl.program_id(0), tl.program_id(1)
    o = pid % OT * BO + tl.arange(0, BO)
    c = pid // OT % CT * BC + tl.arange(0, BC)
    tap = pid // (OT * CT) * BT + (tl.arange(0, BT) if BT > 1 else 0)
    begin = split * step
    end = tl.minimum(begin + step, rows)
    acc = tl.zeros(
        [BT * BC, BO], tl.float64 if g_ptr.dtype.element_ty == tl.float32 else tl.float32
    )
    for first in range(begin, end, BR):
        row = first + tl.arange(0, BR)
        ok = row < end
        block = row // (S * S * S)
        block27 = (block.to(tl.int64) if WIDE else block) * 27
        place = places(row if S > 1 else 0, S, STRIDE, SI) - ((1 << 20) + (1 << 10) + 1)
        if BT > 1:
            if S > 1:
                place = place[:, None]
            place = place + tap_place(tap, T)[None, :]
            mask = ok[:, None] & (tap < TAPS)[None, :]
            source = source_rows(table_ptr, block27[:, None], place, mask, SI, LOG)
            g_first = (source.to(tl.int64) if WIDE else source) * C
            g_mask = (
                (source >= 0)[:, :, None] & (c < C)[None, None, :]
                if C % BC
                else (source >= 0)[:, :, None]
            )
            g = tl.load(g_ptr + g_first[:, :, None] + c[None, None, :], g_mask, other=0.0)
            g = tl.reshape(g, [BR, BT * BC])
        else:
            source = source_rows(table_ptr, block27, place + tap_place(tap, T), ok, SI, LOG)
            g_first = (source.to(tl.int64) if WIDE else source) * C
            g_mask = (source >= 0)[:, None] & (c < C)[None, :] if C % BC else (source >= 0)[:, None]
            g = tl.load(g_ptr + g_first[:, None] + c[None, :], g_mask, other=0.0)
        d_first = (row.to(tl.int64) if WIDE else row) * O
        d_mask = ok[:, None] & (o < O)[None, :] if O % BO else ok[:, None]
        d = tl.load(d_ptr + d_first[:, None] + o[None, :], d_mask, other=0.0)
        acc = add_dot(tl.trans(g), d, acc)
    tap = pid // (OT * CT) * BT + tl.arange(0, BT)
    out = tl.reshape(tap[:, None] * C + c[None, :], [BT * BC])
    inside = tl.reshape((tap < TAPS)[:, None] & (c < C)[None, :], [BT * BC])
    p_first = p_ptr + split.to(tl.int64) * (TAPS * C * O)
    tl.store(
        p_first + out[:, None] * O + o[None, :],
        acc.to(tl.float32),
        inside[:, None] & (o < O)[None, :],
    )


@triton.jit
def _tap_product(
    acc, d, g_ptr, table_ptr, block27, place, tap, ok, c, C: tl.constexpr, SI: tl.constexpr, LOG: tl.constexpr,
    T: tl.constexpr,    WIDE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    source = source_rows(
        table_ptr, block27, place + tap_place(tap, T), ok & (tap < T * T * T), SI, LOG
    )
    first = (source.to(tl.int64) if WIDE else source) * C
    mask = (source >= 0)[:, None] & (c < C)[None, :] if C % BC else (source >= 0)[:, None]
    g = tl.load(g_ptr + first[:, None] + c[None, :], mask, other=0.0)
    return add_dot(d, g, acc)


@triton.jit
def _store_tap(p_ptr, acc, tap, c, o, C: tl.constexpr, O: tl.constexpr, TAPS: tl.constexpr):
    mask = ((o < O) & (tap < TAPS))[:, None] & (c < C)[None, :]
    tl.store(p_ptr + tap * (C * O) + c[None, :] * O + o[:, None], acc.to(tl.float32), mask)


@triton.jit(do_not_specialize=["rows", "step"])
def _weight_grad_by_tap(
    g_ptr, d_ptr, table_ptr, p_ptr, rows, step, C: tl.constexpr, O: tl.constexpr,
    S: tl.constexpr, SI: tl.constexpr, LOG: tl.constexpr, T: tl.constexpr, STRIDE: tl.constexpr, WIDE: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """As `_weight_grad`, with a product for each of 1, 2 or 4 taps, which share the dense rows as their tall side."""
    TAPS: tl.constexpr = T * T * T
    CT: tl.constexpr = (C + BC - 1) // BC
    OT: tl.constexpr = (O + BO - 1) // BO
    pid, split = tl.program_id(0), tl.program_id(1)
    o = pid % OT * BO + tl.arange(0, BO)
    c = pid // OT % CT * BC + tl.arange(0, BC)
    tap = pid // (OT * CT) * BT
    begin = split * step
    end = tl.minimum(begin + step, rows)
    acc0 = tl.zeros([BO, BC], tl.float64 if g_ptr.dtype.element_ty == tl.float32 else tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for first in range(begin, end, BR):
        row = first + tl.arange(0, BR)
        ok = row < end
        block = row // (S * S * S)
        block27 = (block.to(tl.int64) if WIDE else block) * 27
        place = places(row if S > 1 else 0, S, STRIDE, SI) - ((1 << 20) + (1 << 10) + 1)
        d_first = (row.to(tl.int64) if WIDE else row) * O
        d_mask = ok[:, None] & (o < O)[None, :] if O % BO else ok[:, None]
        d = tl.trans(tl.load(d_ptr + d_first[:, None] + o[None, :], d_mask, other=0.0))
        acc0 = _tap_product(
            acc0, d, g_ptr, table_ptr, block27, place, tap, ok, c, C, SI, LOG, T, WIDE, BC
        )
        if BT > 1:
            acc1 = _tap_product(
                acc1, d, g_ptr, table_ptr, block27, place, tap + 1, ok, c, C, SI, LOG, T, WIDE, BC
            )
        if BT > 2:
            acc2 = _tap_product(
                acc2, d, g_ptr, table_ptr, block27, place, tap + 2, ok, c, C, SI, LOG, T, WIDE, BC
            )
            acc3 = _tap_product(
                acc3, d, g_ptr, table_ptr, block27, place, tap + 3, ok, c, C, SI, LOG, T, WIDE, BC
            )
    p_first = p_ptr + split.to(tl.int64) * (TAPS * C * O)
    _store_tap(p_first, acc0, tap, c, o, C, O, TAPS)
    if BT > 1:
        _store_tap(p_first, acc1, tap + 1, c, o, C, O, TAPS)
    if BT > 2:
        _store_tap(p_first, acc2, tap + 2, c, o, C, O, TAPS)
        _store_tap(p_first, acc3, tap + 3, c, o, C, O, TAPS)


@dataclass(frozen=True)
class GradTiles:
    """Sizes of one program: taps, channels and outputs of its part of the gradient, rows at a time."""

    taps: int
    channels: int
    outputs: int
    rows: int
    warps: int
    stages: int
    by_tap: bool = False  # `_weight_grad_by_tap`


@functools.cache
def grad_tiles(C: int, O: int, dtype: torch.dtype, group: bool) -> tuple[GradTiles, ...]:
    """The default, then what else may be faster; `group` is that of `group_products`."""
    if dtype == torch.float32:
        channels, outputs = power_of_2(C, 16, 64), power_of_2(O, 16, 64)
        return (GradTiles(64 // channels, channels, outputs, 32, 4, 2),)
    channels, outputs = power_of_2(C, 16, 128), power_of_2(O, 16, 128)
    taps = 128 // channels
    if outputs < 64:  # too low for a Hopper matrix product: the taps side by side are the tall side
        tiles = [GradTiles(taps, channels, outputs, 128, warps, 2) for warps in (4, 8)]
        return (*tiles, GradTiles(2 * taps, channels, outputs, 64, 4, 2))
    taps, stages = min(taps, 4), 3 if outputs == 128 else 2
    warps = 4 if group or outputs < 128 else 8  # 128 registers of sums and the factors spill
    tiles = [GradTiles(taps, channels, outputs, 64, warps, s, True) for s in (stages, 5 - stages)]
    if outputs < 128:  # 128 rows of 256 numbers, twice, leave room for one program
        tiles += [GradTiles(taps, channels, outputs, 128, warps, 2, True)]
    return (*tiles, GradTiles(taps, channels, outputs, 32, warps, 4, True))


KERNELS = (_weight_grad, _weight_grad_by_tap)


def weight_grad(
    gathered: Tensor,
    dense: Tensor,
    table_M27: Tensor,
    taps: Taps,
    *,
    wide: bool = False,
    splits: int | None = None,
) -> Tensor:
    """Sum over rows of gathered source row x dense row: fp32 [taps, C, O] of [.., C] and [rows, O], contiguous.

    Rows are cut into splits whose sums are added in order: the same bits every time.
    """
    rows, C, O = len(dense), gathered.shape[1], dense.shape[1]
    size = taps.count * C * O
    if rows == 0 or size == 0:
        return dense.new_zeros(taps.count, C, O, dtype=torch.float32)
    wide = is_wide(gathered, dense, table_M27, force=wide)

    def partials(tiles: GradTiles) -> Tensor:
        parts = (
            cdiv(n, b)
            for n, b in ((taps.count, tiles.taps), (C, tiles.channels), (O, tiles.outputs))
        )
        programs = 1
        for part in parts:
            programs *= part
        count = splits or max(
            1, min(_PROGRAMS // programs, _MAX_PARTIALS // size, cdiv(rows, 8 * tiles.rows))
        )
        step = cdiv(cdiv(rows, count), tiles.rows) * tiles.rows
        count = cdiv(rows, step)
        partial = dense.new_empty(count, taps.count, C, O, dtype=torch.float32)
        kernel = _weight_grad_by_tap if tiles.by_tap else _weight_grad
        kernel[(programs, count)](
            gathered, dense, table_M27, partial, rows, step, C, O,
            S=taps.size, SI=taps.source, LOG=taps.source.bit_length() - 1, T=taps.taps, STRIDE=taps.stride, WIDE=wide,
            BT=tiles.taps, BC=tiles.channels, BO=tiles.outputs, BR=tiles.rows,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return partial

    key = ("weights", taps.size, taps.source, taps.taps, C, O, dense.dtype, size_class(rows))
    with on_device(dense):
        candidates = grad_tiles(C, O, dense.dtype, gather_gemm.group_products(dense.device))
        tiles = choose(key, candidates, partials, dense, KERNELS)
        return partials(tiles).sum(0)
