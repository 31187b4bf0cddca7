"""Pictures of meshes drawn with NumPy alone, and files of meshes, for previews during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.core.primitives.surface_distance import sample_surface

# Axes of the default view: right, up, towards the eye. It looks from the front, above and one side.
VIEW = np.array([[0.8, 0.0, -0.6], [-0.24, 0.9165, -0.32], [0.5499, 0.4, 0.7332]])
LIGHT = np.array([0.35, 0.6, 0.72])
FRONT_COLOR = np.array([205, 210, 220])
BACK_COLOR = np.array([225, 150, 120])
VISIBLE_SIDE = 1.5  # length of the picture's side in units of the cube's side
POINTS_PER_PIXEL = 7
LABEL_HEIGHT = 20  # pixels


def picture(
    vertices: NDArray, faces: NDArray, size: int = 320, view: NDArray = VIEW
) -> NDArray[np.uint8]:
    """Draw a mesh in the cube [-0.5, 0.5]^3 without perspective.

    The surface is sampled, and each pixel shows the sample nearest to the eye, lit by its normal.
    Surfaces that face away from the eye are tinted.

    Args:
        vertices: Float [V, 3].
        faces: Integer [F, 3].
        size: Pixels per side.
        view: Float [3, 3] with the directions right, up and towards the eye as rows.

    Returns:
        RGB, uint8 [size, size, 3]. White if the mesh is empty.
    """
    image = np.full((size, size, 3), 255, np.uint8)
    if not len(faces):
        return image
    points, normals, _ = sample_surface(vertices, faces, POINTS_PER_PIXEL * size * size, seed=0)
    # Project the samples to pixels.
    seen = points @ (view / np.linalg.norm(view, axis=1, keepdims=True)).T
    column = np.clip(((seen[:, 0] / VISIBLE_SIDE + 0.5) * size).astype(int), 0, size - 1)
    row = np.clip(((0.5 - seen[:, 1] / VISIBLE_SIDE) * size).astype(int), 0, size - 1)
    # Shade them, and draw the nearest ones last.
    facing = normals @ (view[2] / np.linalg.norm(view[2]))
    shade = 0.25 + 0.75 * np.abs(normals @ (LIGHT / np.linalg.norm(LIGHT)))
    base = np.where(facing[:, None] >= 0, FRONT_COLOR, BACK_COLOR)
    colors = (base * shade[:, None]).astype(np.uint8)
    order = np.argsort(seen[:, 2], kind="stable")
    image[row[order], column[order]] = colors[order]
    return image


def side_by_side(
    rows: Sequence[Sequence[NDArray[np.uint8]]], labels: Sequence[str] = ()
) -> NDArray[np.uint8]:
    """Join rows of images of one size to one image.

    Args:
        rows: RGB images, uint8 [H, W, 3], the same number in each row.
        labels: Titles of the columns. Without any there is no title bar.

    Returns:
        RGB, uint8. A title bar adds LABEL_HEIGHT pixels at the top.
    """
    image = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    if not labels:
        return image
    bar = Image.new("RGB", (image.shape[1], LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(bar)
    width = rows[0][0].shape[1]
    for column, label in enumerate(labels):
        draw.text((column * width + 4, 4), label, fill="black")
    return np.concatenate([np.asarray(bar), image], axis=0)


def save_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an RGB or RGBA image, uint8 [H, W, C], in the format of the file's suffix."""
    Image.fromarray(image).save(path)


def write_ply(path: Path, vertices: NDArray, faces: NDArray) -> None:
    """Write a triangle mesh as binary PLY.

    Args:
        path: The file.
        vertices: Float [V, 3], written as float32.
        faces: Integer [F, 3], written as int32.
    """
    header = (
        "ply\nformat binary_little_endian 1.0\n"
        f"element vertex {len(vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    packed = np.empty(len(faces), np.dtype([("count", "u1"), ("corners", "<i4", (3,))]))
    packed["count"] = 3
    packed["corners"] = faces
    path.write_bytes(header.encode() + vertices.astype("<f4").tobytes() + packed.tobytes())
