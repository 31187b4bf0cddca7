"""The SS-VAE as the training loop sees it: its losses, and what is shown of held-out assets."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from model.inference.extract_mesh import extract_meshes
from model.sparse_vae import SparseVAE
from pipeline.core.primitives.marching_cubes import extract
from pipeline.core.primitives.voxel_iou import intersection_over_union
from train.data.bricks import BrickLoader, BuildIndex, VAEBatch
from train.engine.distributed import World
from train.engine.mesh_pictures import picture, save_image, side_by_side, write_ply
from train.stages.vae.config import VAETraining
from train.stages.vae.losses import vae_losses


class VAETask:
    """The SS-VAE as the loop sees it."""

    def __init__(self, cfg: VAETraining, world: World, val: BuildIndex):
        torch.manual_seed(cfg.loop.seed)  # the same weights on every rank
        self.cfg, self.world, self.val = cfg, world, val
        self.model = SparseVAE(cfg.model).to(world.device)
        self.model.activation_checkpointing = cfg.loop.activation_checkpointing
        self._flops_a_cell: dict[int, float] = {}

    def losses(self, model: nn.Module, batch: VAEBatch) -> dict[str, Tensor]:
        values, posterior = model(batch.bricks, batch.noise)
        return vae_losses(
            values, posterior.mean, posterior.logvar, batch.bricks, self.cfg.loss, share=batch.share
        )

    def flops(self, batch: VAEBatch) -> float:
        """Counted exactly for the first batch at each resolution, in proportion to cells after that."""
        resolution = batch.bricks.resolution
        if resolution not in self._flops_a_cell:
            self._flops_a_cell[resolution] = self.model.flops(batch.bricks) / batch.tokens
        return self._flops_a_cell[resolution] * batch.tokens

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Losses of held-out assets as they are stored, the latents at their means; over all resolutions and ranks."""
        bricks, names, sums = self.cfg.bricks, ("loss", "in", "ext", "sharp", "kl", "iou"), []
        loader = BrickLoader(
            self.val, seed=0, noise_channels=self.cfg.model.latent_channels, symmetries=False
        )
        for resolution in bricks.resolutions:
            assets = [int(n) for n in self.val.tokens[resolution].nonzero()[0]]
            mine = assets[self.world.rank :: self.world.size][
                : bricks.val_batches * bricks.batch_size
            ]
            for asset in mine:  # one by one: a large one beside others might not fit
                batch = loader.load_assets([asset], resolution).to(self.world.device)
                values, posterior = model(batch.bricks)
                found = vae_losses(
                    values, posterior.mean, posterior.logvar, batch.bricks, self.cfg.loss
                )
                iou = intersection_over_union(values < 0, batch.bricks.values < 0)
                sums.append(torch.stack([*(found[name].double() for name in names[:-1]), iou]))
        total = (
            torch.stack(sums).sum(0) if sums else torch.zeros(len(names), device=self.world.device)
        )
        total = self.world.sum(torch.cat([total, total.new_tensor([len(sums)])])).tolist()
        if not total[-1]:
            return {}
        return {name: value / total[-1] for name, value in zip(names, total, strict=False)}

    def sample(self, model: nn.Module, folder: Path) -> None:
        """Held-out assets at the finest resolution: reconstructions as meshes, and pictures beside the stored ones."""
        resolution = max(self.cfg.bricks.resolutions)
        assets = self.val.tokens[resolution].nonzero()[0][: self.cfg.bricks.reconstructions]
        loader = BrickLoader(
            self.val, seed=0, noise_channels=self.cfg.model.latent_channels, symmetries=False
        )
        rows = []
        for asset in assets:
            batch = loader.load_assets([int(asset)], resolution)
            bricks = batch.bricks.to(self.world.device)
            surface = extract_meshes(bricks.cells, model(bricks)[0])[0]
            write_ply(folder / f"{batch.uids[0]}.ply", *surface)
            rows.append([picture(*extract(batch.bricks.bricks()[0])), picture(*surface)])
        if rows:
            save_image(folder / "reconstructions.png", side_by_side(rows))
