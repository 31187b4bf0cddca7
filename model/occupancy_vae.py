"""The occupancy VAE: the dense grid that says which cells an asset has, to a small dense grid of latents and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import OccupancyConfig
from pipeline.core.primitives.voxel_iou import intersection_over_union

LOGVAR = (-30.0, 20.0)  # clamp of log variances; paper, sec. 3


class Gaussian(NamedTuple):
    """A diagonal normal distribution of every latent; both [B, C, X, Y, Z] fp32."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, for standard normal noise of the mean's shape."""
        return self.mean + (0.5 * self.logvar).exp() * noise


def _norm(groups: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU())


class _Residual(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), the last convolution zero at first."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.first = nn.Sequential(
            *_norm(groups, channels), nn.Conv3d(channels, channels, 3, padding=1)
        )
        self.second = nn.Sequential(
            *_norm(groups, channels), nn.Conv3d(channels, channels, 3, padding=1)
        )
        for parameter in self.second[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class _Up(nn.Module):
    """Every cell becomes 2^3: a convolution to eight times the channels, which are dealt out in space."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, 8 * out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        B, C, X, Y, Z = y.shape
        y = y.view(B, C // 8, 2, 2, 2, X, Y, Z).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return y.reshape(B, C // 8, 2 * X, 2 * Y, 2 * Z)


class OccupancyVAE(nn.Module):
    """Occupancy of side^3 cells <-> latent_side^3 latents of latent_channels, by 3D convolutions as in TRELLIS."""

    Config = OccupancyConfig

    def __init__(self, config: OccupancyConfig):
        super().__init__()
        self.config = config
        widths, blocks, groups, latent = (
            config.widths,
            config.blocks,
            config.groups,
            config.latent_channels,
        )
        encoder: list[nn.Module] = [nn.Conv3d(1, widths[0], 3, padding=1)]
        for level, width in enumerate(widths):
            if level:
                encoder.append(nn.Conv3d(widths[level - 1], width, 2, stride=2))
            encoder += [_Residual(width, groups) for _ in range(blocks)]
        encoder += [_Residual(widths[-1], groups) for _ in range(blocks)]
        self.encoder = nn.Sequential(
            *encoder, *_norm(groups, widths[-1]), nn.Conv3d(widths[-1], 2 * latent, 3, padding=1)
        )
        decoder: list[nn.Module] = [nn.Conv3d(latent, widths[-1], 3, padding=1)]
        decoder += [_Residual(widths[-1], groups) for _ in range(blocks)]
        for level in reversed(range(len(widths))):
            decoder += [_Residual(widths[level], groups) for _ in range(blocks)]
            if level:
                decoder.append(_Up(widths[level], widths[level - 1]))
        self.decoder = nn.Sequential(
            *decoder, *_norm(groups, widths[0]), nn.Conv3d(widths[0], 1, 3, padding=1)
        )

    def encode(self, occupied: Tensor) -> Gaussian:
        """bool [B, S, S, S] -> the latents' distribution, [B, C, s, s, s]. ValueError for another side."""
        S = self.config.side
        if occupied.ndim != 4 or occupied.shape[1:] != (S, S, S):
            raise ValueError(f"occupied must be [B, {S}, {S}, {S}], got {list(occupied.shape)}")
        dtype = next(self.parameters()).dtype
        mean, logvar = self.encoder(2 * occupied[:, None].to(dtype) - 1).chunk(2, dim=1)
        if mean.dtype in (torch.float16, torch.bfloat16):  # under autocast
            mean, logvar = mean.float(), logvar.float()
        return Gaussian(mean, logvar.clamp(*LOGVAR))

    def decode(self, z_BCXYZ: Tensor) -> Tensor:
        """[B, C, s, s, s] -> logits [B, S, S, S]: a cell is occupied where they are positive."""
        C, s = self.config.latent_channels, self.config.latent_side
        if z_BCXYZ.ndim != 5 or z_BCXYZ.shape[1:] != (C, s, s, s):
            raise ValueError(f"z must be [B, {C}, {s}, {s}, {s}], got {list(z_BCXYZ.shape)}")
        return self.decoder(z_BCXYZ)[:, 0]

    def forward(self, occupied: Tensor, noise: Tensor) -> tuple[Tensor, Gaussian]:
        """Logits [B, S, S, S] of a sampled latent, and the distribution it came from."""
        posterior = self.encode(occupied)
        return self.decode(posterior.sample(noise)), posterior


def occupancy_loss(
    logits: Tensor,
    occupied: Tensor,
    posterior: Gaussian,
    kl_weight: float,
    share: float | None = None,
) -> dict[str, Tensor]:
    """Scalars: bce + dice + kl_weight * kl as "loss", each of them, and the "iou" of the logits' signs.

    Means over an asset's cells (KL: latents), then over assets: share * their sum, by default share = 1 / assets. Few
    cells are occupied, so the soft Dice term, which does not count the empty ones that are right, keeps them from being
    outvoted.
    """
    share = 1 / len(logits) if share is None else share
    target = occupied.to(logits.dtype)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2, 3))
    p = logits.float().sigmoid()
    shared, either = (p * target).sum((1, 2, 3)), (p + target).sum((1, 2, 3))
    dice = 1 - (2 * shared + 1) / (either + 1)
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean((1, 2, 3, 4))
    iou = intersection_over_union(logits.detach() > 0, occupied, (1, 2, 3)).float()
    parts = {"loss": bce + dice + kl_weight * kl, "bce": bce, "dice": dice, "kl": kl, "iou": iou}
    return {name: share * part.sum() for name, part in parts.items()}


def occupancy_grid(cells: Tensor, side: int, batch_size: int) -> Tensor:
    """int [N, 4] (batch, x, y, z) -> bool [B, S, S, S]. ValueError if a cell lies outside."""
    grid = torch.zeros(batch_size, side, side, side, dtype=torch.bool, device=cells.device)
    if len(cells):
        limit = torch.tensor([batch_size, side, side, side], device=cells.device)
        if bool(((cells < 0) | (cells >= limit)).any()):
            raise ValueError(f"cells must lie in 0..{side - 1} with batch below {batch_size}")
        grid[tuple(cells.long().unbind(1))] = True
    return grid
