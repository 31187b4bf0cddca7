"""Diagonal Gaussians: the posteriors of latents, their samples and their KL divergence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A diagonal Gaussian for every latent.

    Attributes:
        mean: [..., C] or [B, C, ...].
        logvar: The logarithm of the variance, of the mean's shape.
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + standard deviation * noise, for noise of the mean's shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def divergence(self, dtype: torch.dtype) -> Tensor:
        """Return the KL divergence of each element from a standard normal, of the mean's shape.

        Args:
            dtype: dtype of the computation and of the result.
        """
        mean, logvar = self.mean.to(dtype), self.logvar.to(dtype)
        return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
