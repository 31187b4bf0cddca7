"""Weights that a new run starts from: those of a checkpoint, of an export, or shipped ones."""

from __future__ import annotations

import filecmp
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from model.checkpoint import CONFIG, check_merged, copy_weights, read_config, weights_file
from model.inference.checkpoint_source import SHIPPED, find_checkpoint, is_shipped
from model.inference.stages import exported_resolutions
from pipeline.core.errors import UserError
from train.data.attribution import attribute_weights
from train.engine import checkpoint
from train.engine.distributed import World

log = logging.getLogger(__name__)

ExportedStage = Literal["vae", "structure", "dit"]
# The occupancy VAE is also a part of the whole structure stage, under these names.
PARTS = {("Structure", "OccupancyVAE"): "vae."}


def find_init(
    init: Path | None,
    out: Path,
    stage: ExportedStage,
    models: Sequence[str],
    resolutions: Sequence[int] = (),
) -> Path | None:
    """Find the weights that a new run starts from.

    Args:
        init: Value of `--init`: a checkpoint, an export, the name of shipped weights or of weights
            on the Hugging Face hub.
        out: Directory of the run. If it has a checkpoint, the run is resumed and `init` not used.
        stage: Stage of the export that is taken.
        models: Names of the model classes, of which the weights must hold one.
        resolutions: Resolutions of the run, for the stages that are exported for each resolution.

    Returns:
        The directory of the weights, or None if the run does not start from other weights.

    Raises:
        UserError: If there are no such weights, or they are those of another kind of model.
    """
    if init is None or checkpoint.latest(out) is not None:
        return None
    if not init.exists() and not is_shipped(init) and not str(init).startswith("hf:"):
        raise UserError(
            f"{init} does not exist; train it first, or name a checkpoint with --init, an export "
            f"of python -m train.export, or shipped weights: {', '.join(SHIPPED)}"
        )
    path = find_checkpoint(init)
    if not (path / CONFIG).exists():
        path = _stage_of_export(path, stage, resolutions)
    description = read_config(path)
    check_merged(path, description)
    name = description.get("model")
    if name not in models:
        raise UserError(
            f"{path} holds a {name} and cannot start this run, which trains a {models[0]}; name a "
            f"checkpoint of python -m train.{stage} or an export with --init"
        )
    return path


def start_from(path: Path, model: nn.Module, out: Path, world: World) -> None:
    """Let a run start from the weights that `find_init` found, and carry their attribution into it.

    Args:
        path: Directory of the weights.
        model: The model, which gets them as by `load_init`.
        out: Directory of the run.
        world: The ranks. The first one writes the attribution.

    Raises:
        UserError: As `load_init`.
    """
    load_init(path, model)
    if world.is_first:
        attribute_weights(path, out)


def load_init(path: Path, model: nn.Module) -> None:
    """Copy the weights that `find_init` found into a model, the averaged ones if there are any.

    Raises:
        UserError: If they are damaged or do not fit the model. The model is then unchanged.
    """
    prefix = PARTS.get((str(read_config(path).get("model")), type(model).__name__), "")
    file = weights_file(path)
    try:
        weights = load_file(file)
        ours = {
            name.removeprefix(prefix): tensor
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }
        copy_weights(ours, model, "it")
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{file} cannot be used with --init: {error}; give this run the --model options of "
            f"{path / CONFIG}, or name other weights"
        ) from error
    log.info("Starting from the weights of %s.", path)


def _stage_of_export(path: Path, stage: ExportedStage, resolutions: Sequence[int]) -> Path:
    """Return the directory of an export's stage, which is the same for all resolutions of a run."""
    exported = exported_resolutions(path, stage)
    undivided = path / stage  # the structure stage, or one VAE for all resolutions
    if not exported and not undivided.is_dir():
        raise UserError(
            f"{path} is neither a checkpoint nor an export with a stage {stage}: it has no "
            f"{CONFIG} and no directory {stage} or {stage}_R; name another one with --init"
        )
    if undivided.is_dir():
        return undivided
    missing = [resolution for resolution in resolutions if resolution not in exported]
    names = ", ".join(str(exported[resolution]) for resolution in sorted(exported))
    if missing:
        raise UserError(
            f"{path} has no {stage} of R = {missing[0]}; train at a resolution that it has, or "
            f"name one of its stages with --init: {names}"
        )
    first, *others = [exported[resolution] for resolution in resolutions]
    for other in others:
        if not filecmp.cmp(weights_file(first), weights_file(other), shallow=False):
            raise UserError(
                f"{first} and {other} are different VAEs and this run trains one; name one of them "
                "with --init"
            )
    return first
