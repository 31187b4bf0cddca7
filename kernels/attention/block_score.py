"""Probability that compressed attention gives to each block, summed over the heads of a group.

The definition is `block_scores` in kernels.attention.reference. No [N, compressed tokens] tensor is
made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.block_index import TILE_BLOCKS, TILE_COMPRESSED, BlockIndex
from kernels.attention.packed_heads import load_keys
from kernels.attention.softmax import LOG2E, products
from kernels.runtime.integer_math import cdiv
from kernels.runtime.triton_ops import register_limit


@triton.jit(do_not_specialize=["first_token", "last_token", "columns"])
def _block_score(
    q_ptr, ck_ptr, lse_ptr, tile_ptr, block_compressed_ptr, compressed_block_ptr, block_asset_ptr,
    asset_blocks_ptr, token_starts_ptr, score_ptr, first_token, last_token, columns, scale2,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # One program: BLOCK_N queries and the at most BLOCK_B blocks of one tile, for one key/value
    # head.
    tile, g = tl.program_id(0), tl.program_id(2)
    b0, b1 = tl.load(tile_ptr + tile), tl.load(tile_ptr + tile + 1)
    asset = tl.load(block_asset_ptr + b0)
    first = tl.maximum(tl.load(token_starts_ptr + asset), first_token) + tl.program_id(1) * BLOCK_N
    last = tl.minimum(tl.load(token_starts_ptr + asset + 1), last_token)
    if first < last:
        n, d, bb = first + tl.arange(0, BLOCK_N), tl.arange(0, D), tl.arange(0, BLOCK_B)
        ok = n < last
        row = n.to(tl.int64) * (G * GROUP) + g * GROUP
        acc = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
        end = tl.load(block_compressed_ptr + b1)

        # BLOCK_P compressed tokens at a time: once, unless a block has more of them.
        for t in range(tl.load(block_compressed_ptr + b0), end, BLOCK_P):
            # Probabilities of the compressed tokens, summed over the heads.
            m = t + tl.arange(0, BLOCK_P)
            k = load_keys(ck_ptr, ck_ptr, m, end, g, G, D, False, False, True)  # [BLOCK_P, D]
            p = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
            for h in range(GROUP):
                x_ptr = q_ptr + (row + h)[:, None] * D + d[None, :]
                q = tl.load(x_ptr, ok[:, None], other=0.0)  # [BLOCK_N, D]
                lse = tl.load(lse_ptr + row + h, ok, other=float("inf"))  # [BLOCK_N]
                p += tl.exp2(products(q, k) * scale2 - lse[:, None]).to(tl.float32)
            p = tl.where((m < end)[None, :], p, 0.0)

            # Sum them by block: a product with the membership matrix. The two products of 16-bit
            # floats keep 16 bits of the sum.
            block = tl.load(compressed_block_ptr + m, m < end, other=-1) - b0  # [BLOCK_P]
            member = (block[:, None] == bb[None, :]).to(q_ptr.dtype.element_ty)
            high = p.to(member.dtype)
            low = (p - high.to(tl.float32)).to(member.dtype)
            acc = tl.dot(high, member, acc, input_precision="ieee")
            acc = tl.dot(low, member, acc, input_precision="ieee")

        # Blocks are counted from the asset's first.
        column = b0 - tl.load(asset_blocks_ptr + asset) + bb
        line = g.to(tl.int64) * (last_token - first_token) + n - first_token
        x = line[:, None] * columns + column[None, :]
        tl.store(score_ptr + x, acc, ok[:, None] & (b0 + bb < b1)[None, :])


def block_score(
    q_NHD: Tensor,
    ck_PGD: Tensor,
    lse_NH: Tensor,
    index: BlockIndex,
    scale: float,
    first: int = 0,
    last: int = -1,
) -> Tensor:
    """Return the block scores of tokens first..last.

    Args:
        q_NHD: [N, H, D], contiguous.
        ck_PGD: [P, G, D], contiguous.
        lse_NH: Log-sums (log2) of compressed attention over the same keys.
        index: Block index.
        scale: Factor of the scores.
        first: First token.
        last: One past the last token. -1 stands for N.

    Returns:
        fp32 [G, last - first, max_blocks]. Columns that an asset lacks are not written.
    """
    N, H, D = q_NHD.shape
    G = ck_PGD.shape[1]
    last = N if last < 0 else last
    columns = index.max_blocks
    score_GNM = q_NHD.new_empty(G, last - first, columns, dtype=torch.float32)
    if first == last:
        return score_GNM
    BLOCK_N = 32 if q_NHD.dtype == torch.float32 else 64
    tiles = index.tile_blocks.shape[0] - 1
    # Five programs share a multiprocessor.
    options = register_limit(96) if D <= 32 and BLOCK_N == 64 else {}
    _block_score[(tiles, cdiv(min(index.max_tokens, last - first), BLOCK_N), G)](
        q_NHD, ck_PGD, lse_NH, index.tile_blocks, index.block_compressed, index.compressed_block,
        index.block_asset, index.asset_blocks, index.token_starts, score_GNM, first, last, columns,
        scale * LOG2E, G, H // G, D, BLOCK_N, BLOCK_P=TILE_COMPRESSED, BLOCK_B=TILE_BLOCKS,
        num_warps=4, num_stages=3 if D <= 64 else 2, **options,
    )  # fmt: skip
    return score_GNM
