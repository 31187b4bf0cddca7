"""The structure stage: from an image to the cells near the surface.

A flow model generates latents on a small dense grid, and the occupancy VAE decodes them to the
dense grid of cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from kernels import token_order
from model.conditioning.image_conditioned_dit import ConditionedDiT, views_of
from model.conditioning.image_encoder import ImageBatch
from model.config import SamplingOptions, StructureConfig
from model.image_tokens import ImageTokens
from model.occupancy_vae import OccupancyVAE
from model.sparse_tensor import Level, SparseTensor


class Structure(nn.Module):
    """The occupancy VAE and the flow model over its latents, as in TRELLIS.

    Direct3D-S2 paper (arXiv 2505.17412), section 4, uses TRELLIS for its first stage.

    Args:
        config: The configuration.
        parts: A VAE and a flow model of this configuration. None makes them with random weights.
    """

    Config = StructureConfig

    def __init__(
        self,
        config: StructureConfig,
        parts: tuple[OccupancyVAE, ConditionedDiT] | None = None,
    ):
        super().__init__()
        self.config = config
        self.vae, self.flow = parts or (OccupancyVAE(config.occupancy), ConditionedDiT(config.flow))

    @property
    def resolution(self) -> int:
        """Resolution R of the bricks whose cells the stage generates."""
        return self.config.resolution

    def forward(
        self, x: SparseTensor, t_B: Tensor, images: ImageBatch, dropped_B: Tensor | None = None
    ) -> Tensor:
        """Estimate the velocity at normalised latents on `dense_level`; see `ConditionedDiT`."""
        return self.flow(x, t_B, images, dropped_B)

    def generate(
        self,
        image: ImageTokens | Sequence[ImageTokens],
        seeds: Sequence[int],
        sampling: SamplingOptions,
        *,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> Level:
        """Generate the occupied cells of each asset.

        Args:
            image: Image tokens of this stage's own encoder, `flow.encode_images`, or one entry for
                each of several views.
            seeds: Seed of each asset's noise.
            sampling: Steps, guidance and solver.
            progress: Wraps the steps, as tqdm does.

        Returns:
            The cells at resolution R / 8. An asset may have none.

        Raises:
            ValueError: As `ConditionedDiT.generate`.
        """
        view = views_of(image)[0]
        level = dense_level(
            self.config.occupancy.latent_side, view.batch_size, view.feats_SC.device
        )
        z_NC = self.flow.generate(level, image, seeds, sampling, progress=progress)
        dtype = next(self.vae.parameters()).dtype
        with torch.no_grad():
            logits = self.vae.decode(rows_to_grid(z_NC, level).to(dtype))
        return occupied_level(self.vae.occupied(logits))


def dense_level(side: int, batch_size: int, device: torch.device | str = "cpu") -> Level:
    """Return a level with every voxel of a side^3 grid, for each asset of a batch."""
    axis = torch.arange(side)
    coords = torch.cartesian_prod(torch.arange(batch_size), axis, axis, axis)
    coords = coords[token_order(coords)].int().to(device)
    return Level.from_coords(coords, side, batch_size)


def grid_to_rows(grid_BCXYZ: Tensor, level: Level) -> Tensor:
    """Gather a dense grid at the voxels of a level.

    Args:
        grid_BCXYZ: [B, C, s, s, s].
        level: N voxels at resolution s.

    Returns:
        [N, C], rows as in the level.
    """
    b, x, y, z = level.coords.long().unbind(1)
    return grid_BCXYZ.permute(0, 2, 3, 4, 1)[b, x, y, z]


def rows_to_grid(rows_NC: Tensor, level: Level) -> Tensor:
    """Scatter rows to a dense grid, which is zero elsewhere.

    Args:
        rows_NC: [N, C], rows as in the level.
        level: N voxels at resolution s.

    Returns:
        [B, C, s, s, s].
    """
    side = level.resolution
    grid = rows_NC.new_zeros(level.batch_size, side, side, side, rows_NC.shape[1])
    b, x, y, z = level.coords.long().unbind(1)
    grid[b, x, y, z] = rows_NC
    return grid.permute(0, 4, 1, 2, 3).contiguous()


def occupied_level(occupied_BXYZ: Tensor) -> Level:
    """Return the level of the cells where a grid is true.

    This copies from the device to the host twice.

    Args:
        occupied_BXYZ: bool [B, S, S, S].
    """
    coords = occupied_BXYZ.nonzero()
    coords = coords[token_order(coords)].int()
    return Level.from_coords(coords, occupied_BXYZ.shape[1], len(occupied_BXYZ))
