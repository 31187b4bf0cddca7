"""What the SS-VAE minimises: squared errors over three sets of voxels, and the divergence from a standard normal."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from model.sparse_tensor import BrickBatch
from train.stages.vae.config import LossWeights


@functools.cache  # a copy to the device in every step would wait for the forward
def _of_terms(weights: LossWeights, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(
        [weights.inside, weights.outside, weights.sharp, weights.kl], dtype=dtype
    ).to(device)


def vae_losses(
    values: Tensor,
    mean: Tensor,
    logvar: Tensor,
    batch: BrickBatch,
    weights: LossWeights,
    share: float | None = None,
) -> dict[str, Tensor]:
    """loss (the weighted sum), in, ext, sharp, kl: scalars, fp32 or wider, differentiable.

    values [M, 512] decoded; mean, logvar [M, C] of the posterior. Each term is a mean over its set within a sample (KL:
    over cells and channels), then over the samples: share * their sum, by default share = 1 / samples. A sample without
    sharp voxels contributes 0 to that term. ValueError if a shape does not fit the batch.
    """
    if values.shape != batch.values.shape:
        raise ValueError(f"values must be {list(batch.values.shape)}, got {list(values.shape)}")
    if mean.shape != logvar.shape or mean.ndim != 2 or len(mean) != len(values):
        raise ValueError(
            f"mean, logvar must be [{len(values)}, C], got {list(mean.shape)}, {list(logvar.shape)}"
        )
    with torch.autocast(values.device.type, enabled=False):
        dtype = torch.promote_types(values.dtype, torch.float32)
        square = (values.to(dtype) - batch.values.to(dtype)).square()
        active, sharp = batch.active, batch.sharp
        asset_of = batch.cells.coords[:, 0].long()
        # Sums per asset as a product with indicators: deterministic, which index_add is not on a GPU.
        of_asset_AM = (
            torch.arange(batch.batch_size, device=values.device)[:, None] == asset_of
        ).to(dtype)
        wanted = {"in": active, "ext": ~active, "sharp": sharp}
        total_A3 = of_asset_AM @ torch.stack(
            [torch.where(mask, square, 0).sum(1) for mask in wanted.values()], 1
        )
        count_A3 = of_asset_AM @ torch.stack([mask.sum(1).to(dtype) for mask in wanted.values()], 1)
        mean, logvar = mean.to(dtype), logvar.to(dtype)
        kl_M = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(1)
        kl_A = (of_asset_AM @ kl_M) / of_asset_AM.sum(1).clamp(min=1)
        per_sample = torch.cat([total_A3 / count_A3.clamp(min=1), kl_A[:, None]], 1)
        terms = per_sample.sum(0) * (1 / batch.batch_size if share is None else share)
        names = (*wanted, "kl")
        return {
            "loss": terms @ _of_terms(weights, dtype, terms.device),
            **{name: terms[n] for n, name in enumerate(names)},
        }
