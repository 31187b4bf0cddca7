"""`python -m benchmarks.generation`: time and peak memory of every stage, at the paper's sizes.

Weights are random, which does not change the cost. The cells of each stage are those of a torus
with about the paper's mean number of tokens. Marching cubes runs on the torus's exact bricks,
because bricks decoded from random weights have no surface.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.conditioning import image_conditioned_dit
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.conditioning.image_encoder import DinoEncoder, ImageBatch
from model.conditioning.image_preprocessing import prepare_image
from model.config import (
    DEFAULT_GUIDANCE,
    DEFAULT_STEPS,
    ConditionedDiTConfig,
    DiTConfig,
    EncoderConfig,
    Guidance,
    OccupancyConfig,
    SamplingOptions,
    StructureConfig,
    VAEConfig,
)
from model.inference.cells_near_mesh import cells_near
from model.inference.extract_mesh import extract_meshes
from model.inference.generator import level_near_mesh
from model.inference.mesh_cleaning import CleanedMesh, clean_mesh
from model.sparse_tensor import Level
from model.sparse_vae import SparseVAE
from model.structure import Structure
from pipeline.core.cli import command, parse
from pipeline.core.devices import choose_device
from pipeline.core.grid import band, spacing

# Radii of a torus with about 10.7k cells at R = 512 and 46k at 1024, the means of the paper.
MAJOR_RADIUS = 0.30
MINOR_RADIUS = 0.095


def torus_values(level: Level) -> torch.Tensor:
    """Return clamp(sdf / tau) of the torus at the 512 grid points of every cell, fp32 [M, 512]."""
    resolution = 8 * level.resolution
    local = torch.cartesian_prod(*[torch.arange(8, device=level.device)] * 3)
    points = (8 * level.coords[:, None, 1:] + local) * spacing(resolution) - 0.5
    ring = (points[..., [0, 2]].norm(dim=-1) - MAJOR_RADIUS).square() + points[..., 1].square()
    return ((ring.sqrt() - MINOR_RADIUS) / band(resolution)).clamp(-1, 1)


def torus_mesh(n: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices and faces of the torus, made of n x n quads."""
    u, v = np.meshgrid(*[2 * np.pi * np.arange(n) / n] * 2, indexing="ij")
    ring = MAJOR_RADIUS + MINOR_RADIUS * np.cos(v)
    points = np.stack([ring * np.cos(u), MINOR_RADIUS * np.sin(v), ring * np.sin(u)], -1)
    vertices = points.reshape(-1, 3)
    i, j = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    a, b, c, d = (((i + x) % n) * n + (j + y) % n for x, y in ((0, 0), (0, 1), (1, 1), (1, 0)))
    faces = np.concatenate(
        [np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)]
    )
    return vertices, faces.astype(np.int32)


def make_models(tiny: bool) -> tuple[SparseVAE, Structure, ConditionedDiT]:
    """Return an SS-VAE, a structure stage and an SS-DiT with random weights.

    Args:
        tiny: Sizes that a CPU can run, instead of those of the paper.
    """
    if tiny:
        image = EncoderConfig(channels=32, image_size=112)
        encoder = DinoEncoder.random(channels=32, layers=1, heads=2, image_size=112)
        dit = DiTConfig(channels=64, blocks=2, heads=4, kv_heads=2, condition_channels=32)
        structure_dit = replace(dit, kv_heads=4, latent_channels=8, attention="full")
        occupancy = OccupancyConfig(side=8, widths=(8, 16), groups=8)
        vae = VAEConfig(widths=(8, 8, 16, 32), heads=2, groups=8)
    else:
        image = EncoderConfig()
        encoder = DinoEncoder.random(channels=1024, layers=24, heads=16, image_size=518)
        encoder = encoder.to(torch.bfloat16)
        dit = DiTConfig()
        structure_dit = StructureConfig().flow.dit
        occupancy = OccupancyConfig()
        vae = VAEConfig()
    # The pretrained weights are not available where benchmarks run.
    image_conditioned_dit.build_encoder = lambda _config: encoder
    flow = ConditionedDiTConfig(dit=structure_dit, encoder=image)
    structure = Structure(StructureConfig(occupancy=occupancy, flow=flow))
    return SparseVAE(vae), structure, ConditionedDiT(ConditionedDiTConfig(dit=dit, encoder=image))


log = logging.getLogger(__name__)


class StageTimer:
    """Times functions on a device and collects one row for each.

    Args:
        device: The device.
        dtype: Dtype of products on a GPU.

    Attributes:
        rows: "stage", "seconds", "peak_gb" (None on the CPU) and notes of each function.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16):
        self.device = device
        self.dtype = dtype
        self.rows: list[dict[str, Any]] = []

    def time(self, stage: str, function: Callable[[], Any], **notes: Any) -> Any:
        """Call a function, add its row and return its result."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        with (
            torch.no_grad(),
            torch.autocast(
                self.device.type,
                torch.bfloat16 if self.dtype == torch.float32 else self.dtype,
                enabled=on_gpu and self.dtype != torch.float32,
            ),
        ):
            result = function()
        if on_gpu:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated(self.device) / 1e9 if on_gpu else None
        self.rows.append({"stage": stage, "seconds": seconds, "peak_gb": peak, **notes})
        log.info("%s: %.3g s, peak %s GB", stage, seconds, peak)
        return result


def measure(
    device: torch.device,
    tiny: bool,
    guidance: float,
    steps: tuple[int, ...],
    meshes: bool = True,
) -> list[dict[str, Any]]:
    """Time every stage of generation.

    Args:
        device: Where the models run.
        tiny: Use models and resolutions that a CPU can run.
        guidance: Guidance scale.
        steps: Sampling steps of the structure stage and of both resolutions.
        meshes: Also decode, extract and clean meshes.

    Returns:
        The rows of `StageTimer`.
    """
    torch.manual_seed(0)
    vae, structure, dit = make_models(tiny)
    for model in (vae, structure, dit):
        model.to(device).eval()
    timer = StageTimer(device)
    sampling = partial(SamplingOptions, guidance=Guidance(scale=guidance))

    # The image encoder. Its first call is a warm-up.
    row, column = np.mgrid[:1024, :1024] / 1024 - 0.5
    alpha = np.uint8(255 * (row**2 + column**2 < 0.2))
    rgba = np.dstack([np.full((1024, 1024, 3), 120, np.uint8), alpha])
    images = ImageBatch.collate([prepare_image(rgba, dit.encoder.image_size)]).to(device)
    dit.encode_images(images)
    image = timer.time("image encoder", lambda: dit.encode_images(images))

    # The structure stage, with one step and with all.
    for count in (1, steps[0]):
        timer.time(
            f"structure, {count} steps",
            lambda n=count: structure.generate(image, [0], sampling(steps=n)),
        )

    # Latents, bricks and mesh at both resolutions.
    vertices, faces = torus_mesh()
    mesh = CleanedMesh(vertices=vertices, faces=faces, holes=0, floaters=0, bubbles=0)
    first = structure.resolution
    for resolution, count in ((first, steps[1]), (2 * first, steps[2])):
        level = timer.time(
            f"cells at {resolution}",
            lambda r=resolution, m=mesh: level_near_mesh(m, r, device),
        )
        for n in (1, count):
            z = timer.time(
                f"DiT at {resolution}, {n} steps",
                lambda at=level, k=n: dit.generate(at, image, [0], sampling(steps=k)),
                tokens=len(level),
            )
        if not meshes:
            continue
        decode = partial(vae.decode, z, level)
        timer.time(f"VAE decoder at {resolution} (first call)", decode)
        timer.time(f"VAE decoder at {resolution}", decode)
        extract = partial(extract_meshes, level, torus_values(level))
        ((v, f),) = timer.time(f"marching cubes at {resolution}", extract)
        mesh = timer.time(f"cleaning at {resolution}", partial(clean_mesh, v, f), faces=len(f))
    return timer.rows


@dataclass(frozen=True, kw_only=True)
class GenerationBenchmark:
    """Measure seconds and peak memory of every stage of generation and print a Markdown table."""

    device: str = "auto"
    """Device: "auto", "cpu", "cuda" or "cuda:N"."""
    tiny: bool = False
    """Use models and resolutions that a CPU can run."""
    guidance: float = DEFAULT_GUIDANCE
    """Guidance scale."""
    steps: tuple[int, int, int] = DEFAULT_STEPS
    """Sampling steps of the structure stage and of both resolutions."""
    meshes: bool = True
    """Also time decoding, extraction and cleaning of meshes."""
    out: Path | None = None
    """File to which the rows are also written as JSON."""


def main(args: Sequence[str]) -> None:
    """Parse the options, measure and print a Markdown table."""
    cfg = parse(GenerationBenchmark, args, prog="python -m benchmarks.generation")
    cells_near(*torus_mesh(8), 64)  # compiles
    rows = measure(choose_device(cfg.device), cfg.tiny, cfg.guidance, cfg.steps, cfg.meshes)
    lines = ["| stage | tokens | seconds | peak GB |", "|---|---|---|---|"]
    for row in rows:
        peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"
        lines.append(
            f"| {row['stage']} | {row.get('tokens', '')} | {row['seconds']:.3g} | {peak} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    if cfg.out is not None:
        cfg.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command(main)
