"""Selection attention in torch, block by block, for inference without a GPU.

The definition is `selection_attention` in kernels.attention.reference, which computes the scores of
all tokens of an asset and masks those that are not selected. Here each block meets only the queries
that selected it, and a running softmax adds up what the blocks of a query contribute.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.attention.block_index import BlockIndex


@torch.no_grad()
def selection_by_block(
    q_NHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    blocks_GNT: Tensor,
    index: BlockIndex,
    scale: float,
) -> Tensor:
    """Attend from every query to all tokens of its selected blocks, without gradients.

    Args:
        q_NHD: Queries [N, H, D], fp32 or fp64. The other tensors have the same dtype.
        k_NGD: Keys [N, G, D].
        v_NGD: Values [N, G, D].
        blocks_GNT: Numbers of the selected blocks in the batch, each once for a query, -1 for none.
        index: Block index of the N tokens.
        scale: Factor of the scores.

    Returns:
        [N, H, D] in the dtype of `q_NHD`. NaN where a query selected no block, as in the reference.
    """
    N, H, D = q_NHD.shape
    G = k_NGD.shape[1]
    q_GNHD = (q_NHD * scale).unflatten(1, (G, H // G)).transpose(0, 1).contiguous()
    k_GND, v_GND = (x.transpose(0, 1).contiguous() for x in (k_NGD, v_NGD))
    out_GNHD = torch.zeros_like(q_GNHD)
    sum_GNH = q_GNHD.new_zeros(q_GNHD.shape[:3])
    top_GNH = torch.full_like(sum_GNH, -math.inf)
    starts = index.block_starts.tolist()
    for g in range(G):
        q_NhD, out_NhD, sum_Nh, top_Nh = q_GNHD[g], out_GNHD[g], sum_GNH[g], top_GNH[g]
        for block, queries in enumerate(_queries_of_blocks(blocks_GNT[g], index.num_blocks)):
            if not len(queries):
                continue
            tokens = slice(starts[block], starts[block + 1])
            scores_nhm = q_NhD[queries] @ k_GND[g, tokens].T
            # The running softmax: what earlier blocks added is scaled to the new maximum.
            old_top_nh = top_Nh[queries]
            top_nh = torch.maximum(old_top_nh, scores_nhm.amax(2))
            kept_nh = (old_top_nh - top_nh).exp_()
            p_nhm = scores_nhm.sub_(top_nh[..., None]).exp_()
            out_nhD = out_NhD[queries].mul_(kept_nh[..., None]).add_(p_nhm @ v_GND[g, tokens])
            out_NhD[queries] = out_nhD
            sum_Nh[queries] = sum_Nh[queries].mul_(kept_nh).add_(p_nhm.sum(2))
            top_Nh[queries] = top_nh
    return (out_GNHD / sum_GNH[..., None]).transpose(0, 1).reshape(N, H, D)


def _queries_of_blocks(blocks_NT: Tensor, num_blocks: int) -> tuple[Tensor, ...]:
    """Return the queries that selected each block, in ascending order."""
    flat = blocks_NT.flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat + 1, minlength=num_blocks + 1).tolist()
    # The first part are entries of -1.
    return (order // blocks_NT.shape[1]).split(counts)[1:]
