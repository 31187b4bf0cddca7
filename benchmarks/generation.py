"""`python -m benchmarks.generation`: seconds and peak memory of every stage of generation, at the paper's sizes.

Weights are random, which changes no cost: the cells of each stage are those of a torus with about the paper's mean
number of tokens, and marching cubes runs on its exact bricks, since random ones have no surface.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.conditioning import image_conditioned_dit
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.conditioning.image_encoder import DinoEncoder, ImageBatch
from model.conditioning.image_preprocessing import prepare_image
from model.config import (
    DEFAULT_STEPS,
    ConditionedDiTConfig,
    DiTConfig,
    EncoderConfig,
    Guidance,
    OccupancyConfig,
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
from pipeline.core.grid import band, spacing

MAJOR, MINOR = (
    0.30,
    0.095,
)  # of a torus: about 10.7k cells at 512 and 46k at 1024, as the paper's means


def torus_values(level: Level) -> torch.Tensor:
    """clamp(sdf / tau) of the 512 points of every cell, fp32 [M, 512]."""
    resolution = 8 * level.resolution
    local = torch.cartesian_prod(*[torch.arange(8, device=level.device)] * 3)
    points = (8 * level.coords[:, None, 1:] + local) * spacing(resolution) - 0.5
    ring = (points[..., [0, 2]].norm(dim=-1) - MAJOR).square() + points[..., 1].square()
    return ((ring.sqrt() - MINOR) / band(resolution)).clamp(-1, 1)


def torus_mesh(n: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and faces of the same torus, n x n quads."""
    u, v = np.meshgrid(*[2 * np.pi * np.arange(n) / n] * 2, indexing="ij")
    ring = MAJOR + MINOR * np.cos(v)
    vertices = np.stack([ring * np.cos(u), MINOR * np.sin(v), ring * np.sin(u)], -1).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    a, b, c, d = (((i + x) % n) * n + (j + y) % n for x, y in ((0, 0), (0, 1), (1, 1), (1, 0)))
    faces = np.concatenate(
        [np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)]
    )
    return vertices, faces.astype(np.int32)


def models(tiny: bool) -> tuple[SparseVAE, Structure, ConditionedDiT, int]:
    """Random models and the first resolution."""
    if tiny:
        size, first = {"channels": 32, "layers": 1, "heads": 2, "image_size": 112}, 64
        dit = DiTConfig(channels=64, blocks=2, heads=4, kv_heads=2, condition_channels=32)
        full = DiTConfig(
            channels=64,
            blocks=2,
            heads=4,
            kv_heads=4,
            condition_channels=32,
            latent_channels=8,
            attention="full",
        )
        occupancy, vae = (
            OccupancyConfig(side=8, widths=(8, 16), groups=8),
            VAEConfig(widths=(8, 8, 16, 32), heads=2, groups=8),
        )
    else:
        size, first = {"channels": 1024, "layers": 24, "heads": 16, "image_size": 518}, 512
        dit, full, occupancy, vae = (
            DiTConfig(),
            StructureConfig().flow.dit,
            OccupancyConfig(),
            VAEConfig(),
        )
    image = EncoderConfig(kind="dinov2", channels=size["channels"], image_size=size["image_size"])
    encoder = DinoEncoder.random(**size).to(torch.float32 if tiny else torch.bfloat16)
    # The pretrained weights are not available where benchmarks run.
    image_conditioned_dit.build_encoder = lambda _config: encoder
    structure = Structure(
        StructureConfig(occupancy=occupancy, flow=ConditionedDiTConfig(dit=full, encoder=image))
    )
    return (
        SparseVAE(vae),
        structure,
        ConditionedDiT(ConditionedDiTConfig(dit=dit, encoder=image)),
        first,
    )


def measure(
    device: torch.device, tiny: bool, guidance: float, steps: tuple[int, ...]
) -> list[dict[str, Any]]:
    """One row a stage."""
    torch.manual_seed(0)
    vae, structure, dit, first = models(tiny)
    for model in (vae, structure, dit):
        model.to(device).eval()
    rows: list[dict[str, Any]] = []

    def timed(name: str, work: Callable[[], Any], **about: Any) -> Any:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with (
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
        ):
            made = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
        rows.append(
            {"stage": name, "seconds": time.perf_counter() - started, "peak_gb": peak, **about}
        )
        return made

    row, column = np.mgrid[:1024, :1024] / 1024 - 0.5
    alpha = np.uint8(255 * (row**2 + column**2 < 0.2))
    picture = np.dstack([np.full((1024, 1024, 3), 120, np.uint8), alpha])
    images = ImageBatch.collate([prepare_image(picture, dit.encoder.image_size)]).to(device)
    condition = dit.encode_images(images)  # warm-up of the encoder
    condition = timed("image encoder", lambda: dit.encode_images(images))
    scale = Guidance(scale=guidance)
    for count in (1, steps[0]):
        timed(
            f"structure, {count} steps",
            lambda n=count: structure.generate(condition, [0], steps=n, guidance=scale),
        )
    vertices, faces = torus_mesh()
    mesh = CleanedMesh(vertices=vertices, faces=faces, holes=0, floaters=0, bubbles=0)
    for number, resolution in enumerate((first, 2 * first)):
        level = timed(
            f"cells at {resolution}", lambda r=resolution, m=mesh: level_near_mesh(m, r, device)
        )
        count = steps[number + 1]
        for n in (1, count):
            z = timed(
                f"DiT at {resolution}, {n} steps",
                lambda at=level, k=n: dit.generate(at, condition, [0], steps=k, guidance=scale),
                tokens=len(level),
            )
        timed(f"VAE decoder at {resolution} (first call)", lambda z=z, at=level: vae.decode(z, at))
        timed(f"VAE decoder at {resolution}", lambda z=z, at=level: vae.decode(z, at))
        values = torus_values(level)
        ((v, f),) = timed(
            f"marching cubes at {resolution}", lambda at=level, x=values: extract_meshes(at, x)
        )
        mesh = timed(f"cleaning at {resolution}", lambda v=v, f=f: clean_mesh(v, f), faces=len(f))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--tiny", action="store_true", help="models and resolutions that a CPU can run"
    )
    parser.add_argument("--guidance", type=float, default=7.0)
    parser.add_argument("--steps", type=int, nargs=3, default=DEFAULT_STEPS)
    parser.add_argument("--out", type=Path, default=None, help="also write the rows as JSON")
    cfg = parser.parse_args()
    cells_near(*torus_mesh(8), 64)  # compiles
    rows = measure(torch.device(cfg.device), cfg.tiny, cfg.guidance, tuple(cfg.steps))
    lines = ["| stage | tokens | seconds | peak GB |", "|---|---|---|---|"]
    for row in rows:
        peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"
        lines.append(
            f"| {row['stage']} | {row.get('tokens', '')} | {row['seconds']:.3g} | {peak} |"
        )
    print("\n".join(lines))  # noqa: T201
    if cfg.out is not None:
        cfg.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
