"""`python -m train.vae`: train the SS-VAE on a build's SDF bricks; under torchrun on several GPUs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from model.sparse_vae import SparseVAE
from pipeline.core.cli import command, parse_with_presets
from pipeline.core.hashing import to_json
from train.data.bricks import BrickLoader, read_build_index
from train.engine import checkpoint
from train.engine.batch_sampler import BatchSampler
from train.engine.distributed import World, join_world
from train.engine.prefetch import Prefetcher
from train.engine.trainer import fit
from train.stages.vae.config import VAE_PRESETS, VAETraining
from train.stages.vae.task import VAETask

log = logging.getLogger(__name__)

PROG = "python -m train.vae"


def train(cfg: VAETraining, world: World) -> int:
    """A run by its config; returns the steps done. UserError and RunError as the modules it calls."""
    index = read_build_index(cfg.data, cfg.bricks.resolutions)
    chosen, val = index.split("train"), index.split("val")
    task = VAETask(cfg, world, val)
    planner = BatchSampler(
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
        pin=world.device.type == "cuda",
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
                log.warning(
                    "%d assets exceed max_tokens at R = %d and are left out", left_out, resolution
                )
        if not len(val):
            log.warning("%s has no held-out assets: nothing is validated", cfg.data)
    stream = Prefetcher(planner, partial(loader.load, rank=world.rank), workers=cfg.bricks.workers)
    return fit(
        task, stream, cfg.loop, out=cfg.out, world=world, config=run_config(cfg), init=cfg.init
    )


def run_config(cfg: VAETraining) -> dict[str, Any]:
    """What a checkpoint's config.json says of the run; `model` and `config` are what loading the model takes."""
    training = to_json(asdict(cfg))
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
    cfg = parse_with_presets(VAE_PRESETS, "tiny", args, prog=PROG)
    checkpoint.check_init(cfg.init, cfg.out)
    with join_world(cfg.device) as world:
        if not world.is_first:
            logging.getLogger().setLevel(logging.WARNING)
        done = train(cfg, world)
        log.info("%d steps done; checkpoints in %s", done, cfg.out)


if __name__ == "__main__":
    command(main)
