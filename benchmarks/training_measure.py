"""Training of the SS-VAE: the time of whole steps, and the quality after minutes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import gpu_machine, limited, require_gpu, row_or_failure, step_report
from benchmarks.training_config import PROCEDURAL, TIMED_MESHES, Measure
from model.checkpoint import load_model
from model.config import VAEConfig
from model.sparse_vae import SparseVAE
from pipeline.core.hashing import make_uid
from train.data.bricks import BrickLoader, BrickReader, BuildIndex, VAEBatch, read_build_index
from train.engine.distributed import World
from train.engine.mesh_pictures import save_image, side_by_side
from train.engine.optimizer import make_optimizer
from train.evaluation.results import summarize_surfaces
from train.evaluation.vae import evaluate_asset, reconstruction_table
from train.stages.vae.config import VAE_PRESETS, BrickConfig, VAETraining
from train.stages.vae.run import train_vae
from train.stages.vae.task import VAETask

log = logging.getLogger(__name__)


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
            row = row_or_failure(partial(_time_base, cfg, index, batch, device))
            about = {
                "R": resolution,
                "batch": batch_size,
                "cells": batch.tokens,
                "checkpointing": checkpointing,
            }
            rows.append({**about, **row})
            log.info("%s", rows[-1])
    return rows


def _time_base(
    cfg: VAETraining, index: BuildIndex, batch: VAEBatch, device: torch.device
) -> dict[str, Any]:
    task = VAETask(cfg, World(device=device), index.subset([]))
    return time_vae_step(task, cfg, batch, device)


def profile_step(step: Callable[[], object], shown: int = 40) -> dict[str, Any]:
    """Return where the time of a step goes on the GPU and on the host.

    Args:
        step: A training step, whose kernels are compiled and whose tiles are chosen.
        shown: Number of kernels to name.

    Returns:
        "host_ms", the time to issue the step. "busy_ms", the sum of its kernels. "launches", their
        number. "waits", the number of calls that wait for the GPU. "kernels", milliseconds and
        number of launches of the kernels that take most, by name.
    """
    torch.cuda.synchronize()
    started = time.monotonic()
    step()
    host_ms = 1000 * (time.monotonic() - started)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    kernels: dict[str, list[float]] = {}
    waits = 0
    for event in profile.events() or ():
        if event.device_type.name == "CUDA":
            entry = kernels.setdefault(event.name[:120], [0.0, 0])
            entry[0] += event.device_time / 1000
            entry[1] += 1
        elif event.name in ("cudaStreamSynchronize", "cudaEventSynchronize"):
            waits += 1
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])
    return {
        "host_ms": host_ms,
        "busy_ms": sum(ms for ms, _ in kernels.values()),
        "launches": int(sum(count for _, count in kernels.values())),
        "waits": waits,
        "kernels": {name: [round(ms, 3), int(count)] for name, (ms, count) in longest[:shown]},
    }


def time_vae_step(
    task: VAETask, cfg: VAETraining, batch: VAEBatch, device: torch.device, profile: bool = False
) -> dict[str, Any]:
    """Return the median time of training steps with one batch, their MFU and the peak of memory.

    Args:
        task: The model and its losses.
        cfg: Options of the run.
        batch: A batch on the host.
        device: The GPU.
        profile: Also return `profile_step`.
    """
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
        **(profile_step(step) if profile else {}),
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
        lines = [
            json.loads(line)
            for line in (run.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
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
        (cfg.out / "training.json").write_text(
            json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8"
        )

    for preset in cfg.learn:
        results["learn"].append(learn(cfg, preset, device))
        save()
    if cfg.steps:
        results["steps"] = time_steps(cfg.data, device)
        save()
    return results
