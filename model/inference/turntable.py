"""A mesh seen from all sides: a turning GIF, or a PNG of eight views."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.cameras import look_at_origin
from pipeline.core.schema import Material, Mesh, Part
from pipeline.rendering.views import render_from

CLAY = Material(base_color=(0.30, 0.38, 0.48, 1.0))
PAPER = np.array([238, 241, 245], np.float64)  # behind the mesh
ELEVATION_DEGREES, FOCAL_MM = 20.0, 50.0
FRAMES = 36  # of a GIF
FRAME_MS = 80
VIEWS = (2, 4)  # rows and columns of a PNG


def turntable(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], frames: int, size: int = 320
) -> list[NDArray[np.uint8]]:
    """RGB [size, size, 3] from `frames` sides, the first from azimuth 30 degrees, all from a little above.

    RunError without EGL.
    """
    part = Part(vertices=slice(0, len(vertices)), faces=slice(0, len(faces)), material=CLAY)
    mesh = Mesh(
        vertices=np.asarray(vertices, np.float64), faces=np.asarray(faces, np.int32), parts=(part,)
    )
    eyes = [
        look_at_origin(30 + 360 * n / frames, ELEVATION_DEGREES, FOCAL_MM) for n in range(frames)
    ]
    return [on_paper(rgba) for rgba in render_from(mesh, eyes, size)]


def on_paper(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB of an image with alpha over a light grey."""
    alpha = rgba[..., 3:] / 255
    return (rgba[..., :3] * alpha + PAPER * (1 - alpha)).round().astype(np.uint8)


def write_preview(
    path: Path, vertices: NDArray[np.floating], faces: NDArray[np.integer], size: int = 320
) -> None:
    """Write a GIF that turns once, or a PNG of eight views. ValueError for another ending."""
    kind = path.suffix.lower()
    if kind not in (".gif", ".png"):
        raise ValueError(f"{path} must end in .gif or .png, got {path.suffix or 'no ending'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".gif":
        images = [Image.fromarray(frame) for frame in turntable(vertices, faces, FRAMES, size)]
        images[0].save(path, save_all=True, append_images=images[1:], duration=FRAME_MS, loop=0)
        return
    rows, columns = VIEWS
    views = np.stack(turntable(vertices, faces, rows * columns, size))
    sheet = (
        views.reshape(rows, columns, size, size, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(rows * size, columns * size, 3)
    )
    Image.fromarray(sheet).save(path)
