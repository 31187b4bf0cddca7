"""The occupancy VAE: shapes, the order of upsampled voxels, the loss, and learning."""

import pytest
import torch
from torch.nn import functional as F

from model.checkpoint import load_model, save_model
from model.config import OccupancyConfig
from model.gaussian import Gaussian
from model.occupancy_vae import (
    OccupancyVAE,
    _Up,
    occupancy_grid,
    occupancy_loss,
)
from pipeline.core.primitives.voxel_iou import intersection_over_union

AXES = (1, 2, 3)  # the axes of a grid in a batch
TINY = OccupancyConfig(side=16, widths=(8, 16, 32), blocks=1, groups=8, latent_channels=4)


def shells(side, count, seed=0):
    """Return bool [count, S, S, S], true in the cells that random spheres and boxes cross."""
    generator = torch.Generator().manual_seed(seed)
    line = (torch.arange(side) + 0.5) / side - 0.5
    grid = torch.stack(torch.meshgrid(line, line, line, indexing="ij"))
    assets = []
    for number in range(count):
        centre = 0.3 * torch.rand(3, generator=generator) - 0.15
        radius = 0.15 + 0.15 * torch.rand(1, generator=generator)
        offset = (grid - centre[:, None, None, None]).abs()
        distance = offset.square().sum(0).sqrt() if number % 2 else offset.amax(0)
        assets.append((distance - radius).abs() < 0.6 / side)
    return torch.stack(assets)


def test_shapes_are_those_of_the_configuration():
    torch.manual_seed(0)
    vae, occupied = OccupancyVAE(TINY), shells(16, 3)
    posterior = vae.encode(occupied)
    assert posterior.mean.shape == posterior.logvar.shape == (3, 4, 4, 4, 4)
    logits, again = vae(occupied, torch.zeros_like(posterior.mean))
    assert logits.shape == (3, 16, 16, 16)
    torch.testing.assert_close(logits, vae.decode(again.mean))
    flat = OccupancyVAE(
        OccupancyConfig(side=8, widths=(8, 16), blocks=1, groups=4, latent_channels=2)
    )
    assert flat.encode(shells(8, 1)).mean.shape == (1, 2, 4, 4, 4)


def test_the_size_for_512_is_that_of_trellis():
    with torch.device("meta"):
        vae = OccupancyVAE(OccupancyConfig())
    assert (vae.config.factor, vae.config.latent_side) == (4, 16)
    assert 50e6 < sum(p.numel() for p in vae.parameters()) < 150e6


def test_upsampling_moves_channels_to_the_child_voxels():
    up = _Up(8, 1)
    torch.nn.init.dirac_(up.conv.weight)  # the convolution passes its input through
    torch.nn.init.zeros_(up.conv.bias)
    x = torch.randn(1, 8, 3, 2, 2)
    y = up(x)
    assert y.shape == (1, 1, 6, 4, 4)
    for child in range(8):
        dx, dy, dz = child >> 2, child >> 1 & 1, child & 1
        torch.testing.assert_close(y[:, 0, dx::2, dy::2, dz::2], x[:, child])


def test_the_loss_equals_its_formulas():
    logits = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    occupied = torch.rand(2, 4, 4, 4) < 0.3
    mean, logvar = torch.randn(2, 3, 2, 2, 2), torch.randn(2, 3, 2, 2, 2)
    parts = occupancy_loss(logits, occupied, Gaussian(mean, logvar), kl_weight=0.01, share=0.5)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(
        normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0)
    ).mean()
    torch.testing.assert_close(parts["kl"], kl)
    torch.testing.assert_close(
        parts["bce"], F.binary_cross_entropy(logits.sigmoid(), occupied.double())
    )
    p, y = logits.sigmoid().flatten(1), occupied.double().flatten(1)
    dice = [1 - (2 * (a * b).sum() + 1) / (a.sum() + b.sum() + 1) for a, b in zip(p, y)]
    torch.testing.assert_close(parts["dice"].double(), torch.stack(dice).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(parts["loss"].double(), parts["bce"] + parts["dice"] + 0.01 * kl)
    doubled = occupancy_loss(logits, occupied, Gaussian(mean, logvar), kl_weight=0.01, share=1.0)
    torch.testing.assert_close(doubled["loss"], 2 * parts["loss"])
    exact = torch.where(occupied, 50.0, -50.0)
    perfect = occupancy_loss(
        exact, occupied, Gaussian(0 * mean, 0 * logvar), kl_weight=1.0, share=0.5
    )
    assert perfect["iou"] == 1.0
    assert perfect["loss"] < 1e-6


def test_cells_are_converted_to_a_grid():
    cells = torch.tensor([[0, 1, 2, 3], [1, 0, 0, 7], [1, 7, 7, 7]], dtype=torch.int32)
    grid = occupancy_grid(cells, 8, 3)
    torch.testing.assert_close(grid.nonzero().int(), cells)
    assert intersection_over_union(grid, grid, AXES).tolist() == [1.0, 1.0, 1.0]
    assert intersection_over_union(grid, grid.flip(3), AXES).tolist() == [0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match=r"0\.\.6 with batch below 3"):
        occupancy_grid(cells, 7, 3)
    with pytest.raises(ValueError, match="batch below 1"):
        occupancy_grid(cells, 8, 1)


def test_the_vae_learns_the_cells_of_analytic_shapes():
    torch.manual_seed(0)
    config = OccupancyConfig(side=8, widths=(8, 16), blocks=1, groups=8, latent_channels=4)
    vae, occupied = OccupancyVAE(config), shells(8, 4)
    optimizer = torch.optim.AdamW(vae.parameters(), 6e-3)
    for _ in range(80):
        logits, posterior = vae(occupied, torch.randn(4, 4, 4, 4, 4))
        losses = occupancy_loss(logits, occupied, posterior, kl_weight=1e-3, share=1 / 4)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        decoded = vae.decode(vae.encode(occupied).mean) > 0
    assert intersection_over_union(decoded, occupied, AXES).min() > 0.95
    assert losses["kl"] < 4  # latents stay near a standard normal distribution


def test_a_saved_vae_is_loaded_unchanged(tmp_path):
    torch.manual_seed(1)
    vae = OccupancyVAE(TINY)
    save_model(tmp_path / "vae", vae, TINY)
    again = load_model(tmp_path / "vae", OccupancyVAE)
    z = torch.randn(1, 4, 4, 4, 4)
    torch.testing.assert_close(again.decode(z), vae.eval().decode(z), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": 18}, "side must be a multiple of 4 for 3 widths, got 18"),
        ({"widths": (8, 12)}, r"multiples of groups = 8, got \(8, 12\)"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        OccupancyConfig(**{"side": 16, "widths": (8, 16, 32), "groups": 8, **change})


def test_grids_of_another_side_are_refused():
    vae = OccupancyVAE(TINY)
    with pytest.raises(ValueError, match=r"occupied must be \[B, 16, 16, 16\], got \[1, 8, 8, 8\]"):
        vae.encode(shells(8, 1))
    with pytest.raises(ValueError, match=r"z must be \[B, 4, 4, 4, 4\]"):
        vae.decode(torch.zeros(1, 4, 2, 2, 2))
