"""Previews of a mesh from all sides: an animated GIF, or a PNG of eight views."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.cameras import look_at_origin
from pipeline.core.schema import Material, Mesh, Part
from pipeline.mesh_io.mesh_export import BASE_COLOR
from pipeline.rendering.views import render_from

CLAY = Material(base_color=(*BASE_COLOR, 1.0))
BACKGROUND = np.array([238, 241, 245], np.float64)  # sRGB
FIRST_AZIMUTH_DEGREES = 30.0
ELEVATION_DEGREES = 20.0
FOCAL_MM = 50.0
GIF_FRAMES = 36
GIF_FRAME_MS = 80
PNG_ROWS = 2
PNG_COLUMNS = 4


def turntable(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], frames: int, size: int = 320
) -> list[NDArray[np.uint8]]:
    """Render a mesh from cameras on a circle around it.

    Args:
        vertices: [V, 3] in the cube [-0.5, 0.5]^3, y up.
        faces: [F, 3].
        frames: Number of cameras.
        size: Pixels along one side of an image.

    Returns:
        RGB images uint8 [size, size, 3].

    Raises:
        RunError: If EGL is missing.
    """
    part = Part(vertices=slice(0, len(vertices)), faces=slice(0, len(faces)), material=CLAY)
    mesh = Mesh(
        vertices=np.asarray(vertices, np.float64), faces=np.asarray(faces, np.int32), parts=(part,)
    )
    cameras = [
        look_at_origin(FIRST_AZIMUTH_DEGREES + 360 * n / frames, ELEVATION_DEGREES, FOCAL_MM)
        for n in range(frames)
    ]
    return [over_background(rgba) for rgba in render_from(mesh, cameras, size)]


def over_background(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Composite an RGBA image [h, w, 4] over light grey and return RGB uint8 [h, w, 3]."""
    alpha = rgba[..., 3:] / 255
    return (rgba[..., :3] * alpha + BACKGROUND * (1 - alpha)).round().astype(np.uint8)


def write_preview(
    path: Path, vertices: NDArray[np.floating], faces: NDArray[np.integer], size: int = 320
) -> None:
    """Write a GIF that turns once, or a PNG of eight views.

    Args:
        path: The file. Its ending chooses the format, and its parent directories are created.
        vertices: [V, 3] in the cube [-0.5, 0.5]^3, y up.
        faces: [F, 3].
        size: Pixels along one side of a view.

    Raises:
        ValueError: If `path` ends in neither .gif nor .png.
        RunError: If EGL is missing.
    """
    kind = path.suffix.lower()
    if kind not in (".gif", ".png"):
        raise ValueError(f"{path} must end in .gif or .png, got {path.suffix or 'no ending'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".gif":
        frames = [Image.fromarray(view) for view in turntable(vertices, faces, GIF_FRAMES, size)]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=GIF_FRAME_MS, loop=0)
        return
    views = np.stack(turntable(vertices, faces, PNG_ROWS * PNG_COLUMNS, size))
    sheet = (
        views.reshape(PNG_ROWS, PNG_COLUMNS, size, size, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(PNG_ROWS * size, PNG_COLUMNS * size, 3)
    )
    Image.fromarray(sheet).save(path)
