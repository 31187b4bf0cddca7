"""`python -m model.generate IMAGE ... -o OUT.glb`: a watertight mesh from a picture of an object."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from model.conditioning.background_removal import load_foreground
from model.config import GenerationOptions
from model.inference.generator import GeneratedMesh, Generator
from model.inference.mesh_cleaning import check_simplification
from model.inference.mesh_export import FORMATS, check_format, write_mesh
from model.inference.turntable import write_preview
from pipeline.core.cli import command, parse
from pipeline.core.errors import RunError, UserError

log = logging.getLogger(__name__)

PROG = "python -m model.generate"


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Generate a mesh for each image of an object. Transparent pixels are background."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]  # picture files
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = (
        None  # file; of several images the folder
    )
    format: Literal["glb", "obj", "ply", "stl"] = "glb"  # of the files, where --out does not say
    checkpoint: Path = Path(
        "runs/export"
    )  # the trained stages, collected by python -m train.export
    seed: int = 0  # the same seed, image and options give the same mesh on the same machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    keep_background: bool = False  # take an image without transparency as it is
    preview: Literal["none", "png", "gif"] = (
        "none"  # views all around, beside the mesh as NAME.preview.png or .gif
    )
    options: Annotated[GenerationOptions, tyro.conf.OmitArgPrefixes] = field(
        default_factory=GenerationOptions
    )

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("images must name at least one file, got none")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")


def targets(cfg: GenerateConfig) -> list[Path]:
    """The mesh file of each image. UserError if --out does not fit the number of images, two files would be one, or one
    would take the place of an image."""
    files = _named(cfg)
    images = {image.resolve() for image in cfg.images}
    for file in files:
        taken = images & {file.resolve(), _preview_of(file, cfg).resolve()}
        if taken:
            raise UserError(
                f"{min(taken)} would be replaced by what is made from it; choose another --out"
            )
    return files


def _check_folder(folder: Path) -> None:
    """UserError unless files can be written there; it is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}); choose another --out"
        ) from error


def _preview_of(file: Path, cfg: GenerateConfig) -> Path:
    return file.with_name(f"{file.stem}.preview.{cfg.preview}")


def _named(cfg: GenerateConfig) -> list[Path]:
    if len(cfg.images) == 1 and cfg.out is not None and cfg.out.suffix and not cfg.out.is_dir():
        if cfg.out.suffix.lower() not in FORMATS:
            raise UserError(f"--out must end in one of {', '.join(FORMATS)}, got {cfg.out}")
        return [check_format(cfg.out)]
    if cfg.out is not None and cfg.out.suffix.lower() in FORMATS and not cfg.out.is_dir():
        raise UserError(f"--out must be a folder for {len(cfg.images)} images, got {cfg.out}")
    folder = cfg.out or Path()
    files = [folder / f"{image.stem}.{cfg.format}" for image in cfg.images]
    twice = {file for file in files if files.count(file) > 1}
    if twice:
        raise UserError(f"two images would both become {min(twice)}; give them different names")
    return files


def generate(cfg: GenerateConfig) -> int:
    """Make every mesh; one that fails costs only itself. Returns how many failed."""
    files = targets(cfg)
    _check_folder(files[0].parent)
    for path in cfg.images:  # before any waiting; not kept, for a folder of photos would not fit
        load_foreground(path, keep_background=cfg.keep_background)
    if cfg.options.faces is not None:
        check_simplification()
    device = choose_device(cfg.device)
    generator = Generator.load(cfg.checkpoint, device, cfg.options.resolution)
    log.info("image encoder: %s; models for R = %s on %s", generator.structure.flow.encoder.label,
             " ".join(map(str, generator.resolutions)), device)  # fmt: skip
    failed = 0
    for path, file in zip(cfg.images, files, strict=True):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            picture = load_foreground(path, keep_background=cfg.keep_background)
            made = generator.generate(
                picture, cfg.seed, cfg.options, whole_if_opaque=cfg.keep_background, progress=_show
            )
            write_mesh(file, made.vertices, made.faces)
            log.info("%s", report(file, made, device))
            if cfg.preview != "none":
                write_preview(_preview_of(file, cfg), made.vertices, made.faces)
                log.info("preview %s", _preview_of(file, cfg))
        except (RunError, UserError, ValueError) as error:
            failed += 1
            log.error("%s: %s", path, error)
    return failed


def report(file: Path, made: GeneratedMesh, device: torch.device) -> str:
    """One line: what was made, what each stage took, the peak of memory."""
    stages = ", ".join(
        f"{stage.name} {stage.seconds:.1f} s ({stage.tokens} cells)" for stage in made.stages
    )
    surface = "closed" if not made.open_edges else f"{made.open_edges} open edges"
    done = made.cleaned
    tidied = (
        f"{done.holes} holes closed, {done.floaters} floaters and {done.bubbles} bubbles removed"
    )
    return f"{file}: {len(made.faces)} faces, {surface}; {stages}; {tidied}; peak memory {peak_memory(device)}"


def peak_memory(device: torch.device) -> str:
    """Of the GPU's tensors for the last image, or of this process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on the GPU"
    return f"{1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9:.2f} GB"


def choose_device(name: str) -> torch.device:
    """auto: a GPU where there is one. UserError if cuda is asked for and is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a CUDA device, none found; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _show(stage: str, steps: Iterable[int]) -> Iterable[int]:
    return tqdm(steps, desc=stage, unit="step", leave=False, disable=not sys.stderr.isatty())


def main(args: Sequence[str]) -> int:
    return min(generate(parse(GenerateConfig, args, prog=PROG)), 1)


if __name__ == "__main__":
    command(main)
