"""`python -m benchmarks.official`: cost of generation with models of the published sizes.

Weights are random, which does not change the cost. The cells of each resolution are those of a
torus, not of the random structure stage, and marching cubes runs on the torus's exact bricks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.generation import (
    MAJOR_RADIUS,
    MINOR_RADIUS,
    StageTimer,
    torus_mesh,
    torus_values,
)
from benchmarks.gpu import gpu_machine
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.conditioning.image_encoder import DinoEncoder, ImageBatch, ImageEncoder
from model.conditioning.image_preprocessing import prepare_image
from model.config import (
    DEFAULT_STEPS,
    GenerationOptions,
    Guidance,
    Meshing,
    Precision,
    SamplingOptions,
    StructureConfig,
)
from model.image_tokens import ImageTokens
from model.inference.cells_near_mesh import cells_near
from model.inference.extract_mesh import extract_meshes
from model.inference.generator import Generator, level_near_mesh
from model.inference.mesh_cleaning import CleanedMesh, clean_mesh
from model.inference.refine_volume import (
    crossed_bricks,
    outside_of,
    refined_volume,
    signed_bricks,
)
from model.inference.stages import Stages
from model.occupancy_vae import OccupancyVAE
from model.published_settings import (
    conditioned,
    dense_dit,
    dense_vae,
    image_encoder,
    refiner,
    sparse_dit,
    sparse_vae,
    time_schedule,
)
from model.refiner import VolumeRefiner
from model.sparse_dit import SparseDiT
from model.sparse_tensor import Level
from model.sparse_vae import SparseVAE
from model.structure import Structure
from pipeline.core.cli import command, parse
from pipeline.core.grid import band, spacing

SETTINGS = Path(__file__).resolve().parents[1] / "tests/model/official/shapes/counts.json"
FULL_VOLUME = 512
GUIDANCE = Guidance(scale=7.0)


@dataclass(frozen=True, kw_only=True)
class OfficialBenchmark:
    """Measure seconds and peak memory of every stage with models of the published sizes."""

    version: Literal["1.0", "1.1"] = "1.1"
    """Version of the published settings."""
    precision: Precision = "fp16"
    """Precision of matrix products."""
    steps: tuple[int, int, int] = DEFAULT_STEPS
    """Sampling steps of the structure stage and of both resolutions."""
    refiners: bool = True
    """Load the refiners and measure them."""
    out: Path | None = None
    """File to which the rows are also written as JSON."""


def random_model(cls: Callable[[Any], Any], config: Any) -> Any:
    """Return a model on the GPU whose weights are small random numbers."""
    with torch.device("meta"):
        model = cls(config)
    model.to_empty(device="cuda")
    for tensor in model.state_dict().values():
        tensor.normal_(0, 0.02) if tensor.ndim > 1 else tensor.fill_(1)
    return model


def make_stages(version: str, refiners: bool) -> Stages:
    """Return all stages of a published version with random weights."""
    known = json.loads(SETTINGS.read_text(encoding="utf-8"))

    def read(stage: str, reader: Callable[..., Any], *more: Any) -> Any:
        return reader(known[f"v{version} {stage}"]["settings"], *more, stage)

    dino = {"model": "facebookresearch/dinov2", "version": "dinov2_vitl14_reg", "size": 518}
    encoder_config = image_encoder(dino, 1024, "random", "encoder")
    encoder: ImageEncoder = DinoEncoder.random(1024, 24, 16, 518)

    def dit(config: Any, shift: float) -> ConditionedDiT:
        times = time_schedule({"num_train_timesteps": 1000, "shift": shift}, "schedule")
        whole = conditioned(config, encoder_config, times, "benchmark")
        return ConditionedDiT(whole, random_model(SparseDiT, config), encoder)

    dense, side = read("dense_dit", dense_dit)
    occupancy, _ = read("dense_vae", dense_vae, side)
    flow = dit(dense, 6.0)
    structure = Structure(
        StructureConfig(occupancy=occupancy, flow=flow.config),
        (random_model(OccupancyVAE, occupancy), flow),
    )
    dits, vaes, refined = {}, {}, {}
    for size, shift in ((512, 6.0), (1024, 8.0)):
        dits[size] = dit(read(f"sparse_dit_{size}", sparse_dit)[0], shift)
        vaes[size] = random_model(SparseVAE, read(f"sparse_vae_{size}", sparse_vae)[0])
    if refiners:
        for size, stage in ((512, "refiner"), (1024, "refiner_1024")):
            values = known[f"v{version} {stage}"]["settings"]
            config = refiner(values, signs=size == 1024, where=stage)
            refined[size] = random_model(VolumeRefiner, config)
    meshing = {512: Meshing(iso_value=0.2), 1024: Meshing(iso_value=0.2, normalize=True)}
    return Stages(structure=structure, dits=dits, vaes=vaes, refiners=refined, meshing=meshing)


def torus_volume(device: torch.device) -> torch.Tensor:
    """Return clamp(sdf / tau) of the torus on the whole grid at R = 512, fp32 [R, R, R]."""
    axis = torch.arange(FULL_VOLUME, device=device) * spacing(FULL_VOLUME) - 0.5
    volume = torch.empty((FULL_VOLUME,) * 3, device=device)
    for number, x in enumerate(axis):
        ring = ((x.square() + axis.square()).sqrt() - MAJOR_RADIUS).square()
        distance = (ring[None] + axis.square()[:, None]).sqrt() - MINOR_RADIUS
        volume[number] = (distance / band(FULL_VOLUME)).clamp(-1, 1)
    return volume


def measure(cfg: OfficialBenchmark) -> list[dict[str, Any]]:
    """Time every stage. Returns the rows of `StageTimer`."""
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    generator = Generator(make_stages(cfg.version, cfg.refiners), device, cfg.precision)
    torch.cuda.empty_cache()
    timer = StageTimer(device, generator.dtype)
    weights = torch.cuda.memory_allocated() / 1e9
    timer.rows.append({"stage": "weights of all stages", "seconds": 0.0, "peak_gb": weights})
    flow = generator.structure.flow
    encode(flow, device)
    image = timer.time("image encoder", partial(encode, flow, device))
    for count in (1, cfg.steps[0]):
        sampling = SamplingOptions(steps=count, guidance=GUIDANCE)
        sampled = partial(generator.structure.generate, image, [0], sampling)
        timer.time(f"structure, {count} steps", sampled, tokens=generator.structure.resolution)
    vertices, faces = torus_mesh()
    mesh = CleanedMesh(vertices=vertices, faces=faces, holes=0, floaters=0, bubbles=0)
    for size, count in zip(generator.dits, cfg.steps[1:], strict=True):
        mesh = measure_resolution(timer, generator, size, mesh, count)
    return timer.rows


def encode(dit: ConditionedDiT, device: torch.device) -> ImageTokens:
    """Return the tokens of a picture of a disc."""
    row, column = np.mgrid[:1024, :1024] / 1024 - 0.5
    alpha = np.uint8(255 * (row**2 + column**2 < 0.2))
    rgba = np.dstack([np.full((1024, 1024, 3), 120, np.uint8), alpha])
    prepared = prepare_image(rgba, dit.encoder.image_size, preparation="published")
    return dit.encode_images(ImageBatch.collate([prepared], dit.config.image_tokens).to(device))


def measure_resolution(
    timer: StageTimer, generator: Generator, size: int, mesh: CleanedMesh, steps: int
) -> CleanedMesh:
    """Time the stages of one resolution.

    Args:
        timer: Collects the rows.
        generator: The models.
        size: The resolution.
        mesh: The mesh near which the cells are.
        steps: Sampling steps.

    Returns:
        The torus at this resolution.
    """
    device = generator.device
    # The mesh is not normalised, so that there are about as many cells as in the paper.
    near = partial(level_near_mesh, mesh, size, device)
    level = timer.time(f"cells at {size}", near)
    dit, vae = generator.dits[size], generator.vaes[size]
    tokens = encode(dit, device)
    z = torch.empty(0)
    for count in (1, steps):
        sampling = SamplingOptions(steps=count, guidance=GUIDANCE)
        sampled = partial(dit.generate, level, tokens, [0], sampling)
        z = timer.time(f"DiT at {size}, {count} steps", sampled, tokens=len(level))
    refiner = generator.refiners.get(size)
    decode = vae.decode_with_features if size == FULL_VOLUME else vae.decode
    decoded: Any = None
    for note in (" (first call)", ""):
        decoded = None  # frees the result of the first call
        decoded = timer.time(f"VAE decoder at {size}{note}", partial(decode, z, level))
    bricks: tuple[Level, torch.Tensor] = (level, torus_values(level))
    if refiner is not None:
        for note in (" (first call)", ""):
            name = f"refiner at {size}{note}"
            if size == FULL_VOLUME:
                timer.time(name, partial(refined_volume, refiner, level, *decoded))
            else:
                outside = timer.time(name, partial(outside_of, refiner, level, decoded))
                timer.time(
                    f"signed cells at {size}{note}",
                    partial(signed_bricks, level, decoded, outside),
                )
    if refiner is not None and size == FULL_VOLUME:
        del decoded
        volume = torus_volume(device)
        bricks = timer.time(f"crossed cells at {size}", partial(crossed_bricks, volume, 0.2))
    extract = partial(extract_meshes, *bricks, iso_value=0.2)
    ((v, f),) = timer.time(f"marching cubes at {size}", extract)
    return timer.time(f"cleaning at {size}", partial(clean_mesh, v, f), faces=len(f))


def main(args: Sequence[str]) -> None:
    """Parse the options, measure and print a Markdown table."""
    cfg = parse(OfficialBenchmark, args, prog="python -m benchmarks.official")
    GenerationOptions(precision=cfg.precision, steps=cfg.steps)
    cells_near(*torus_mesh(8), 64)  # compiles
    rows = measure(cfg)
    machine = gpu_machine(torch.device("cuda", 0))
    lines = ["| stage | tokens | seconds | peak GB |", "|---|---|---|---|"]
    lines += [
        f"| {row['stage']} | {row.get('tokens', '')} | {row['seconds']:.3g} | "
        f"{row['peak_gb']:.2f} |"
        for row in rows
    ]
    highest = max(row["peak_gb"] for row in rows)
    lines.append(f"| highest | | | {highest:.2f} |")
    sys.stdout.write("\n".join([json.dumps(machine), *lines]) + "\n")
    if cfg.out is not None:
        cfg.out.write_text(
            json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    command(main)
