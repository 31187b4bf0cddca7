"""Export of trained stages: their averaged weights in one directory, for `model.generate`."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from model.checkpoint import load_model, read_config, save_model
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.sparse_vae import SparseVAE
from model.structure import Structure
from pipeline.core.errors import UserError
from train.data.latents import vae_hash
from train.stages.config import ExportConfig

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class TrainedStage:
    """A stage to export. `vae` is the hash of the VAE that it is or belongs to, if known."""

    model: Any
    source: Path
    vae: str | None = None


def export(cfg: ExportConfig) -> list[Path]:
    """Export trained stages and return their directories.

    Raises:
        UserError: If a checkpoint is missing, or if a DiT and the VAE do not belong together.
    """
    stages = _read_stages(cfg)
    vaes = {name: stage.vae for name, stage in stages.items() if stage.vae is not None}
    _check_same_vae(cfg, stages, {**vaes, **_vaes_of_kept_stages(cfg.out, stages)})
    recommended = _recommended_sampling(cfg, stages)
    directories = []
    for name, stage in stages.items():
        notes: dict[str, Any] = {}
        if name in vaes and name != "vae":
            notes["vae"] = vaes[name]
        if name in recommended:
            notes["recommended"] = recommended[name]
        save_model(cfg.out / name, stage.model, stage.model.config, **notes)
        count = sum(tensor.numel() for tensor in stage.model.state_dict().values())
        log.info(
            "%s has %.2f M parameters from %s.",
            cfg.out / name,
            count / 1e6,
            stage.source.resolve(),
        )
        directories.append(cfg.out / name)
    return directories


def _recommended_sampling(cfg: ExportConfig, stages: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the steps and the guidance to record for each stage, by the name of its directory."""
    resolutions = [int(name[4:]) for name in stages if name.startswith("dit_")]
    # The first number is that of the structure stage, also if this export leaves the stage out.
    names = ["structure", *(f"dit_{resolution}" for resolution in sorted(resolutions))]
    recommended: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(names):
        if cfg.steps:
            steps = cfg.steps[min(number, len(cfg.steps) - 1)]
            recommended.setdefault(name, {})["steps"] = steps
        if cfg.guidance is not None:
            recommended.setdefault(name, {})["guidance"] = cfg.guidance
    return recommended


def _read_stages(cfg: ExportConfig) -> dict[str, TrainedStage]:
    """Load the checkpoints that the options name, by the name of their directory."""
    stages: dict[str, TrainedStage] = {}
    if cfg.vae is not None:
        vae = _load_stage(cfg.vae, SparseVAE)
        stages["vae"] = TrainedStage(model=vae, source=cfg.vae, vae=vae_hash(vae))
    if cfg.structure is not None:
        structure = _load_stage(cfg.structure, Structure)
        stages["structure"] = TrainedStage(model=structure, source=cfg.structure)
    for path in cfg.dit:
        dit = _load_stage(path, ConditionedDiT)
        training = read_config(path).get("training") or {}
        resolution = training.get("resolution")
        if not isinstance(resolution, int):
            raise UserError(
                f"{path} does not say at which resolution it was trained; train it again"
            )
        name = f"dit_{resolution}"
        if name in stages:
            raise UserError(
                f"{path} and {stages[name].source} are both of R = {resolution}; "
                "name one for each resolution"
            )
        stages[name] = TrainedStage(model=dit, source=path, vae=training.get("vae"))
    return stages


def _load_stage(path: Path, cls: type[Model]) -> Model:
    """Load a checkpoint's model with its averaged weights."""
    if not path.exists():
        raise UserError(f"{path} does not exist: train the stage first, or leave it out")
    return load_model(path, cls)


def _vaes_of_kept_stages(out: Path, replaced: Collection[str]) -> dict[str, str]:
    """Return the VAE hash of each stage that was exported to `out` before and is not replaced."""
    vaes = {}
    for path in sorted(out.glob("dit_*/config.json")):
        if path.parent.name in replaced:
            continue
        try:
            vae = json.loads(path.read_text()).get("vae")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{path} cannot be read: {error}; choose another --out") from error
        if vae is not None:
            vaes[path.parent.name] = vae
    if "vae" not in replaced and (out / "vae").is_dir():
        try:
            vaes["vae"] = vae_hash(load_model(out / "vae", SparseVAE))
        except ValueError as error:
            raise UserError(f"{error}; choose another --out") from error
    return vaes


def _check_same_vae(
    cfg: ExportConfig, stages: Mapping[str, TrainedStage], vaes: Mapping[str, str]
) -> None:
    """Raise UserError if a DiT was trained on latents of another VAE than that of `out`."""
    if "vae" not in vaes:
        return
    vae = cfg.vae or cfg.out / "vae"
    for name, trained_on in vaes.items():
        if trained_on == vaes["vae"]:
            continue
        if name in stages:
            raise UserError(
                f"{stages[name].source} was trained on latents of VAE {trained_on}, but {vae} is "
                f"{vaes['vae']}; export the VAE that made them, or encode and train again"
            )
        raise UserError(
            f"{cfg.out / name} stays, and was trained on latents of VAE {trained_on}, but {vae} is "
            f"{vaes['vae']}; replace it with --dit, delete it, or choose another --out"
        )
