"""The published Direct3D-S2 folder: its config.yaml and checkpoint files, as our stages.

Settings, names and shapes are checked before any model is made. The weights are read with
`weights_only` and mapped from the files.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor, nn

from model import published_settings
from model.checkpoint import KeyMap, convert_weights, unchanged
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.conditioning.image_encoder import EncoderOnDemand, ImageEncoder, build_encoder
from model.config import (
    DINO_WEIGHTS,
    ConditionedDiTConfig,
    EncoderConfig,
    Meshing,
    OccupancyConfig,
    RefinerConfig,
    StructureConfig,
    TimeSchedule,
    VAEConfig,
)
from model.inference.stages import Stages, StageSelection, check_refiners
from model.layers import position_embedding
from model.occupancy_vae import OccupancyVAE
from model.published_settings import LatentScale
from model.published_weights import (
    published_dit_keys,
    published_occupancy_keys,
    published_vae_keys,
)
from model.refiner import VolumeRefiner
from model.sparse_dit import SparseDiT
from model.sparse_vae import SparseVAE
from model.structure import Structure
from pipeline.core.errors import UserError

CONFIG = "config.yaml"
LFS = b"version https://git-lfs"
ISO_VALUE = 0.2  # of the surface in bricks that no refiner has changed
POSITION_TOLERANCE = 2e-3  # of the stored positions, which may be fp16
SIZES = (512, 1024)  # in the names of the published sections and files
MODELS = "direct3d_s2.models."
# The class of each section of config.yaml. Copies of the release add "_legacy" to modules.
TARGETS = {
    "dense_vae": f"{MODELS}autoencoders.dense_vae.DenseShapeVAE",
    "dense_dit": f"{MODELS}transformers.dense_dit.DenseDiT",
    "dense_image_encoder": f"{MODELS}conditioner.DinoEncoder",
    "dense_scheduler": "diffusers.schedulers.FlowMatchEulerDiscreteScheduler",
    **{f"sparse_vae_{n}": f"{MODELS}autoencoders.ss_vae.SparseSDFVAE" for n in SIZES},
    **{f"sparse_dit_{n}": f"{MODELS}transformers.sparse_dit.SparseDiT" for n in SIZES},
    **{
        f"sparse_scheduler_{n}": "diffusers.schedulers.FlowMatchEulerDiscreteScheduler"
        for n in SIZES
    },
    "sparse_image_encoder": f"{MODELS}conditioner.DinoEncoder",
    "refiner": f"{MODELS}refiner.unet_refiner.Voxel_RefinerXL",
    "refiner_1024": f"{MODELS}refiner.unet_refiner.Voxel_RefinerXL_sign",
}
OPTIONAL = ("refiner", "refiner_1024")
# Files and the state dicts in each.
DENSE_FILE = "model_dense.ckpt"
SPARSE_FILE = "model_sparse_{}.ckpt"
REFINER_FILES = {"refiner": "model_refiner.ckpt", "refiner_1024": "model_refiner_1024.ckpt"}

Module = TypeVar("Module", bound=nn.Module)
Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class SparseSettings:
    """Settings of a published resolution.

    Attributes:
        name: 512 or 1024, as in the names of the sections.
        vae: Configuration of the SS-VAE.
        dit: Configuration of the SS-DiT.
        scale: Scale of the latents.
    """

    name: int
    vae: VAEConfig
    dit: ConditionedDiTConfig
    scale: LatentScale


def as_stored(weights: Mapping[str, Tensor], _where: str) -> Mapping[str, Tensor]:
    """Return a state dict unchanged."""
    return weights


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A model among the published files.

    Attributes:
        cls: Its class.
        config: Its configuration.
        file: The file that holds its weights.
        name: Name of its state dict.
        names: Names of all state dicts of the file.
        keys: The key map. None if the published names are ours.
        prepare: Changes the state dict, given the name of the source for error messages.
    """

    cls: Callable[[Any], nn.Module]
    config: Any
    file: Path
    name: str
    names: tuple[str, ...] = ("vae", "dit")
    keys: KeyMap | None = None
    prepare: Callable[[Mapping[str, Tensor], str], Mapping[str, Tensor]] = as_stored

    def check(self) -> Callable[[], Any]:
        """Check the weights, and return the function that makes the model with them.

        Nothing large is allocated before the function is called.

        Raises:
            UserError: If the file cannot be read, or names or shapes do not fit.
        """
        where = f"{self.file}: {self.name}"
        weights = self.prepare(read_state_dicts(self.file, *self.names)[self.name], where)
        return load_module(self.cls, self.config, weights, self.keys, where)

    def load(self) -> Any:
        """Return the model with its weights, which are read anew.

        Raises:
            UserError: As `check`.
        """
        return self.check()()

    def skeleton(self) -> Any:
        """Return the model on the meta device, without weights."""
        return _model_on_meta(self.cls, self.config)


@dataclass(frozen=True, kw_only=True)
class PublishedSettings:
    """The settings of a published folder.

    Attributes:
        structure: Configuration of the structure stage.
        structure_scale: Scale of its latents.
        sparse: Settings of the sparse stages by resolution R.
        refiners: Configurations of the refiners by resolution R.
    """

    structure: StructureConfig
    structure_scale: LatentScale
    sparse: dict[int, SparseSettings]
    refiners: dict[int, RefinerConfig]


def is_published(path: Path) -> bool:
    """Return whether a directory has the layout of the published weights."""
    has_file = any(path.glob("model_*.ckpt"))
    return (path / CONFIG).exists() or has_file


def read_settings(path: Path, image_encoder: str | None = None) -> PublishedSettings:
    """Read config.yaml of a published folder.

    Args:
        path: The folder.
        image_encoder: Folder or name on the Hugging Face hub of DINOv2's weights, which are not in
            the folder. None takes those that its authors took.

    Raises:
        UserError: If the file is missing or damaged, or a section, class or setting is missing,
            unknown or not supported.
    """
    params = _read_sections(path / CONFIG)

    def where(section: str) -> str:
        return f"{path / CONFIG}: {section}"

    def read(section: str, reader: Callable[..., Config], *more: Any) -> Config:
        return reader(params[section], *more, where(section))

    dense, latent_side = read("dense_dit", published_settings.dense_dit)
    occupancy, structure_scale = read("dense_vae", published_settings.dense_vae, latent_side)
    weights = image_encoder or DINO_WEIGHTS

    def encoder(section: str, channels: int) -> EncoderConfig:
        return read(section, published_settings.image_encoder, channels, weights)

    def conditioned(section: str, dit: Any, encoder: EncoderConfig, times: TimeSchedule) -> Any:
        return published_settings.conditioned(dit, encoder, times, where(section))

    flow = conditioned(
        "dense_dit",
        dense,
        encoder("dense_image_encoder", dense.condition_channels),
        read("dense_scheduler", published_settings.time_schedule),
    )
    structure = _structure(occupancy, flow, where("dense_vae"))
    sparse = {}
    for name in SIZES:
        vae, resolution, scale = read(f"sparse_vae_{name}", published_settings.sparse_vae)
        dit, dit_resolution = read(f"sparse_dit_{name}", published_settings.sparse_dit)
        section = f"sparse_dit_{name}"
        for what, ours, theirs in (
            ("resolution", dit_resolution // 8, resolution // 8),
            ("in_channels", dit.latent_channels, vae.latent_channels),
        ):
            if ours != theirs:
                raise UserError(
                    f"{where(section)}: {what} must be {theirs} for sparse_vae_{name}, got {ours}"
                )
        sparse[resolution] = SparseSettings(
            name=name,
            vae=vae,
            dit=conditioned(
                section,
                dit,
                encoder("sparse_image_encoder", dit.condition_channels),
                read(f"sparse_scheduler_{name}", published_settings.time_schedule),
            ),
            scale=scale,
        )
    first, *_ = sorted(sparse)
    if len(sparse) != len(SIZES) or first != structure.resolution or sparse[first].name != SIZES[0]:
        raise UserError(
            f"{path / CONFIG}: sparse_vae_512 must have the dense stage's resolution "
            f"{structure.resolution // 8} and sparse_vae_1024 a finer one, "
            f"got {sorted(resolution // 8 for resolution in sparse)}"
        )
    refiners = {}
    for section, resolution in zip(OPTIONAL, sorted(sparse), strict=True):
        if section in params:
            refiners[resolution] = published_settings.refiner(
                params[section], signs=section != OPTIONAL[0], where=where(section)
            )
    return PublishedSettings(
        structure=structure, structure_scale=structure_scale, sparse=sparse, refiners=refiners
    )


def _structure(
    occupancy: OccupancyConfig, flow: ConditionedDiTConfig, where: str
) -> StructureConfig:
    try:
        return StructureConfig(occupancy=occupancy, flow=flow)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _read_sections(file: Path) -> dict[str, dict[str, Any]]:
    """Return the keywords of every section of config.yaml."""
    _check_not_a_pointer(file)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold sections, got {type(content).__name__}")
    unknown = [str(name) for name in content if name not in TARGETS]
    missing = [name for name in TARGETS if name not in content and name not in OPTIONAL]
    problems = [f"unknown section {name}" for name in unknown]
    problems += [f"missing section {name}" for name in missing]
    if problems:
        raise UserError(f"{file}: {', '.join(problems)}")
    sections = {}
    for name, section in content.items():
        if not isinstance(section, dict) or set(section) - {"target", "params"}:
            raise UserError(f"{file}: {name} must hold target and params, got {section!r}"[:300])
        target = section.get("target")
        if str(target).replace("_legacy", "") != TARGETS[name]:
            raise UserError(f"{file}: {name} has the unknown target {target!r}")
        params = section.get("params") or {}
        if not isinstance(params, dict):
            raise UserError(f"{file}: params of {name} must be settings, got {params!r}"[:300])
        sections[name] = params
    return sections


def _check_not_a_pointer(file: Path, *, optional: bool = False) -> None:
    """Check that a file exists and holds more than a pointer of Git LFS.

    Args:
        file: The file.
        optional: Whether it holds a refiner, which can be left out.
    """
    if not file.is_file():
        other = ", or leave the refiner out with --refine none" if optional else ""
        raise UserError(f"{file} is missing; download the folder again{other}")
    with file.open("rb") as stream:
        start = stream.read(len(LFS))
    if start == LFS:
        raise UserError(
            f"{file} is a pointer of Git LFS and not the file itself; run `git lfs pull` in its "
            "folder, or download it with `hf download`"
        )
    if not start:
        raise UserError(f"{file} is empty; download it again")


def read_state_dicts(file: Path, *names: str) -> dict[str, dict[str, Tensor]]:
    """Read the state dicts of a checkpoint file, mapped from the file.

    Args:
        file: The file.
        *names: Names of the state dicts, all that the file may hold.

    Raises:
        UserError: If the file is missing, a pointer, incomplete, or holds something else.
    """
    _check_not_a_pointer(file)
    if not zipfile.is_zipfile(file):
        raise UserError(
            f"{file} is damaged, or its download did not finish: it is no file of torch.save; "
            "download it again"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError, OSError, EOFError, ValueError, LookupError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{file} cannot be read: {reason}"[:400]) from error
    if not isinstance(content, dict) or set(content) != set(names):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{file} must hold {', '.join(names)}, got {found}"[:400])
    for name, weights in content.items():
        if not isinstance(weights, dict) or not all(
            isinstance(x, Tensor) for x in weights.values()
        ):
            raise UserError(f"{file}: {name} must be a state dict of tensors")
    return content


def _model_on_meta(cls: Callable[[Any], Module], config: Any) -> Module:
    with torch.device("meta"):
        return cls(config)


def load_module(
    cls: Callable[[Any], Module],
    config: Any,
    weights: Mapping[str, Tensor],
    keys: KeyMap | None,
    where: str,
) -> Callable[[], Module]:
    """Check weights against a model, and return the function that makes it with them.

    Nothing large is allocated before the function is called.

    Args:
        cls: Class of the model.
        config: Its configuration.
        weights: The published weights.
        keys: The key map. None if the published names are ours.
        where: Name of the source in error messages.

    Raises:
        UserError: If names or shapes do not fit.
    """
    model = _model_on_meta(cls, config)
    if keys is None:
        keys = {name: (name, unchanged) for name in model.state_dict()}
    shapes = {name: torch.empty(x.shape, device="meta") for name, x in weights.items()}
    convert_weights(shapes, model, where, keys)

    def make() -> Module:
        tensors = convert_weights(weights, model, where, keys)
        model.load_state_dict(
            {name: x.float().contiguous() for name, x in tensors.items()}, assign=True
        )
        return model.eval()

    return make


def dit_weights(
    weights: Mapping[str, Tensor], config: ConditionedDiTConfig, scale: LatentScale
) -> dict[str, Tensor]:
    """Return the weights of a published DiT with the scale of its latents."""
    channels = (config.dit.latent_channels,)
    return {
        **weights,
        "latents_scale": torch.full(channels, scale.scale),
        "latents_shift": torch.full(channels, scale.shift),
    }


def without_positions(
    weights: Mapping[str, Tensor], side: int, channels: int, where: str
) -> dict[str, Tensor]:
    """Drop the positions that a published dense DiT stores, after comparing them with ours.

    Args:
        weights: The published state dict.
        side: Side of the grid of latents.
        channels: Channels of the DiT.
        where: Name of the source in error messages.

    Raises:
        UserError: If they are missing or differ.
    """
    rest = dict(weights)
    stored = rest.pop("pos_emb", None)
    if stored is None:
        raise UserError(f"{where}: missing pos_emb")
    if list(stored.shape) != [side**3, channels]:
        raise UserError(
            f"{where}: pos_emb of shape {list(stored.shape)} does not fit {[side**3, channels]}"
        )
    cells = torch.cartesian_prod(*[torch.arange(side)] * 3)
    difference = (stored.float() - position_embedding(cells, channels)).abs().max().item()
    if not difference < POSITION_TOLERANCE:
        raise UserError(
            f"{where}: pos_emb must be the sines and cosines of the grid, it is off by {difference}"
        )
    return rest


def read_published(path: Path, selection: StageSelection | None = None) -> Stages:
    """Load the stages of the published Direct3D-S2 folder, version 1.0 or 1.1.

    Args:
        path: The folder.
        selection: Which stages are loaded. None takes the defaults.

    Raises:
        UserError: If a section, class, setting, file, name or shape is missing, unknown or does not
            fit, or a file is damaged. Nothing large has been allocated then.
    """
    selection = selection or StageSelection()
    settings = read_settings(path, selection.image_encoder)
    wanted = selection.resolutions(path, settings.sparse)
    first = wanted[0]
    refiners = {
        size: config
        for size, config in settings.refiners.items()
        if size in wanted and selection.includes(config)
    }
    check_refiners(path / CONFIG, refiners, wanted, selection.refine)
    files = [DENSE_FILE, *(SPARSE_FILE.format(settings.sparse[size].name) for size in wanted)]
    files += [REFINER_FILES[OPTIONAL[size != first]] for size in refiners]
    for name in files:
        _check_not_a_pointer(path / name, optional=name in REFINER_FILES.values())
    flow, scale = settings.structure.flow, settings.structure_scale
    occupancy = Part(
        cls=OccupancyVAE,
        config=settings.structure.occupancy,
        file=path / DENSE_FILE,
        name="vae",
        keys=published_occupancy_keys(settings.structure.occupancy),
    )
    side = settings.structure.occupancy.latent_side

    def dense_weights(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        return dit_weights(without_positions(weights, side, flow.dit.channels, where), flow, scale)

    dense_dit = _dit_part(path / DENSE_FILE, flow, dense_weights)
    vaes, dits = {}, {}
    for size in wanted:
        sparse = settings.sparse[size]
        file = path / SPARSE_FILE.format(sparse.name)
        vaes[size] = _vae_part(path, sparse)
        dits[size] = _dit_part(
            file,
            sparse.dit,
            lambda weights, _, sparse=sparse: dit_weights(weights, sparse.dit, sparse.scale),
        )
    refiner_parts = {
        size: Part(
            cls=VolumeRefiner,
            config=config,
            file=path / REFINER_FILES[OPTIONAL[size != first]],
            name="refiner",
            names=("refiner",),
        )
        for size, config in refiners.items()
    }
    groups = (vaes, dits, refiner_parts)
    parts = [occupancy, dense_dit, *(part for group in groups for part in group.values())]
    makers = {part: part.check() for part in parts}
    # Everything has been checked. The encoder comes first, since its weights may be missing.
    encoders: dict[EncoderConfig, ImageEncoder] = {}
    make_encoder = EncoderOnDemand if selection.low_memory else build_encoder
    for config in (flow, *(settings.sparse[size].dit for size in wanted)):
        if config.encoder not in encoders:
            encoders[config.encoder] = _encoder(config.encoder, path, make_encoder)
    deferred: dict[nn.Module, Callable[[], nn.Module]] = {}

    def use(build: Callable[[Callable[[Part], Any]], Module]) -> Module:
        """Return the model that is made of parts, on the meta device if it is loaded later."""
        if not selection.low_memory:
            return build(lambda part: makers[part]())
        model = build(Part.skeleton)
        deferred[model] = lambda: build(Part.load)
        return model

    def conditioned(
        config: ConditionedDiTConfig, part: Part, make: Callable[[Part], Any]
    ) -> ConditionedDiT:
        return ConditionedDiT(config, make(part), encoders[config.encoder])

    def structure(make: Callable[[Part], Any]) -> Structure:
        return Structure(settings.structure, (make(occupancy), conditioned(flow, dense_dit, make)))

    return Stages(
        structure=use(structure),
        dits={
            size: use(partial(conditioned, settings.sparse[size].dit, part))
            for size, part in dits.items()
        },
        vaes={size: use(partial(_made, part)) for size, part in vaes.items()},
        refiners={size: use(partial(_made, part)) for size, part in refiner_parts.items()},
        meshing={size: Meshing(iso_value=ISO_VALUE, normalize=size != first) for size in wanted},
        deferred=deferred,
    )


def _made(part: Part, make: Callable[[Part], Any]) -> Any:
    return make(part)


def _vae_part(path: Path, sparse: SparseSettings) -> Part:
    return Part(
        cls=SparseVAE,
        config=sparse.vae,
        file=path / SPARSE_FILE.format(sparse.name),
        name="vae",
        keys=published_vae_keys(sparse.vae),
    )


def _dit_part(
    file: Path,
    config: ConditionedDiTConfig,
    prepare: Callable[[Mapping[str, Tensor], str], dict[str, Tensor]],
) -> Part:
    return Part(
        cls=SparseDiT,
        config=config.dit,
        file=file,
        name="dit",
        keys=published_dit_keys(config.dit),
        prepare=prepare,
    )


def missing_refiners(path: Path) -> list[Path]:
    """Return the files of refiners that the published folder does not have."""
    return [path / name for name in REFINER_FILES.values() if not (path / name).exists()]


def read_vae(path: Path, resolution: int | None = None) -> tuple[SparseVAE, int]:
    """Load one SS-VAE of the published folder. The other files need not be there.

    Args:
        path: The folder.
        resolution: Its resolution R. None takes the finest one.

    Returns:
        The VAE and its resolution.

    Raises:
        UserError: As `read_published`.
    """
    settings = read_settings(path)
    size = StageSelection(resolution=resolution).resolutions(path, settings.sparse)[-1]
    return _vae_part(path, settings.sparse[size]).load(), size


def _encoder(
    config: EncoderConfig, path: Path, make: Callable[[EncoderConfig], ImageEncoder]
) -> ImageEncoder:
    try:
        return make(config)
    except ValueError as error:
        raise UserError(f"{path / CONFIG}: the image encoder does not fit: {error}") from error
