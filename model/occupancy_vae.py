"""Occupancy VAE: the dense grid of an asset's occupied cells to a small dense grid of latents."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.checkpoint import copy_weights
from model.config import OccupancyConfig
from model.gaussian import Gaussian
from model.published_weights import published_occupancy_keys
from model.sparse_vae import LOGVAR_RANGE
from pipeline.core.primitives.voxel_iou import intersection_over_union


class CellLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each cell: [B, C, X, Y, Z] -> [B, C, X, Y, Z]."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each cell."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def _norm(config: OccupancyConfig, channels: int) -> tuple[nn.Module, nn.Module]:
    if config.norm == "layer":
        return CellLayerNorm(channels, eps=1e-5), nn.SiLU()
    return nn.GroupNorm(config.groups, channels), nn.SiLU()


class _Residual(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))). The last convolution starts at zero."""

    def __init__(self, channels: int, config: OccupancyConfig):
        super().__init__()
        self.first = nn.Sequential(
            *_norm(config, channels), nn.Conv3d(channels, channels, 3, padding=1)
        )
        self.second = nn.Sequential(
            *_norm(config, channels), nn.Conv3d(channels, channels, 3, padding=1)
        )
        for parameter in self.second[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class _Up(nn.Module):
    """Convolution to eight times the channels, which become the 2^3 children of every voxel."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, 8 * out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        B, C, X, Y, Z = y.shape
        y = y.view(B, C // 8, 2, 2, 2, X, Y, Z).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return y.reshape(B, C // 8, 2 * X, 2 * Y, 2 * Z)


class OccupancyVAE(nn.Module):
    """VAE of dense occupancy grids by 3D convolutions, as in TRELLIS.

    The grid has side^3 cells, its latents latent_side^3 positions with latent_channels each.
    """

    Config = OccupancyConfig

    def __init__(self, config: OccupancyConfig):
        super().__init__()
        self.config = config
        widths, latent, blocks = config.widths, config.latent_channels, config.blocks
        encoder: list[nn.Module] = [nn.Conv3d(1, widths[0], 3, padding=1)]
        for depth, width in enumerate(widths):
            if depth:
                encoder.append(nn.Conv3d(widths[depth - 1], width, 2, stride=2))
            encoder += [_Residual(width, config) for _ in range(blocks)]
        encoder += [_Residual(widths[-1], config) for _ in range(blocks)]
        self.encoder = nn.Sequential(
            *encoder, *_norm(config, widths[-1]), nn.Conv3d(widths[-1], 2 * latent, 3, padding=1)
        )
        widths = config.widths_of_decoder
        blocks = config.decoder_blocks or config.blocks
        decoder: list[nn.Module] = [nn.Conv3d(latent, widths[-1], 3, padding=1)]
        decoder += [_Residual(widths[-1], config) for _ in range(blocks)]
        for depth in reversed(range(len(widths))):
            decoder += [_Residual(widths[depth], config) for _ in range(blocks)]
            if depth:
                decoder.append(_Up(widths[depth], widths[depth - 1]))
        self.decoder = nn.Sequential(
            *decoder, *_norm(config, widths[0]), nn.Conv3d(widths[0], 1, 3, padding=1)
        )

    def encode(self, occupied: Tensor) -> Gaussian:
        """Encode grids.

        Args:
            occupied: bool [B, S, S, S].

        Returns:
            The distribution of the latents, at least fp32 [B, C, s, s, s].

        Raises:
            ValueError: If the grids have another side.
        """
        S = self.config.side
        if occupied.ndim != 4 or occupied.shape[1:] != (S, S, S):
            raise ValueError(f"occupied must be [B, {S}, {S}, {S}], got {list(occupied.shape)}")
        dtype = next(self.parameters()).dtype
        mean, logvar = self.encoder(2 * occupied[:, None].to(dtype) - 1).chunk(2, dim=1)
        if mean.dtype in (torch.float16, torch.bfloat16):  # under autocast
            mean, logvar = mean.float(), logvar.float()
        return Gaussian(mean, logvar.clamp(*LOGVAR_RANGE))

    def decode(self, z_BCXYZ: Tensor) -> Tensor:
        """Decode latents.

        Args:
            z_BCXYZ: [B, C, s, s, s].

        Returns:
            Logits [B, S, S, S]. `occupied` says which cells are occupied.

        Raises:
            ValueError: If the latents have another shape.
        """
        C, s = self.config.latent_channels, self.config.latent_side
        if z_BCXYZ.ndim != 5 or z_BCXYZ.shape[1:] != (C, s, s, s):
            raise ValueError(f"z must be [B, {C}, {s}, {s}, {s}], got {list(z_BCXYZ.shape)}")
        return self.decoder(z_BCXYZ)[:, 0]

    def occupied(self, logits_BXYZ: Tensor) -> Tensor:
        """Return where the probability of decoded logits is above the threshold, bool."""
        threshold = self.config.threshold
        return logits_BXYZ > math.log(threshold / (1 - threshold))

    def load_published(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights of a published dense VAE.

        Args:
            weights: The published state dict.

        Raises:
            CheckpointError: If names or shapes do not fit. The message lists all of them.
        """
        copy_weights(weights, self, "the state dict", published_occupancy_keys(self.config))

    def forward(self, occupied: Tensor, noise: Tensor) -> tuple[Tensor, Gaussian]:
        """Encode grids, sample and decode.

        Args:
            occupied: bool [B, S, S, S].
            noise: Standard normal [B, C, s, s, s].

        Returns:
            Logits [B, S, S, S] and the distribution of the latents.
        """
        posterior = self.encode(occupied)
        return self.decode(posterior.sample(noise)), posterior


def occupancy_loss(
    logits: Tensor, occupied: Tensor, posterior: Gaussian, kl_weight: float, share: float
) -> dict[str, Tensor]:
    """Compute the loss of the occupancy VAE.

    Few cells are occupied. The soft Dice term does not count empty cells that are right, so the
    occupied ones are not outweighed.

    Args:
        logits: [B, S, S, S].
        occupied: bool [B, S, S, S], the target.
        posterior: Distribution of the latents.
        kl_weight: Weight of the divergence from a standard normal.
        share: Weight of each asset. 1 / B gives the mean over the assets.

    Returns:
        Scalars: "loss" = bce + dice + kl_weight * kl, its terms "bce", "dice" and "kl", and "iou"
        of the logits' signs. Each is a mean over an asset's cells (for KL its latents), weighted by
        `share` and added over assets.
    """
    target = occupied.to(logits.dtype)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2, 3))
    p = logits.float().sigmoid()
    shared = (p * target).sum((1, 2, 3))
    total = (p + target).sum((1, 2, 3))
    dice = 1 - (2 * shared + 1) / (total + 1)
    kl = posterior.divergence(torch.float32).mean((1, 2, 3, 4))
    iou = intersection_over_union(logits.detach() > 0, occupied, (1, 2, 3)).float()
    parts = {"loss": bce + dice + kl_weight * kl, "bce": bce, "dice": dice, "kl": kl, "iou": iou}
    return {name: share * part.sum() for name, part in parts.items()}


def occupancy_grid(cells: Tensor, side: int, batch_size: int) -> Tensor:
    """Return the dense grid that is true at the given cells.

    Args:
        cells: int [N, 4] = (batch, x, y, z).
        side: Cells S along one side of the grid.
        batch_size: Number B of assets.

    Returns:
        bool [B, S, S, S].

    Raises:
        ValueError: If a cell lies outside the grid.
    """
    grid = torch.zeros(batch_size, side, side, side, dtype=torch.bool, device=cells.device)
    if len(cells):
        limit = torch.tensor([batch_size, side, side, side], device=cells.device)
        if bool(((cells < 0) | (cells >= limit)).any()):
            raise ValueError(f"cells must lie in 0..{side - 1} with batch below {batch_size}")
        grid[tuple(cells.long().unbind(1))] = True
    return grid
