"""`python -m benchmarks.training`: cost of training the SS-VAE, and its quality after minutes.

It has three sub-commands, because a machine with a GPU may lack mesh libraries. `geometry` packs
normalised meshes into one file, `bricks` makes a build of them on all cores, and `measure` times
training steps and trains on that build.
"""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.gpu import gpu_machine, limited, require_gpu, step_report
from model.checkpoint import load_model
from model.config import VAEConfig
from model.sparse_vae import SparseVAE
from pipeline.core.cli import command
from pipeline.core.files import write_atomically
from pipeline.core.hashing import make_uid
from pipeline.core.product import Product
from pipeline.core.schema import Bricks, Mesh
from pipeline.core.subcommands import parse_subcommand
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.sdf import compute_bricks
from pipeline.geometry.topology import build_topology
from pipeline.storage.layout import MANIFEST, manifest_path, marker_path, product_paths
from pipeline.storage.manifest import ManifestRow, write_manifest
from pipeline.storage.sdf_shard import write_sdf_shard
from train.data.bricks import BrickLoader, BrickReader, VAEBatch, read_build_index
from train.engine.distributed import World
from train.engine.mesh_pictures import save_image, side_by_side
from train.engine.optimizer import make_optimizer
from train.evaluation.results import summarize_surfaces
from train.evaluation.vae import evaluate_asset, reconstruction_table
from train.stages.vae.config import VAE_PRESETS, BrickConfig, VAETraining
from train.stages.vae.run import train_vae
from train.stages.vae.task import VAETask

log = logging.getLogger(__name__)

PROG = "python -m benchmarks.training"
SHARD = "000000"
# Meshes that are duplicates of others, whose seams take a minute to cut, or that are flat.
LEFT_OUT = (
    *("duck.dae", "nancolor.obj", "negative_indices.obj", "suzanne.ply"),
    *("counterXP.3MF", "cycloidal.ply", "soup.stl"),
    *("plane.ply", "notenoughindices.obj"),
)
HELD_OUT = ("bunny.ply", "fandisk.obj", "rabbit.obj", "teapot.stl")
PROCEDURAL = ("castle", "robot")  # further held-out assets
# Together they have as many cells as the paper's mean asset: 2.1k at R = 256.
TIMED_MESHES = ("chair_model.obj", "no_indices_3storybuilding.glb", "rabbit.obj", "teapot.stl")


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Normalise the meshes of a folder and pack them into one file."""

    meshes: Path
    """Directory of the meshes."""
    out: Path = Path("geometry.npz")
    """File of the packed meshes."""


@dataclass(frozen=True, kw_only=True)
class BrickBuild:
    """Make a build of packed meshes on all cores."""

    geometry: Path
    """File that the sub-command geometry wrote."""
    out: Path
    """Directory of the build."""
    resolutions: tuple[int, ...] = (256, 384, 512)
    """Resolutions of the bricks."""
    finest: int | None = 1024
    """Further resolution of the four meshes whose training steps are timed. None adds none."""
    workers: int = 12
    """Number of processes."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Time training steps, then train and evaluate, on one GPU."""

    data: Path
    """Directory of the build."""
    out: Path
    """Directory of the results."""
    steps: bool = True
    """Time training steps of the preset base."""
    learn: tuple[str, ...] = ("small", "base")
    """Presets to train."""
    resolutions: tuple[int, ...] = (256, 512)
    """Resolutions to train at, one after another."""
    minutes: float = 1.0
    """Minutes of training for each preset and resolution."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the weight matrices."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    samples: int = 200_000
    """Number of points sampled on each surface in the evaluation."""


def pack_geometry(cfg: Geometry) -> None:
    """Write the meshes as npz: `names`, and v<n> float32 [V, 3] and f<n> int32 [F, 3] of each."""
    from pipeline.core.errors import Reject
    from pipeline.mesh_io.config import LoadConfig, NormalizeConfig
    from pipeline.mesh_io.load import load
    from pipeline.mesh_io.normalize import normalize
    from pipeline.sources import open_source

    arrays: dict[str, Any] = {}
    names: list[str] = []
    for spec in (f"folder:{cfg.meshes}", "procedural"):
        source = open_source(spec)
        for record in source.records():
            name = (
                Path(record.url).name if spec.startswith("folder") else record.url.partition("-")[2]
            )
            if name in LEFT_OUT or (
                spec == "procedural" and (name not in PROCEDURAL or name in names)
            ):
                continue
            folder = cfg.out.with_suffix(".scratch") / record.uid
            folder.mkdir(parents=True, exist_ok=True)
            try:
                mesh = normalize(
                    load(source.materialize(record, folder), LoadConfig()), NormalizeConfig()
                )
            except Reject as verdict:
                log.info("%s: %s", name, verdict)
                continue
            arrays |= {
                f"v{len(names)}": mesh.vertices.astype(np.float32),
                f"f{len(names)}": mesh.faces,
            }
            names.append(name)
    np.savez_compressed(cfg.out, names=np.array(names), **arrays)
    log.info("%d meshes are packed in %s.", len(names), cfg.out)


def make_bricks(cfg: BrickBuild) -> None:
    """Write a committed build of one shard."""
    packed = np.load(cfg.geometry)
    names = packed["names"].tolist()
    jobs = [
        (name, packed[f"v{n}"], packed[f"f{n}"], _resolutions(cfg, name))
        for n, name in enumerate(names)
    ]
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(cfg.workers) as pool:
        made = dict(pool.imap_unordered(_bricks_of, sorted(jobs, key=lambda job: -len(job[2]))))
    rows = []
    for number, name in enumerate(names):
        split = "val" if name in (*HELD_OUT, *PROCEDURAL) else "train"
        source = "procedural" if name in PROCEDURAL else "folder"
        row = ManifestRow(
            uid=make_uid(source, name),
            url=name,
            status="done",
            tokens={r: len(bricks.cells) for r, bricks in made[name].items()},
            shard=SHARD,
            row=number,
            split=split,
        )
        rows.append(row)
    resolutions = sorted({r for bricks in made.values() for r in bricks})
    for resolution in resolutions:
        assets = [(row.uid, made[row.url][resolution]) for row in rows if resolution in row.tokens]
        path = cfg.out / product_paths(Product.sdf(resolution), SHARD)[0]
        path.parent.mkdir(parents=True)
        write_sdf_shard(path, resolution, assets, "benchmark")
    write_manifest(manifest_path(cfg.out, SHARD), rows, resolutions)
    for product in (MANIFEST, *map(Product.sdf, resolutions)):
        write_atomically(marker_path(cfg.out, SHARD, product), "{}")
    seconds = time.monotonic() - began
    log.info("%d assets at R = %s are built in %.0f s.", len(rows), resolutions, seconds)


def _resolutions(cfg: BrickBuild, name: str) -> tuple[int, ...]:
    return (
        (*cfg.resolutions, cfg.finest) if cfg.finest and name in TIMED_MESHES else cfg.resolutions
    )


def _bricks_of(
    job: tuple[str, np.ndarray, np.ndarray, Sequence[int]],
) -> tuple[str, dict[int, Bricks]]:
    name, vertices, faces, resolutions = job
    mesh = Mesh(vertices=vertices.astype(np.float64), faces=faces)
    topology = build_topology(mesh, TopologyConfig())
    return name, {resolution: compute_bricks(topology, resolution) for resolution in resolutions}


# Steps


def time_steps(data: Path, device: torch.device) -> list[dict[str, Any]]:
    """Time whole training steps of `base`, from a batch in host memory to the updated weights."""
    rows = []
    for resolution, batch_size in ((256, 4), (384, 4), (512, 4), (1024, 1)):
        index = read_build_index(data, [resolution])
        names = TIMED_MESHES[:batch_size]
        wanted = [index.uids.index(make_uid("folder", name)) for name in names]
        loader = BrickLoader(index, seed=0, noise_channels=16, symmetries=False)
        batch = loader.load_assets(wanted, resolution).pin_memory()
        for checkpointing in (False, True):
            cfg = VAE_PRESETS["base"]
            cfg = replace(cfg, activation_checkpointing=checkpointing)
            try:
                row = time_vae_step(
                    VAETask(cfg, World(device=device), index.subset([])), cfg, batch, device
                )
            except torch.cuda.OutOfMemoryError as error:
                row = {"failed": str(error).splitlines()[0]}
            gc.collect()
            torch.cuda.empty_cache()
            about = {
                "R": resolution,
                "batch": batch_size,
                "cells": batch.tokens,
                "checkpointing": checkpointing,
            }
            rows.append({**about, **row})
            log.info("%s", rows[-1])
    return rows


def time_vae_step(
    task: VAETask, cfg: VAETraining, batch: VAEBatch, device: torch.device
) -> dict[str, Any]:
    """Return the median time of training steps with one batch, their MFU and the peak of memory."""
    optimizer = make_optimizer(task.model, cfg.loop, device)
    events = []

    def step() -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        # A new copy: neighbours and windows are computed again, as in training.
        on_device = batch.to(device)
        with torch.autocast("cuda", torch.bfloat16):
            losses = task.losses(task.model, on_device)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), cfg.loop.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end.record()
        events.append((start, end))

    for _ in range(4):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events.clear()
    for _ in range(10):
        step()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in events]
    forward_flops = task.model.flops(batch.to(device).bricks)
    report = step_report(times, tokens=batch.tokens, forward_flops=forward_flops, device=device)
    return {
        **report,
        "peak_gb": torch.cuda.max_memory_allocated() / 2**30,
    }


# Learning


def learn(cfg: Measure, preset: str, device: torch.device) -> dict[str, Any]:
    """Train a preset at one resolution after another and evaluate it after each."""
    result: dict[str, Any] = {"preset": preset, "optimizer": cfg.optimizer, "stages": []}
    init = None
    for resolution in cfg.resolutions:
        start = VAE_PRESETS[preset]
        run = replace(
            start,
            data=cfg.data,
            out=cfg.out / "runs" / f"{preset}-{resolution}",
            init=init,
            bricks=BrickConfig(resolutions=(resolution,), workers=8, reconstructions=0),
            loop=limited(
                start.loop,
                cfg.minutes,
                optimizer=cfg.optimizer,
                learning_rate=cfg.learning_rate,
                warmup_steps=30,
                log_every=50,
            ),
        )
        began = time.monotonic()
        steps = train_vae(run, World(device=device))
        seconds = time.monotonic() - began
        init = run.out / "latest"
        lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
        stage = {
            "resolution": resolution,
            "steps": steps,
            "seconds": seconds,
            "loss": [
                float(np.mean([line["loss"] for line in part]))
                for part in (lines[:20], lines[-20:])
            ],
            "ms": median(line["seconds"] for line in lines) * 1000,
            "tokens_per_s": median(line["tokens_per_s"] for line in lines),
            "mfu": median(line["mfu"] or 0.0 for line in lines),
            "data_share": sum(line["data_s"] for line in lines)
            / sum(line["seconds"] for line in lines),
            "skipped": lines[-1]["skipped"],
        }
        result["stages"].append(stage | _evaluate(cfg, preset, init, resolution, device))
        log.info("%s", result["stages"][-1])
    return result


def _evaluate(
    cfg: Measure, preset: str, checkpoint: Path, resolution: int, device: torch.device
) -> dict[str, Any]:
    model = load_model(checkpoint, SparseVAE, device=device)
    stored = sorted({*cfg.resolutions, resolution})
    reader = BrickReader(read_build_index(cfg.data, stored))
    rows, images = [], []
    for asset in range(len(reader.index)):
        draw = bool(reader.index.is_val[asset]) or asset % 6 == 0
        found = evaluate_asset(
            model, reader, asset, resolution, device=device, samples=cfg.samples, draw=draw
        )
        if found is not None:
            rows.append(found[0])
            images += [found[1]] if draw else []
    half = -(-len(images) // 2)
    sheet = [[*left, *right] for left, right in zip(images[:half], images[half:] + images[:1])]
    save_image(cfg.out / f"{preset}-{resolution}.png", side_by_side(sheet))
    procedural = {make_uid("procedural", name) for name in PROCEDURAL}
    groups = {
        "train, real": [row for row in rows if row.split == "train"],
        "held out, real": [row for row in rows if row.split == "val" and row.uid not in procedural],
        "held out, procedural": [row for row in rows if row.uid in procedural],
    }
    summaries = [
        summarize_surfaces(group, f"{preset} R = {resolution}, {name}")
        for name, group in groups.items()
    ]
    log.info("\n%s", reconstruction_table(summaries))
    return {"summaries": summaries}


def measure(cfg: Measure) -> dict[str, Any]:
    """Measure what the options ask for. The results are written after each part."""
    device = require_gpu()
    cfg.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "machine": gpu_machine(device),
        "model": VAEConfig.__name__,
        "steps": [],
        "learn": [],
    }

    def save() -> None:
        (cfg.out / "training.json").write_text(json.dumps(results, indent=1, default=str) + "\n")

    for preset in cfg.learn:
        results["learn"].append(learn(cfg, preset, device))
        save()
    if cfg.steps:
        results["steps"] = time_steps(cfg.data, device)
        save()
    return results


def main(args: Sequence[str]) -> None:
    """Run the sub-command that the first word names."""
    configs = {"geometry": Geometry, "bricks": BrickBuild, "measure": Measure}
    functions = {"geometry": pack_geometry, "bricks": make_bricks, "measure": measure}
    name, cfg = parse_subcommand(configs, args, prog=PROG)
    functions[name](cfg)


if __name__ == "__main__":
    command(main)
