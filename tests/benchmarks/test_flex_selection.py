"""FlexAttention with the mask of the selected branch computes the selected branch."""

from __future__ import annotations

import pytest
import torch

from benchmarks.flex_selection import flex_selection, selection_mask
from kernels import BlockIndex, selection_attention, token_order
from tests.kernel_inputs import random_coords


def test_it_agrees_with_the_reference():
    coords = random_coords([300], 24)
    index = BlockIndex.from_coords(coords[token_order(coords)], 1)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(300, 4, 16, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 300, 2, 16, generator=generator, dtype=torch.float64)
    selected = torch.randint(0, index.num_blocks, (2, 300, 3), generator=generator)
    selected[:, ::7, 1:] = -1
    mask, share = selection_mask(index, selected, 4)
    ours = selection_attention(q, k, v, selected, index)
    torch.testing.assert_close(flex_selection(q, k, v, mask), ours)
    assert share == 1


def test_tiles_without_a_selected_key_are_skipped():
    coords = torch.cartesian_prod(torch.zeros(1, dtype=torch.int32), *[torch.arange(16).int()] * 3)
    coords = coords[token_order(coords)]
    index = BlockIndex.from_coords(coords, 1)  # 8 blocks of 512 tokens, 4 tiles each
    own = index.block_of[None, :, None].expand(2, -1, 1)
    mask, share = selection_mask(index, own, 4)
    assert share == pytest.approx(1 / 8)
    assert (mask.kv_num_blocks == 4).all()


def test_several_assets_are_refused():
    coords = random_coords([20, 20], 8)
    index = BlockIndex.from_coords(coords[token_order(coords)], 2)
    with pytest.raises(ValueError, match="one asset, got 2"):
        selection_mask(index, torch.zeros(1, 40, 1, dtype=torch.int32), 1)
