"""`python -m train.dit`: train the SS-DiT on a build's renders and latents; under torchrun on several GPUs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from model.checkpoint import load_model, load_weights
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.sparse_vae import SparseVAE
from pipeline.core.cli import command, parse_with_presets
from pipeline.core.errors import UserError
from pipeline.core.hashing import to_json
from train.data.bricks import BuildIndex
from train.data.latents import LatentStore, vae_hash
from train.engine import checkpoint
from train.engine.batch_sampler import ShardBatchSampler
from train.engine.distributed import World, join_world
from train.engine.prefetch import Prefetcher
from train.engine.trainer import fit
from train.stages.dit.config import DIT_PRESETS, DiTTraining
from train.stages.dit.data import DiTLoader, joined
from train.stages.dit.task import DiTTask

log = logging.getLogger(__name__)

PROG = "python -m train.dit"


def train(cfg: DiTTraining, world: World) -> int:
    """A run by its config; returns the steps done. UserError and RunError as the modules it calls."""
    vae, store = read_latents(cfg, world)
    index = joined(cfg, store)
    chosen, val = index.split("train"), index.split("val")
    planner = ShardBatchSampler(
        chosen.tokens,
        chosen.shards,
        mixed=cfg.flow.open_shards,
        batch_size=cfg.flow.batch_size,
        world_size=world.size,
        seed=cfg.flow.loop.seed,
        max_tokens=cfg.max_tokens,
    )
    loader = DiTLoader(chosen, store, cfg)
    task = DiTTask(cfg, world, chosen, val, store, vae)
    if cfg.init is not None and checkpoint.latest(cfg.out) is None:
        load_weights(cfg.init, task.model)
        task.model.dit.set_statistics(
            store.mean, store.std
        )  # of these latents, not of those before
        log.info("weights from %s", cfg.init)
    if world.is_first:
        _introduce(cfg, task.model, world, chosen, val, planner)
    stream = Prefetcher(planner, partial(loader.load, rank=world.rank), workers=cfg.workers)
    return fit(
        task, stream, cfg.flow.loop, out=cfg.out, world=world, config=run_config(cfg, store.vae)
    )


def read_latents(cfg: DiTTraining, world: World) -> tuple[SparseVAE | None, LatentStore]:
    """The VAE if one is named, and its latents. UserError, with what to run, if there are none or they do not fit."""
    vae = None
    if cfg.vae is not None:
        if not cfg.vae.exists():
            raise UserError(
                f"{cfg.vae} does not exist; name the VAE that made the latents with --vae, or take those that are "
                "there without looking at samples: --vae None"
            )
        vae = load_model(cfg.vae, SparseVAE, device=world.device)
    store = LatentStore(
        cfg.latents or cfg.data / "latents", cfg.resolution, None if vae is None else vae_hash(vae)
    )
    if store.channels != cfg.model.dit.latent_channels:
        raise UserError(
            f"model.dit.latent_channels must be the {store.channels} channels of {store.folder}, "
            f"got {cfg.model.dit.latent_channels}"
        )
    return vae, store


def _introduce(
    cfg: DiTTraining,
    model: ConditionedDiT,
    world: World,
    chosen: BuildIndex,
    val: BuildIndex,
    planner: ShardBatchSampler,
) -> None:
    count = sum(parameter.numel() for parameter in model.dit.parameters())
    assets = f"{len(chosen)} training and {len(val)} held-out assets of {cfg.data} at R = {cfg.resolution}"
    log.info(
        "SS-DiT of %.2f M parameters, %s, %d x %s",
        count / 1e6,
        assets,
        world.size,
        world.device.type,
    )
    log.info("conditions: %s", model.encoder.label)
    if planner.left_out[cfg.resolution]:
        log.warning(
            "%d assets exceed max_tokens and are left out", planner.left_out[cfg.resolution]
        )
    if not len(val):
        log.warning("%s has no held-out assets: nothing is validated", cfg.data)


def run_config(cfg: DiTTraining, vae: str) -> dict[str, Any]:
    """What a checkpoint's config.json says of the run; `model` and `config` are what loading the model takes.

    `training` names the VAE by its hash.
    """
    everything = to_json(asdict(cfg))
    names = ("resolution", "max_tokens", "held_out_views", "cameras")
    training = {"vae": vae, **{name: everything[name] for name in names}, **everything["flow"]}
    for name in ("guidance", "steps"):  # of the samples that are looked at
        training.pop(name)
    return {"model": ConditionedDiT.__name__, "config": everything["model"], "training": training}


def main(args: Sequence[str]) -> None:
    cfg = parse_with_presets(DIT_PRESETS, "tiny", args, prog=PROG)
    checkpoint.check_init(cfg.init, cfg.out)
    with join_world(cfg.device) as world:
        if not world.is_first:
            logging.getLogger().setLevel(logging.WARNING)
        done = train(cfg, world)
        log.info("%d steps done; checkpoints in %s", done, cfg.out)


if __name__ == "__main__":
    command(main)
