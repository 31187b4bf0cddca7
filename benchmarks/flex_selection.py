"""The selected branch of SSA through FlexAttention, torch's generic tool for masked attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kernels import BlockIndex

TILE = 128  # queries and keys of a tile that FlexAttention computes or skips


def selection_mask(index: BlockIndex, selected_GNT: Tensor, heads: int) -> tuple[BlockMask, float]:
    """Return the mask of the selected branch for one asset.

    Args:
        index: Block index of N tokens of one asset.
        selected_GNT: Blocks that each query selects, -1 for none.
        heads: Number H of query heads.

    Returns:
        The mask for queries [1, H, N, D], and the share of the tiles that are computed.

    Raises:
        ValueError: If there are several assets.
    """
    G, N, _ = selected_GNT.shape
    M, device = index.num_blocks, selected_GNT.device
    if len(index.token_starts) != 2:
        raise ValueError(f"there must be one asset, got {len(index.token_starts) - 1}")
    # Column M takes the places without a block.
    places = torch.where(selected_GNT >= 0, selected_GNT, M).long()
    chosen = torch.zeros(G, N, M + 1, dtype=torch.bool, device=device).scatter_(2, places, True)
    chosen_GNM = chosen[..., :M].contiguous()
    block_of = index.block_of.long()
    tiles = -(-N // TILE)
    padded = torch.zeros(G, tiles * TILE, M, dtype=torch.bool, device=device)
    padded[:, :N] = chosen_GNM
    wanted = padded.view(G, tiles, TILE, M).any(2).float()
    held = torch.zeros(tiles, M, device=device)
    held[torch.arange(N, device=device) // TILE, block_of] = 1
    computed = wanted @ held.T > 0  # [G, tiles of queries, tiles of keys]
    share = computed.double().mean().item()
    computed = computed.repeat_interleave(heads // G, 0)[None]
    order = computed.int().argsort(dim=3, descending=True, stable=True).int()
    group = heads // G

    def selects(_batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return chosen_GNM[head // group, query, block_of[key]]

    mask = BlockMask.from_kv_blocks(
        computed.sum(3).int(), order, BLOCK_SIZE=TILE, mask_mod=selects, seq_lengths=(N, N)
    )
    return mask, share


def flex_selection(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, mask: BlockMask, function: Any = flex_attention
) -> Tensor:
    """Attend to the selected blocks: [N, H, D].

    Args:
        q_NHD: [N, H, D] queries.
        k_NGD: [N, G, D] keys.
        v_NGD: [N, G, D] values.
        mask: Result of `selection_mask`.
        function: `flex_attention`, or the same compiled.
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (q_NHD, k_NGD, v_NGD))
    return function(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)
