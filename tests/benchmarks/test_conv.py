"""The parts of the convolution benchmark that need no GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import conv_timing
from kernels import neighbor_map, token_order
from tests.kernel_inputs import random_coords


def test_voxels_of_blocks_have_the_neighbours_of_their_coordinates():
    blocks = random_coords([20], 4)
    blocks = blocks[token_order(blocks)]
    voxels = conv_timing.voxel_coords(blocks, 2)
    by_block = conv_timing.block_rows(neighbor_map(blocks), 2)
    row_of = {tuple(voxel): row for row, voxel in enumerate(voxels.tolist())}
    offsets = torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * 3)
    for row, (batch, *xyz) in enumerate(voxels.tolist()):
        expected = [row_of.get((batch, *(torch.tensor(xyz) + o).tolist()), -1) for o in offsets]
        assert by_block[row].tolist() == expected


@pytest.mark.parametrize("layer", [conv_timing.Layer("a", 1, 4, 3), conv_timing.LAYERS[-1]])
def test_a_peer_is_compared_with_ours(layer):
    blocks = random_coords([4], 2)
    blocks = blocks[token_order(blocks)]
    inputs = conv_timing.PeerInputs.draw(layer, blocks, torch.float32)
    rows = neighbor_map(blocks)
    rows = rows if layer.size == 1 else conv_timing.block_rows(rows, layer.size)

    def by_gathering(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        source = torch.cat([inputs.source(x), torch.zeros(1, layer.C)])
        w = w.reshape(layer.O, 27 * layer.C)
        return source[rows.long()].flatten(1) @ w.T + b  # row -1 is zero

    inputs.check(by_gathering)
    with pytest.raises(RuntimeError, match=r"output of layer .* differs by 0\.0"):
        inputs.check(lambda x, w, b: by_gathering(1.05 * x, w, b))


def test_the_table_has_a_column_for_each_peer():
    row = {
        "layer": "encoder",
        "rows": 10,
        "ours": (1.0, 2.0),
        "floor": (0.5, 1.0),
        "flex_gemm": (2.0, 4.0),
        "dense_tflops": 1.0,
        "tflops": 1.0,
        "gb_per_s": 1.0,
        "peak_gb": 1.0,
    }
    head, rule, line = conv_timing.table([row], {"flop": 1e12}).splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    assert "| 2/4 | 2.00x |" in line
