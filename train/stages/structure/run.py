"""A training run of the structure stage: the occupancy VAE, then the flow over its latents."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.checkpoint import load_weights, read_config, weights_file
from model.conditioning.image_encoder import build_encoder
from model.occupancy_vae import OccupancyVAE
from model.structure import Structure
from pipeline.core.errors import UserError
from pipeline.core.hashing import options_of
from train.data.bricks import BuildIndex, log_training_data, read_build_index
from train.data.render_conditions import ViewReader
from train.data.source import open_source
from train.engine import checkpoint
from train.engine.batch_sampler import BatchSampler, ShardBatchSampler
from train.engine.distributed import World
from train.engine.prefetch import Prefetcher, start_prefetcher
from train.engine.trainer import Trainer
from train.stages.initial_weights import find_init, start_from
from train.stages.structure.config import StructureTraining
from train.stages.structure.data import GridLoader
from train.stages.structure.task import FlowTask, OccupancyTask

log = logging.getLogger(__name__)

OF_VIEWS = ("held_out_views", "cameras", "facing_views", "mirrored_views")
RECORDED = {"vae": ("resolution",), "flow": ("resolution", *OF_VIEWS)}
PREVIEW_OPTIONS = ("guidance", "steps")  # they do not change what is trained


def train_structure(cfg: StructureTraining, world: World) -> None:
    """Train both parts of the stage, or the one that `cfg.part` names, or resume them.

    Raises:
        UserError: If the build or a checkpoint does not fit the options.
        RunError: If data is unreadable, gradients stay bad or checkpoints cannot be written.
    """
    index = read_build_index(open_source(cfg.data, cfg.cache), [cfg.resolution])
    training, held_out = index.split("train"), index.split("val")
    if cfg.part != "vae":
        _check_flow(cfg, training, held_out)  # before the first part is trained
    if cfg.part != "flow":
        done = train_occupancy_vae(cfg, world, training, held_out)
        steps = cfg.vae.loop.steps
        if cfg.part == "both" and done < steps:
            log.info(
                "The occupancy VAE has %d of %d steps. Run the same command to resume it; the "
                "flow follows when it is complete.",
                done,
                steps,
            )
            return
    if cfg.part != "vae":
        train_flow(cfg, world, training, held_out)


def train_occupancy_vae(
    cfg: StructureTraining, world: World, training: BuildIndex, held_out: BuildIndex
) -> int:
    """Train the occupancy VAE in OUT/vae and return the number of steps done."""
    occupancy = checkpoint.model_of_run(cfg.model.occupancy, cfg.out / "vae")
    cfg = replace(cfg, model=replace(cfg.model, occupancy=occupancy))
    task = OccupancyTask(cfg, world, held_out)
    out = cfg.out / "vae"
    init = _init_of_vae(cfg)
    if init is not None:
        start_from(init, task.model, cfg.out, world)
    stream = _stream(cfg, world, training, held_out, images=False)
    config = run_config(cfg, "vae")
    return Trainer(task, stream, cfg.vae.loop, out=out, world=world, config=config).run()


def train_flow(
    cfg: StructureTraining, world: World, training: BuildIndex, held_out: BuildIndex
) -> int:
    """Train the flow over the latents of OUT/vae in OUT/flow and return the number of steps done.

    Raises:
        UserError: If OUT/vae has no checkpoint, besides the errors of `train_structure`.
    """
    cfg = replace(cfg, model=checkpoint.model_of_run(cfg.model, cfg.out / "flow"))
    vae = trained_vae(cfg, world)
    newest = checkpoint.latest(cfg.out / "flow")
    task = FlowTask(cfg, world, training, held_out, vae)
    init = _init_of_flow(cfg)
    if init is not None:
        start_from(init, task.model, cfg.out, world)
        # The occupancy VAE is that of this run, and so are the statistics of its latents.
        task.model.vae.load_state_dict(vae.state_dict())
    if newest is None:  # a checkpoint holds the statistics
        task.measure(GridLoader(training, cfg, images=False, use="validation"))
    elif world.is_first and not _has_vae(newest, vae):
        log.warning(
            "%s keeps the occupancy VAE that it started with, which differs from that of %s.",
            newest,
            cfg.out / "vae",
        )
    log.info("The image encoder is %s.", task.model.flow.encoder.label)
    stream = _stream(cfg, world, training, held_out, images=True)
    out = cfg.out / "flow"
    config = run_config(cfg, "flow")
    return Trainer(task, stream, cfg.flow.loop, out=out, world=world, config=config).run()


def _check_flow(cfg: StructureTraining, training: BuildIndex, held_out: BuildIndex) -> None:
    """Check what the flow needs besides the occupancy VAE, which is trained for long before it.

    Raises:
        UserError: If renders, the weights of the image encoder or those of `cfg.init` are missing.
    """
    _init_of_flow(cfg)
    for index in (training, held_out):
        ViewReader(index, cfg.cameras)
    encoder = checkpoint.model_of_run(cfg.model, cfg.out / "flow").flow.encoder
    if encoder.kind == "dinov2":
        build_encoder(encoder)


def trained_vae(cfg: StructureTraining, world: World) -> OccupancyVAE:
    """Load the averaged weights of the occupancy VAE in OUT/vae, or else of `cfg.init`.

    Raises:
        UserError: If there are none, or they have another configuration.
    """
    newest, init = checkpoint.latest(cfg.out / "vae"), _init_of_vae(cfg)
    vae = OccupancyVAE(cfg.model.occupancy)
    if newest is not None:
        load_weights(newest, vae)
    elif init is not None:
        start_from(init, vae, cfg.out, world)
    else:
        raise UserError(
            f"{cfg.out / 'vae'} holds no occupancy VAE; train it first: "
            f"python -m train.structure --part vae --out {cfg.out}"
        )
    return vae.eval()


def _init_of_vae(cfg: StructureTraining) -> Path | None:
    """Return the weights that the occupancy VAE of a new run starts from, if any."""
    models = (OccupancyVAE.__name__, Structure.__name__)
    return find_init(cfg.init, cfg.out / "vae", "structure", models)


def _init_of_flow(cfg: StructureTraining) -> Path | None:
    """Return the weights that the flow of a new run starts from, if any.

    Raises:
        UserError: If they are not those of a whole stage of as many cells per side.
    """
    init = find_init(cfg.init, cfg.out / "flow", "structure", (Structure.__name__,))
    if init is not None:
        stored = (read_config(init).get("config") or {}).get("occupancy") or {}
        side, wanted = stored.get("side"), cfg.model.occupancy.side
        if side != wanted:
            raise UserError(
                f"{init} was trained on {side} cells per side, and this run has {wanted}; set "
                "--resolution and --model.occupancy.side as it has them, or name other weights "
                "with --init"
            )
    return init


def run_config(cfg: StructureTraining, part: str) -> dict[str, Any]:
    """Return the entries of a checkpoint's config.json that describe the run of a part.

    Args:
        cfg: Options of the run.
        part: "vae" or "flow".

    Returns:
        {"model", "config", "training"}. The first two are what loading the model needs.
    """
    options = options_of(cfg)
    recorded = {name: options[name] for name in RECORDED[part] if name in options}
    training = {**recorded, **options[part]}
    for name in PREVIEW_OPTIONS:
        training.pop(name, None)
    config = options["model"]
    if part == "vae":
        return {
            "model": OccupancyVAE.__name__,
            "config": config["occupancy"],
            "training": training,
        }
    return {"model": Structure.__name__, "config": config, "training": training}


def _has_vae(path: Path, vae: OccupancyVAE) -> bool:
    """Return whether a checkpoint of the flow has the weights of this VAE."""
    try:
        with safe_open(weights_file(path), framework="pt") as file:
            return all(
                torch.equal(file.get_tensor(f"vae.{name}"), tensor)
                for name, tensor in vae.state_dict().items()
            )
    except (OSError, SafetensorError):
        return True  # the trainer reports damaged checkpoints


def _stream(
    cfg: StructureTraining,
    world: World,
    training: BuildIndex,
    held_out: BuildIndex,
    *,
    images: bool,
) -> Prefetcher[Any, Any]:
    part = cfg.flow if images else cfg.vae
    options: dict[str, Any] = {
        "batch_size": part.batch_size,
        "world_size": world.size,
        "seed": part.loop.seed,
    }
    if images:  # renders are read shard by shard
        sampler = ShardBatchSampler(
            training.tokens, training.shards, mixed=cfg.flow.open_shards, **options
        )
    else:
        sampler = BatchSampler(training.tokens, **options)
    log_training_data(training, held_out, sampler, world)
    return start_prefetcher(
        sampler,
        partial(GridLoader, training, cfg, images=images),
        rank=world.rank,
        workers=cfg.workers,
        kind=cfg.worker_kind,
    )
