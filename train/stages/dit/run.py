"""A training run of the SS-DiT: its latents, its batches and its configuration."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from model.checkpoint import ADAPTERS, build_config, load_model, read_config
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.config import DiTConfig
from model.sparse_vae import SparseVAE
from pipeline.core.errors import UserError
from pipeline.core.hashing import options_of
from train.data.bricks import log_training_data
from train.data.latents import LatentStore, vae_hash
from train.data.source import open_source
from train.data.symmetry import quarter_turn
from train.engine import checkpoint
from train.engine.batch_sampler import ShardBatchSampler
from train.engine.distributed import World
from train.engine.prefetch import start_prefetcher
from train.engine.trainer import Trainer
from train.stages.dit.config import DiTTraining
from train.stages.dit.data import DiTLoader, index_with_latents
from train.stages.dit.lora import add_adapters
from train.stages.dit.task import DiTTask
from train.stages.initial_weights import find_init, start_from

log = logging.getLogger(__name__)

OF_VIEWS = ("held_out_views", "cameras", "facing_views", "mirrored_views")
RECORDED = ("resolution", "max_tokens", "token_budget", *OF_VIEWS)
PREVIEW_OPTIONS = ("guidance", "steps")  # they do not change what is trained


def train_dit(cfg: DiTTraining, world: World) -> int:
    """Train the SS-DiT as configured, or resume the run in `cfg.out`.

    Returns:
        Number of steps done.

    Raises:
        UserError: If the build, the latents, the VAE or a checkpoint do not fit the options.
        RunError: If data is unreadable, gradients stay bad or checkpoints cannot be written.
    """
    init = find_init(cfg.init, cfg.out, "dit", (ConditionedDiT.__name__,), (cfg.resolution,))
    cfg = replace(cfg, model=checkpoint.model_of_run(cfg.model, cfg.out))
    vae, store = read_latents(cfg, world)
    index = index_with_latents(cfg, store)
    training, held_out = index.split("train"), index.split("val")
    sampler = ShardBatchSampler(
        training.tokens,
        training.shards,
        mixed=cfg.flow.open_shards,
        batch_size=cfg.flow.batch_size,
        world_size=world.size,
        seed=cfg.flow.loop.seed,
        max_tokens=cfg.max_tokens,
        token_budget=cfg.token_budget,
    )
    task = DiTTask(cfg, world, training, held_out, store, vae)
    if init is not None:
        check_init_positions(cfg, init)
        start_from(init, task.model, cfg.out, world)
        # The statistics are those of the latents of this run and not of the run before.
        task.model.dit.set_statistics(store.mean, store.std)
    if cfg.lora.rank:
        add_adapters(task.model, cfg.lora)
    log_training_data(training, held_out, sampler, world)
    log.info("The image encoder is %s.", task.model.encoder.label)
    stream = start_prefetcher(
        sampler,
        partial(DiTLoader, training, store, cfg),
        rank=world.rank,
        workers=cfg.workers,
        kind=cfg.worker_kind,
    )
    config = run_config(cfg, store.vae)
    return Trainer(task, stream, cfg.flow.loop, out=cfg.out, world=world, config=config).run()


def check_init_positions(cfg: DiTTraining, init: Path) -> None:
    """Check that the weights that a run starts from were trained with its position factor.

    Raises:
        UserError: If the factor at the resolution of the weights' own run would be another one, and
            `init_any_positions` does not allow it.
    """
    description = read_config(init)
    trained_at = (description.get("training") or {}).get("resolution", cfg.resolution)
    dit = (description.get("config") or {}).get("dit")
    if cfg.init_any_positions or not isinstance(dit, dict) or not isinstance(trained_at, int):
        return
    before = build_config(DiTConfig, dit, f"{init}: dit").position_factor(trained_at)
    now = cfg.model.dit.position_factor(trained_at)
    if before != now:
        raise UserError(
            f"{init} was trained at R = {trained_at} with the position factor {before:g}, which "
            f"would now be {now:g}; set --model.dit.min-position-factor and "
            "--model.dit.position-resolution as it has them, or pass --init-any-positions"
        )


def read_latents(cfg: DiTTraining, world: World) -> tuple[SparseVAE | None, LatentStore]:
    """Load the VAE, if one is named, and open its latents.

    Returns:
        The VAE on the world's device or None, and the latents.

    Raises:
        UserError: If the VAE or its latents are missing, or do not fit the model.
    """
    vae = None
    if cfg.vae is not None:
        if not cfg.vae.exists():
            raise UserError(
                f"{cfg.vae} does not exist; name the VAE that made the latents with --vae, or use "
                "the latents that exist without drawing previews: --vae None"
            )
        vae = load_model(cfg.vae, SparseVAE, device=world.device)
    latents = open_source(cfg.latents or cfg.data / "latents", cfg.cache)
    store = LatentStore(latents, cfg.resolution, None if vae is None else vae_hash(vae))
    for turns in range(4 if cfg.facing_views else 1):
        for mirrored in (False, True) if cfg.mirrored_views else (False,):
            store.turned(quarter_turn(turns, mirrored=mirrored))
    if store.channels != cfg.model.dit.latent_channels:
        raise UserError(
            f"model.dit.latent_channels must be the {store.channels} channels of {store.folder}, "
            f"got {cfg.model.dit.latent_channels}"
        )
    return vae, store


def run_config(cfg: DiTTraining, vae: str) -> dict[str, Any]:
    """Return the entries of a checkpoint's config.json that describe the run.

    Args:
        cfg: Options of the run.
        vae: Hash of the VAE whose latents are trained on.

    Returns:
        {"model", "config", "training"}. The first two are what loading the model needs.
    """
    options = options_of(cfg)
    recorded = {name: options[name] for name in RECORDED if name in options}
    training = {"vae": vae, **recorded, **options["flow"]}
    if cfg.lora.rank:
        training[ADAPTERS] = options["lora"]
    for name in PREVIEW_OPTIONS:
        del training[name]
    return {"model": ConditionedDiT.__name__, "config": options["model"], "training": training}
