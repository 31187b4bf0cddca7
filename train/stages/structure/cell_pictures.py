"""Pictures of occupied cells for previews."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from train.engine.mesh_pictures import picture

PICTURE_SIDE = 192  # pixels


def draw_cells(occupied: Tensor) -> NDArray[np.uint8]:
    """Draw occupied cells as cubes.

    Args:
        occupied: bool [S, S, S].

    Returns:
        RGB, uint8 [PICTURE_SIDE, PICTURE_SIDE, 3].
    """
    return picture(*cube_surface(occupied.cpu().numpy()), size=PICTURE_SIDE)


def cube_surface(occupied: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Return the faces between occupied and empty cells.

    Args:
        occupied: bool [S, S, S]. The grid fills the cube [-0.5, 0.5]^3.

    Returns:
        Vertices, float64 [V, 3], and triangles, int32 [F, 3], which face the empty cells.
    """
    padded = np.pad(occupied, 1)
    squares = []
    for axis in range(3):
        u, v = (np.eye(3)[(axis + n) % 3] for n in (1, 2))
        # Squares on the far side of cells, then on the near side, where the order is reversed.
        for step, order in ((1, (0, 1, 2, 3)), (-1, (3, 2, 1, 0))):
            has_face = occupied & ~np.roll(padded, -step, axis)[1:-1, 1:-1, 1:-1]
            base = np.argwhere(has_face) + (np.eye(3)[axis] if step == 1 else 0)
            square = np.stack([base, base + u, base + u + v, base + v], axis=1)
            squares.append(square[:, order])
    corners = np.concatenate(squares)
    first = 4 * np.arange(len(corners))[:, None]
    triangles = [first + np.array(corner) for corner in ((0, 1, 2), (0, 2, 3))]
    vertices = corners.reshape(-1, 3) / len(occupied) - 0.5
    return vertices, np.concatenate(triangles).astype(np.int32)


def resize(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Scale an RGB image to PICTURE_SIDE pixels per side by the nearest pixel."""
    rows, columns = (np.arange(PICTURE_SIDE) * side // PICTURE_SIDE for side in image.shape[:2])
    return image[rows][:, columns]
