"""What the page and the HTTP API share: cut-outs of uploads, jobs, and mesh files of results."""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.app.config import AppConfig
from model.app.jobs import JobQueue, JobRequest
from model.conditioning.background_removal import (
    BackgroundKept,
    check_foreground,
    load_foreground,
)
from model.conditioning.cut_out import without_specks
from model.conditioning.image_preprocessing import load_image
from model.config import GenerationOptions
from model.inference.generator import Generator, Progress
from pipeline.core.errors import UserError
from pipeline.mesh_io.mesh_export import FORMATS, write_mesh

PAINTED = 128  # smallest alpha of a painted pixel
# Repairs are painted in these colours, RGB.
REMOVE_COLOR = (220, 38, 38)
RESTORE_COLOR = (22, 163, 74)


@dataclass(frozen=True, eq=False)
class CutOut:
    """An upload and the object that was cut out of it.

    Attributes:
        name: Name of the file.
        picture: The upload, RGBA.
        image: The object on a transparent background, RGBA of the same size.
        problem: Why the models cannot take the image. "" if they can.
        whole: Whether all of the picture is the object.
    """

    name: str
    picture: Image.Image
    image: Image.Image
    problem: str = ""
    whole: bool = False


def parse_steps(text: str) -> tuple[int, ...] | None:
    """Return numbers of steps that are separated by spaces or commas, None for an empty text.

    Raises:
        ValueError: If a word is no number.
    """
    words = text.replace(",", " ").split()
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"steps must be numbers such as 50 30 15, got {text!r}")
    return tuple(map(int, words)) or None


def parse_guidance(text: str) -> float | None:
    """Return a guidance scale, None for an empty text.

    Raises:
        ValueError: If the text is no finite number.
    """
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"guidance must be a number such as 7, got {text!r}")
    return value


class Service:
    """Cut-outs, jobs and mesh files.

    Args:
        config: Options of the server.
        generator: The trained stages.
    """

    def __init__(self, config: AppConfig, generator: Generator):
        self.config = config
        self.generator = generator
        self.queue = JobQueue(
            self._generate,
            generator.stages_of,
            generator.device,
            max_queue=config.max_queue,
            keep=config.keep_results,
        )
        self._folder = Path(tempfile.mkdtemp(prefix="sparse3d-app-"))
        self._writing = threading.Lock()

    def close(self) -> None:
        """Cancel all jobs and remove the mesh files."""
        self.queue.close()
        shutil.rmtree(self._folder)

    def options(self, **values: Any) -> GenerationOptions:
        """Return generation options with those that the server was started with.

        Raises:
            ValueError: If a value is out of range, or there is no model of the resolution.
        """
        options = GenerationOptions(
            precision=self.config.precision, refine=self.config.refine, **values
        )
        self.generator.stages_of(options)
        return options

    def describe(self) -> dict[str, Any]:
        """Return what can be asked for, as JSON values: resolutions, defaults and limits."""
        defaults = self.generator.describe_sampling(self.options())
        return {
            "resolutions": self.generator.resolutions,
            "stages": self.generator.stages_of(self.options()),
            "steps": defaults["steps"],
            "guidance": defaults["guidance"],
            "facing_views": bool(self.generator.facing_views),
            "views_from_one_side": self.generator.views_from_one_side,
            "device": str(self.generator.device),
            "formats": [name[1:] for name in FORMATS],
            "max_upload_bytes": self.config.max_upload_bytes,
            "max_pixels": self.config.max_pixels,
            "max_images": self.max_images,
        }

    @property
    def max_images(self) -> int:
        """Largest number of images of one object that the server and the models take."""
        return min(self.config.max_images, self.generator.max_views or self.config.max_images)

    def check_count(self, count: int) -> None:
        """Raise UserError unless so many images of one object are accepted."""
        if not 1 <= count <= self.max_images:
            raise UserError(
                f"there must be 1 to {self.max_images} images of one object, got {count}"
            )

    def cut_out(self, path: Path, name: str, *, keep_background: bool) -> CutOut:
        """Cut the object out of an uploaded image.

        An image whose background cannot be removed here is returned with the problem, so that the
        cut-out can be repaired by hand.

        Args:
            path: The uploaded file.
            name: The name that it had.
            keep_background: Take all of the picture as the object.

        Raises:
            UserError: If the file is no image that can be read, is too large, or is empty.
        """
        limit = self.config.max_pixels
        try:
            picture = load_image(path, name=name, max_pixels=limit)
        except ValueError as error:
            raise UserError(str(error)) from error
        try:
            image = load_foreground(
                path, keep_background=keep_background, name=name, max_pixels=limit
            )
        except BackgroundKept:
            problem = (
                f"The background of {name} was not removed: it is not clearly transparent, and the "
                "server does not have the package rembg. Repair the cut-out, or keep the "
                "background if the object fills the picture."
            )
            return CutOut(name, picture, picture, problem)
        return CutOut(name, picture, image, whole=keep_background)

    def repair(self, cut_out: CutOut, strokes: Sequence[Image.Image]) -> CutOut:
        """Remove and restore the painted parts of a cut-out.

        Args:
            cut_out: The cut-out.
            strokes: RGBA layers with what was painted, of any size. A pixel nearer to REMOVE_COLOR
                becomes transparent, one nearer to RESTORE_COLOR gets the pixel of the upload.

        Raises:
            UserError: If no usable foreground is left.
        """
        result = np.array(cut_out.image)
        original = np.asarray(cut_out.picture)
        for layer in strokes:
            resized = layer.convert("RGBA").resize(cut_out.image.size, Image.Resampling.NEAREST)
            pixels = np.asarray(resized).astype(np.int32)
            remove, restore = (
                ((pixels[..., :3] - color) ** 2).sum(-1) for color in (REMOVE_COLOR, RESTORE_COLOR)
            )
            painted = pixels[..., 3] >= PAINTED
            result[painted & (remove <= restore), 3] = 0
            restored = painted & (restore < remove)
            result[restored, :3] = original[restored, :3]
            result[restored, 3] = 255
        image = without_specks(Image.fromarray(result))
        return CutOut(cut_out.name, cut_out.picture, check_foreground(cut_out.name, image))

    def mesh_file(self, job_id: str, format: str) -> Path:
        """Return the mesh file of a job that is done. It is written on first use.

        Args:
            job_id: The job.
            format: "glb", "obj", "ply" or "stl".

        Raises:
            KeyError: If there is no such job.
            UserError: If the job has no mesh, or the format is another one.
        """
        if f".{format}" not in FORMATS:
            raise UserError(f"the format must be one of {', '.join(FORMATS)}, got {format}")
        mesh = self.queue.get(job_id).mesh
        if mesh is None:
            raise UserError(f"the job is {self.queue.status(job_id).state} and has no mesh")
        path = self._folder / job_id / f"mesh.{format}"
        with self._writing:
            self._remove_forgotten()
            if not path.exists():
                write_mesh(path, mesh.vertices, mesh.faces)
        return path

    def describe_mesh(self, job_id: str) -> dict[str, Any]:
        """Return the sizes and times of the mesh of a job that is done, as JSON values."""
        mesh = self.queue.get(job_id).mesh
        assert mesh is not None
        return {
            "vertices": len(mesh.vertices),
            "faces": len(mesh.faces),
            "closed": mesh.open_edges == 0,
            "holes_closed": mesh.cleaned.holes,
            "floaters_removed": mesh.cleaned.floaters,
            "bubbles_removed": mesh.cleaned.bubbles,
            "stages": [asdict(stage) for stage in mesh.stages],
        }

    def _remove_forgotten(self) -> None:
        """Remove the mesh files of jobs that the queue has forgotten."""
        for folder in self._folder.iterdir():
            try:
                self.queue.get(folder.name)
            except KeyError:
                shutil.rmtree(folder)

    def _generate(self, request: JobRequest, progress: Progress) -> Any:
        return self.generator.generate(
            request.images,
            request.seed,
            request.options,
            whole_if_opaque=request.whole_if_opaque,
            progress=progress,
        )
