"""Losses of the SS-VAE against loops over assets and grid points.

The loops follow section 3 of the Direct3D-S2 paper (arXiv 2505.17412).
"""

import numpy as np
import pytest
import torch

from model.gaussian import Gaussian
from model.sparse_tensor import BrickBatch
from tests.train.analytic_builds import bricks_of, shape
from train.stages.vae.config import LossWeights
from train.stages.vae.losses import vae_losses


def batch_of(numbers, sharp=True):
    bricks = [bricks_of(shape(n), 32) for n in numbers]
    if not sharp:
        bricks[0].sharp[:] = 0
    return BrickBatch.collate(bricks)


def outputs(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    M = len(batch.cells)
    values = torch.tanh(torch.randn(M, 512, generator=generator, dtype=torch.float64))
    mean, logvar = torch.randn(2, M, 16, generator=generator, dtype=torch.float64)
    return values.requires_grad_(), mean.requires_grad_(), logvar.requires_grad_()


def losses_of(values, mean, logvar, batch, share=None):
    share = 1 / batch.batch_size if share is None else share
    return vae_losses(values, Gaussian(mean, logvar), batch, LossWeights(), share)


def by_hand(values, mean, logvar, batch):
    """Return the terms: means over each set within an asset, then over assets."""
    terms = {"in": [], "ext": [], "sharp": [], "kl": []}
    stored = batch.values.double()
    for asset in range(batch.batch_size):
        rows = (batch.cells.coords[:, 0] == asset).numpy()
        error = ((values - stored) ** 2).detach().numpy()[rows]
        active = np.abs(stored.numpy()[rows]) < 1
        sharp = batch.sharp.numpy()[rows]
        terms["in"].append(error[active].mean())
        terms["ext"].append(error[~active].mean())
        terms["sharp"].append(error[sharp].mean() if sharp.any() else 0.0)
        m, v = mean.detach().numpy()[rows], np.exp(logvar.detach().numpy()[rows])
        terms["kl"].append((0.5 * (m**2 + v - 1 - np.log(v))).mean())
    return {name: np.mean(values) for name, values in terms.items()}


@pytest.mark.parametrize("sharp", [True, False])
def test_terms_and_their_weighted_sum(sharp):
    batch = batch_of([0, 1, 2], sharp)
    values, mean, logvar = outputs(batch)
    found, expected = (
        losses_of(values, mean, logvar, batch),
        by_hand(values, mean, logvar, batch),
    )
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-12), name
    total = expected["in"] + 0.1 * expected["ext"] + expected["sharp"] + 1e-3 * expected["kl"]
    assert found["loss"].item() == pytest.approx(total, rel=1e-12)


def test_the_gradient_agrees_with_finite_differences():
    batch = batch_of([3, 4])
    values, mean, logvar = outputs(batch)
    losses_of(values, mean, logvar, batch)["loss"].backward()
    row, point = 5, 100
    for tensor, where in ((values, (row, point)), (mean, (row, 3)), (logvar, (row, 3))):
        with torch.no_grad():
            losses = []
            for step in (1e-5, -1e-5):
                tensor[where] += step
                losses.append(losses_of(values, mean, logvar, batch)["loss"].item())
                tensor[where] -= step
        assert tensor.grad is not None
        assert tensor.grad[where].item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4)


def test_the_losses_of_parts_add_up_to_the_loss_of_the_whole():
    """The mean of the ranks' losses is the loss of the global batch, however it is divided."""
    whole = batch_of([0, 1, 2])
    values, mean, logvar = (x.detach() for x in outputs(whole))
    expected = losses_of(values, mean, logvar, whole)
    ranks = []
    for numbers in ([0], [1, 2]):
        rows = torch.isin(whole.cells.coords[:, 0], torch.tensor(numbers))
        part = batch_of(numbers)
        ranks.append(losses_of(values[rows], mean[rows], logvar[rows], part, 2 / 3))
    for name, value in expected.items():
        assert torch.stack([rank[name] for rank in ranks]).mean().item() == pytest.approx(
            value.item(), rel=1e-12
        )


def test_half_precision_is_summed_in_fp32():
    batch = batch_of([0])
    values, mean, logvar = (x.detach().bfloat16() for x in outputs(batch))
    with torch.autocast("cpu", torch.bfloat16):
        found = losses_of(values, mean, logvar, batch)
    expected = losses_of(values.double(), mean.double(), logvar.double(), batch)
    assert found["loss"].dtype == torch.float32
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)


def test_wrong_shapes_are_errors():
    batch = batch_of([0])
    values, mean, logvar = outputs(batch)
    with pytest.raises(ValueError, match="values must be"):
        losses_of(values[1:], mean, logvar, batch)
    with pytest.raises(ValueError, match="mean, logvar must be"):
        losses_of(values, mean[1:], logvar, batch)
