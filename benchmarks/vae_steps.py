"""`python -m benchmarks.vae_steps`: time of training steps of the SS-VAE on an analytic SDF."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.generation import MAJOR_RADIUS, MINOR_RADIUS, torus_values
from benchmarks.gpu import gpu_machine, require_gpu
from benchmarks.training_measure import time_vae_step
from kernels import token_order
from model.config import VAEConfig
from model.sparse_tensor import BrickBatch, Level
from pipeline.core.cli import command, parse
from pipeline.core.grid import CELL_SIDE
from train.data.bricks import VAEBatch
from train.engine.distributed import World
from train.stages.vae.config import VAE_PRESETS
from train.stages.vae.task import VAETask

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VaeSteps:
    """Time training steps of the preset base on the analytic SDF of a torus. This only needs a GPU.

    The torus has about the paper's mean number of cells.
    """

    out: Path
    """Directory of the results, vae-steps.json."""
    batches: tuple[str, ...] = ("256x4", "256x16", "512x4", "1024x1")
    """Resolution and number of assets of each step, such as 512x4."""
    profile: bool = False
    """Also report the kernels of each step, the time to issue it and how often it waits."""


def torus_batch(resolution: int, count: int, device: torch.device) -> VAEBatch:
    """Return a batch of torus bricks on the host.

    Args:
        resolution: Resolution R of the SDF.
        count: Number of assets, which are all the same.
        device: Where the SDF is computed.
    """
    side = resolution // CELL_SIDE
    axis = torch.arange(side, device=device)
    coords = torch.cartesian_prod(torch.zeros(1, device=device, dtype=axis.dtype), *[axis] * 3)
    centre = (coords[:, 1:] + 0.5) / side - 0.5
    ring = (centre[:, [0, 2]].norm(dim=1) - MAJOR_RADIUS).square() + centre[:, 1].square()
    coords = coords[(ring.sqrt() - MINOR_RADIUS).abs() < 1.5 / side].int()
    level = Level.from_coords(coords[token_order(coords)], side, 1)
    values = torus_values(level).half()
    active = (values.abs() < 1).any(1)
    values = values[active].cpu()
    asset = level.coords[active].cpu()
    parts = [asset + torch.tensor([n, 0, 0, 0]).int() for n in range(count)]
    cells = Level.from_coords(torch.cat(parts), side, count)
    values = values.repeat(count, 1)
    bricks = BrickBatch(cells, values, torch.zeros_like(values, dtype=torch.bool), resolution)
    noise = torch.randn(len(cells), VAEConfig().latent_channels)
    uids = tuple(map(str, range(count)))
    return VAEBatch(
        bricks=bricks.pin_memory(), noise=noise.pin_memory(), share=1 / count, uids=uids
    )


def main(args: Sequence[str]) -> None:
    """Parse the options, time steps of each batch and write the results."""
    cfg = parse(VaeSteps, args, prog="python -m benchmarks.vae_steps")
    device = require_gpu()
    cfg.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in cfg.batches:
        resolution, count = map(int, name.split("x"))
        batch = torus_batch(resolution, count, device)
        preset = VAE_PRESETS["base"]
        no_index: Any = None
        task = VAETask(preset, World(device=device), no_index)
        times = time_vae_step(task, preset, batch, device, cfg.profile)
        rows.append({"batch": name, "cells": batch.tokens, **times})
        log.info("%s", rows[-1])
        del task
        gc.collect()
        torch.cuda.empty_cache()
    results = {"machine": gpu_machine(device), "rows": rows}
    (cfg.out / "vae-steps.json").write_text(
        json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    command(main)
