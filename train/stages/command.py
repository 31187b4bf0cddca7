"""The commands that train a stage: their options, presets and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.cli import parse_with_presets
from pipeline.core.errors import UserError
from train.stages.dit.config import DIT_PRESETS
from train.stages.structure.config import STRUCTURE_PRESETS
from train.stages.vae.config import VAE_PRESETS

StageName = Literal["vae", "structure", "dit"]


@dataclass(frozen=True, kw_only=True)
class StageCommand:
    """The options of a command.

    Args:
        presets: Configurations by name.
        basic: Names of the options that `--help` lists.
    """

    presets: Mapping[str, Any]
    basic: tuple[str, ...]


STAGE_COMMANDS: dict[StageName, StageCommand] = {
    "vae": StageCommand(
        presets=VAE_PRESETS,
        basic=(
            *("preset", "data", "out", "init", "device", "gpus", "ray-gpus"),
            *("bricks.resolutions", "bricks.batch-size", "bricks.max-tokens"),
            *("loop.steps", "loop.max-minutes", "loop.optimizer", "loop.learning-rate"),
            "loop.seed",
        ),
    ),
    "structure": StageCommand(
        presets=STRUCTURE_PRESETS,
        basic=(
            *("preset", "part", "data", "out", "init", "device", "gpus", "ray-gpus"),
            "resolution",
            *(
                "cameras",
                "held-out-views",
                "vae.batch-size",
                "vae.loop.steps",
                "vae.loop.max-minutes",
            ),
            *("vae.loop.learning-rate", "flow.batch-size", "flow.loop.steps"),
            *("flow.loop.max-minutes", "flow.loop.learning-rate", "model.flow.views"),
        ),
    ),
    "dit": StageCommand(
        presets=DIT_PRESETS,
        basic=(
            *("preset", "data", "latents", "vae", "out", "init", "device", "gpus", "ray-gpus"),
            *("resolution", "max-tokens", "cameras", "held-out-views"),
            *("flow.batch-size", "flow.guidance", "flow.steps", "flow.loop.steps"),
            *("flow.loop.max-minutes", "flow.loop.learning-rate", "flow.loop.seed"),
            *("model.views", "lora.rank"),
        ),
    ),
}


def check_run_directory(out: Path) -> None:
    """Check that a run can be kept in a directory, which need not exist.

    Raises:
        UserError: If it is a file, or the output directory of a build.
    """
    from pipeline.storage.layout import PLAN

    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a directory for the run")
    if (out / PLAN).exists():
        raise UserError(f"--out {out} is a build; name another directory for the run")


def train_stage(name: StageName, args: Sequence[str]) -> int:
    """Parse the options of `python -m train.NAME` and train the stage.

    The work is done by one process per GPU. Under torchrun this process is one of them.

    Args:
        name: Name of the stage.
        args: The words after the command.

    Returns:
        The exit code: 0, or that of the first process that failed.

    Raises:
        UserError: If the options are wrong or do not fit the data.
        RunError: If the run cannot continue.
        SystemExit: If `args` asks for help.
    """
    stage = STAGE_COMMANDS[name]
    prog = f"python -m train.{name}"
    cfg = parse_with_presets(stage.presets, "tiny", args, prog=prog, basic=stage.basic)
    check_run_directory(cfg.out)
    # torch is imported after the options are parsed, so that --help and errors come at once.
    from train.engine.ranks import started_ranks

    code = started_ranks(f"train.{name}", args, cfg)
    if code is not None:
        return code
    from train.data.attribution import attributed
    from train.engine.distributed import join_world

    with join_world(cfg.device) as world, attributed(cfg.data, cfg.out, world.is_first):
        if name == "vae":
            from train.stages.vae.run import train_vae

            train_vae(cfg, world)
        elif name == "structure":
            from train.stages.structure.run import train_structure

            train_structure(cfg, world)
        else:
            from train.stages.dit.run import train_dit

            train_dit(cfg, world)
    return 0
