"""`python -m model.generate IMAGE ... -o OUT.glb`: a closed mesh of the object in each image.

With `--views A.png B.png ...` it is one mesh of the object that all images show.

Options and images are checked before torch and the models are imported, which takes seconds.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from model.config import GenerationOptions, PrintOptions
from pipeline.core.cli import command, parse
from pipeline.core.devices import Device, check_device, choose_device
from pipeline.core.errors import RunError, UserError
from pipeline.core.memory import peak_memory

if TYPE_CHECKING:
    import torch

    from model.inference.generator import GeneratedMesh

log = logging.getLogger(__name__)

PROG = "python -m model.generate"


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Generate a mesh for each image of an object. Transparent pixels are background."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Image files, each of an object of its own."""

    views: tuple[Path, ...] = ()
    """Image files that show one object from several sides. One mesh is generated from all of them.
    A model that was trained with --facing-views needs views from the same side, within 45 degrees
    of azimuth, and a warning says so if the export records it. A model that was trained with
    several views takes views from all sides, and its mesh faces the camera of the first one."""

    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Mesh file, or the directory of the mesh files. The default is the current directory."""

    checkpoint: str = "runs/export"
    """Directory of the trained stages, which python -m train.export writes, or of the published
    Direct3D-S2 weights. "props" takes the weights of the package, hf://OWNER/NAME/SUBFOLDER
    downloads from the Hugging Face hub."""

    image_encoder: str | None = None
    """DINOv2 weights: a folder or a name on the Hugging Face hub. Without it those that the
    checkpoint names are taken."""

    seed: int = 0
    """Seed of the noise. The same seed, image and options give the same mesh on a machine."""

    device: Device = "auto"
    """Device of the models. "auto" takes a GPU if there is one, "cuda:N" the GPU of number N."""

    low_memory: bool = False
    """Load each stage when it runs and free it afterwards, for every image anew. This needs less
    memory and more time, and gives the same meshes."""

    format: Literal["glb", "obj", "ply", "stl"] = "glb"
    """Format of the mesh files, unless --out names a file."""

    keep_background: bool = False
    """Take all of an image without transparent pixels as the object."""

    preview: Literal["none", "png", "gif"] = "none"
    """Also write views from all sides to NAME.preview.png or NAME.preview.gif beside the mesh."""

    check_print: bool = False
    """Also log whether the mesh can be printed: closed, one piece, thick walls, overhangs."""

    print: PrintOptions = field(default_factory=PrintOptions)

    generation: Annotated[GenerationOptions, tyro.conf.OmitArgPrefixes] = field(
        default_factory=GenerationOptions
    )

    def __post_init__(self) -> None:
        if bool(self.images) == bool(self.views):
            found = "both" if self.images else "neither"
            raise ValueError(
                "images must name at least one file, or --views the views of one object, "
                f"got {found}"
            )
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        check_device(self.device)

    @property
    def objects(self) -> list[tuple[Path, ...]]:
        """The image files of each object, of which one mesh is generated each."""
        return [self.views] if self.views else [(image,) for image in self.images]


def mesh_files(cfg: GenerateConfig) -> list[Path]:
    """Return the mesh file of each object.

    Raises:
        UserError: If --out does not fit the number of objects, if two files would have one name, or
            if a file would replace an image.
    """
    files = _mesh_files(cfg)
    images = {view.resolve() for views in cfg.objects for view in views}
    for file in files:
        replaced = images & {file.resolve(), _preview_file(file, cfg).resolve()}
        if replaced:
            raise UserError(
                f"{min(replaced)} is an image and would be replaced by its mesh or preview; "
                "choose another --out"
            )
    return files


def _mesh_files(cfg: GenerateConfig) -> list[Path]:
    from pipeline.mesh_io.mesh_export import FORMATS

    objects = cfg.objects
    names_a_file = cfg.out is not None and not cfg.out.is_dir()
    if len(objects) == 1 and cfg.out is not None and names_a_file and cfg.out.suffix:
        if cfg.out.suffix.lower() not in FORMATS:
            raise UserError(f"--out must end in one of {', '.join(FORMATS)}, got {cfg.out}")
        return [cfg.out]
    if cfg.out is not None and names_a_file and cfg.out.suffix.lower() in FORMATS:
        raise UserError(f"--out must be a directory for {len(objects)} images, got {cfg.out}")
    folder = cfg.out or Path()
    files = [folder / f"{views[0].stem}.{cfg.format}" for views in objects]
    repeated = {file for file in files if files.count(file) > 1}
    if repeated:
        raise UserError(
            f"two images would both be written to {min(repeated)}; give them different names"
        )
    return files


def _preview_file(mesh_file: Path, cfg: GenerateConfig) -> Path:
    return mesh_file.with_name(f"{mesh_file.stem}.preview.{cfg.preview}")


def _check_writable(folder: Path) -> None:
    """Raise UserError unless files can be written to a directory. It is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}); choose another --out"
        ) from error


def generate(cfg: GenerateConfig) -> int:
    """Generate the mesh of every object. An object that fails does not stop the others.

    Returns:
        Number of objects that failed.

    Raises:
        UserError: If an option or an image cannot be used, or a stage is missing.
    """
    from model.conditioning.background_removal import load_foreground

    files = mesh_files(cfg)
    _check_writable(files[0].parent)
    # Every image is checked before any model is loaded. A directory of photos may not fit into
    # memory, so they are read again later.
    for views in cfg.objects:
        for path in views:
            load_foreground(path, keep_background=cfg.keep_background)
    if cfg.generation.faces is not None:
        from model.inference.mesh_cleaning import check_simplification

        check_simplification()
    if cfg.check_print:
        from model.inference.print_check import check_libraries

        check_libraries()
    device = choose_device(cfg.device)

    import torch

    from model.inference.generator import Generator
    from pipeline.mesh_io.mesh_export import write_mesh

    generator = Generator.load(
        cfg.checkpoint, device, cfg.generation, cfg.image_encoder, low_memory=cfg.low_memory
    )
    log.info(
        "image encoder: %s; models for R = %s on %s",
        generator.structure.flow.encoder.label,
        " ".join(map(str, generator.resolutions)),
        device,
    )
    if generator.views_from_one_side and len(cfg.views) > 1:
        log.warning(
            "%s generates meshes that face the camera, so all --views must be from the same side, "
            "within 45 degrees of azimuth.",
            cfg.checkpoint,
        )
    failed = 0
    for views, file in zip(cfg.objects, files, strict=True):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            mesh = generator.generate(
                [load_foreground(path, keep_background=cfg.keep_background) for path in views],
                cfg.seed,
                cfg.generation,
                whole_if_opaque=cfg.keep_background,
                progress=_progress_bar,
            )
            write_mesh(file, mesh.vertices, mesh.faces)
            log.info("%s", describe(file, mesh, device))
            if cfg.check_print:
                from model.inference.print_check import check_print

                log.info("%s: %s", file, check_print(mesh.vertices, mesh.faces, cfg.print))
            if cfg.preview != "none":
                from model.inference.turntable import write_preview

                write_preview(_preview_file(file, cfg), mesh.vertices, mesh.faces)
                log.info("preview: %s", _preview_file(file, cfg))
        except (RunError, UserError, ValueError) as error:
            failed += 1
            log.error("%s: %s", " ".join(map(str, views)), error)
    return failed


def describe(file: Path, mesh: GeneratedMesh, device: torch.device) -> str:
    """Return the log line of a mesh: its size, the time of each stage, the peak of memory."""
    stages = ", ".join(
        f"{stage.name} {stage.seconds:.1f} s ({stage.tokens} cells)" for stage in mesh.stages
    )
    surface = "closed" if not mesh.open_edges else f"{mesh.open_edges} open edges"
    cleaned = mesh.cleaned
    return (
        f"{file}: {len(mesh.faces)} faces, {surface}; {stages}; {cleaned.holes} holes closed, "
        f"{cleaned.floaters} floaters and {cleaned.bubbles} bubbles removed; "
        f"peak memory {_peak_memory(device)}"
    )


def _peak_memory(device: torch.device) -> str:
    """Return the peak of the GPU's tensors since the last image, or that of the process."""
    if device.type == "cuda":
        import torch

        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on the GPU"
    return f"{peak_memory() / 1e9:.2f} GB"


def _progress_bar(stage: str, steps: Iterable[int]) -> Iterable[int]:
    from tqdm import tqdm

    return tqdm(steps, desc=stage, unit="step", leave=False, disable=not sys.stderr.isatty())


def main(args: Sequence[str]) -> int:
    return min(generate(parse(GenerateConfig, args, prog=PROG)), 1)


if __name__ == "__main__":
    command(main)
