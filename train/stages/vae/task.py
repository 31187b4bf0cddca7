"""Training of the SS-VAE: its losses, validation and previews."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from model.inference.extract_mesh import extract_meshes
from model.sparse_vae import SparseVAE
from pipeline.core.primitives.marching_cubes import extract
from pipeline.core.primitives.voxel_iou import solid_intersection_over_union
from train.data.bricks import BrickLoader, BuildIndex, VAEBatch
from train.engine.distributed import World
from train.engine.mesh_pictures import picture, save_image, side_by_side, write_ply
from train.stages.task import StageTask
from train.stages.vae.config import VAETraining
from train.stages.vae.losses import vae_losses
from train.stages.validation import assets_of_rank, mean_over_ranks

LOSS_NAMES = ("loss", "in", "ext", "sharp", "kl")


class VAETask(StageTask[VAETraining]):
    """What the SS-VAE adds to the trainer. The arguments are those of `StageTask`."""

    def __init__(self, cfg: VAETraining, world: World, val: BuildIndex):
        super().__init__(cfg, world, val, cfg.loop.seed)
        self.model = SparseVAE(cfg.model).to(world.device)
        self.model.activation_checkpointing = cfg.activation_checkpointing
        self._flops_per_cell: dict[int, float] = {}  # by resolution

    def losses(self, model: nn.Module, batch: VAEBatch) -> dict[str, Tensor]:
        """Return the loss terms of `vae_losses` for samples of the posterior."""
        values, posterior = model(batch.bricks, batch.noise)
        return vae_losses(values, posterior, batch.bricks, self.cfg.loss, batch.share)

    def flops(self, batch: VAEBatch) -> float:
        """Return the operations of one forward pass.

        They are counted for the first batch at each resolution. Later ones are estimated in
        proportion to their cells.
        """
        resolution = batch.bricks.resolution
        if resolution not in self._flops_per_cell:
            self._flops_per_cell[resolution] = self.model.flops(batch.bricks) / batch.tokens
        return self._flops_per_cell[resolution] * batch.tokens

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Return mean losses and the IoU of held-out assets at all resolutions.

        The assets are decoded from the means of their posteriors. All ranks call this together.
        """
        bricks = self.cfg.bricks
        metrics = []
        loader = self._validation_loader()
        for resolution in bricks.resolutions:
            assets = [int(asset) for asset in self.val.tokens[resolution].nonzero()[0]]
            most = bricks.val_batches * bricks.batch_size
            for asset in assets_of_rank(assets, self.world, most):
                # One asset at a time: a large one together with others might exceed the memory.
                batch = loader.load_assets([asset], resolution).to(self.world.device)
                values, posterior = model(batch.bricks)
                losses = vae_losses(values, posterior, batch.bricks, self.cfg.loss, 1.0)
                iou = solid_intersection_over_union(values, batch.bricks.values, resolution)
                metrics.append(torch.stack([*(losses[name].double() for name in LOSS_NAMES), iou]))
        names = (*LOSS_NAMES, "iou")
        sums = torch.zeros(len(names), device=self.world.device)
        if metrics:
            sums = torch.stack(metrics).sum(0)
        return mean_over_ranks(sums, len(metrics), names, self.world)

    def sample(self, model: nn.Module, folder: Path) -> None:
        """Reconstruct held-out assets at the finest resolution.

        Writes one PLY file per asset, and reconstructions.png with one row per asset.
        """
        resolution = max(self.cfg.bricks.resolutions)
        assets = self.val.tokens[resolution].nonzero()[0][: self.cfg.bricks.reconstructions]
        loader = self._validation_loader()
        rows = []
        for asset in assets:
            batch = loader.load_assets([int(asset)], resolution)
            bricks = batch.bricks.to(self.world.device)
            surface = extract_meshes(bricks.cells, model(bricks)[0])[0]
            write_ply(folder / f"{batch.uids[0]}.ply", *surface)
            rows.append([picture(*extract(batch.bricks.bricks()[0])), picture(*surface)])
        if rows:
            sheet = side_by_side(rows, ("stored surface", "reconstruction"))
            save_image(folder / "reconstructions.png", sheet)

    def _validation_loader(self) -> BrickLoader:
        channels = self.cfg.model.latent_channels
        return BrickLoader(self.val, seed=0, noise_channels=channels, symmetries=False)
