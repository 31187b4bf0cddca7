"""`python -m benchmarks.low_memory`: peak memory of a generation, with and without --low-memory.

An export with random weights is written, and each mode generates a mesh in a process of its own.
Random weights have no surface: the cells and the surface of each stage are those of a torus. All
stages run, with the memory that their weights and their cells need. The decoded values of all
resolutions are hashed, so that the modes can be compared bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.generation import torus_mesh
from model import structure as structure_module
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.conditioning.image_encoder import DinoEncoder
from model.config import (
    ConditionedDiTConfig,
    DiTConfig,
    EncoderConfig,
    GenerationOptions,
    OccupancyConfig,
    StructureConfig,
    VAEConfig,
)
from model.inference import generator as generator_module
from model.inference.generator import Generator, level_near_mesh
from model.inference.mesh_cleaning import CleanedMesh
from model.inference.stages import Stages, write_stages
from model.sparse_tensor import Level
from model.sparse_vae import SparseVAE
from model.structure import Structure
from pipeline.core.cli import command, parse
from pipeline.core.devices import choose_device
from pipeline.core.errors import RunError, UserError
from pipeline.core.grid import CELL_SIDE
from pipeline.core.memory import peak_memory
from pipeline.core.primitives.marching_cubes import MeshArrays

log = logging.getLogger(__name__)

PICTURE_SIDE = 1024
TORUS_QUADS = 256  # along each circle


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes of all stages.

    Attributes:
        dit: Configuration of the SS-DiTs.
        structure_dit: Configuration of the structure stage's DiT.
        occupancy: Configuration of its VAE. Its side is an eighth of the first resolution.
        vae: Configuration of the SS-VAE.
        dino_layers: Layers of the random DINOv2. Its channels are those that the DiTs take.
    """

    dit: DiTConfig
    structure_dit: DiTConfig
    occupancy: OccupancyConfig
    vae: VAEConfig
    dino_layers: int


# On a CPU, medium needs minutes. Its resolutions are 128 and 256, those of tiny are 64 and 128.
_MEDIUM = DiTConfig(channels=512, blocks=24, heads=16, condition_channels=512)
_TINY = DiTConfig(channels=64, blocks=2, heads=4, kv_heads=2, condition_channels=64)
SIZES = {
    "tiny": ModelSizes(
        dit=_TINY,
        structure_dit=replace(_TINY, kv_heads=4, latent_channels=8, attention="full"),
        occupancy=OccupancyConfig(side=8, widths=(8, 16), groups=8),
        vae=VAEConfig(widths=(8, 8, 16, 32), heads=2, groups=8),
        dino_layers=1,
    ),
    "medium": ModelSizes(
        dit=_MEDIUM,
        structure_dit=replace(_MEDIUM, kv_heads=16, latent_channels=8, attention="full"),
        occupancy=OccupancyConfig(side=16, widths=(32, 128, 256)),
        vae=VAEConfig(),
        dino_layers=12,
    ),
    "paper": ModelSizes(
        dit=DiTConfig(),
        structure_dit=StructureConfig().flow.dit,
        occupancy=OccupancyConfig(),
        vae=VAEConfig(),
        dino_layers=24,
    ),
}


@dataclass(frozen=True, kw_only=True)
class LowMemoryConfig:
    """Measure the peak memory of a generation with and without --low-memory."""

    size: Literal["tiny", "medium", "paper"] = "medium"
    """Sizes of the models: "paper" needs a GPU and 3 GB of disk. "medium" runs on a CPU within
    minutes, "tiny" within seconds."""

    device: str = "auto"
    """Device: "auto", "cpu", "cuda" or "cuda:N"."""

    steps: int = 2
    """Sampling steps of each stage."""

    resolution: int | None = None
    """Resolution of the mesh. Models of finer ones are not loaded. None takes the finest one: 1024
    of "paper", 256 of "medium" and 128 of "tiny"."""

    folder: Path | None = None
    """Directory of the export, which is written if it is missing. None takes a temporary one."""

    mode: Literal["both", "usual", "low"] = "both"
    """Measure both modes, each in a process of its own, or one in this process."""

    timeout_s: float = 900.0
    """Seconds after which a mode that has not ended counts as failed."""

    out: Path | None = None
    """File to which the rows are also written as JSON, after each mode."""


def write_export(folder: Path, sizes: ModelSizes, device: torch.device) -> dict[str, float]:
    """Write an export with random weights, and the image encoder beside it.

    Matrices are written in bf16. Generation loads them in the precision of the models, as it loads
    an export of any precision.

    Args:
        folder: Directory of "stages" and "dinov2".
        sizes: Sizes of the models.
        device: Where random numbers are drawn. A CPU takes a minute for models of the paper's size.

    Returns:
        Size of the weights of each stage as they are stored, in GB.
    """
    torch.manual_seed(0)
    channels = sizes.dit.condition_channels
    with device:
        dino = DinoEncoder.random(channels, sizes.dino_layers, channels // 64, 518, mlp_ratio=4)
        encoder = EncoderConfig(channels=channels, weights=str(folder / "dinov2"))
        flow = ConditionedDiT(
            ConditionedDiTConfig(dit=sizes.structure_dit, encoder=encoder), encoder=dino
        )
        config = StructureConfig(occupancy=sizes.occupancy, flow=flow.config)
        structure = Structure(config, (structure_module.OccupancyVAE(sizes.occupancy), flow))
        dit = ConditionedDiT(ConditionedDiTConfig(dit=sizes.dit, encoder=encoder), encoder=dino)
        vae = SparseVAE(sizes.vae)
        for model in (structure, dit, vae):
            _draw_zero_weights(model)
    dino.model.to(torch.bfloat16).save_pretrained(folder / "dinov2")  # pyright: ignore
    first = structure.resolution
    stages = Stages(structure=structure, dits={first: dit}, vaes={first: vae})
    written = write_stages(folder / "stages", stages, matrices=torch.bfloat16)
    # Both resolutions have models of the same sizes, so that one file serves both.
    for kind in ("dit", "vae"):
        shutil.copytree(
            folder / "stages" / f"{kind}_{first}",
            folder / "stages" / f"{kind}_{2 * first}",
            copy_function=os.link,
        )
    return {
        path.name: sum(file.stat().st_size for file in path.iterdir()) / 1e9
        for path in (folder / "dinov2", *written)
    }


def _draw_zero_weights(model: torch.nn.Module) -> None:
    """Give random values to matrices that start at zero, without which no stage has a result."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def measure(cfg: LowMemoryConfig, folder: Path) -> dict[str, Any]:
    """Generate in this process: twice on a GPU, where the first time includes compilation.

    Args:
        cfg: The options. The mode must be "usual" or "low".
        folder: What `write_export` wrote.

    Returns:
        "mode", "load_seconds", "first_seconds" and "seconds" of the first and the last generation,
        "tokens" of each stage, "sha256" of the decoded values, "peak_gb" of the process,
        "gpu_peak_gb" of the GPU's tensors and "gpu_reserved_gb" of what torch took from the driver.
        Without a GPU both are None.
    """
    device = choose_device(cfg.device)
    vertices, faces = torus_mesh(TORUS_QUADS)
    torus = CleanedMesh(vertices=vertices, faces=faces, holes=0, floaters=0, bubbles=0)
    # The stages run on the torus, whatever the random weights generate.
    structure_module.occupied_level = lambda grid: level_near_mesh(
        torus, CELL_SIDE * grid.shape[1], device
    )
    decoded = hashlib.sha256()

    def torus_surface(_level: Level, values_MK: torch.Tensor, _iso: float) -> list[MeshArrays]:
        if not values_MK.isfinite().all():
            raise RunError("a stage decoded values that are not finite")
        decoded.update(values_MK.cpu().numpy().tobytes())
        return [(vertices, faces)]

    generator_module.extract_meshes = torus_surface
    row, column = np.mgrid[:PICTURE_SIDE, :PICTURE_SIDE] / PICTURE_SIDE - 0.5
    alpha = np.uint8(255 * (row**2 + column**2 < 0.2))
    picture = np.dstack([np.full((PICTURE_SIDE, PICTURE_SIDE, 3), 120, np.uint8), alpha])
    started = time.perf_counter()
    options = GenerationOptions(resolution=cfg.resolution, steps=(cfg.steps,))
    stages = Generator.load(folder / "stages", device, options, low_memory=cfg.mode == "low")
    load_seconds = time.perf_counter() - started
    log.info("%s: the stages are loaded after %.1f s.", cfg.mode, load_seconds)

    def progress(stage: str, numbers: Iterable[int]) -> Iterable[int]:
        log.info("%s: stage %s begins; peak so far %.2f GB", cfg.mode, stage, peak_memory() / 1e9)
        return numbers

    on_gpu = device.type == "cuda"
    seconds, tokens = [], []
    for _ in range(2 if on_gpu else 1):
        started = time.perf_counter()
        made = stages.generate(picture, 0, options, progress=progress)
        seconds.append(time.perf_counter() - started)
        tokens = [stage.tokens for stage in made.stages]
        log.info("%s: a mesh is generated after %.1f s.", cfg.mode, seconds[-1])
    return {
        "mode": cfg.mode,
        "load_seconds": load_seconds,
        "first_seconds": seconds[0],
        "seconds": seconds[-1],
        "tokens": tokens,
        "sha256": decoded.hexdigest(),
        "peak_gb": peak_memory() / 1e9,
        "gpu_peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None,
        "gpu_reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9 if on_gpu else None,
    }


def measure_in_child(cfg: LowMemoryConfig, folder: Path, mode: str) -> dict[str, Any]:
    """Return the row of a mode, measured in a process of its own.

    Returns:
        As `measure`, or "mode" and "failed" with the reason.
    """
    options = ["--size", cfg.size, "--device", cfg.device, "--steps", str(cfg.steps)]
    options += ["--mode", mode, "--folder", str(folder)]
    if cfg.resolution is not None:
        options += ["--resolution", str(cfg.resolution)]
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "benchmarks.low_memory", *options],
            stdout=subprocess.PIPE,
            check=False,
            encoding="utf-8",
            timeout=cfg.timeout_s,
        )
    except subprocess.TimeoutExpired:
        return {"mode": mode, "failed": f"it did not end within {cfg.timeout_s:g} s"}
    if ended.returncode:
        reason = f"its process ended with {ended.returncode}; see the messages above"
        return {"mode": mode, "failed": reason}
    return json.loads(ended.stdout.splitlines()[-1])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| mode | load s | first mesh s | last mesh s | peak GB of the process "
        "| GPU: tensors GB | GPU: reserved GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['mode']} | failed: {row['failed']} | | | | | |")
            continue
        times = [f"{row[name]:.1f}" for name in ("load_seconds", "first_seconds", "seconds")]
        sizes = [row[name] for name in ("peak_gb", "gpu_peak_gb", "gpu_reserved_gb")]
        cells = [row["mode"], *times, *("" if gb is None else f"{gb:.2f}" for gb in sizes)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(args: Sequence[str]) -> int:
    """Parse the options, measure and print a Markdown table, or one row as JSON.

    Returns:
        0, or 1 if a mode failed. The rows of the others are printed and written.

    Raises:
        RunError: If the modes decoded different values.
    """
    cfg = parse(LowMemoryConfig, args, prog="python -m benchmarks.low_memory")
    if cfg.out is not None and not cfg.out.parent.is_dir():
        raise UserError(f"--out {cfg.out} is in a directory that does not exist; create it")
    with tempfile.TemporaryDirectory() as temporary:
        folder = cfg.folder or Path(temporary)
        weights: dict[str, float] = {}
        if not (folder / "stages").is_dir():
            log.info("An export with random weights is written to %s.", folder)
            started = time.perf_counter()
            weights = write_export(folder, SIZES[cfg.size], choose_device(cfg.device))
            log.info("It took %.1f s.", time.perf_counter() - started)
            log.info("weights in GB: %s", {name: round(gb, 2) for name, gb in weights.items()})
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # the modes have the GPU for themselves
        if cfg.mode != "both":
            sys.stdout.write(json.dumps(measure(cfg, folder)) + "\n")
            return 0
        rows: list[dict[str, Any]] = []
        for mode in ("usual", "low"):
            rows.append(measure_in_child(cfg, folder, mode))
            log.info("%s", rows[-1])
            if cfg.out is not None:
                result = {"options": asdict(cfg), "weights_gb": weights, "rows": rows}
                text = json.dumps(result, indent=1, default=str) + "\n"
                cfg.out.write_text(text, encoding="utf-8")
    sys.stdout.write(table(rows))
    if any("failed" in row for row in rows):
        return 1
    if len({row["sha256"] for row in rows}) > 1:
        raise RunError(f"the modes decoded different values: {[row['sha256'] for row in rows]}")
    log.info("both modes decoded the same values, bit by bit")
    return 0


if __name__ == "__main__":
    command(main)
