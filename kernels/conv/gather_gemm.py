"""Matrix products of gathered rows: an output row sums source rows times the weights of their taps.

This is the forward of the sparse convolution and the gradient of its input. The definition is
`sparse_conv` in kernels.conv.reference.

A position inside a block is packed into one integer: x, y and z take 10 bits each.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.runtime.autotune_cache import choose, size_class
from kernels.runtime.integer_math import cdiv, next_power_of_2
from kernels.runtime.triton_ops import add_dot, needs_long_offsets, on_device


@dataclass(frozen=True)
class Taps:
    """Which source rows an output row sees, on grids of full blocks.

    On each axis, output voxel l of a block sees `taps` source voxels from stride * l + start on.
    Voxels outside the source block belong to a neighbour block. Without parities start is -1. With
    parities an output row has 8 results, one per child, and start is the child's parity - 1.
    """

    size: int
    """Voxels per side of an output block."""

    source: int
    """Voxels per side of a source block."""

    taps: int = 3
    """Taps per axis."""

    stride: int = 1
    parities: bool = False

    @property
    def count(self) -> int:
        """Number of taps."""
        return self.taps**3

    def rows(self, blocks: int) -> int:
        """Return the number of output rows of that many blocks, without parities."""
        return blocks * self.size**3


@functools.cache
def plain_taps(size: int) -> Taps:
    """Return the 3^3 taps of a convolution, or of its transpose with the taps reversed."""
    return Taps(size, size)


@functools.cache
def upsampling_taps(size: int) -> Taps:
    """Return the taps after duplication, from blocks of (size / 2)^3 to blocks of size^3."""
    return Taps(size // 2, size // 2, taps=2, parities=True)


@functools.cache
def downsampling_taps(size: int) -> Taps:
    """Return the taps of the transpose of `upsampling_taps`, from size^3 to (size / 2)^3."""
    return Taps(size // 2, size, taps=4, stride=2)


@triton.jit
def zero_sums(x_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros [ROWS, COLUMNS] to sum products of what x_ptr points to: fp64 for fp32, else fp32."""
    return tl.zeros(
        [ROWS, COLUMNS], tl.float64 if x_ptr.dtype.element_ty == tl.float32 else tl.float32
    )


@triton.jit
def row_positions(row, S: tl.constexpr, STRIDE: tl.constexpr, SI: tl.constexpr):
    """Packed positions of rows of blocks of S^3 voxels in a source block of SI^3, plus SI per axis.

    The added SI keeps positions before the block positive.
    """
    x, y, z = row // (S * S) % S, row // S % S, row % S
    return ((x * STRIDE + SI) << 20) + ((y * STRIDE + SI) << 10) + (z * STRIDE + SI)


@triton.jit
def tap_offset(tap, T: tl.constexpr):
    """Difference that a tap makes to a packed position."""
    return ((tap // (T * T)) << 20) + ((tap // T % T) << 10) + tap % T


@triton.jit
def source_rows(table_ptr, block27, position, ok, SI: tl.constexpr, LOG: tl.constexpr):
    """Source row of each position of each block, negative where there is none.

    The bits of an axis from LOG on say whether the position is before (0), inside (1) or after (2)
    the block. One product with 9, 3, 1 turns the three of them into the neighbour's column, and
    three shifts turn the lower bits into a row.
    """
    side = (position >> LOG) & ((3 << 20) + (3 << 10) + 3)
    column = ((side * ((1 << 20) + (3 << 10) + 9)) >> 20) & 31
    block = tl.load(table_ptr + block27 + column, ok, other=-1)
    inside = position & (((SI - 1) << 20) + ((SI - 1) << 10) + SI - 1)
    local = ((inside >> (20 - 2 * LOG)) + (inside >> (10 - LOG)) + inside) & (SI * SI * SI - 1)
    return (block << (3 * LOG)) + local


@triton.jit
def load_source(x_ptr, source, c, C: tl.constexpr, BLOCK_C: tl.constexpr, LONG: tl.constexpr):
    """Channels c of the source rows, zero where a row is negative: [rows, BLOCK_C]."""
    first = (source.to(tl.int64) if LONG else source) * C
    mask = (source >= 0)[:, None] & (c < C)[None, :] if C % BLOCK_C else (source >= 0)[:, None]
    return tl.load(x_ptr + first[:, None] + c[None, :], mask, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def _gather_gemm(
    x_ptr, w_ptr, b_ptr, table_ptr, y_ptr, rows, C: tl.constexpr, O: tl.constexpr, S: tl.constexpr,
    SI: tl.constexpr, LOG: tl.constexpr, T: tl.constexpr, STRIDE: tl.constexpr,
    PARITIES: tl.constexpr, BIAS: tl.constexpr, LONG: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One program: BLOCK_O outputs of BLOCK_M rows, for one parity.
    CHUNKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    OT: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O
    pid = tl.program_id(0)
    o = pid % OT * BLOCK_O + tl.arange(0, BLOCK_O)
    parity = pid // OT % 8 if PARITIES else 0
    row = pid // (OT * 8 if PARITIES else OT) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = row < rows
    block = row // (S * S * S)
    block27 = (block.to(tl.int64) if LONG else block) * 27

    # Position of the first tap. A parity has the same digits as a tap of 2^3.
    start = tap_offset(parity, 2) if PARITIES else 0
    start -= (1 << 20) + (1 << 10) + 1
    position = row_positions(row if S > 1 else 0, S, STRIDE, SI) + start

    # The bias comes first: registers that held it until after the products would cost a third
    # program per multiprocessor.
    acc = zero_sums(x_ptr, BLOCK_M, BLOCK_O)
    if BIAS:
        acc += tl.load(b_ptr + o, o < O, other=0.0)[None, :].to(acc.dtype)

    # Each tap, BLOCK_C channels at a time.
    for k in range(T * T * T * CHUNKS):
        tap = k // CHUNKS
        c = k % CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)
        source = source_rows(table_ptr, block27, position + tap_offset(tap, T), ok, SI, LOG)
        x = load_source(x_ptr, source, c, C, BLOCK_C, LONG)  # [BLOCK_M, BLOCK_C]
        w = (parity * (T * T * T) + tap) * (C * O) + c[:, None] * O + o[None, :]
        if C % BLOCK_C == 0 and O % BLOCK_O == 0:
            w = tl.load(w_ptr + w)  # [BLOCK_C, BLOCK_O]
        else:
            w = tl.load(w_ptr + w, (c < C)[:, None] & (o < O)[None, :], other=0.0)
        acc = add_dot(x, w, acc)

    # With parities a result belongs to a child: 2 * x + parity's x, and so on.
    if PARITIES:
        local = row_positions(row, S, 2, 0) + tap_offset(parity, 2)
        D: tl.constexpr = 2 * S
        row = (
            block * (D * D * D)
            + (local >> 20) * (D * D)
            + ((local >> 10) & 1023) * D
            + (local & 1023)
        )
    first = (row.to(tl.int64) if LONG else row) * O
    y_mask = ok[:, None] & (o < O)[None, :] if O % BLOCK_O else ok[:, None]
    tl.store(y_ptr + first[:, None] + o[None, :], acc.to(y_ptr.dtype.element_ty), y_mask)


@dataclass(frozen=True)
class TileSizes:
    """Sizes of one program: rows, outputs and channels at a time; warps and pipeline stages."""

    rows: int
    outputs: int
    channels: int
    warps: int
    stages: int


def power_of_2(n: int, low: int, high: int) -> int:
    """Return n rounded up to a power of two, between `low` and `high`."""
    return min(max(next_power_of_2(n), low), high)


@functools.cache
def has_warpgroup_products(device: torch.device) -> bool:
    """Return True if four warps share a matrix product that reads shared memory.

    This holds for Hopper and for Blackwell of data centres. Elsewhere the factors pass through
    registers, beside the sums.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


@functools.cache
def forward_tiles(C: int, O: int, dtype: torch.dtype, warpgroup: bool) -> tuple[TileSizes, ...]:
    """Return the default tile sizes, then others that may be faster.

    Each of them is fastest for some layer of the VAE at 512 or 1024 on an H200. `warpgroup` is the
    result of `has_warpgroup_products`.
    """
    channels, outputs = power_of_2(C, 16, 64), power_of_2(O, 16, 128)
    if dtype == torch.float32:  # sums in fp64 take twice the registers
        return (TileSizes(64, min(outputs, 64), min(channels, 32), 8, 2),)
    tiles = [TileSizes(128, outputs, channels, 4, 2)]
    # 128 registers of sums, the factors and three stages would spill.
    if warpgroup or outputs < 128:
        tiles += [TileSizes(128, outputs, channels, 4, 3)]
    tiles += [TileSizes(128, outputs, channels, 8, 3), TileSizes(256, outputs, channels, 8, 2)]
    tiles += [TileSizes(64, outputs, channels, 4, 3)]
    if C >= 128:
        tiles += [TileSizes(64, outputs, 128, 4, 3)]
    return tuple(tiles)


def gather_gemm(
    x_NC: Tensor,
    weight: Tensor,
    bias_O: Tensor | None,
    table_M27: Tensor,
    taps: Taps,
    *,
    long_offsets: bool = False,
) -> Tensor:
    """Return the sum over taps of source rows times weights, plus the bias.

    Args:
        x_NC: Source rows of full blocks, contiguous.
        weight: [taps, C, O], or [8, taps, C, O] with parities, contiguous.
        bias_O: [O] or None.
        table_M27: int32 neighbour table of the M blocks, contiguous.
        taps: Which source rows an output row sees.
        long_offsets: Force 64-bit offsets.

    Returns:
        [rows, O] in the dtype of `x_NC`, rows of full blocks.
    """
    rows = taps.rows(len(table_M27))
    C, O = weight.shape[-2:]
    parities = 8 if taps.parities else 1
    y = x_NC.new_empty(rows * parities, O)
    if y.numel() == 0:
        return y
    long_offsets = long_offsets or needs_long_offsets(x_NC, y, table_M27)

    def launch(tiles: TileSizes) -> None:
        grid = cdiv(rows, tiles.rows) * parities * cdiv(O, tiles.outputs)
        _gather_gemm[(grid,)](
            x_NC, weight, y if bias_O is None else bias_O, table_M27, y, rows, C, O,
            S=taps.size, SI=taps.source, LOG=taps.source.bit_length() - 1, T=taps.taps,
            STRIDE=taps.stride, PARITIES=taps.parities, BIAS=bias_O is not None, LONG=long_offsets,
            BLOCK_M=tiles.rows, BLOCK_O=tiles.outputs, BLOCK_C=tiles.channels,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    key = ("gemm", taps.size, taps.source, taps.taps, C, O, x_NC.dtype, size_class(rows))
    with on_device(x_NC):
        warpgroup = has_warpgroup_products(x_NC.device)
        candidates = forward_tiles(C, O, x_NC.dtype, warpgroup)
        launch(choose(key, candidates, launch, x_NC, (_gather_gemm,)))
    return y
