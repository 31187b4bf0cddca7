"""From an image to a mesh: structure, then latents, bricks and mesh at each resolution in turn."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kernels import token_order
from model.checkpoint import load_model
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.conditioning.image_encoder import ImageBatch
from model.conditioning.image_preprocessing import prepare_image
from model.config import GenerationOptions, Guidance, RecommendedSampling
from model.image_tokens import ImageTokens
from model.inference.cells_near_mesh import cells_near
from model.inference.extract_mesh import extract_meshes
from model.inference.mesh_cleaning import CleanedMesh, clean, count_open_edges, simplify
from model.sparse_tensor import Level
from model.sparse_vae import SparseVAE
from model.structure import Structure
from pipeline.core.errors import RunError, UserError
from pipeline.core.grid import CELL_SIDE

See = Callable[[ConditionedDiT], ImageTokens]
Progress = Callable[[str, Iterable[int]], Iterable[int]]  # (stage, steps) -> the same steps, shown
STEPS = (50, 30, 15)  # of structure, of the first resolution, of every later one; paper, sec. 4


def no_progress(_stage: str, steps: Iterable[int]) -> Iterable[int]:
    """Steps as they are."""
    return steps


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one stage cost and made."""

    name: str  # structure, 512, 1024, ...
    seconds: float
    tokens: int  # cells


@dataclass(frozen=True, kw_only=True)
class GeneratedMesh:
    """A mesh, and how it came about."""

    vertices: NDArray[np.float64]  # [V, 3] in the cube, y up
    faces: NDArray[np.int32]  # [F, 3] seen from outside
    open_edges: int  # 0: the surface is closed
    cleaned: CleanedMesh  # of the last resolution, before its faces were reduced
    stages: tuple[Stage, ...] = field(default=())


class Generator:
    """The trained stages, on one device."""

    def __init__(
        self,
        vae: SparseVAE,
        structure: Structure,
        dits: dict[int, ConditionedDiT],
        device: torch.device,
    ):
        first, channels = structure.resolution, vae.config.latent_channels
        if first not in dits:
            raise ValueError(
                f"dits must have one for R = {first}, where the structure stage ends, got {sorted(dits)}"
            )
        for resolution, dit in dits.items():
            if dit.config.dit.latent_channels != channels:
                found = dit.config.dit.latent_channels
                raise ValueError(
                    f"dits[{resolution}] must have the VAE's {channels} latent channels, got {found}"
                )
        self.vae, self.structure = vae.to(device).eval(), structure.to(device).eval()
        self.dits = {
            resolution: dits[resolution].to(device).eval()
            for resolution in sorted(dits)
            if resolution >= first
        }
        self.device = device

    @classmethod
    def load(
        cls, directory: Path, device: torch.device | str = "cpu", resolution: int | None = None
    ) -> Generator:
        """The models that `python -m train.export` wrote; DiTs beyond `resolution` are left on the disk.

        UserError, with what to run, if they are missing, incomplete or damaged.
        """
        sizes = {
            int(path.name[4:]): path
            for path in directory.glob("dit_*")
            if re.fullmatch(r"dit_\d+", path.name)
        }
        missing = [name for name in ("vae", "structure") if not (directory / name).is_dir()]
        missing += [] if sizes else ["dit_<resolution>"]
        if missing:
            raise UserError(
                f"{directory} lacks {', '.join(missing)}: train the stages and collect them with "
                "python -m train.export, or see `make demo`"
            )
        if resolution is not None and resolution not in sizes:
            raise UserError(
                f"{directory} has models for R = {_words(sizes)}, none for {resolution}"
            )
        wanted = {
            size: path for size, path in sizes.items() if resolution is None or size <= resolution
        }
        device = torch.device(device)
        try:
            vae = load_model(directory / "vae", SparseVAE)
            structure = load_model(directory / "structure", Structure)
            dits = {size: load_model(path, ConditionedDiT) for size, path in wanted.items()}
            for dit in dits.values():
                dit.share_encoder(structure.flow)
            return cls(vae, structure, dits, device)
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def resolutions(self) -> list[int]:
        """Of the meshes it can make, in the order in which one leads to the next."""
        return list(self.dits)

    def generate(
        self,
        image: Image.Image | NDArray[np.uint8],
        seed: int,
        options: GenerationOptions | None = None,
        *,
        whole_if_opaque: bool = False,
        progress: Progress = no_progress,
    ) -> GeneratedMesh:
        """A mesh of the object in an RGBA image. The same image, seed, options and device give the same mesh.

        ValueError if the image has no usable foreground (see `prepare_image`) or there is no model for the resolution;
        RunError if a stage comes out empty or too large.
        """
        options = options or GenerationOptions()
        last = options.resolution or self.resolutions[-1]
        if last not in self.dits:
            raise ValueError(f"resolution must be one of {_words(self.dits)}, got {last}")

        def see(dit: ConditionedDiT) -> ImageTokens:
            prepared = prepare_image(image, dit.encoder.image_size, whole_if_opaque=whole_if_opaque)
            return dit.encode_images(ImageBatch.collate([prepared]).to(self.device))

        started = self._now()
        level = self.cells(see, seed, options, progress)
        stages, cleaned = (
            [Stage(name="structure", seconds=self._now() - started, tokens=len(level))],
            None,
        )
        for number, resolution in enumerate([size for size in self.resolutions if size <= last]):
            started = self._now()
            if cleaned is not None:
                level = level_near_mesh(cleaned, resolution, self.device)
            cleaned = self.refine(level, see, seed, options, progress, stage=number + 1)
            stages.append(
                Stage(name=str(resolution), seconds=self._now() - started, tokens=len(level))
            )
        assert cleaned is not None
        vertices, faces = cleaned.vertices, cleaned.faces
        if options.faces is not None:
            vertices, faces = simplify(vertices, faces, options.faces)
        return GeneratedMesh(
            vertices=vertices,
            faces=faces,
            open_edges=count_open_edges(faces),
            cleaned=cleaned,
            stages=tuple(stages),
        )

    @torch.no_grad()
    def cells(
        self, see: See, seed: int, options: GenerationOptions, progress: Progress = no_progress
    ) -> Level:
        """The structure stage: the cells of one asset. `see` gives a DiT's tokens of the image."""
        with self._precision():
            return self.structure.generate(
                see(self.structure.flow), [seed], steps=options.sampling(0, RecommendedSampling())[0],
                guidance=Guidance(scale=options.sampling(0, RecommendedSampling())[1]),
                method=options.method, progress=lambda steps: progress("structure", steps),
            )  # fmt: skip

    @torch.no_grad()
    def refine(
        self,
        level: Level,
        see: See,
        seed: int,
        options: GenerationOptions,
        progress: Progress = no_progress,
        *,
        stage: int = 1,
    ) -> CleanedMesh:
        """A stage after the structure: latents, bricks and mesh of given cells of one asset, at 8 x their resolution.

        RunError if there is no cell, no surface, or more cells than options.max_tokens.
        """
        resolution = CELL_SIDE * level.resolution
        if not len(level):
            raise RunError("the structure stage has no cell; try another --seed, or train longer")
        if len(level) > options.max_tokens:
            raise RunError(
                f"{len(level)} cells at R = {resolution} are more than --max-tokens {options.max_tokens}"
            )
        dit = self.dits[resolution]
        with self._precision():
            z_MC = dit.generate(
                level, see(dit), [seed], steps=options.sampling(stage, RecommendedSampling())[0],
                guidance=Guidance(scale=options.sampling(stage, RecommendedSampling())[1]),
                method=options.method, progress=lambda steps: progress(str(resolution), steps),
            )  # fmt: skip
            values = self.vae.decode(z_MC, level)
        ((vertices, faces),) = extract_meshes(level, values)
        if not len(faces):
            raise RunError(
                f"the stage at R = {resolution} has no surface; try another --seed, or train longer"
            )
        return clean(vertices, faces, options.min_piece)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """bf16 products on a GPU; fp32 on the CPU."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            yield


def level_near_mesh(
    mesh: CleanedMesh, resolution: int, device: torch.device | str = "cpu"
) -> Level:
    """The level of the cells near a mesh at a finer resolution, of one asset."""
    xyz = torch.from_numpy(cells_near(mesh.vertices, mesh.faces, resolution).astype(np.int32))
    coords = torch.cat([torch.zeros(len(xyz), 1, dtype=torch.int32), xyz], 1)
    return Level.from_coords(coords[token_order(coords)].to(device), resolution // CELL_SIDE, 1)


def _words(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(sizes)))
