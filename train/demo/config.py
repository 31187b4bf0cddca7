"""Options of the demo, and the arguments that its commands get on a CPU and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HELD_OUT_FOLDER = Path(__file__).parent / "held_out"  # pictures that are part of the package
HELD_OUT_CHECKPOINT = "props"  # the shipped weights that they are given to
LIVE_PICTURES = 3  # from so many pictures the demo generates meshes; it shows stored ones of others


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Generate meshes from pictures of held-out objects with the shipped weights. Then build data,
    train every stage, generate and evaluate meshes, and write a report page.

    The demo is resumable: run the same command again and it continues where it stopped.
    """

    size: Literal["auto", "cpu", "gpu"] = "auto"
    """Size of the demo. "gpu" uses more data and larger models than "cpu". "auto" is "gpu" if
    there is a CUDA device."""

    data: Path = Path("data/demo")
    """Directory of the build."""

    out: Path = Path("runs/demo")
    """Directory of the trained stages, the evaluations, the logs and the report page."""


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How large a demo is: the arguments that its commands get, as a user would type them."""

    device: str
    preset: str  # of every training command
    resolution: str
    parallel_training: bool  # train the structure stage beside the VAE and the DiT
    build: tuple[str, ...]
    vae: tuple[str, ...]
    structure: tuple[str, ...]
    dit: tuple[str, ...]
    sampling: tuple[str, ...]  # that the export recommends


DEMO_SIZES: dict[str, DemoSize] = {
    # About 14 minutes on two cores. Few assets, because the models memorise few assets sooner.
    "cpu": DemoSize(
        device="cpu",
        preset="tiny",
        resolution="64",
        parallel_training=True,
        build=("--limit", "24"),
        vae=("--bricks.no-symmetries", "--loop.steps", "700"),
        structure=("--vae.loop.steps", "300", "--flow.loop.steps", "800"),
        dit=("--flow.loop.steps", "800"),
        sampling=("--steps", "20", "--guidance", "2.0"),
    ),
    "gpu": DemoSize(
        device="cuda",
        preset="small",
        resolution="256",
        parallel_training=False,
        build=(
            *("--limit", "96", "--resolutions", "256", "--topology-resolution", "256"),
            *("--views", "24", "--image-size", "512"),
        ),
        vae=("--bricks.resolutions", "256", "--loop.max-minutes", "4"),
        structure=("--vae.loop.max-minutes", "2", "--flow.loop.max-minutes", "4"),
        dit=("--flow.loop.max-minutes", "4"),
        sampling=("--steps", "50", "30", "--guidance", "3.0"),
    ),
}
