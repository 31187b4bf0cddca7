"""`python -m train.vae`: train the SS-VAE on a build's SDF bricks; under torchrun on several GPUs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.mesh import extract_meshes
from model.sparse import BrickBatch
from model.vae import SparseVAE
from pipeline.isosurface import extract
from pipeline.schema import UserError
from train.command import command, configure
from train.config import VAE_PRESETS, VAETraining, resolved
from train.data import BrickLoader, Catalogue, TrainBatch, read_catalogue
from train.distributed import World, join
from train.loop import fit
from train.losses import vae_losses
from train.pictures import picture, save_image, side_by_side, write_ply
from train.plan import Planner
from train.prefetch import Prefetcher

log = logging.getLogger(__name__)

PROG = "python -m train.vae"


class VAETask:
    """The SS-VAE as the loop sees it."""

    def __init__(self, cfg: VAETraining, world: World, val: Catalogue):
        torch.manual_seed(cfg.loop.seed)  # the same weights on every rank
        self.cfg, self.world, self.val = cfg, world, val
        self.model = SparseVAE(cfg.model).to(world.device)
        self.model.activation_checkpointing = cfg.loop.activation_checkpointing
        self._flops_a_cell: dict[int, float] = {}

    def losses(self, model: nn.Module, batch: TrainBatch) -> dict[str, Tensor]:
        values, posterior = model(batch.bricks, batch.noise)
        return vae_losses(values, posterior.mean, posterior.logvar, batch.bricks, self.cfg.loss, share=batch.share)

    def flops(self, batch: TrainBatch) -> float:
        """Counted exactly for the first batch at each resolution, in proportion to cells after that."""
        resolution = batch.bricks.resolution
        if resolution not in self._flops_a_cell:
            self._flops_a_cell[resolution] = self.model.flops(batch.bricks) / batch.tokens
        return self._flops_a_cell[resolution] * batch.tokens

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Losses of held-out assets as they are stored, the latents at their means; over all resolutions and ranks."""
        bricks, names, sums = self.cfg.bricks, ("loss", "in", "ext", "sharp", "kl", "iou"), []
        loader = BrickLoader(self.val, seed=0, noise_channels=self.cfg.model.latent_channels, symmetries=False)
        for resolution in bricks.resolutions:
            assets = [int(n) for n in self.val.tokens[resolution].nonzero()[0]]
            mine = assets[self.world.rank :: self.world.size][: bricks.val_batches * bricks.batch_size]
            for asset in mine:  # one by one: a large one beside others might not fit
                batch = loader.load_assets([asset], resolution).to(self.world.device)
                values, posterior = model(batch.bricks)
                found = vae_losses(values, posterior.mean, posterior.logvar, batch.bricks, self.cfg.loss)
                overlap = inside_iou(values, batch.bricks.values)
                sums.append(torch.stack([*(found[name].double() for name in names[:-1]), overlap]))
        total = torch.stack(sums).sum(0) if sums else torch.zeros(len(names), device=self.world.device)
        total = self.world.sum(torch.cat([total, total.new_tensor([len(sums)])])).tolist()
        if not total[-1]:
            return {}
        return {name: value / total[-1] for name, value in zip(names, total, strict=False)}

    def sample(self, model: nn.Module, folder: Path) -> None:
        """Held-out assets at the finest resolution: reconstructions as meshes, and pictures beside the stored ones."""
        resolution = max(self.cfg.bricks.resolutions)
        assets = self.val.tokens[resolution].nonzero()[0][: self.cfg.bricks.reconstructions]
        loader = BrickLoader(self.val, seed=0, noise_channels=self.cfg.model.latent_channels, symmetries=False)
        rows = []
        for asset in assets:
            batch = loader.load_assets([int(asset)], resolution)
            surface = reconstruct(model, batch.bricks.to(self.world.device))[0]
            write_ply(folder / f"{batch.uids[0]}.ply", *surface)
            rows.append([picture(*extract(batch.bricks.bricks()[0])), picture(*surface)])
        if rows:
            save_image(folder / "reconstructions.png", side_by_side(rows))


def inside_iou(values: Tensor, stored: Tensor) -> Tensor:
    """Intersection over union of the points below 0 among the stored ones, float64 []; 1 if neither has any."""
    ours, theirs = values < 0, stored < 0
    union = (ours | theirs).sum()
    return torch.where(union > 0, (ours & theirs).sum().double() / union.clamp(min=1), 1.0)


@torch.no_grad()
def reconstruct(model: nn.Module, batch: BrickBatch) -> list[tuple[Any, Any]]:
    """Every asset through encoder (its mean) and decoder: [(vertices, faces)]."""
    values, _ = model(batch)
    return extract_meshes(batch.cells, values)


def train(cfg: VAETraining, world: World) -> int:
    """A run by its config; returns the steps done. UserError and RunError as the modules it calls."""
    catalogue = read_catalogue(cfg.data, cfg.bricks.resolutions)
    chosen, val = catalogue.split("train"), catalogue.split("val")
    task = VAETask(cfg, world, val)
    planner = Planner(
        chosen.tokens,
        batch_size=cfg.bricks.batch_size,
        world_size=world.size,
        seed=cfg.loop.seed,
        max_tokens=cfg.bricks.max_tokens,
    )
    loader = BrickLoader(
        chosen,
        seed=cfg.loop.seed,
        noise_channels=cfg.model.latent_channels,
        symmetries=cfg.bricks.symmetries,
        max_bad_share=cfg.bricks.max_bad_share,
        largest=cfg.bricks.max_tokens,
    )
    if world.is_first:
        count = sum(parameter.numel() for parameter in task.model.parameters())
        log.info(
            "SS-VAE of %.2f M parameters, %d training and %d held-out assets of %s at R = %s, %d x %s",
            count / 1e6,
            len(chosen),
            len(val),
            cfg.data,
            " ".join(map(str, cfg.bricks.resolutions)),
            world.size,
            world.device.type,
        )
        for resolution, left_out in planner.left_out.items():
            if left_out:
                log.warning("%d assets exceed max_tokens at R = %d and are left out", left_out, resolution)
        if not len(val):
            log.warning("%s has no held-out assets: nothing is validated", cfg.data)
    stream = Prefetcher(planner, partial(loader.load, rank=world.rank), workers=cfg.bricks.workers)
    return fit(task, stream, cfg.loop, out=cfg.out, world=world, config=described(cfg), init=cfg.init)


def described(cfg: VAETraining) -> dict[str, Any]:
    """What a checkpoint's config.json says of the run; `model` and `config` are what loading the model takes."""
    training = resolved(cfg)
    config = training.pop("model")
    for name in ("data", "out", "device", "init", "preset"):  # where it ran, not what it is
        training.pop(name)
    training["bricks"] = {
        name: value
        for name, value in training["bricks"].items()
        if name not in ("workers", "val_batches", "reconstructions")
    }
    return {"model": SparseVAE.__name__, "config": config, "training": training}


def main(args: Sequence[str]) -> None:
    cfg = configure(VAE_PRESETS, "tiny", args, prog=PROG)
    if cfg.init is not None and not cfg.init.exists():
        raise UserError(f"{cfg.init} does not exist; train it first, or name a checkpoint with --init")
    with join(cfg.device) as world:
        if not world.is_first:
            logging.getLogger().setLevel(logging.WARNING)
        done = train(cfg, world)
        log.info("%d steps done; checkpoints in %s", done, cfg.out)


if __name__ == "__main__":
    command(main)
