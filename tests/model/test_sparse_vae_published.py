"""The published SS-VAE weights: their names and shapes, and to which parameter each is copied."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels import token_order
from model.config import VAEConfig
from model.conv import SparseConv3d
from model.published_weights import published_vae_keys
from model.sparse_tensor import Level
from model.sparse_vae import SparseVAE
from tests.kernel_inputs import random_coords
from tests.model.test_sparse_vae import TINY

torch.set_num_threads(1)


def published_shapes(widths=(32, 64, 128, 512), latent=16, blocks=4):
    """Return the names and shapes of the published VAE."""
    shapes = {
        "encoder.input_layer1.weight": (widths[0], 1),
        "encoder.input_layer1.bias": (widths[0],),
    }
    for n, (a, b) in enumerate(itertools.pairwise(widths)):
        down = f"encoder.downsample.{n}"
        shapes |= {f"{down}.act_layers.0.{name}": (a,) for name in ("weight", "bias")}
        shapes |= {
            f"{down}.out_layers.0.conv.kernel": (27, a, b),
            f"{down}.out_layers.0.conv.bias": (b,),
        }
        shapes |= {f"{down}.out_layers.1.{name}": (b,) for name in ("weight", "bias")}
        shapes |= {
            f"{down}.out_layers.3.conv.kernel": (27, b, b),
            f"{down}.out_layers.3.conv.bias": (b,),
        }
        shapes |= {
            f"{down}.skip_connection.conv.kernel": (a, b),
            f"{down}.skip_connection.conv.bias": (b,),
        }
    for n, (a, b) in enumerate(itertools.pairwise(widths[::-1])):
        up = f"decoder.upsample.{n}"
        shapes |= {
            f"{up}.act_layers.0.conv.kernel": (27, a, b),
            f"{up}.act_layers.0.conv.bias": (b,),
        }
        shapes |= {
            f"{up}.out_layers.0.conv.kernel": (27, b, b),
            f"{up}.out_layers.0.conv.bias": (b,),
        }
    C = widths[-1]
    linears = {"encoder.input_layer": (C, C), "decoder.input_layer": (C, latent)}
    linears |= {"encoder.out_layer": (2 * latent, C), "decoder.out_layer": (1, widths[0])}
    for part, n in itertools.product(("encoder", "decoder"), range(blocks)):
        block = f"{part}.blocks.{n}"
        linears |= {f"{block}.attn.to_qkv": (3 * C, C), f"{block}.attn.to_out": (C, C)}
        linears |= {f"{block}.mlp.mlp.0": (4 * C, C), f"{block}.mlp.mlp.2": (C, 4 * C)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def test_the_default_sizes_are_the_published_ones():
    shapes = published_shapes()
    assert sum(np.prod(shape) for shape in shapes.values()) == 37_874_113
    assert set(shapes) == set(published_vae_keys(VAEConfig()))


def published(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = published_shapes(TINY.widths, TINY.latent_channels, TINY.blocks)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_published_weights_are_copied_to_their_parameters():
    vae, weights = SparseVAE(TINY), published()
    vae.load_published(weights)
    sums = sorted(tensor.double().sum().item() for tensor in weights.values())
    assert sorted(
        tensor.double().sum().item() for tensor in vae.state_dict().values()
    ) == pytest.approx(sums)
    skip = torch.randn(5, 4)
    torch.testing.assert_close(
        vae.encoder.down[0].skip(skip),
        skip @ weights["encoder.downsample.0.skip_connection.conv.kernel"]
        + weights["encoder.downsample.0.skip_connection.conv.bias"],
    )
    assert torch.equal(
        vae.decoder.transformer.blocks[1].mlp[0].weight,
        weights["decoder.blocks.1.mlp.mlp.0.weight"],
    )
    assert torch.equal(vae.encoder.input.bias, weights["encoder.input_layer1.bias"])


def test_published_convolutions_are_dense_convolutions_with_x_fastest():
    """In torchsparse out[p] is the sum of x[p + d] @ kernel[k] over taps k, plus a bias.

    k = 9 * (dz + 1) + 3 * (dy + 1) + (dx + 1).
    """
    vae, weights = SparseVAE(TINY), published()
    vae.load_published(weights)
    kernel = weights["encoder.downsample.1.out_layers.0.conv.kernel"]
    # [dz, dy, dx, in, out] -> [out, in, dx, dy, dz] of conv3d
    dense = kernel.view(3, 3, 3, 8, 8).permute(4, 3, 2, 1, 0)
    coords = random_coords([70], side=6)
    level = Level.from_coords(coords[token_order(coords)], 8, 1)
    x = torch.randn(70, 8)
    volume = torch.zeros(6, 6, 6, 8)
    at = tuple(level.coords[:, 1:].long().T)
    volume[at] = x
    expected = F.conv3d(
        volume.permute(3, 0, 1, 2)[None],
        dense,
        weights["encoder.downsample.1.out_layers.0.conv.bias"],
        padding=1,
    )[0].permute(1, 2, 3, 0)[at]
    conv = vae.encoder.down[1].conv1
    assert isinstance(conv, SparseConv3d)
    torch.testing.assert_close(conv(x, level.neighbors), expected, rtol=1e-4, atol=1e-4)


def test_missing_published_weights_are_listed():
    vae, weights = SparseVAE(TINY), published()
    del weights["decoder.out_layer.bias"]
    weights["encoder.extra"] = torch.zeros(1)
    weights["encoder.input_layer1.bias"] = torch.zeros(5)
    message = (
        r"unknown encoder.extra; missing decoder.out_layer.bias; "
        r"encoder.input_layer1.bias of shape \[5\] does not fit"
    )
    with pytest.raises(ValueError, match=message):
        vae.load_published(weights)
