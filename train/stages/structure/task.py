"""Training of the two parts of the structure stage: losses, validation and previews."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.image_tokens import ImageTokens
from model.occupancy_vae import OccupancyVAE, occupancy_grid, occupancy_loss
from model.rectified_flow import interpolate, velocity_target
from model.sparse_tensor import Level, SparseTensor
from model.structure import Structure, dense_level, grid_to_rows, rows_to_grid
from pipeline.core.primitives.voxel_iou import intersection_over_union
from train.data.bricks import BuildIndex
from train.engine.batch_sampler import SampleId
from train.engine.distributed import World
from train.engine.mesh_pictures import save_image, side_by_side
from train.stages.conditioned import VALIDATION_TIMES, preview_groups, write_ious
from train.stages.structure.cell_pictures import draw_cells, resize
from train.stages.structure.config import StructureTraining
from train.stages.structure.data import GridBatch, GridLoader
from train.stages.task import StageTask
from train.stages.validation import assets_of_rank, mean_over_ranks

LATENT_BYTES = 1 << 30  # of encoded assets that are kept on the device

LOSS_NAMES = ("loss", "bce", "dice", "kl", "iou")


class OccupancyTask(StageTask[StructureTraining]):
    """What the occupancy VAE adds to the trainer. The arguments are those of `StageTask`."""

    def __init__(self, cfg: StructureTraining, world: World, val: BuildIndex):
        super().__init__(cfg, world, val, cfg.vae.loop.seed)
        self.model = OccupancyVAE(cfg.model.occupancy).to(world.device)
        self._flops_per_asset: float | None = None

    def losses(self, model: nn.Module, batch: GridBatch) -> dict[str, Tensor]:
        """Return the loss terms of `occupancy_loss` for samples of the posterior."""
        logits, posterior = model(batch.occupied, self._noise_grid(batch))
        return occupancy_loss(
            logits, batch.occupied, posterior, self.cfg.vae.kl_weight, batch.share
        )

    def _noise_grid(self, batch: GridBatch) -> Tensor:
        return rows_to_grid(batch.noise, latent_level(self.cfg, batch))

    def flops(self, batch: GridBatch) -> float:
        """Return the operations of one forward pass, counted for an asset of the first batch."""
        if self._flops_per_asset is None:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                self.model(batch.occupied[:1], self._noise_grid(batch)[:1])
            self._flops_per_asset = counter.get_total_flops()
        return self._flops_per_asset * batch.samples

    def validate(self, model: Any) -> dict[str, float]:
        """Return mean losses and the IoU of held-out assets.

        The assets are decoded from the means of their posteriors. All ranks call this together.
        """
        loader = GridLoader(self.val, self.cfg, images=False, use="validation")
        assets = validation_assets(self.val, self.cfg, self.world, self.cfg.vae.batch_size)
        sums = torch.zeros(len(LOSS_NAMES), dtype=torch.float64, device=self.world.device)
        for asset in assets:
            batch = loader.batch([SampleId(asset, 0)], 1.0).to(self.world.device)
            posterior = model.encode(batch.occupied)
            logits = model.decode(posterior.mean)
            losses = occupancy_loss(
                logits, batch.occupied, posterior, self.cfg.vae.kl_weight, batch.share
            )
            sums += torch.stack([losses[name].double() for name in LOSS_NAMES])
        return mean_over_ranks(sums, len(assets), LOSS_NAMES, self.world)

    def sample(self, model: Any, folder: Path) -> None:
        """Reconstruct held-out assets. Writes cells.png with one row per asset."""
        loader = GridLoader(self.val, self.cfg, images=False, use="validation")
        rows = []
        for asset in validation_assets(self.val, self.cfg, World(), 1)[: self.cfg.samples]:
            batch = loader.batch([SampleId(asset, 0)], 1.0).to(self.world.device)
            decoded = model.decode(model.encode(batch.occupied).mean) > 0
            rows.append([draw_cells(batch.occupied[0]), draw_cells(decoded[0])])
        if rows:
            sheet = side_by_side(rows, ("stored cells", "decoded cells"))
            save_image(folder / "cells.png", sheet)


class FlowTask(StageTask[StructureTraining]):
    """What the flow over the latents of the occupancy VAE adds to the trainer.

    The model contains the VAE, which is not trained, so that a checkpoint is the whole stage.

    Args:
        cfg: Options of the run. They seed the initial weights, which are equal on all ranks.
        world: The ranks of the run.
        train: The training assets.
        val: The held-out assets.
        vae: The trained VAE. Its weights are copied.
    """

    model: Structure

    def __init__(
        self,
        cfg: StructureTraining,
        world: World,
        train: BuildIndex,
        val: BuildIndex,
        vae: OccupancyVAE,
    ):
        super().__init__(cfg, world, val, cfg.flow.loop.seed)
        self.train = train
        self.model = Structure(cfg.model)
        self.model.vae.load_state_dict(vae.state_dict())
        self.model.vae.requires_grad_(False)
        self.model.flow.dit.kept_activations = cfg.flow.kept_activations
        self.model.to(world.device)
        self._flops_per_asset: float | None = None
        self._encoded: dict[tuple[str, int], Tensor] = {}  # [s^3, C] by uid and symmetry

    @torch.no_grad()
    def measure(self, loader: GridLoader) -> None:
        """Set the mean and the deviation of the latents in the model.

        They are measured on `cfg.flow.statistics` training assets at even distances.

        Args:
            loader: Loads training assets without images and without augmentation.
        """
        assets = self.train.tokens[self.cfg.resolution].nonzero()[0]
        count = min(self.cfg.flow.statistics, len(assets))
        rows = 0
        total_C = torch.zeros(())
        squares_C = torch.zeros(())
        for asset in assets[np.arange(count) * len(assets) // count]:
            batch = loader.batch([SampleId(int(asset), 0)], 1.0).to(self.world.device)
            z_NC = self._latents(batch).double()
            rows += len(z_NC)
            total_C = total_C + z_NC.sum(0)
            squares_C = squares_C + z_NC.square().sum(0)
        mean_C = total_C / rows
        std_C = ((squares_C - rows * mean_C.square()) / (rows - 1)).clamp(min=1e-6).sqrt()
        self.model.flow.dit.set_statistics(mean_C.float(), std_C.float())

    def losses(self, model: nn.Module, batch: GridBatch) -> dict[str, Tensor]:
        """Return the squared error of the velocity: its mean in each asset, then over assets."""
        loss_B = self._errors(model, batch, batch.times, batch.dropped)
        return {"loss": batch.share * loss_B.sum()}

    def _latents(self, batch: GridBatch) -> Tensor:
        """Return the means of the posteriors, fp32 [B * s^3, C].

        Encoding takes longer than a training step of a small flow, so the latents are kept, up to
        LATENT_BYTES. Each asset is encoded alone: its latents do not depend on the batch, and a
        resumed run, which has to encode again, gets the same ones.
        """
        keys = zip(batch.uids, batch.symmetries, strict=True)
        return torch.cat([self._encode(batch, *item) for item in enumerate(keys)])

    def _encode(self, batch: GridBatch, number: int, key: tuple[str, int]) -> Tensor:
        """Return the latents of one asset of a batch, fp32 [s^3, C]."""
        kept = self._encoded.get(key)
        if kept is not None:
            return kept
        with torch.autocast(self.world.device.type, enabled=False):
            grid = self.model.vae.encode(batch.occupied[number : number + 1]).mean
        latents_NC = grid_to_rows(grid, _level(grid.shape[-1], 1, grid.device))
        if (len(self._encoded) + 1) * latents_NC.nbytes <= LATENT_BYTES:
            self._encoded[key] = latents_NC
        return latents_NC

    def _errors(self, model: nn.Module, batch: GridBatch, t_B: Tensor, dropped_B: Tensor) -> Tensor:
        """Return the mean squared error of the velocity over each asset's latents, [B]."""
        assert batch.images is not None
        level = latent_level(self.cfg, batch)
        with torch.no_grad():
            x0_NC = self.model.flow.dit.normalize(self._latents(batch))
        x_NC = interpolate(x0_NC, batch.noise, t_B[level.coords[:, 0].long()])
        velocity_NC = model(SparseTensor(x_NC, level), t_B, batch.images, dropped_B)
        error_NC = (velocity_NC - velocity_target(x0_NC, batch.noise)).square()
        return error_NC.view(batch.samples, -1).mean(1)

    def flops(self, batch: GridBatch) -> float:
        """Return the operations of one forward pass of the DiT, counted for the first batch."""
        if self._flops_per_asset is None and batch.images is not None:
            images = batch.images
            tokens = ImageTokens(
                images.pixels.new_empty(0, 0), images.coords, images.starts, images.max_tokens
            )
            flops = self.model.flow.dit.flops(latent_level(self.cfg, batch), tokens)
            self._flops_per_asset = flops / batch.samples
        return (self._flops_per_asset or 0.0) * batch.samples

    def validate(self, model: Any) -> dict[str, float]:
        """Return the mean loss of held-out assets at VALIDATION_TIMES.

        Noise and views are the same in every validation. All ranks call this together.
        """
        loader = GridLoader(self.val, self.cfg, images=True, use="validation")
        assets = validation_assets(self.val, self.cfg, self.world, self.cfg.flow.batch_size)
        sums = torch.zeros(1, dtype=torch.float64, device=self.world.device)
        for asset in assets:
            batch = loader.batch([SampleId(asset, 0)], 1.0).to(self.world.device)
            errors = [
                self._errors(model, batch, torch.full_like(batch.times, t), batch.dropped)
                for t in VALIDATION_TIMES
            ]
            sums += torch.stack(errors).mean().double()
        return mean_over_ranks(sums, len(assets), ("loss",), self.world)

    def sample(self, model: Any, folder: Path) -> None:
        """Generate the cells of training assets from held-out views, and of held-out assets.

        Writes cells.png with one row per asset, and iou.json with the IoU between generated and
        stored cells.
        """
        ious_by_group = {}
        rows = []
        for group in preview_groups(self.cfg, self.train, self.val):
            index = group.index
            loader = GridLoader(index, self.cfg, images=True, use=group.use)
            ious = []
            for asset in validation_assets(index, self.cfg, World(), 1)[: self.cfg.samples]:
                batch = loader.batch([SampleId(asset, 0)], 1.0).to(self.world.device)
                assert batch.images is not None
                image_tokens = model.flow.encode_images(batch.images)
                cells = generate_cells(model, image_tokens, asset, self.cfg)
                ious.append(float(intersection_over_union(cells, batch.occupied).float()))
                image = batch.images.pixels[0].permute(1, 2, 0).cpu().numpy()
                rows.append([resize(image), draw_cells(cells[0]), draw_cells(batch.occupied[0])])
            ious_by_group[group.name] = ious
        write_ious(folder, ious_by_group)
        if rows:
            sheet = side_by_side(rows, ("image", "generated cells", "stored cells"))
            save_image(folder / "cells.png", sheet)


def latent_level(cfg: StructureTraining, batch: GridBatch) -> Level:
    """Return the dense level of a batch's latents. Batches of one size share it."""
    return _level(cfg.model.occupancy.latent_side, batch.samples, batch.noise.device)


_level = lru_cache(maxsize=4)(dense_level)  # sorting its coordinates takes longer than a small step


def generate_cells(
    model: Structure, image_tokens: ImageTokens, seed: int, cfg: StructureTraining
) -> Tensor:
    """Generate the cells of one asset from its image.

    Args:
        model: The stage.
        image_tokens: Tokens of one image.
        seed: Seed of the noise.
        cfg: Options of the run, which have the sampling steps and the guidance of previews.

    Returns:
        Whether each cell is occupied, bool [1, S, S, S].
    """
    level = model.generate(image_tokens, [seed], cfg.flow.preview_sampling)
    return occupancy_grid(level.coords, level.resolution, 1)


def validation_assets(
    index: BuildIndex, cfg: StructureTraining, world: World, batch_size: int
) -> list[int]:
    """Return the assets with cells that a rank validates or draws.

    Args:
        index: Assets of the build.
        cfg: Options of the run.
        world: The ranks.
        batch_size: Number of assets in a batch, of which `cfg.val_batches` are validated.
    """
    assets = [int(asset) for asset in index.tokens[cfg.resolution].nonzero()[0]]
    return assets_of_rank(assets, world, max(cfg.val_batches * batch_size, cfg.samples))
