"""Losses of the SS-VAE: squared errors over three sets of grid points, and the KL divergence."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from model.gaussian import Gaussian
from model.sparse_tensor import BrickBatch
from train.stages.vae.config import LossWeights


@functools.cache  # a copy to the device in every step would wait for the forward pass
def _weights_on(weights: LossWeights, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(
        [weights.inside, weights.outside, weights.sharp, weights.kl], dtype=dtype
    ).to(device)


def vae_losses(
    values: Tensor, posterior: Gaussian, batch: BrickBatch, weights: LossWeights, share: float
) -> dict[str, Tensor]:
    """Compute the loss terms of a batch.

    "in" is the squared error of active grid points, "ext" that of the other decoded points, "sharp"
    that of active points near sharp edges, and "kl" the divergence of the posterior from a standard
    normal distribution. Each term is averaged within an asset: over its points, or over cells and
    channels. A term without points is 0. The terms of the assets are then added and multiplied by
    `share`. "loss" is the weighted sum of the terms.

    Args:
        values: Decoded values, [M, 512] for the M cells of the batch.
        posterior: Distribution of the latents, [M, C].
        batch: The stored bricks.
        weights: Weights of the terms.
        share: Weight of one asset. 1 / number of assets gives the mean over the assets.

    Returns:
        "loss", "in", "ext", "sharp" and "kl" as differentiable scalars, at least fp32.

    Raises:
        ValueError: If a shape does not fit the batch.
    """
    if values.shape != batch.values.shape:
        raise ValueError(f"values must be {list(batch.values.shape)}, got {list(values.shape)}")
    mean, logvar = posterior.mean, posterior.logvar
    if mean.shape != logvar.shape or mean.ndim != 2 or len(mean) != len(values):
        raise ValueError(
            f"mean, logvar must be [{len(values)}, C], got {list(mean.shape)}, {list(logvar.shape)}"
        )
    with torch.autocast(values.device.type, enabled=False):
        dtype = torch.promote_types(values.dtype, torch.float32)
        square = (values.to(dtype) - batch.values.to(dtype)).square()
        # Sums per asset are products with indicators, because index_add on a GPU is not
        # deterministic.
        asset_M = batch.cells.coords[:, 0].long()
        assets = torch.arange(batch.batch_size, device=values.device)
        is_of_asset_AM = (assets[:, None] == asset_M).to(dtype)
        # Squared errors, averaged over three sets of points.
        masks = {"in": batch.active, "ext": ~batch.active, "sharp": batch.sharp}
        total_A3 = is_of_asset_AM @ torch.stack(
            [torch.where(mask, square, 0).sum(1) for mask in masks.values()], 1
        )
        count_A3 = is_of_asset_AM @ torch.stack(
            [mask.sum(1).to(dtype) for mask in masks.values()], 1
        )
        # KL divergence, averaged over cells and channels.
        kl_M = posterior.divergence(dtype).mean(1)
        kl_A = (is_of_asset_AM @ kl_M) / is_of_asset_AM.sum(1).clamp(min=1)
        # Sum over the assets.
        terms_A4 = torch.cat([total_A3 / count_A3.clamp(min=1), kl_A[:, None]], 1)
        terms = terms_A4.sum(0) * share
        return {
            "loss": terms @ _weights_on(weights, dtype, terms.device),
            **{name: terms[n] for n, name in enumerate((*masks, "kl"))},
        }
