"""Pictures and files of meshes, for looking at while training: no window system, no OpenGL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.primitives.surface_distance import sample_surface

VIEW = np.array(
    [[0.8, 0.0, -0.6], [-0.24, 0.9165, -0.32], [0.5499, 0.4, 0.7332]]
)  # right, up, towards the eye
LIGHT = np.array([0.35, 0.6, 0.72])


def picture(
    vertices: NDArray, faces: NDArray, size: int = 320, view: NDArray = VIEW
) -> NDArray[np.uint8]:
    """[size, size, 3] of a mesh in the cube [-0.5, 0.5]^3, from the front, above and to one side; white if empty.

    `view`: rows right, up and towards the eye; without perspective.
    Some ten points a pixel of the surface, the nearest lit by its normal: what faces away from the eye is tinted.
    """
    image = np.full((size, size, 3), 255, np.uint8)
    if not len(faces):
        return image
    points, normals = sample_surface(vertices, faces, 7 * size * size, seed=0)
    seen = points @ (view / np.linalg.norm(view, axis=1, keepdims=True)).T
    column = np.clip(((seen[:, 0] / 1.5 + 0.5) * size).astype(int), 0, size - 1)
    row = np.clip(((0.5 - seen[:, 1] / 1.5) * size).astype(int), 0, size - 1)
    order = np.argsort(seen[:, 2], kind="stable")  # later ones overwrite: nearest last
    facing = normals @ (view[2] / np.linalg.norm(view[2]))
    shade = 0.25 + 0.75 * np.abs(normals @ (LIGHT / np.linalg.norm(LIGHT)))
    front, back = np.array([205, 210, 220]), np.array([225, 150, 120])
    colors = (np.where(facing[:, None] >= 0, front, back) * shade[:, None]).astype(np.uint8)
    image[row[order], column[order]] = colors[order]
    return image


def side_by_side(rows: Sequence[Sequence[NDArray[np.uint8]]]) -> NDArray[np.uint8]:
    """Rows of images of one size, as one image."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)


def save_image(path: Path, image: NDArray[np.uint8]) -> None:
    Image.fromarray(image).save(path)


def write_ply(path: Path, vertices: NDArray, faces: NDArray) -> None:
    """A binary PLY of a triangle mesh, vertices in float32."""
    header = (
        "ply\nformat binary_little_endian 1.0\n"
        f"element vertex {len(vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    packed = np.empty(len(faces), np.dtype([("count", "u1"), ("corners", "<i4", (3,))]))
    packed["count"], packed["corners"] = 3, faces
    path.write_bytes(header.encode() + vertices.astype("<f4").tobytes() + packed.tobytes())
