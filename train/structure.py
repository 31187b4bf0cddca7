"""`python -m train.structure`: train the stage that says which cells an asset has, on a build's bricks and renders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.checkpoint import load_weights, weights_file
from model.occupancy_vae import OccupancyVAE
from model.structure import Structure
from pipeline.core.cli import command, parse_with_presets
from pipeline.core.errors import UserError
from pipeline.core.hashing import to_json
from train.data.bricks import BuildIndex, read_build_index
from train.engine import checkpoint
from train.engine.batch_sampler import BatchSampler, ShardBatchSampler
from train.engine.distributed import World, join_world
from train.engine.prefetch import Prefetcher
from train.engine.trainer import fit
from train.stages.structure.config import STRUCTURE_PRESETS, StructureTraining
from train.stages.structure.data import GridLoader
from train.stages.structure.task import FlowTask, OccupancyTask

log = logging.getLogger(__name__)

PROG = "python -m train.structure"


def train(cfg: StructureTraining, world: World) -> None:
    """Both halves, or the one asked for. UserError and RunError as the modules it calls."""
    index = read_build_index(cfg.data, [cfg.resolution])
    chosen, val = index.split("train"), index.split("val")
    if world.is_first:
        counts = f"{len(chosen)} training and {len(val)} held-out assets"
        log.info("structure stage at R = %d: %s of %s", cfg.resolution, counts, cfg.data)
    if cfg.part != "flow":
        done = train_vae(cfg, world, chosen, val)
        if cfg.part == "both" and done < cfg.vae.loop.steps:
            log.info(
                "the occupancy VAE has %d of %d steps; the same command goes on",
                done,
                cfg.vae.loop.steps,
            )
            return
    if cfg.part != "vae":
        train_flow(cfg, world, chosen, val)


def train_vae(cfg: StructureTraining, world: World, chosen: BuildIndex, val: BuildIndex) -> int:
    """The occupancy VAE, in OUT/vae; returns the steps done."""
    task = OccupancyTask(cfg, world, val)
    _introduce("occupancy VAE", task.model, world)
    stream = _stream(cfg, world, chosen, images=False)
    config = run_config(cfg, "vae", OccupancyVAE.__name__)
    return fit(task, stream, cfg.vae.loop, out=cfg.out / "vae", world=world, config=config)


def train_flow(cfg: StructureTraining, world: World, chosen: BuildIndex, val: BuildIndex) -> int:
    """The flow model over the latents of OUT/vae, in OUT/flow; returns the steps done."""
    vae, found = trained_vae(cfg), checkpoint.latest(cfg.out / "flow")
    task = FlowTask(cfg, world, chosen, val, vae)
    if found is None:  # else the checkpoint has them
        task.measure(GridLoader(chosen, cfg, images=False, training=False))
    elif world.is_first and not _holds(found, vae):
        log.warning(
            "%s keeps the occupancy VAE that it began with; that of %s is another",
            found,
            cfg.out / "vae",
        )
    _introduce(f"flow with {task.model.flow.encoder.label}", task.model.flow, world)
    stream = _stream(cfg, world, chosen, images=True)
    config = run_config(cfg, "flow", Structure.__name__)
    return fit(task, stream, cfg.flow.loop, out=cfg.out / "flow", world=world, config=config)


def _holds(found: Path, vae: OccupancyVAE) -> bool:
    """Whether a checkpoint of the flow has these weights of the VAE; of a damaged one `fit` says what is wrong."""
    try:
        with safe_open(weights_file(found), framework="pt") as file:
            return all(
                torch.equal(file.get_tensor(f"vae.{name}"), x)
                for name, x in vae.state_dict().items()
            )
    except (OSError, SafetensorError):
        return True


def trained_vae(cfg: StructureTraining) -> OccupancyVAE:
    """The averaged weights of OUT/vae. UserError if they are not there, or of another configuration."""
    found = checkpoint.latest(cfg.out / "vae")
    if found is None:
        raise UserError(
            f"{cfg.out / 'vae'} holds no occupancy VAE; train it first: {PROG} --part vae --out {cfg.out}"
        )
    vae = OccupancyVAE(cfg.model.occupancy)
    load_weights(found, vae)
    return vae.eval()


def run_config(cfg: StructureTraining, half: str, model: str) -> dict[str, Any]:
    """What a checkpoint's config.json says of the run; `model` and `config` are what loading the model takes."""
    everything = to_json(asdict(cfg))
    names = ("resolution", "held_out_views", "cameras")
    training = {
        **{name: everything[name] for name in names[: None if half == "flow" else 1]},
        **everything[half],
    }
    for name in ("guidance", "steps"):  # of the samples that are looked at
        training.pop(name, None)
    config = everything["model"]
    return {
        "model": model,
        "config": config if half == "flow" else config["occupancy"],
        "training": training,
    }


def _stream(
    cfg: StructureTraining, world: World, chosen: BuildIndex, *, images: bool
) -> Prefetcher[Any, Any]:
    half = cfg.flow if images else cfg.vae
    options = {"batch_size": half.batch_size, "world_size": world.size, "seed": half.loop.seed}
    planner = BatchSampler(chosen.tokens, **options)
    if images:  # which lie together in the shards
        planner = ShardBatchSampler(
            chosen.tokens, chosen.shards, mixed=cfg.flow.open_shards, **options
        )
    loader = GridLoader(chosen, cfg, images=images)
    return Prefetcher(planner, partial(loader.load, rank=world.rank), workers=cfg.workers)


def _introduce(name: str, model: Any, world: World) -> None:
    if world.is_first:
        count = sum(parameter.numel() for parameter in model.parameters())
        log.info(
            "%s of %.2f M parameters, %d x %s", name, count / 1e6, world.size, world.device.type
        )


def main(args: Sequence[str]) -> None:
    cfg = parse_with_presets(STRUCTURE_PRESETS, "tiny", args, prog=PROG)
    with join_world(cfg.device) as world:
        if not world.is_first:
            logging.getLogger().setLevel(logging.WARNING)
        train(cfg, world)
        log.info("done; checkpoints in %s", cfg.out)


if __name__ == "__main__":
    command(main)
