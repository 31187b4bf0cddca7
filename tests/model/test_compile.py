"""torch.compile sees the transformer blocks as one graph each."""

from __future__ import annotations

import pytest
import torch

from model.layers import WindowBlock
from model.sparse_dit import ResidualStream
from tests.model.test_kept_activations import triton_on_the_cpu  # noqa: F401
from tests.model.test_sparse_dit import make_dit, make_inputs, make_level

explain = torch._dynamo.explain


@pytest.mark.usefixtures("triton_on_the_cpu")
def test_a_dit_block_has_no_graph_breaks():
    model = make_dit(dtype=torch.float32, blocks=1)
    x, _, image = make_inputs([9, 3], [5, 7], torch.float32)
    layout = model.layout(x.level)
    _ = layout.place_indicator(64, torch.float32), image.asset_of  # made once per batch
    stream = ResidualStream(torch.randn(12, 64), torch.randn(12, 64), torch.randn(2, 64))
    time_BC = torch.randn(2, 64)
    found = explain(model.blocks[0])(stream, time_BC, image, layout)
    assert found.graph_break_count == 0, found.break_reasons
    assert found.graph_count == 1


@pytest.mark.usefixtures("triton_on_the_cpu")
@pytest.mark.parametrize("shifted", [False, True])
def test_a_block_of_the_vae_has_no_graph_breaks(shifted):
    block = WindowBlock(64, 4, shifted=shifted)
    index = make_level([9, 3]).block_index
    found = explain(block)(torch.randn(12, 64), index)
    assert found.graph_break_count == 0, found.break_reasons
    assert found.graph_count == 1
