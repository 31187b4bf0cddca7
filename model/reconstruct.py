"""`python -m model.reconstruct MESH -o OUT.glb`: a mesh through the SS-VAE and back.

The mesh becomes bricks, latents, bricks and a mesh again, with any VAE: ours or the published one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from model.config import Precision
from pipeline.core.cli import command, parse
from pipeline.core.devices import Device, check_device, choose_device
from pipeline.core.errors import UserError
from pipeline.core.grid import check_resolution

log = logging.getLogger(__name__)

PROG = "python -m model.reconstruct"


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Encode a mesh with the SS-VAE, decode it, and measure the distance."""

    mesh: Annotated[Path, tyro.conf.Positional]
    """Mesh file, in any format that the data pipeline reads."""

    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Mesh file of the reconstruction. None writes none."""

    checkpoint: str = "runs/export"
    """Directory of an export, of a VAE alone, or of the published Direct3D-S2 weights.
    "props" takes the weights of the package, hf://OWNER/NAME/SUBFOLDER downloads from the Hugging
    Face hub."""

    resolution: int | None = None
    """Resolution of the SDF. None takes the finest one that the checkpoint has a VAE for."""

    device: Device = "auto"
    """Device of the model. "auto" takes a GPU if there is one, "cuda:N" the GPU of number N."""

    precision: Precision = "auto"
    """Precision of matrix products. "auto" is bf16 on a GPU and fp32 on the CPU."""

    samples: int = 200_000
    """Points on each surface from which the distances are measured."""

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.resolution is not None:
            check_resolution(self.resolution)
        if self.samples < 1:
            raise ValueError(f"samples must be 1 or more, got {self.samples}")


def reconstruct(cfg: ReconstructConfig) -> str:
    """Reconstruct a mesh and return the line that describes the result.

    Raises:
        UserError: If the mesh, the checkpoint or an option cannot be used.
    """
    if cfg.out is not None:
        from pipeline.mesh_io.mesh_export import FORMATS

        if cfg.out.suffix.lower() not in FORMATS:
            raise UserError(f"--out must end in one of {', '.join(FORMATS)}, got {cfg.out}")
        if cfg.out.resolve() == cfg.mesh.resolve():
            raise UserError(
                f"{cfg.mesh} would be replaced by its reconstruction; choose another -o"
            )
    device = choose_device(cfg.device)

    from model.inference.reconstruction import load_vae, read_mesh, reconstruct_mesh
    from pipeline.mesh_io.mesh_export import write_mesh

    vae, resolution, iso_value = load_vae(cfg.checkpoint, cfg.resolution)
    mesh, bricks = read_mesh(cfg.mesh, resolution)
    result = reconstruct_mesh(
        vae,
        mesh,
        bricks,
        device=device,
        precision=cfg.precision,
        samples=cfg.samples,
        iso_value=iso_value,
    )
    if cfg.out is not None:
        write_mesh(cfg.out, result.vertices, result.faces)
    metrics = result.metrics
    f1 = ", ".join(f"F1({t}) {100 * value:.2f} %" for t, value in metrics.f1.items())
    return (
        f"{cfg.mesh} at R = {resolution}: {result.tokens} tokens, {len(result.faces)} faces; "
        f"CD x1000 {1000 * metrics.chamfer:.3f}, {f1}, "
        f"normal error {100 * (1 - metrics.normal_consistency):.2f} %"
    )


def main(args: Sequence[str]) -> int:
    """Parse the options, reconstruct the mesh and log the distances."""
    log.info("%s", reconstruct(parse(ReconstructConfig, args, prog=PROG)))
    return 0


if __name__ == "__main__":
    command(main)
