"""Compilation of what turns decoded bricks into a mesh, ahead of the first generation.

`make setup` and the image run it once. numba keeps the code on the disk.
"""

from __future__ import annotations

import torch

from model.inference.extract_mesh import extract_meshes
from model.inference.generator import level_near_mesh
from model.inference.mesh_cleaning import clean_mesh
from model.sparse_tensor import POINTS, Level
from pipeline.core.grid import CELL_SIDE

SIDE = 4  # cells along each axis


def warm_up() -> None:
    """Extract and clean the mesh of a ball, and find the cells near it."""
    cells = torch.cartesian_prod(*[torch.arange(SIDE, dtype=torch.int32)] * 3)
    level = Level.from_coords(torch.nn.functional.pad(cells, (1, 0)), SIDE, 1)
    local = torch.cartesian_prod(*[torch.arange(CELL_SIDE)] * 3)
    points = CELL_SIDE * level.coords[:, None, 1:] + local  # [M, 512, 3] in grid steps
    radii = (points - (CELL_SIDE * SIDE - 1) / 2).norm(dim=-1)
    values = (radii.reshape(-1, POINTS) / CELL_SIDE - 1).clamp(-1, 1)
    ((vertices, faces),) = extract_meshes(level, values)
    level_near_mesh(clean_mesh(vertices, faces), 2 * CELL_SIDE * SIDE)
