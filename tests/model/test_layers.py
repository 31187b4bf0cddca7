"""Positions, window blocks and recomputation against loops and modules of torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels import BlockIndex, token_order
from model import layers
from tests.kernel_inputs import random_coords

torch.set_num_threads(1)


def test_positions_equal_the_formula():
    coords, channels, factor = torch.tensor([[3, 0, 61], [7, 5, 1]]), 20, 2.0
    embedded = layers.position_embedding(coords, channels, factor)
    n = channels // 6
    for row, xyz in enumerate(coords.tolist()):
        expected = []
        for value in xyz:
            angles = [factor * value * 10000 ** (-i / n) for i in range(n)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        expected += [0.0] * (channels - len(expected))
        assert embedded[row].tolist() == pytest.approx(expected, abs=1e-5)
    assert embedded.dtype == torch.float32


@pytest.mark.parametrize(
    ("resolution", "factor"), [(256, 2.0), (384, 512 / 384), (512, 1.0), (1024, 1.0)]
)
def test_resolutions_up_to_512_share_a_range_of_positions(resolution, factor):
    assert layers.position_factor(resolution) == factor


def test_invalid_positions_are_refused():
    with pytest.raises(ValueError, match=r"coords_N3 must be \[N, 3\], got \[2, 4\]"):
        layers.position_embedding(torch.zeros(2, 4), 12)
    with pytest.raises(ValueError, match="channels must be at least 6, got 5"):
        layers.position_embedding(torch.zeros(2, 3), 5)


@pytest.mark.parametrize("shifted", [False, True])
def test_a_window_block_equals_torch_attention_within_windows(shifted):
    torch.manual_seed(0)
    coords = random_coords([40, 0, 25], side=12)  # on the CPU: the kernels take no float64
    index = BlockIndex.from_coords(coords[token_order(coords)], 3)
    x = torch.randn(index.num_tokens, 32, dtype=torch.float64)
    block = layers.WindowBlock(32, 2, shifted=shifted).double()
    peer = nn.MultiheadAttention(32, 2, batch_first=True, dtype=torch.float64)
    peer.in_proj_weight, peer.in_proj_bias = block.attention.qkv.weight, block.attention.qkv.bias
    peer.out_proj.weight, peer.out_proj.bias = block.attention.out.weight, block.attention.out.bias
    window = torch.empty(len(x), dtype=torch.long)
    window[index.shifted_order.long()] = index.shifted_of.long()
    window = window if shifted else index.block_of.long()  # blocks are the aligned windows
    normed = F.layer_norm(x, (32,), eps=1e-6)
    mask = window[:, None] != window
    expected = (
        x + peer(normed[None], normed[None], normed[None], attn_mask=mask, need_weights=False)[0][0]
    )
    hidden = F.gelu(
        F.layer_norm(expected, (32,), eps=1e-6) @ block.mlp[0].weight.T + block.mlp[0].bias,
        approximate="tanh",
    )
    expected = expected + hidden @ block.mlp[2].weight.T + block.mlp[2].bias
    torch.testing.assert_close(block(x, index), expected)


def test_layer_norm_is_fp32_under_autocast():
    x = torch.randn(5, 16) * 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        normed = layers.layer_norm(x)
        assert layers.autocast_dtype(x) == torch.bfloat16
    assert normed.dtype == torch.float32
    assert torch.equal(normed, F.layer_norm(x, (16,), eps=1e-6))
    assert layers.autocast_dtype(x) == torch.float32


@pytest.mark.parametrize("wanted", [False, True])
def test_recomputed_activations_are_not_kept(wanted):
    calls, kept = [], []

    def function(x):
        calls.append(1)
        return (x.exp() * 3).sin()

    x = torch.randn(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        y = layers.recompute(wanted, function, x)
    y.sum().backward()
    assert len(calls) == 1 + wanted
    assert sum(kept) == (1000 if wanted else 2000)  # the input alone, or what exp and sin need
    torch.testing.assert_close(x.grad, 3 * x.exp() * (3 * x.exp()).cos())


def test_nothing_is_recomputed_without_gradients():
    with torch.no_grad():
        assert layers.recompute(True, torch.exp, torch.zeros(3)).grad_fn is None
