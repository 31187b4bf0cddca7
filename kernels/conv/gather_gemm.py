"""Matrix products of gathered rows: every output row is a sum over taps of a source row times that tap's weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.runtime.autotune_cache import choose, size_class
from kernels.runtime.integer_math import cdiv, next_power_of_2
from kernels.runtime.triton_ops import add_dot, on_device


@dataclass(frozen=True)
class Taps:
    """Which source rows an output row sees, on grids of full blocks.

    Output voxel l of a block sees the source voxels stride * l + start + (0 ... taps - 1) on each axis; those outside
    the block are the neighbour's. With parities an output row has 8 results, one for each child, whose start is its
    parity - 1; without, start is -1.
    """

    size: int  # voxels a side of an output block
    source: int  # of a source block
    taps: int = 3
    stride: int = 1
    parities: bool = False

    @property
    def count(self) -> int:
        return self.taps**3

    def rows(self, blocks: int) -> int:
        return blocks * self.size**3


@functools.cache
def plain(size: int) -> Taps:
    """The 3^3 taps of a convolution, and of its transpose with the taps reversed."""
    return Taps(size, size)


@functools.cache
def upsampling(size: int) -> Taps:
    """A convolution after duplication, from blocks of (size / 2)^3 to blocks of size^3."""
    return Taps(size // 2, size // 2, taps=2, parities=True)


@functools.cache
def downsampling(size: int) -> Taps:
    """Its transpose, from blocks of size^3 to blocks of (size / 2)^3."""
    return Taps(size // 2, size, taps=4, stride=2)


@triton.jit
def places(row, S: tl.constexpr, STRIDE: tl.constexpr, SI: tl.constexpr):
    """Where rows of blocks of S^3 lie in a source block of SI^3: x, y, z in fields of 10 bits, SI added to each."""
    x, y, z = row // (S * S) % S, row // S % S, row % S
    return ((x * STRIDE + SI) << 20) + ((y * STRIDE + SI) << 10) + (z * STRIDE + SI)


@triton.jit
def tap_place(tap, T: tl.constexpr):
    """What a tap adds to a place."""
    return ((tap // (T * T)) << 20) + ((tap // T % T) << 10) + tap % T


@triton.jit
def source_rows(table_ptr, block27, place, ok, SI: tl.constexpr, LOG: tl.constexpr):
    """Source row of each place of each block, negative where there is none.

    A field's bits from LOG on say before (0), inside (1) or after (2) the block. One product with 9, 3, 1 turns the
    three of them into the neighbour's column, three shifts turn the others into a row.
    """
    side = (place >> LOG) & ((3 << 20) + (3 << 10) + 3)
    column = ((side * ((1 << 20) + (3 << 10) + 9)) >> 20) & 31
    block = tl.load(table_ptr + block27 + column, ok, other=-1)
    inside = place & (((SI - 1) << 20) + ((SI - 1) << 10) + SI - 1)
    local = ((inside >> (20 - 2 * LOG)) + (inside >> (10 - LOG)) + inside) & (SI * SI * SI - 1)
    return (block << (3 * LOG)) + local


@triton.jit(do_not_specialize=["rows"])
def _gather_gemm(
    x_ptr, w_ptr, b_ptr, table_ptr, y_ptr, rows, C: tl.constexpr, O: tl.constexpr,
    S: tl.constexpr, SI: tl.constexpr, LOG: tl.constexpr, T: tl.constexpr, STRIDE: tl.constexpr, PARITIES: tl.constexpr,
    BIAS: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (C + BC - 1) // BC
    OT: tl.constexpr = (O + BO - 1) // BO
    pid = tl.program_id(0)
    o = pid % OT * BO + tl.arange(0, BO)
    parity = pid // OT % 8 if PARITIES else 0
    row = pid // (OT * 8 if PARITIES else OT) * BM + tl.arange(0, BM)
    ok = row < rows
    block = row // (S * S * S)
    block27 = (block.to(tl.int64) if WIDE else block) * 27
    start = tap_place(parity, 2) if PARITIES else 0  # a parity's digits are those of a tap
    start -= (1 << 20) + (1 << 10) + 1
    place = places(row if S > 1 else 0, S, STRIDE, SI) + start
    acc = tl.zeros([BM, BO], tl.float64 if x_ptr.dtype.element_ty == tl.float32 else tl.float32)
    if (
        BIAS
    ):  # before the products: registers that held it until after them would cost a third program
        acc += tl.load(b_ptr + o, o < O, other=0.0)[None, :].to(acc.dtype)
    for k in range(T * T * T * CHUNKS):
        tap = k // CHUNKS
        c = k % CHUNKS * BC + tl.arange(0, BC)
        source = source_rows(table_ptr, block27, place + tap_place(tap, T), ok, SI, LOG)
        first = (source.to(tl.int64) if WIDE else source) * C
        x_mask = (source >= 0)[:, None] & (c < C)[None, :] if C % BC else (source >= 0)[:, None]
        x = tl.load(x_ptr + first[:, None] + c[None, :], x_mask, other=0.0)
        w = (parity * (T * T * T) + tap) * (C * O) + c[:, None] * O + o[None, :]
        if C % BC == 0 and O % BO == 0:
            w = tl.load(w_ptr + w)
        else:
            w = tl.load(w_ptr + w, (c < C)[:, None] & (o < O)[None, :], other=0.0)
        acc = add_dot(x, w, acc)
    if PARITIES:  # x, y, z of the child: 2 * x + parity's x, ...
        local = places(row, S, 2, 0) + tap_place(parity, 2)
        D: tl.constexpr = 2 * S
        row = (
            block * (D * D * D)
            + (local >> 20) * (D * D)
            + ((local >> 10) & 1023) * D
            + (local & 1023)
        )
    first = (row.to(tl.int64) if WIDE else row) * O
    y_mask = ok[:, None] & (o < O)[None, :] if O % BO else ok[:, None]
    tl.store(y_ptr + first[:, None] + o[None, :], acc.to(y_ptr.dtype.element_ty), y_mask)


@dataclass(frozen=True)
class Tiles:
    """Sizes of one program: rows, outputs, channels at a time; warps and stages of the pipeline."""

    rows: int
    outputs: int
    channels: int
    warps: int
    stages: int


def power_of_2(n: int, low: int, high: int) -> int:
    return min(max(next_power_of_2(n), low), high)


@functools.cache
def group_products(device: torch.device) -> bool:
    """Whether a product of matrices is one of four warps that read shared memory (Hopper, Blackwell of data centres).

    Elsewhere its factors pass through registers, beside the sums.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


@functools.cache
def forward_tiles(C: int, O: int, dtype: torch.dtype, group: bool) -> tuple[Tiles, ...]:
    """The default, then what else may be faster; `group` is that of `group_products`."""
    channels, outputs = power_of_2(C, 16, 64), power_of_2(O, 16, 128)
    if dtype == torch.float32:  # sums in fp64 take twice the registers
        return (Tiles(64, min(outputs, 64), min(channels, 32), 8, 2),)
    # Each of these is fastest for some layer of the VAE at 512 or 1024 on an H200.
    tiles = [Tiles(128, outputs, channels, 4, 2)]
    if group or outputs < 128:  # 128 registers of sums, the factors and three stages spill
        tiles += [Tiles(128, outputs, channels, 4, 3)]
    tiles += [Tiles(128, outputs, channels, 8, 3), Tiles(256, outputs, channels, 8, 2)]
    tiles += [Tiles(64, outputs, channels, 4, 3)]
    if C >= 128:
        tiles += [Tiles(64, outputs, 128, 4, 3)]
    return tuple(tiles)


def is_wide(*tensors: Tensor, force: bool = False) -> bool:
    """Whether an offset can pass 2^31."""
    return force or max(t.numel() for t in tensors) >= 2**31


def gather_gemm(
    x_NC: Tensor,
    weight: Tensor,
    bias_O: Tensor | None,
    table_M27: Tensor,
    taps: Taps,
    *,
    wide: bool = False,
) -> Tensor:
    """Sum over taps of source rows times weight [taps, C, O] or, with parities, [8, taps, C, O]; contiguous inputs.

    Results in x's dtype, rows of full blocks. `wide` forces 64-bit offsets.
    """
    rows, (C, O) = taps.rows(len(table_M27)), weight.shape[-2:]
    parities = 8 if taps.parities else 1
    y = x_NC.new_empty(rows * parities, O)
    if y.numel() == 0:
        return y
    wide = is_wide(x_NC, y, table_M27, force=wide)

    def launch(tiles: Tiles) -> None:
        grid = cdiv(rows, tiles.rows) * parities * cdiv(O, tiles.outputs)
        _gather_gemm[(grid,)](
            x_NC, weight, y if bias_O is None else bias_O, table_M27, y, rows, C, O,
            S=taps.size, SI=taps.source, LOG=taps.source.bit_length() - 1, T=taps.taps, STRIDE=taps.stride,
            PARITIES=taps.parities, BIAS=bias_O is not None, WIDE=wide,
            BM=tiles.rows, BO=tiles.outputs, BC=tiles.channels, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    key = ("gemm", taps.size, taps.source, taps.taps, C, O, x_NC.dtype, size_class(rows))
    with on_device(x_NC):
        candidates = forward_tiles(C, O, x_NC.dtype, group_products(x_NC.device))
        launch(choose(key, candidates, launch, x_NC, (_gather_gemm,)))
    return y
