"""From an image to a mesh: cells, then latents, bricks and a mesh at each resolution."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kernels import token_order
from model.checkpoint import CheckpointError, build_config, load_model, read_config
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.conditioning.image_encoder import ImageBatch
from model.conditioning.image_preprocessing import prepare_image
from model.config import GenerationOptions, Guidance, RecommendedSampling
from model.image_tokens import ImageTokens
from model.inference.cells_near_mesh import cells_near
from model.inference.extract_mesh import extract_meshes
from model.inference.mesh_cleaning import CleanedMesh, clean_mesh, count_open_edges, simplify
from model.sparse_tensor import Level
from model.sparse_vae import SparseVAE
from model.structure import Structure
from pipeline.core.errors import RunError, UserError
from pipeline.core.grid import CELL_SIDE

EncodeImage = Callable[[ConditionedDiT], ImageTokens]  # the image's tokens for a DiT
Progress = Callable[[str, Iterable[int]], Iterable[int]]  # (stage, steps) -> the same steps
STRUCTURE = "structure"  # name of the first stage; the others are named by their resolution


def no_progress(_stage: str, steps: Iterable[int]) -> Iterable[int]:
    """Return the steps of a stage unchanged: a `Progress` that shows nothing."""
    return steps


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
        vae: Decoder of the latents of all resolutions.
        structure: The structure stage.
        dits: The DiT of each resolution. Those below the structure stage's resolution are ignored.
        device: Where all stages are moved.
        recommended: Sampling options that each stage's export recommends, by name of the stage.

    Raises:
        ValueError: If the stages do not fit each other.
    """

    def __init__(
        self,
        vae: SparseVAE,
        structure: Structure,
        dits: dict[int, ConditionedDiT],
        device: torch.device,
        recommended: Mapping[str, RecommendedSampling] | None = None,
    ):
        first = structure.resolution
        channels = vae.config.latent_channels
        if first not in dits:
            raise ValueError(
                f"dits must have one for R = {first}, the resolution of the structure stage's "
                f"cells, got {sorted(dits)}"
            )
        for resolution, dit in dits.items():
            found = dit.config.dit.latent_channels
            if found != channels:
                raise ValueError(
                    f"dits[{resolution}] must have the VAE's {channels} latent channels, "
                    f"got {found}"
                )
        self.vae = vae.to(device).eval()
        self.structure = structure.to(device).eval()
        self.dits = {
            resolution: dits[resolution].to(device).eval()
            for resolution in sorted(dits)
            if resolution >= first
        }
        self.device = device
        self.recommended = dict(recommended or {})

    @classmethod
    def load(
        cls, path: Path, device: torch.device | str = "cpu", resolution: int | None = None
    ) -> Generator:
        """Load the stages that `python -m train.export` wrote.

        Args:
            path: Directory of the export.
            device: Where the stages are moved.
            resolution: Resolution of the meshes. DiTs of finer resolutions are not loaded. None
                loads all of them.

        Raises:
            UserError: If stages are missing, incomplete or damaged.
        """
        folders = {
            int(folder.name[4:]): folder
            for folder in path.glob("dit_*")
            if re.fullmatch(r"dit_\d+", folder.name)
        }
        missing = [name for name in ("vae", STRUCTURE) if not (path / name).is_dir()]
        missing += [] if folders else ["dit_<resolution>"]
        if missing:
            raise UserError(
                f"{path} lacks {', '.join(missing)}: train the stages and collect them with "
                "python -m train.export, or see `make demo`"
            )
        if resolution is not None and resolution not in folders:
            raise UserError(
                f"{path} has models for R = {_join_numbers(folders)}, none for {resolution}"
            )
        wanted = {
            size: folder
            for size, folder in folders.items()
            if resolution is None or size <= resolution
        }
        vae = load_model(path / "vae", SparseVAE)
        structure = load_model(path / STRUCTURE, Structure)
        dits = {size: load_model(folder, ConditionedDiT) for size, folder in wanted.items()}
        for dit in dits.values():
            dit.share_encoder(structure.flow)
        recommended = {STRUCTURE: read_recommended(path / STRUCTURE)}
        recommended |= {str(size): read_recommended(folder) for size, folder in wanted.items()}
        try:
            return cls(vae, structure, dits, torch.device(device), recommended)
        except ValueError as error:
            raise UserError(f"{path} holds stages that do not fit: {error}") from error

    @property
    def resolutions(self) -> list[int]:
        """The resolutions of the meshes that can be made, in ascending order."""
        return list(self.dits)

    def describe_sampling(self, options: GenerationOptions) -> dict[str, Any]:
        """Return the options as JSON values, with the steps and guidance that each stage takes.

        "guidance" is one number where all stages take the same one.
        """
        names = [STRUCTURE, *map(str, self.resolutions)]
        values = [self._sampling(stage, name, options) for stage, name in enumerate(names)]
        steps = [steps for steps, _ in values]
        scales = [scale for _, scale in values]
        guidance = scales[0] if len(set(scales)) == 1 else scales
        return {**asdict(options), "steps": steps, "guidance": guidance}

    def generate(
        self,
        image: Image.Image | NDArray[np.uint8],
        seed: int,
        options: GenerationOptions | None = None,
        *,
        whole_if_opaque: bool = False,
        progress: Progress = no_progress,
    ) -> GeneratedMesh:
        """Generate a mesh of the object in an image.

        The same image, seed, options and device give the same mesh.

        Args:
            image: RGBA. As an array uint8 [height, width, 4].
            seed: Seed of the noise of all stages, 0 <= seed < 2^63.
            options: How meshes are sampled and cleaned. None takes the defaults.
            whole_if_opaque: Take an image without transparent pixels as foreground.
            progress: Called once a stage with its name and its steps.

        Raises:
            ValueError: If the image has no usable foreground (see `prepare_image`) or there is no
                model of the resolution.
            RunError: If a stage comes out empty or too large.
        """
        options = options or GenerationOptions()
        last = options.resolution or self.resolutions[-1]
        if last not in self.dits:
            raise ValueError(f"resolution must be one of {_join_numbers(self.dits)}, got {last}")

        def encode(dit: ConditionedDiT) -> ImageTokens:
            prepared = prepare_image(image, dit.encoder.image_size, whole_if_opaque=whole_if_opaque)
            return dit.encode_images(ImageBatch.collate([prepared]).to(self.device))

        started = self._now()
        level = self.generate_cells(encode, seed, options, progress)
        reports = [StageReport(name=STRUCTURE, seconds=self._now() - started, tokens=len(level))]
        cleaned = None
        for number, resolution in enumerate(size for size in self.resolutions if size <= last):
            started = self._now()
            if cleaned is not None:
                level = level_near_mesh(cleaned, resolution, self.device)
            cleaned = self.refine(level, encode, seed, options, progress, stage=number + 1)
            seconds = self._now() - started
            reports.append(StageReport(name=str(resolution), seconds=seconds, tokens=len(level)))
        assert cleaned is not None
        vertices, faces = cleaned.vertices, cleaned.faces
        if options.faces is not None:
            vertices, faces = simplify(vertices, faces, options.faces)
        return GeneratedMesh(
            vertices=vertices,
            faces=faces,
            open_edges=count_open_edges(faces),
            cleaned=cleaned,
            stages=tuple(reports),
        )

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
        steps, scale = self._sampling(0, STRUCTURE, options)
        with self._precision():
            return self.structure.generate(
                encode(self.structure.flow),
                [seed],
                steps=steps,
                guidance=Guidance(scale=scale),
                method=options.method,
                progress=lambda numbers: progress(STRUCTURE, numbers),
            )

    @torch.no_grad()
    def refine(
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
        steps, scale = self._sampling(stage, name, options)
        dit = self.dits[resolution]
        with self._precision():
            z_MC = dit.generate(
                level,
                encode(dit),
                [seed],
                steps=steps,
                guidance=Guidance(scale=scale),
                method=options.method,
                progress=lambda numbers: progress(name, numbers),
            )
            values_MK = self.vae.decode(z_MC, level)
        ((vertices, faces),) = extract_meshes(level, values_MK)
        if not len(faces):
            raise RunError(
                f"the stage at R = {resolution} has no surface; try another --seed, or train longer"
            )
        return clean_mesh(vertices, faces, options.min_piece)

    def _sampling(self, stage: int, name: str, options: GenerationOptions) -> tuple[int, float]:
        return options.sampling(stage, self.recommended.get(name, RecommendedSampling()))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Compute products in bf16 on a GPU and in fp32 on the CPU."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            yield


def read_recommended(path: Path) -> RecommendedSampling:
    """Return the sampling options that an exported stage recommends, which may be none.

    Raises:
        CheckpointError: If its config.json is not readable or the options are not valid.
    """
    recommended = read_config(path).get("recommended", {})
    if not isinstance(recommended, dict):
        raise CheckpointError(f"{path}: recommended must be an object, got {recommended!r}")
    values = {**asdict(RecommendedSampling()), **recommended}
    return build_config(RecommendedSampling, values, f"{path}: recommended")


def level_near_mesh(
    mesh: CleanedMesh, resolution: int, device: torch.device | str = "cpu"
) -> Level:
    """Return the cells near the mesh of one asset, which are the tokens of the next stage.

    Args:
        mesh: The mesh of the stage before.
        resolution: Resolution R of the next stage.
        device: Where the cells are put.
    """
    xyz = torch.from_numpy(cells_near(mesh.vertices, mesh.faces, resolution).astype(np.int32))
    coords = torch.cat([torch.zeros(len(xyz), 1, dtype=torch.int32), xyz], 1)
    return Level.from_coords(coords[token_order(coords)].to(device), resolution // CELL_SIDE, 1)


def _join_numbers(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
