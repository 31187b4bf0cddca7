"""The trained stages of generation, and their exports on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from model.checkpoint import CheckpointError, build_config, load_model, read_config, save_model
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.conditioning.image_encoder import EncoderOnDemand, ImageEncoder
from model.config import (
    ConditionedDiTConfig,
    EncoderConfig,
    Meshing,
    RecommendedSampling,
    Refine,
    RefinerConfig,
    StructureConfig,
)
from model.occupancy_vae import OccupancyVAE
from model.refiner import VolumeRefiner
from model.sparse_vae import SparseVAE
from model.structure import Structure
from pipeline.core.errors import UserError

Model = TypeVar("Model", bound=nn.Module)

FACING_VIEWS = "facing_views"  # entry of config.json of an exported stage
STRUCTURE = "structure"  # name of the first stage; the others are named by their resolution


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The trained stages, and how they are used.

    Attributes:
        structure: The structure stage.
        dits: The DiT of each resolution.
        vaes: The VAE of each resolution, which decodes the latents of its DiT.
        refiners: The refiners of some resolutions.
        recommended: Recommended sampling options by name of the stage, "structure" or "512".
        meshing: How the mesh of each resolution is made. A missing one has the defaults.
        facing_views: Whether meshes face the camera of their image, because the structure stage was
            trained with --facing-views. None if that is not recorded.
        deferred: For each model that is on the meta device and has no weights, the function that
            loads it with its weights.
    """

    structure: Structure
    dits: dict[int, ConditionedDiT]
    vaes: dict[int, SparseVAE]
    refiners: dict[int, VolumeRefiner] = field(default_factory=dict)
    recommended: dict[str, RecommendedSampling] = field(default_factory=dict)
    meshing: dict[int, Meshing] = field(default_factory=dict)
    facing_views: bool | None = None
    deferred: dict[nn.Module, Callable[[], nn.Module]] = field(default_factory=dict)

    def meshing_of(self, resolution: int) -> Meshing:
        """Return how the mesh of a resolution is made."""
        return self.meshing.get(resolution, Meshing())

    def check(self) -> None:
        """Check that the stages fit each other.

        Raises:
            ValueError: If a stage is missing or does not fit.
        """
        first = self.structure.resolution
        if first not in self.dits:
            raise ValueError(
                f"dits must have one for R = {first}, the resolution of the structure stage's "
                f"cells, got {sorted(self.dits)}"
            )
        for resolution, dit in self.dits.items():
            if resolution not in self.vaes:
                raise ValueError(
                    f"vaes must have one for R = {resolution}, got {sorted(self.vaes)}"
                )
            found = dit.config.dit.latent_channels
            channels = self.vaes[resolution].config.latent_channels
            if found != channels:
                raise ValueError(
                    f"dits[{resolution}] must have the VAE's {channels} latent channels, "
                    f"got {found}"
                )
        for resolution, refiner in self.refiners.items():
            if resolution not in self.vaes:
                raise ValueError(f"refiners[{resolution}] must have a VAE of its resolution")
            config, width = refiner.config, self.vaes[resolution].config.widths[0]
            if config.output == "sdf" and config.features != width:
                raise ValueError(
                    f"refiners[{resolution}] must take the {width} features of the VAE, "
                    f"got {config.features}"
                )


@dataclass(frozen=True, kw_only=True)
class StageSelection:
    """Which stages of a checkpoint are loaded. Files of other stages are not read.

    Attributes:
        resolution: Resolution of the meshes. Finer stages are not loaded. None loads all stages.
        refine: Which refiners are loaded. None loads the one of values, if the checkpoint has it.
        image_encoder: Folder or name on the Hugging Face hub of DINOv2's weights. None takes those
            that the checkpoint names.
        low_memory: Whether the weights are checked but not loaded. `Stages.deferred` then loads
            each model.
    """

    resolution: int | None = None
    refine: Refine | None = None
    image_encoder: str | None = None
    low_memory: bool = False

    def resolutions(self, path: Path, available: Iterable[int]) -> list[int]:
        """Return the resolutions up to the wanted one, in ascending order.

        Args:
            path: The checkpoint, for the error message.
            available: Its resolutions.

        Raises:
            UserError: If there is no model of the wanted resolution.
        """
        names = sorted(available)
        if self.resolution is not None and self.resolution not in names:
            raise UserError(
                f"{path} has models for R = {', '.join(map(str, names))}, "
                f"none for {self.resolution}"
            )
        return [size for size in names if self.resolution is None or size <= self.resolution]

    def includes(self, refiner: RefinerConfig) -> bool:
        """Return whether a refiner of one of the loaded resolutions is loaded."""
        return self.refine != "none" and (refiner.output == "sdf" or self.refine == "all")


def read_export(path: Path, selection: StageSelection | None = None) -> Stages:
    """Load the stages that `python -m train.export` wrote.

    Args:
        path: Directory of the export.
        selection: Which stages are loaded. None takes the defaults.

    Raises:
        UserError: If stages are missing, incomplete or damaged.
    """
    selection = selection or StageSelection()
    image_encoder = selection.image_encoder
    folders = exported_resolutions(path, "dit")
    vae_folders = exported_resolutions(path, "vae")
    missing = [] if vae_folders or (path / "vae").is_dir() else ["vae"]
    missing += [] if (path / STRUCTURE).is_dir() else [STRUCTURE]
    missing += [] if folders else ["dit_<resolution>"]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}: train the stages and collect them with "
            "python -m train.export, or see `make demo`"
        )
    wanted = {size: folders[size] for size in selection.resolutions(path, folders)}
    # An older export has one VAE for all resolutions.
    vae_folders = {size: vae_folders.get(size, path / "vae") for size in wanted}
    for size, folder in vae_folders.items():
        if not folder.is_dir():
            raise UserError(
                f"{path} lacks vae_{size}: export the VAE of the DiT at R = {size} with "
                "python -m train.export --vae"
            )
    models = ModelReader(low_memory=selection.low_memory)
    loaded_vaes = {
        folder: models.read(folder, SparseVAE) for folder in sorted(set(vae_folders.values()))
    }

    def dit_config(config: ConditionedDiTConfig) -> ConditionedDiTConfig:
        if image_encoder is None:
            return config
        return replace(config, encoder=replace(config.encoder, weights=image_encoder))

    def structure_config(config: StructureConfig) -> StructureConfig:
        return replace(config, flow=dit_config(config.flow))

    structure = models.read(path / STRUCTURE, Structure, structure_config)
    dits = {
        size: models.read(folder, ConditionedDiT, dit_config) for size, folder in wanted.items()
    }
    for dit in dits.values():
        dit.share_encoder(structure.flow)
    refiners = {}
    for size, folder in exported_resolutions(path, "refiner").items():
        if size in wanted and selection.refine != "none":
            model = models.read(folder, VolumeRefiner)
            if selection.includes(model.config):
                refiners[size] = model
    check_refiners(path, refiners, wanted, selection.refine)
    return Stages(
        structure=structure,
        dits=dits,
        vaes={size: loaded_vaes[folder] for size, folder in vae_folders.items()},
        refiners=refiners,
        recommended={
            STRUCTURE: read_recommended(path / STRUCTURE),
            **{str(size): read_recommended(folder) for size, folder in wanted.items()},
        },
        meshing={size: read_meshing(folder) for size, folder in wanted.items()},
        facing_views=read_facing_views(path / STRUCTURE),
        deferred=models.deferred,
    )


class ModelReader:
    """Reads the models of an export, or checks them and defers their loading.

    Args:
        low_memory: Whether loading is deferred.

    Attributes:
        deferred: As `Stages.deferred`.
    """

    def __init__(self, *, low_memory: bool):
        self.low_memory = low_memory
        self.deferred: dict[nn.Module, Callable[[], nn.Module]] = {}
        self._encoders: dict[EncoderConfig, ImageEncoder] = {}

    def read(
        self, folder: Path, cls: type[Model], adapt: Callable[[Any], Any] | None = None
    ) -> Model:
        """Load the model of a directory, or return it on the meta device.

        Raises:
            CheckpointError: As `load_model`.
            UserError: If the weights of its frozen image encoder are not available.
        """
        if not self.low_memory:
            return load_model(folder, cls, adapt=adapt)
        load = partial(load_model, folder, cls, adapt=adapt, make=partial(self._make, cls))
        model = load(skeleton=True)
        self.deferred[model] = load
        return model

    def _make(self, cls: type[nn.Module], config: Any) -> Any:
        if cls is Structure:
            return Structure(
                config, (OccupancyVAE(config.occupancy), self._conditioned(config.flow))
            )
        return self._conditioned(config) if cls is ConditionedDiT else cls(config)

    def _conditioned(self, config: ConditionedDiTConfig) -> ConditionedDiT:
        return ConditionedDiT(config, encoder=encoder_for(config.encoder, self._encoders))


def encoder_for(
    config: EncoderConfig, known: dict[EncoderConfig, ImageEncoder]
) -> ImageEncoder | None:
    """Return the encoder of a model whose weights are loaded on demand.

    Args:
        config: Its configuration.
        known: The frozen encoders so far, to which a new one is added.

    Returns:
        A frozen encoder that holds no weights. None for one that is trained with the model and is
        among its weights.
    """
    if config.kind == "stand-in":
        return None
    if config not in known:
        known[config] = EncoderOnDemand(config)
    return known[config]


def check_refiners(
    path: Path | str, refiners: Iterable[int], wanted: Iterable[int], refine: Refine | None
) -> None:
    """Check that a checkpoint has the refiners that --refine asks for.

    Raises:
        UserError: If one is missing.
    """
    names = sorted(wanted)
    needed = {"512": names[:1], "all": names}.get(refine or "none", [])
    missing = [str(size) for size in needed if size not in refiners]
    if missing:
        raise UserError(
            f"{path} has no refiner for R = {', '.join(missing)}, which --refine {refine} needs; "
            "use --refine none"
        )


def write_stages(
    path: Path,
    stages: Stages,
    notes: Mapping[str, Mapping[str, Any]] | None = None,
    matrices: torch.dtype | None = None,
) -> list[Path]:
    """Write stages as an export.

    Args:
        path: Directory of the export. Stages that it has already are replaced.
        stages: The stages.
        notes: Further entries of each stage's config.json, by name of its directory.
        matrices: As for `save_model`.

    Returns:
        The directories that were written.
    """
    models: dict[str, Any] = {
        **{f"vae_{size}": model for size, model in stages.vaes.items()},
        STRUCTURE: stages.structure,
        **{f"dit_{size}": model for size, model in stages.dits.items()},
        **{f"refiner_{size}": model for size, model in stages.refiners.items()},
    }
    for name, model in models.items():
        entries: dict[str, Any] = dict((notes or {}).get(name, {}))
        size = name.removeprefix("dit_")
        recommended = stages.recommended.get(size, RecommendedSampling())
        if recommended != RecommendedSampling():
            entries["recommended"] = asdict(recommended)
        if stages.facing_views is not None and (name == STRUCTURE or name != size):
            entries[FACING_VIEWS] = stages.facing_views
        if name != size:
            entries["meshing"] = asdict(stages.meshing_of(int(size)))
        save_model(path / name, model, model.config, matrices=matrices, **entries)
    return [path / name for name in models]


def exported_resolutions(path: Path, kind: str) -> dict[int, Path]:
    """Return the directories such as dit_512 of an export, by their resolution."""
    return {
        int(folder.name.removeprefix(f"{kind}_")): folder
        for folder in path.glob(f"{kind}_*")
        if re.fullmatch(rf"{kind}_\d+", folder.name)
    }


def read_recommended(path: Path) -> RecommendedSampling:
    """Return the sampling options that an exported stage recommends, which may be none.

    Raises:
        CheckpointError: If its config.json is not readable or the options are not valid.
    """
    return _read_note(path, "recommended", RecommendedSampling)


def read_facing_views(path: Path) -> bool | None:
    """Return whether an exported stage was trained with --facing-views, None if it has no record.

    Raises:
        CheckpointError: If its config.json is not readable or the record is not true or false.
    """
    value = read_config(path).get(FACING_VIEWS)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{path}: {FACING_VIEWS} must be true or false, got {value!r}")
    return value


def read_meshing(path: Path) -> Meshing:
    """Return how the mesh of an exported DiT's resolution is made.

    Raises:
        CheckpointError: If its config.json is not readable or the options are not valid.
    """
    return _read_note(path, "meshing", Meshing)


def _read_note(path: Path, name: str, cls: type[Any]) -> Any:
    values = read_config(path).get(name, {})
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: {name} must be an object, got {values!r}")
    return build_config(cls, {**asdict(cls()), **values}, f"{path}: {name}")
