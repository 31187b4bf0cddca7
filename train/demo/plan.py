"""The commands of the demo, and the order in which they run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from train.demo.config import HELD_OUT_CHECKPOINT, DemoConfig, DemoSize

SURFACE_SAMPLES = "20000"  # of each surface in the demo's evaluations


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of this project.

    Args:
        name: Name in log lines and on the page. The log file is named after it.
        arguments: The words that a user would type after `python -m`.
    """

    name: str
    arguments: tuple[str, ...]


Sequence = tuple[Command, ...]  # commands that run one after another
Group = tuple[Sequence, ...]  # sequences that run at the same time


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """All commands of a demo.

    Args:
        groups: Groups of command sequences. A group starts when the one before it has ended. The
            sequences of a group run at the same time.
        out: Directory of the demo. Logs are written to its subdirectory `logs`.
        threads: CPU threads that the sequences of a group share.
    """

    groups: tuple[Group, ...]
    out: Path
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)


def plan_held_out(cfg: DemoConfig, size: DemoSize, pictures: Iterable[Path]) -> DemoPlan:
    """Return the command that generates meshes from pictures with the shipped weights.

    The meshes are written to the directory `held_out` of the demo.
    """
    command = Command(
        name="generate from held-out pictures",
        arguments=(
            *("model.generate", *map(str, pictures), "--checkpoint", HELD_OUT_CHECKPOINT),
            *("--device", size.device, "-o", str(held_out_meshes(cfg.out))),
        ),
    )
    return DemoPlan(groups=(((command,),),), out=cfg.out)


def held_out_meshes(out: Path) -> Path:
    """Return the directory of the meshes that a demo generates from held-out pictures."""
    return out / "held_out"


def plan_demo(cfg: DemoConfig, size: DemoSize) -> DemoPlan:
    """Return the commands of a demo, from building the data to evaluating generated meshes.

    The structure stage does not need the VAE, so both can be trained at the same time.
    """
    out = cfg.out
    vae, structure, dit, export = (out / name for name in ("vae", "structure", "dit", "export"))
    common = ("--data", cfg.data, "--device", size.device)
    latents = ("--latents", out / "latents", "--vae", vae / "latest")
    views = ("--resolution", size.resolution, "--held-out-views", "2")

    def command(module: str, *arguments: str | Path, name: str = "") -> Command:
        return Command(
            name=name or module.partition(".")[2], arguments=(module, *map(str, arguments))
        )

    def train(stage: str, folder: Path, *arguments: str | Path) -> Command:
        start = ("--preset", size.preset, *common, "--out", folder)
        return command(f"train.{stage}", *start, *arguments)

    def evaluate(kind: str, folder: str, *arguments: str | Path, name: str) -> Command:
        start = (kind, *common, "--samples", SURFACE_SAMPLES, "--out", out / folder)
        return command("train.evaluate", *start, *arguments, name=name)

    train_dit: Sequence = (
        train("vae", vae, *size.vae),
        command("train.encode", *common, *latents, "--resolutions", size.resolution),
        # The tiny DiT trains more slowly on two threads than on one.
        train("dit", dit, *latents, *views, "--samples", "0", *size.dit),
    )
    train_structure: Sequence = (
        train("structure", structure, *views, "--samples", "4", *size.structure),
    )
    stages = (
        *("--vae", vae / "latest", "--structure", structure / "flow/latest"),
        *("--dit", dit / "latest"),
    )
    generation = ("--checkpoint", export)
    evaluate_vae = evaluate(
        "vae",
        "reconstruction",
        *("--checkpoint", export / f"vae_{size.resolution}", "--resolutions", size.resolution),
        *("--pictures", "6"),
        name="evaluate vae",
    )
    evaluate_unseen = evaluate(
        "generation",
        "unseen",
        *(*generation, "--split", "val", "--limit", "2"),
        name="evaluate generation of unseen shapes",
    )
    evaluate_seen = evaluate(
        "generation",
        "generation",
        *(*generation, "--limit", "10"),
        name="evaluate generation",
    )
    groups: tuple[Group, ...] = (
        ((command("pipeline.build", "--preset", "smoke", "--out", cfg.data, *size.build),),),
        ((command("pipeline.verify", cfg.data),),),
        (train_dit, train_structure)
        if size.parallel_training
        else ((*train_dit, *train_structure),),
        ((command("train.export", *stages, "--out", export, *size.sampling),),),
        ((evaluate_vae, evaluate_unseen), (evaluate_seen,)),
    )
    return DemoPlan(groups=groups, out=out)
