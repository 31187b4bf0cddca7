"""Export of trained stages: their averaged weights in one directory, for `model.generate`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from model.checkpoint import CONFIG, load_model, read_config, save_model
from model.inference.published_checkpoint import missing_refiners, read_published
from model.inference.stages import (
    FACING_VIEWS,
    STRUCTURE,
    StageSelection,
    exported_resolutions,
    read_facing_views,
    write_stages,
)
from model.sparse_vae import SparseVAE
from model.structure import Structure
from pipeline.core.errors import UserError
from train.data.attribution import ATTRIBUTION, export_attribution
from train.data.latents import vae_hash
from train.stages.config import ExportConfig
from train.stages.dit.lora import load_merged

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class TrainedStage:
    """A stage to export.

    `vae` is the hash of the VAE whose latents it was trained on, if known. `facing_views` says
    whether it was trained with --facing-views.
    """

    model: Any
    source: Path
    facing_views: bool
    vae: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedVAE:
    """A VAE to export, its hash, and the resolutions that it was trained at, if known."""

    model: SparseVAE
    source: Path
    hash: str
    resolutions: tuple[int, ...]


def export(cfg: ExportConfig) -> list[Path]:
    """Export trained stages and return their directories.

    Raises:
        UserError: If a checkpoint is missing, or if a DiT and its VAE do not belong together.
    """
    if cfg.official is not None:
        return _export_published(cfg, cfg.official)
    stages = _read_stages(cfg)
    _check_facing_views(cfg.out, stages)
    vaes = [_read_vae(path) for path in cfg.vae]
    assigned = _assign_vaes(cfg, stages, vaes)
    recommended = _recommended_sampling(cfg, stages)
    models = {f"vae_{size}": vae for size, vae in sorted(assigned.items())} | stages
    for name, stage in models.items():
        notes: dict[str, Any] = {}
        if isinstance(stage, TrainedStage):
            notes[FACING_VIEWS] = stage.facing_views
            notes |= {} if stage.vae is None else {"vae": stage.vae}
        if name in recommended:
            notes["recommended"] = recommended[name]
        config, matrices = stage.model.config, _dtype_of_matrices(cfg)
        save_model(cfg.out / name, stage.model, config, matrices=matrices, **notes)
        _log_stage(cfg.out / name, stage.model, stage.source)
    checkpoints = [*cfg.vae, *cfg.dit, *([] if cfg.structure is None else [cfg.structure])]
    stages_of_out = {path.parent.name for path in cfg.out.glob(f"*/{CONFIG}")}
    keep = bool(stages_of_out - models.keys())
    count = export_attribution(checkpoints, cfg.out, keep=keep)
    if count:
        log.info("%s names the authors of %d assets.", cfg.out / ATTRIBUTION, count)
    return [cfg.out / name for name in models]


def _export_published(cfg: ExportConfig, path: Path) -> list[Path]:
    """Convert the published folder."""
    refine = cfg.refine
    if refine is None and not missing_refiners(path):
        refine = "all"
    stages = read_published(path, StageSelection(refine=refine, image_encoder=cfg.image_encoder))
    vaes = {size: vae_hash(vae) for size, vae in stages.vaes.items()}
    notes: dict[str, dict[str, Any]] = {f"dit_{size}": {"vae": code} for size, code in vaes.items()}
    for name, recommended in _recommended_sampling(cfg, list(notes)).items():
        notes.setdefault(name, {})["recommended"] = recommended
    directories = write_stages(cfg.out, stages, notes, _dtype_of_matrices(cfg))
    if cfg.refine is None:
        for file in missing_refiners(path):
            log.warning("%s is not there, so %s has no refiner of it.", file, cfg.out)
    log.info("%s has %d stages from %s.", cfg.out, len(directories), path.resolve())
    return directories


def _dtype_of_matrices(cfg: ExportConfig) -> torch.dtype | None:
    """Return the dtype of the weights of two or more axes in the files, None for their own."""
    return torch.bfloat16 if cfg.precision == "bf16" else None


def _log_stage(path: Path, model: nn.Module, source: Path) -> None:
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    log.info("%s has %.2f M parameters from %s.", path, count / 1e6, source.resolve())


def _recommended_sampling(cfg: ExportConfig, stages: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the steps and the guidance to record for each stage, by the name of its directory."""
    resolutions = [int(name[4:]) for name in stages if name.startswith("dit_")]
    # The first number is that of the structure stage, also if this export leaves the stage out.
    names = [STRUCTURE, *(f"dit_{resolution}" for resolution in sorted(resolutions))]
    recommended: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(names):
        if cfg.steps:
            steps = cfg.steps[min(number, len(cfg.steps) - 1)]
            recommended.setdefault(name, {})["steps"] = steps
        if cfg.guidance is not None:
            recommended.setdefault(name, {})["guidance"] = cfg.guidance
    return recommended


def _read_stages(cfg: ExportConfig) -> dict[str, TrainedStage]:
    """Load the structure stage and the DiTs, by the name of their directory."""
    stages: dict[str, TrainedStage] = {}
    if cfg.structure is not None:
        structure = _load_stage(cfg.structure, partial(load_model, cls=Structure), "structure")
        training = read_config(cfg.structure).get("training") or {}
        facing = _trained_facing_views(training)
        stages[STRUCTURE] = TrainedStage(model=structure, source=cfg.structure, facing_views=facing)
    for path in cfg.dit:
        dit = _load_stage(path, load_merged, "dit")
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
        stages[name] = TrainedStage(
            model=dit,
            source=path,
            facing_views=_trained_facing_views(training),
            vae=training.get("vae"),
        )
    return stages


def _trained_facing_views(training: Mapping[str, Any]) -> bool:
    """Return whether a run had --facing-views. A run without it does not record the option."""
    return bool(training.get(FACING_VIEWS, False))


def _check_facing_views(out: Path, stages: Mapping[str, TrainedStage]) -> None:
    """Check that all stages of an export were trained with --facing-views, or none.

    Stages that `out` holds already and that stay are checked, too, if they record it.

    Raises:
        UserError: If two stages differ.
    """
    sources = {stage.source: stage.facing_views for stage in stages.values()}
    folders = [out / STRUCTURE, *exported_resolutions(out, "dit").values()]
    for folder in folders:
        if folder.name in stages or not folder.is_dir():
            continue
        try:
            recorded = read_facing_views(folder)
        except ValueError as error:
            raise UserError(f"{error}; choose another --out") from error
        if recorded is not None:
            sources[folder] = recorded
    facing = [source for source, value in sources.items() if value]
    others = [source for source, value in sources.items() if not value]
    if facing and others:
        raise UserError(
            f"{facing[0]} was trained with --facing-views and {others[0]} without; export stages "
            "that were trained alike"
        )


def _read_vae(path: Path) -> TrainedVAE:
    model = _load_stage(path, partial(load_model, cls=SparseVAE), "vae")
    training = read_config(path).get("training") or {}
    resolutions = training.get("bricks", {}).get("resolutions", ())
    return TrainedVAE(
        model=model, source=path, hash=vae_hash(model), resolutions=tuple(resolutions)
    )


def _load_stage(path: Path, load: Callable[[Path], Model], option: str) -> Model:
    """Load a checkpoint's model with its averaged weights. Errors name the option."""
    if not path.exists():
        # Options of several paths are empty, an option of one path is None.
        leave_out = "--structure None" if option == "structure" else f"an empty --{option}"
        raise UserError(
            f"{path} does not exist: train the stage first, or leave it out with {leave_out}"
        )
    return load(path)


def _vaes_of_kept_dits(out: Path, replaced: Collection[str]) -> dict[int, str | None]:
    """Return the hash of the VAE of each DiT that was exported to `out` before and stays."""
    vaes = {}
    for resolution, folder in exported_resolutions(out, "dit").items():
        if folder.name in replaced:
            continue
        try:
            vaes[resolution] = read_config(folder).get("vae")
        except ValueError as error:
            raise UserError(f"{error}; choose another --out") from error
    return vaes


def _assign_vaes(
    cfg: ExportConfig, stages: Mapping[str, TrainedStage], vaes: Collection[TrainedVAE]
) -> dict[int, TrainedVAE]:
    """Return the VAE to export for each resolution.

    Raises:
        UserError: If a DiT was trained on latents of another VAE than the one of its resolution, or
            a VAE belongs to no resolution.
    """
    kept = _vaes_of_kept_dits(cfg.out, stages)
    trained = {int(name[4:]): stages[name] for name in stages if name.startswith("dit_")}
    wanted = {**kept, **{size: dit.vae for size, dit in trained.items()}}
    assigned: dict[int, TrainedVAE] = {}
    for size, code in wanted.items():
        for vae in vaes:
            # A DiT that does not say which VAE it was trained with gets the only one.
            only = code is None and size in trained and len(vaes) == 1
            if vae.hash == code or only:
                assigned[size] = vae
    for size, dit in trained.items():
        if size not in assigned and dit.vae is not None:
            _check_exported_vae(cfg, size, dit, vaes)
    for vae in vaes:
        if vae in assigned.values():
            continue
        others = [size for size in vae.resolutions if size in wanted]
        if others:
            raise UserError(
                f"{cfg.out / f'dit_{others[0]}'} stays, and was trained on latents of VAE "
                f"{wanted[others[0]]}, but {vae.source} is {vae.hash}; replace it with --dit, "
                "delete it, or choose another --out"
            )
        if not vae.resolutions:
            raise UserError(
                f"{vae.source} made the latents of no DiT here, and does not say at which "
                "resolutions it was trained; name its DiT with --dit"
            )
        assigned.update(dict.fromkeys(vae.resolutions, vae))
    return assigned


def _check_exported_vae(
    cfg: ExportConfig, resolution: int, dit: TrainedStage, vaes: Collection[TrainedVAE]
) -> None:
    """Raise UserError if a DiT would be decoded by another VAE than the one of its latents."""
    names = (f"vae_{resolution}", "vae")
    folder = next((cfg.out / name for name in names if (cfg.out / name).is_dir()), None)
    if folder is not None:
        try:
            source, code = folder, vae_hash(load_model(folder, SparseVAE))
        except ValueError as error:
            raise UserError(f"{error}; choose another --out") from error
    elif vaes:
        vae = next(iter(vaes))
        source, code = vae.source, vae.hash
    else:
        return
    if code != dit.vae:
        raise UserError(
            f"{dit.source} was trained on latents of VAE {dit.vae}, but {source} is {code}; export "
            "the VAE that made them, or encode and train again"
        )
