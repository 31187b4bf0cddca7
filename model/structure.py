"""The structure stage: from an image to the cells that hold the surface, through latents of the occupancy grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from kernels import token_order
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.conditioning.image_encoder import ImageBatch
from model.config import Guidance, Method, StructureConfig
from model.image_tokens import ImageTokens
from model.occupancy_vae import OccupancyVAE
from model.sparse_tensor import Level, SparseTensor


class Structure(nn.Module):
    """Occupancy VAE and flow model. paper, sec. 4 (the first stage, as in TRELLIS)"""

    Config = StructureConfig

    def __init__(self, config: StructureConfig):
        super().__init__()
        self.config = config
        self.vae = OccupancyVAE(config.occupancy)
        self.flow = ConditionedDiT(config.flow)

    @property
    def resolution(self) -> int:
        """R of the bricks whose cells this generates."""
        return 8 * self.config.occupancy.side

    def forward(
        self, x: SparseTensor, t_B: Tensor, images: ImageBatch, dropped_B: Tensor | None = None
    ) -> Tensor:
        """The flow's velocity at x, normalised latents on `dense_level`; see `ConditionedDiT`."""
        return self.flow(x, t_B, images, dropped_B)

    def generate(
        self,
        condition: ImageTokens,
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: Guidance,
        method: Method = "euler",
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> Level:
        """The occupied cells of one asset an image, at resolution R / 8; an asset may come out empty.

        `condition` is this stage's own (`flow.condition`). ValueError as `ConditionedDiT.generate`.
        """
        level = dense_level(
            self.config.occupancy.latent_side, condition.batch_size, condition.feats_SC.device
        )
        z_NC = self.flow.generate(
            level,
            condition,
            seeds,
            steps=steps,
            guidance=guidance,
            method=method,
            progress=progress,
        )
        with torch.no_grad():
            logits = self.vae.decode(
                rows_to_grid(z_NC, level).to(next(self.vae.parameters()).dtype)
            )
        return occupied_level(logits > 0)


def dense_level(side: int, batch_size: int, device: torch.device | str = "cpu") -> Level:
    """Every cell of a side^3 grid, for each asset of a batch."""
    axis = torch.arange(side)
    coords = torch.cartesian_prod(torch.arange(batch_size), axis, axis, axis)
    coords = coords[token_order(coords)].int().to(device)
    return Level.from_coords(coords, side, batch_size)


def grid_to_rows(grid_BCXYZ: Tensor, level: Level) -> Tensor:
    """Dense [B, C, s, s, s] -> [N, C], rows as the level's cells."""
    b, x, y, z = level.coords.long().unbind(1)
    return grid_BCXYZ.permute(0, 2, 3, 4, 1)[b, x, y, z]


def rows_to_grid(rows_NC: Tensor, level: Level) -> Tensor:
    """[N, C] on the level's cells -> dense [B, C, s, s, s], zero elsewhere."""
    side = level.resolution
    grid = rows_NC.new_zeros(level.batch_size, side, side, side, rows_NC.shape[1])
    b, x, y, z = level.coords.long().unbind(1)
    grid[b, x, y, z] = rows_NC
    return grid.permute(0, 4, 1, 2, 3).contiguous()


def occupied_level(occupied_BXYZ: Tensor) -> Level:
    """The cells where a bool grid [B, S, S, S] is true. One device-to-host copy, and one of the level's."""
    coords = occupied_BXYZ.nonzero()
    coords = coords[token_order(coords)].int()
    return Level.from_coords(coords, occupied_BXYZ.shape[1], len(occupied_BXYZ))
