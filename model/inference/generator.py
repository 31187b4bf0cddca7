"""From an image to a mesh: cells, then latents, bricks and a mesh at each resolution."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from kernels import token_order
from model.checkpoint import CheckpointError
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.conditioning.image_encoder import ImageBatch
from model.conditioning.image_preprocessing import prepare_image
from model.config import (
    GenerationOptions,
    Precision,
    RecommendedSampling,
    Refine,
    SamplingOptions,
)
from model.image_tokens import ImageTokens
from model.inference.cells_near_mesh import cells_near, normalized
from model.inference.checkpoint_source import find_checkpoint
from model.inference.extract_mesh import extract_meshes
from model.inference.mesh_cleaning import CleanedMesh, clean_mesh, count_open_edges, simplify
from model.inference.published_checkpoint import is_published, read_published
from model.inference.refine_volume import (
    crossed_bricks,
    outside_of,
    refined_volume,
    signed_bricks,
)
from model.inference.stages import (
    STRUCTURE,
    Stages,
    StageSelection,
    check_refiners,
    read_export,
)
from model.refiner import VolumeRefiner
from model.sparse_dit import SparseDiT
from model.sparse_tensor import Level
from model.sparse_vae import SparseVAE
from pipeline.core.errors import RunError, UserError
from pipeline.core.grid import CELL_SIDE
from pipeline.core.primitives.marching_cubes import MeshArrays

# The tokens of each view of the object for a DiT.
EncodeImage = Callable[[ConditionedDiT], ImageTokens | Sequence[ImageTokens]]
ObjectImage = Image.Image | NDArray[np.uint8]
Progress = Callable[[str, Iterable[int]], Iterable[int]]  # (stage, steps) -> the same steps


Result = TypeVar("Result")
Model = TypeVar("Model", bound=nn.Module)
SIMPLIFICATION = "simplification"  # name of the stage that reduces the faces


def surface_stage(resolution: int | str) -> str:
    """Return the name of the stage that decodes latents and extracts their surface."""
    return f"{resolution} surface"


def cleaning_stage(resolution: int | str) -> str:
    """Return the name of the stage that closes holes and removes small pieces."""
    return f"{resolution} cleaning"


def no_progress(_stage: str, steps: Iterable[int]) -> Iterable[int]:
    """Return the steps of a stage unchanged: a `Progress` that shows nothing."""
    return steps


def in_one_step(progress: Progress, stage: str, work: Callable[[], Result]) -> Result:
    """Do work as a stage of one step, so that `progress` sees it begin and end."""
    (result,) = [work() for _ in progress(stage, range(1))]
    return result


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """Cost and size of one stage of a generation.

    Attributes:
        name: "structure", or the resolution such as "512".
        seconds: Wall time.
        tokens: Number of cells that the stage made (structure) or worked on.
    """

    name: str
    seconds: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class GeneratedMesh:
    """A generated mesh.

    Attributes:
        vertices: [V, 3] in the cube [-0.5, 0.5]^3, y up.
        faces: [F, 3], counterclockwise seen from outside.
        open_edges: Number of edges where the surface is open. 0 means closed.
        cleaned: The mesh of the last resolution before its faces were reduced.
        stages: One report for each stage, in order.
    """

    vertices: NDArray[np.float64]
    faces: NDArray[np.int32]
    open_edges: int
    cleaned: CleanedMesh
    stages: tuple[StageReport, ...] = field(default=())


class Generator:
    """The trained stages on one device.

    Args:
        stages: The stages. DiTs below the structure stage's resolution are ignored.
        device: Where all stages are moved.
        precision: Precision of matrix products. "auto" is bf16 on a GPU and fp32 on the CPU. On a
            GPU the weights of these products are stored in it, which halves their memory.

    Raises:
        ValueError: If the stages do not fit each other.
    """

    def __init__(self, stages: Stages, device: torch.device, precision: Precision = "auto"):
        stages.check()
        first = stages.structure.resolution
        self.stages = stages
        self.device = device
        self.dtype = compute_dtype(precision, device)
        self.structure = self._prepared(stages.structure)
        self.dits = {
            resolution: self._prepared(stages.dits[resolution])
            for resolution in sorted(stages.dits)
            if resolution >= first
        }
        self.vaes = {size: self._prepared(stages.vaes[size]) for size in self.dits}
        self.refiners = {
            size: self._prepared(refiner)
            for size, refiner in stages.refiners.items()
            if size in self.dits
        }

    @classmethod
    def load(
        cls,
        path: Path | str,
        device: torch.device | str = "cpu",
        options: GenerationOptions | None = None,
        image_encoder: str | None = None,
        *,
        low_memory: bool = False,
    ) -> Generator:
        """Load the stages of an export, or of the published Direct3D-S2 folder.

        Args:
            path: What `python -m train.export` wrote, the published folder, or a name such as
                "hf://OWNER/NAME/SUBFOLDER" on the Hugging Face hub.
            device: Where the stages are moved.
            options: Which resolutions and refiners are loaded, and the precision. None takes the
                defaults.
            image_encoder: Folder or name on the hub of DINOv2's weights. None takes the one that
                the checkpoint names.
            low_memory: Check all stages, but load each one when it runs and free it afterwards.
                Meshes are the same.

        Raises:
            UserError: If stages are missing, incomplete or damaged.
        """
        options = options or GenerationOptions()
        folder = find_checkpoint(path, options.refine)
        selection = StageSelection(
            resolution=options.resolution,
            refine=options.refine,
            image_encoder=image_encoder,
            low_memory=low_memory,
        )
        try:
            read = read_published if is_published(folder) else read_export
            stages = read(folder, selection)
            return cls(stages, torch.device(device), options.precision)
        except CheckpointError:
            raise
        except ValueError as error:
            raise UserError(f"{folder} holds stages that do not fit: {error}") from error

    def _prepared(self, model: Model) -> Model:
        """Return a stage on the device and in the precision of its weights.

        A deferred stage is returned as it is.
        """
        if model in self.stages.deferred:
            return model
        stored = self.device.type == "cuda" and self.dtype != torch.float32
        if stored and not isinstance(model, SparseVAE):
            store_weights(model, self.dtype)
        return model.to(self.device).eval()

    def _run(self, model: Model, work: Callable[[Model], Result]) -> Result:
        """Do work with a stage. A deferred one is loaded for it and freed afterwards."""
        load = self.stages.deferred.get(model)
        if load is None:
            return work(model)
        loaded = self._prepared(load())
        try:
            return work(loaded)  # pyright: ignore[reportArgumentType]
        finally:
            del loaded
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @property
    def resolutions(self) -> list[int]:
        """The resolutions of the meshes that can be made, in ascending order."""
        return list(self.dits)

    @property
    def facing_views(self) -> bool | None:
        """Whether meshes face the camera of their image. None if the export does not record it."""
        return self.stages.facing_views

    @property
    def averages_views(self) -> bool:
        """Whether a stage averages the velocities of views instead of attending to all of them."""
        return not all(dit.joint_views for dit in self._conditioned(self.resolutions[-1]))

    @property
    def views_from_one_side(self) -> bool:
        """Whether all views of an object must be from the side that the mesh faces.

        Averaged velocities would otherwise be those of shapes that face different sides. A stage
        that attends to all views together faces the first one.
        """
        return bool(self.facing_views) and self.averages_views

    @property
    def max_views(self) -> int | None:
        """Largest number of views of an object. None if any number of them can be averaged."""
        dits = self._conditioned(self.resolutions[-1])
        return min((dit.config.views for dit in dits if dit.joint_views), default=None)

    def _conditioned(self, last: int) -> list[ConditionedDiT]:
        """Return the DiTs of the structure stage and of the resolutions up to the last one."""
        sizes = [size for size in self.resolutions if size <= last]
        return [self.structure.flow, *(self.dits[size] for size in sizes)]

    def stages_of(self, options: GenerationOptions) -> dict[str, int]:
        """Return the number of steps of each stage of a generation, by name and in order.

        `generate` passes exactly these stages to its `progress`, unless it raises.

        Args:
            options: The options of the generation.

        Raises:
            ValueError: If there is no model of the resolution.
        """
        last = self._finest(options)
        stages = {STRUCTURE: self._sampling(0, STRUCTURE, options).steps}
        for number, size in enumerate(size for size in self.resolutions if size <= last):
            stages[str(size)] = self._sampling(number + 1, str(size), options).steps
            stages |= {surface_stage(size): 1, cleaning_stage(size): 1}
        if options.faces is not None:
            stages[SIMPLIFICATION] = 1
        return stages

    def _finest(self, options: GenerationOptions) -> int:
        """Return the resolution of the mesh.

        Raises:
            ValueError: If there is no model of it.
        """
        resolution = options.resolution or self.resolutions[-1]
        if resolution not in self.dits:
            raise ValueError(
                f"resolution must be one of {_join_numbers(self.dits)}, got {resolution}"
            )
        return resolution

    def describe_sampling(self, options: GenerationOptions) -> dict[str, Any]:
        """Return the options as JSON values, with the steps and guidance that each stage takes.

        "guidance" is one number where all stages take the same one.
        """
        names = [STRUCTURE, *map(str, self.resolutions)]
        values = [self._sampling(stage, name, options) for stage, name in enumerate(names)]
        steps = [sampling.steps for sampling in values]
        scales = [sampling.guidance.scale for sampling in values]
        guidance = scales[0] if len(set(scales)) == 1 else scales
        return {**asdict(options), "steps": steps, "guidance": guidance}

    def generate(
        self,
        image: ObjectImage | Sequence[ObjectImage],
        seed: int,
        options: GenerationOptions | None = None,
        *,
        whole_if_opaque: bool = False,
        cells: Level | None = None,
        progress: Progress = no_progress,
    ) -> GeneratedMesh:
        """Generate a mesh of the object in an image.

        The same image, seed, options and device give the same mesh.

        Args:
            image: RGBA. As an array uint8 [height, width, 4]. Several views of the object are
                combined in each stage as it was trained: see `ConditionedDiT.generate`.
            seed: Seed of the noise of all stages, 0 <= seed < 2^63.
            options: How meshes are sampled and cleaned. None takes the defaults.
            whole_if_opaque: Take an image without transparent pixels as foreground.
            cells: Cells of the first resolution on the generator's device. None generates them.
            progress: Called once a stage with its name and its steps.

        Raises:
            ValueError: If the image has no usable foreground (see `prepare_image`), there is no
                model of the resolution, or there are more views than a stage can take.
            RunError: If a stage comes out empty or too large.
        """
        options = options or GenerationOptions()
        last = self._finest(options)

        views = [image] if isinstance(image, (Image.Image, np.ndarray)) else image
        if not views:
            raise ValueError("image must have at least one view, got none")
        for dit in self._conditioned(last):
            dit.check_views(len(views))

        def encode(dit: ConditionedDiT) -> list[ImageTokens]:
            return [self._encode_view(dit, view, whole_if_opaque) for view in views]

        started = self._now()
        level = self.generate_cells(encode, seed, options, progress) if cells is None else cells
        reports = [StageReport(name=STRUCTURE, seconds=self._now() - started, tokens=len(level))]
        cleaned = None
        for number, resolution in enumerate(size for size in self.resolutions if size <= last):
            started = self._now()
            if cleaned is not None:
                normalize = self.stages.meshing_of(resolution).normalize
                level = level_near_mesh(cleaned, resolution, self.device, normalize=normalize)
            cleaned = self.generate_mesh(level, encode, seed, options, progress, stage=number + 1)
            seconds = self._now() - started
            reports.append(StageReport(name=str(resolution), seconds=seconds, tokens=len(level)))
        assert cleaned is not None
        vertices, faces = cleaned.vertices, cleaned.faces
        target = options.faces
        if target is not None:
            vertices, faces = in_one_step(
                progress,
                SIMPLIFICATION,
                lambda: simplify(cleaned.vertices, cleaned.faces, target),
            )
        return GeneratedMesh(
            vertices=vertices,
            faces=faces,
            open_edges=count_open_edges(faces),
            cleaned=cleaned,
            stages=tuple(reports),
        )

    def _encode_view(
        self, dit: ConditionedDiT, image: ObjectImage, whole_if_opaque: bool
    ) -> ImageTokens:
        """Prepare an image and return its tokens for a DiT."""
        prepared = prepare_image(
            image,
            dit.encoder.image_size,
            whole_if_opaque=whole_if_opaque,
            preparation=dit.config.encoder.preparation,
        )
        batch = ImageBatch.collate([prepared], dit.config.image_tokens)
        return dit.encode_images(batch.to(self.device))

    @torch.no_grad()
    def generate_cells(
        self,
        encode: EncodeImage,
        seed: int,
        options: GenerationOptions,
        progress: Progress = no_progress,
    ) -> Level:
        """Run the structure stage for one asset.

        Args:
            encode: Returns the image's tokens for the structure stage's DiT.
            seed: Seed of the noise.
            options: Sampling options.
            progress: Called with the stage's name and steps.

        Returns:
            The occupied cells, at resolution R / 8. There may be none.
        """
        with self._precision():
            tokens = self._frozen_tokens(self.structure.flow, encode)
            return self._run(
                self.structure,
                lambda structure: structure.generate(
                    tokens or encode(structure.flow),
                    [seed],
                    self._sampling(0, STRUCTURE, options),
                    progress=lambda numbers: progress(STRUCTURE, numbers),
                ),
            )

    @torch.no_grad()
    def generate_mesh(
        self,
        level: Level,
        encode: EncodeImage,
        seed: int,
        options: GenerationOptions,
        progress: Progress = no_progress,
        *,
        stage: int = 1,
    ) -> CleanedMesh:
        """Generate latents, bricks and the mesh of one asset from its cells.

        Args:
            level: The cells, at resolution R / 8.
            encode: Returns the image's tokens for the DiT of resolution R.
            seed: Seed of the noise.
            options: Sampling and cleaning options.
            progress: Called with the stage's name and steps.
            stage: 1 for the first resolution, 2 for the next one, ... It selects the steps.

        Raises:
            RunError: If there is no cell, there are more than `options.max_tokens`, or the decoded
                bricks have no surface.
        """
        resolution = CELL_SIDE * level.resolution
        if not len(level):
            raise RunError(
                "the structure stage generated no cell; try another --seed, or train longer"
            )
        if len(level) > options.max_tokens:
            raise RunError(
                f"{len(level)} cells at R = {resolution} are more than "
                f"--max-tokens {options.max_tokens}"
            )
        name = str(resolution)
        dit = self.dits[resolution]
        with self._precision():
            tokens = self._frozen_tokens(dit, encode)
            z_MC = self._run(
                dit,
                lambda model: model.generate(
                    level,
                    tokens or encode(model),
                    [seed],
                    self._sampling(stage, name, options),
                    progress=lambda numbers: progress(name, numbers),
                ),
            )
            vertices, faces = in_one_step(
                progress, surface_stage(name), lambda: self._surface(z_MC, level, options)
            )
        if not len(faces):
            raise RunError(
                f"the stage at R = {resolution} has no surface; try another --seed, or train longer"
            )
        return in_one_step(
            progress,
            cleaning_stage(name),
            lambda: clean_mesh(vertices, faces, options.min_piece, options.max_hole),
        )

    def _frozen_tokens(
        self, dit: ConditionedDiT, encode: EncodeImage
    ) -> ImageTokens | Sequence[ImageTokens] | None:
        """Return the image's tokens before the DiT is loaded, so that its encoder is freed first.

        None if the encoder is trained, because it is then loaded with the DiT.
        """
        return None if dit.encoder.trainable else encode(dit)

    def _sampling(self, stage: int, name: str, options: GenerationOptions) -> SamplingOptions:
        return options.sampling(stage, self.stages.recommended.get(name, RecommendedSampling()))

    def _surface(self, z_MC: Tensor, level: Level, options: GenerationOptions) -> MeshArrays:
        """Decode latents and extract the surface, after the refiner of the resolution."""
        resolution = CELL_SIDE * level.resolution
        vae, iso_value = self.vaes[resolution], self.stages.meshing_of(resolution).iso_value
        refiner = self._refiner(resolution, options.refine)
        if refiner is None:
            values_MK = self._run(vae, lambda vae: vae.decode(z_MC, level))
        elif refiner.config.output == "sdf":
            decoded = self._run(vae, lambda vae: vae.decode_with_features(z_MC, level))
            volume = self._run(refiner, lambda refiner: refined_volume(refiner, level, *decoded))
            iso_value = refiner.config.iso_value
            level, values_MK = crossed_bricks(volume, iso_value)
        else:
            values_MK = self._run(vae, lambda vae: vae.decode(z_MC, level))
            outside = self._run(refiner, lambda refiner: outside_of(refiner, level, values_MK))
            iso_value = refiner.config.iso_value
            level, values_MK = signed_bricks(level, values_MK, outside)
        ((vertices, faces),) = extract_meshes(level, values_MK, iso_value)
        return vertices, faces

    def _refiner(self, resolution: int, refine: Refine | None) -> VolumeRefiner | None:
        """Return the refiner that is used at a resolution.

        Raises:
            UserError: If there is none and one is asked for.
        """
        check_refiners("the generator", self.refiners, self.dits, refine)
        refiner = self.refiners.get(resolution)
        if refiner is None or refine == "none":
            return None
        return refiner if refiner.config.output == "sdf" or refine == "all" else None

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Compute products in the generator's precision."""
        enabled = self.dtype != torch.float32
        dtype = self.dtype if enabled else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=enabled):
            yield


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of products on a device."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def store_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights of products in another precision, which changes no result under autocast.

    The first and the last layer of a DiT compute in fp32 and keep their weights, as does the image
    encoder, which is no submodule.
    """
    kept = {
        layer
        for part in model.modules()
        if isinstance(part, SparseDiT)
        for layer in (part.input, part.out)
    }
    for part in model.modules():
        if isinstance(part, (nn.Linear, nn.Conv3d, nn.ConvTranspose3d)) and part not in kept:
            part.to(dtype)


def level_near_mesh(
    mesh: CleanedMesh,
    resolution: int,
    device: torch.device | str = "cpu",
    *,
    normalize: bool = False,
) -> Level:
    """Return the cells near the mesh of one asset, which are the tokens of the next stage.

    Args:
        mesh: The mesh of the stage before.
        resolution: Resolution R of the next stage.
        device: Where the cells are put.
        normalize: Centre and scale the mesh first, as `normalized` does.
    """
    vertices = normalized(mesh.vertices) if normalize else mesh.vertices
    xyz = torch.from_numpy(cells_near(vertices, mesh.faces, resolution).astype(np.int32))
    coords = torch.cat([torch.zeros(len(xyz), 1, dtype=torch.int32), xyz], 1)
    return Level.from_coords(coords[token_order(coords)].to(device), resolution // CELL_SIDE, 1)


def _join_numbers(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
