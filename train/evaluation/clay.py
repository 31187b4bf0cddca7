"""Surfaces as meshes of one plain material, for pictures and silhouettes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.inference.turntable import CLAY, over_background
from pipeline.core.cameras import Camera
from pipeline.core.primitives.marching_cubes import MeshArrays
from pipeline.core.schema import Mesh, Part
from pipeline.rendering.views import render_from

PICTURE_SIDE = 256  # pixels


def clay_mesh(surface: MeshArrays) -> Mesh:
    """Return a surface as a mesh of one material."""
    vertices, faces = surface
    part = Part(vertices=slice(0, len(vertices)), faces=slice(0, len(faces)), material=CLAY)
    return Mesh(vertices=vertices, faces=faces, parts=(part,))


def draw(surface: MeshArrays, camera: Camera) -> NDArray[np.uint8]:
    """Render a surface as clay on grey.

    Args:
        surface: Vertices and faces.
        camera: Where it is seen from.

    Returns:
        RGB, uint8 [PICTURE_SIDE, PICTURE_SIDE, 3].

    Raises:
        RunError: If there is no OpenGL with EGL.
    """
    (rgba,) = render_from(clay_mesh(surface), [camera], PICTURE_SIDE)
    return over_background(rgba)


def shown(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a stored render on grey at the size of the pictures, scaled to the nearest pixel."""
    rows, columns = (np.arange(PICTURE_SIDE) * side // PICTURE_SIDE for side in rgba.shape[:2])
    return over_background(rgba[rows][:, columns])
