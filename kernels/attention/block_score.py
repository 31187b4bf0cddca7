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
from kernels.attention.launches import Launch, block_score_launch
from kernels.attention.packed_heads import load_keys
from kernels.attention.softmax import LOG2E, exponentials, products, round_scores
from kernels.runtime.integer_math import cdiv


@triton.jit(do_not_specialize=["first_token", "last_token", "columns"])
def _block_score(
    q_ptr, ck_ptr, lse_ptr, tile_ptr, block_compressed_ptr, compressed_block_ptr, block_asset_ptr,
    asset_blocks_ptr, token_starts_ptr, score_ptr, first_token, last_token, columns, scale2,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_B: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr,
    EMULATED: tl.constexpr,
):  # fmt: skip
    # One program: TILES times BLOCK_N queries and the at most BLOCK_B blocks of one tile, for one
    # key/value head.
    tile, g = tl.program_id(0), tl.program_id(2)
    b0, b1 = tl.load(tile_ptr + tile), tl.load(tile_ptr + tile + 1)
    asset = tl.load(block_asset_ptr + b0)
    start = tl.maximum(tl.load(token_starts_ptr + asset), first_token)
    start += tl.program_id(1) * (TILES * BLOCK_N)
    last = tl.minimum(tl.load(token_starts_ptr + asset + 1), last_token)
    if start < last:
        d, bb = tl.arange(0, D), tl.arange(0, BLOCK_B)
        first_m, end = tl.load(block_compressed_ptr + b0), tl.load(block_compressed_ptr + b1)
        # Blocks are counted from the asset's first.
        column = b0 - tl.load(asset_blocks_ptr + asset) + bb

        # BLOCK_P compressed tokens at a time: once, unless a block has more of them. Places past
        # the end repeat the last token and are members of no block, so that no score needs a mask.
        for t in range(first_m, end, BLOCK_P):
            m = t + tl.arange(0, BLOCK_P)
            last_m = tl.minimum(m, end - 1)
            k = load_keys(ck_ptr, ck_ptr, last_m, end, g, G, D, False, True, True)  # [BLOCK_P, D]
            block = tl.load(compressed_block_ptr + m, m < end, other=-1) - b0  # [BLOCK_P]
            member = (block[:, None] == bb[None, :]).to(q_ptr.dtype.element_ty)
            for first in range(start, tl.minimum(start + TILES * BLOCK_N, last), BLOCK_N):
                # Probabilities of the compressed tokens, summed over the heads.
                i = tl.arange(0, BLOCK_N)
                ok = first + i < last
                first_row = g.to(tl.int64) * GROUP + first * (G * GROUP)
                row = i * (G * GROUP)
                q_tile_ptr, lse_tile_ptr = q_ptr + first_row * D, lse_ptr + first_row
                p = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
                for h in tl.range(0, GROUP, loop_unroll_factor=UNROLL):
                    x_ptr = q_tile_ptr + (row + h)[:, None] * D + d[None, :]
                    q = tl.load(x_ptr, ok[:, None], other=0.0)  # [BLOCK_N, D]
                    lse = tl.load(lse_tile_ptr + row + h, ok, other=float("inf"))  # [BLOCK_N]
                    s = products(q, k) * scale2 - lse[:, None]
                    p += exponentials(s, EMULATED, False).to(tl.float32)

                # Sum them by block: a product with the membership matrix. The two products of
                # 16-bit floats keep 16 bits of the sum.
                line = g.to(tl.int64) * (last_token - first_token) + first - first_token
                tile_score_ptr = score_ptr + line * columns
                x = i[:, None] * columns + column[None, :]
                mask = ok[:, None] & (b0 + bb < b1)[None, :]
                acc = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
                if t > first_m:
                    tl.debug_barrier()  # other threads stored them
                    acc = tl.load(tile_score_ptr + x, mask, other=0.0)
                high = round_scores(p, member.dtype)
                low = (p - high.to(tl.float32)).to(member.dtype)
                acc = tl.dot(high, member, acc, input_precision="ieee")
                acc = tl.dot(low, member, acc, input_precision="ieee")
                tl.store(tile_score_ptr + x, acc, mask)


def block_score(
    q_NHD: Tensor,
    ck_PGD: Tensor,
    lse_NH: Tensor,
    index: BlockIndex,
    scale: float,
    first: int = 0,
    last: int = -1,
    launch: Launch | None = None,
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
        launch: Tile sizes. None takes `block_score_launch`.

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
    tiles = index.tile_blocks.shape[0] - 1
    queries = min(index.max_tokens, last - first)
    launch = launch or block_score_launch(q_NHD, tiles * cdiv(queries, 64) * G)
    _block_score[(tiles, cdiv(queries, launch.tiles * launch.rows), G)](
        q_NHD, ck_PGD, lse_NH, index.tile_blocks, index.block_compressed, index.compressed_block,
        index.block_asset, index.asset_blocks, index.token_starts, score_GNM, first, last, columns,
        scale * LOG2E, G, H // G, D, launch.rows, BLOCK_P=TILE_COMPRESSED, BLOCK_B=TILE_BLOCKS,
        TILES=launch.tiles, UNROLL=launch.unroll, EMULATED=launch.emulated, **launch.options,
    )  # fmt: skip
    return score_GNM
