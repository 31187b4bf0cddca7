"""Probability that compressed attention gives each block, summed over heads, without an [N, compressed] tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.block_index import TILE_BLOCKS, TILE_COMPRESSED, BlockIndex
from kernels.runtime.integer_math import cdiv
from kernels.runtime.triton_ops import LOG2E, load_keys, products


@triton.jit(do_not_specialize=["first_token", "last_token", "columns"])
def _block_score(
    q_ptr, ck_ptr, lse_ptr, tile_ptr, block_compressed_ptr, compressed_block_ptr, block_asset_ptr, asset_blocks_ptr,
    token_starts_ptr, score_ptr, first_token, last_token, columns, scale2,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    tile, g = tl.program_id(0), tl.program_id(2)
    b0, b1 = tl.load(tile_ptr + tile), tl.load(tile_ptr + tile + 1)
    asset = tl.load(block_asset_ptr + b0)
    first = tl.maximum(tl.load(token_starts_ptr + asset), first_token) + tl.program_id(1) * BM
    last = tl.minimum(tl.load(token_starts_ptr + asset + 1), last_token)
    if first < last:
        n, d, bb = first + tl.arange(0, BM), tl.arange(0, D), tl.arange(0, BB)
        ok = n < last
        row = n.to(tl.int64) * (G * GS) + g * GS
        acc = tl.zeros([BM, BB], tl.float32)
        end = tl.load(block_compressed_ptr + b1)
        for t in range(
            tl.load(block_compressed_ptr + b0), end, BN
        ):  # once, unless a block has more than BN
            m = t + tl.arange(0, BN)
            k = load_keys(ck_ptr, ck_ptr, m, end, g, G, D, False, False, True)
            p = tl.zeros([BM, BN], tl.float32)
            for h in range(GS):
                q = tl.load(q_ptr + (row + h)[:, None] * D + d[None, :], ok[:, None], other=0.0)
                lse = tl.load(lse_ptr + row + h, ok, other=float("inf"))
                p += tl.exp2(products(q, k) * scale2 - lse[:, None]).to(tl.float32)
            p = tl.where((m < end)[None, :], p, 0.0)
            block = tl.load(compressed_block_ptr + m, m < end, other=-1) - b0
            member = (block[:, None] == bb[None, :]).to(q_ptr.dtype.element_ty)
            high = p.to(member.dtype)  # two products of 16-bit floats keep 16 bits of the sum
            low = (p - high.to(tl.float32)).to(member.dtype)
            acc = tl.dot(
                low,
                member,
                tl.dot(high, member, acc, input_precision="ieee"),
                input_precision="ieee",
            )
        column = b0 - tl.load(asset_blocks_ptr + asset) + bb
        x = (g.to(tl.int64) * (last_token - first_token) + n - first_token)[
            :, None
        ] * columns + column[None, :]
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
    """Scores of tokens first..last: fp32 [G, last - first, max_blocks]; columns an asset lacks are not written.

    lse is that of compressed attention over the same keys (log2), fp32 [N, H].
    """
    (N, H, D), G = q_NHD.shape, ck_PGD.shape[1]
    last = N if last < 0 else last
    columns = index.max_blocks
    score_GNM = q_NHD.new_empty(G, last - first, columns, dtype=torch.float32)
    if first == last:
        return score_GNM
    BM = 32 if q_NHD.dtype == torch.float32 else 64
    grid = (index.tile_blocks.shape[0] - 1, cdiv(min(index.max_tokens, last - first), BM), G)
    options = {"maxnreg": 96} if D <= 32 and BM == 64 else {}  # five programs a multiprocessor
    _block_score[grid](
        q_NHD, ck_PGD, lse_NH, index.tile_blocks, index.block_compressed, index.compressed_block,
        index.block_asset, index.asset_blocks, index.token_starts, score_GNM, first, last, columns, scale * LOG2E,
        G, H // G, D, BM, BN=TILE_COMPRESSED, BB=TILE_BLOCKS, num_warps=4,
        num_stages=3 if D <= 64 else 2, **options,
    )  # fmt: skip
    return score_GNM
