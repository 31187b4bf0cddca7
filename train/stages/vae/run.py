"""A training run of the SS-VAE: its data, its batches and its configuration."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

from model.sparse_vae import SparseVAE
from pipeline.core.hashing import options_of
from train.data.bricks import (
    BrickLoader,
    BuildIndex,
    VAEBatch,
    log_training_data,
    read_build_index,
)
from train.data.source import open_source
from train.engine.batch_sampler import ShardBatchSampler, StepSamples
from train.engine.config import RankOptions
from train.engine.distributed import World
from train.engine.prefetch import Prefetcher, start_prefetcher
from train.engine.trainer import Trainer
from train.stages.initial_weights import find_init, start_from
from train.stages.vae.config import VAETraining
from train.stages.vae.task import VAETask

# Options that say where a run took place and not what was trained.
NOT_RECORDED = (
    *("cache", "data", "out", "init", "preset"),
    *(item.name for item in fields(RankOptions)),
)
NOT_RECORDED_OF_BRICKS = ("kept_gb", "workers", "worker_kind", "val_batches", "reconstructions")


def train_vae(cfg: VAETraining, world: World) -> int:
    """Train the SS-VAE as configured, or resume the run in `cfg.out`.

    Returns:
        Number of steps done.

    Raises:
        UserError: If the build or a checkpoint does not fit the options.
        RunError: If too much data is unreadable, gradients stay bad or checkpoints cannot be
            written.
    """
    init = find_init(cfg.init, cfg.out, "vae", (SparseVAE.__name__,), cfg.bricks.resolutions)
    index = read_build_index(open_source(cfg.data, cfg.cache), cfg.bricks.resolutions)
    training, held_out = index.split("train"), index.split("val")
    task = VAETask(cfg, world, held_out)
    if init is not None:
        start_from(init, task.model, cfg.out, world)
    sampler, stream = brick_stream(cfg, world, training)
    log_training_data(training, held_out, sampler, world)
    config = run_config(cfg)
    return Trainer(task, stream, cfg.loop, out=cfg.out, world=world, config=config).run()


def brick_stream(
    cfg: VAETraining, world: World, training: BuildIndex
) -> tuple[ShardBatchSampler, Prefetcher[StepSamples, VAEBatch]]:
    """Return what draws the samples of the steps, and the batches of this rank.

    Args:
        cfg: Options of the run.
        world: This rank.
        training: Assets to train on.

    Raises:
        UserError: If a resolution has no usable asset.
    """
    bricks = cfg.bricks
    sampler = ShardBatchSampler(
        training.tokens,
        training.shards,
        mixed=bricks.mixed_shards or len(training),
        staggered=True,
        batch_size=bricks.batch_size,
        world_size=world.size,
        seed=cfg.loop.seed,
        max_tokens=bricks.max_tokens,
        token_budget=bricks.token_budget,
    )
    in_threads = bricks.worker_kind == "threads"
    make_loader = partial(
        BrickLoader,
        training,
        seed=cfg.loop.seed,
        noise_channels=cfg.model.latent_channels,
        symmetries=bricks.symmetries,
        max_bad_share=bricks.max_bad_share,
        largest=bricks.max_tokens,
        # A process that loads has no access to the GPU, which page-locked memory needs.
        pin=world.device.type == "cuda" and in_threads,
        kept_bytes=int(1e9 * bricks.kept_gb / (1 if in_threads else max(1, bricks.workers))),
    )
    stream = start_prefetcher(
        sampler,
        make_loader,
        rank=world.rank,
        workers=bricks.workers,
        kind=bricks.worker_kind,
    )
    return sampler, stream


def run_config(cfg: VAETraining) -> dict[str, Any]:
    """Return the entries of a checkpoint's config.json that describe the run.

    Returns:
        {"model", "config", "training"}. The first two are what loading the model needs.
    """
    training = options_of(cfg)
    config = training.pop("model")
    for name in NOT_RECORDED:
        del training[name]
    for name in NOT_RECORDED_OF_BRICKS:
        del training["bricks"][name]
    return {"model": SparseVAE.__name__, "config": config, "training": training}
